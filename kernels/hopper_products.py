"""Products of groups of rows on NVIDIA Hopper: what fits the kernels, and in which blocks."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels.platforms import with_kernel_settings

#: Older versions do not lower the kernels.
OLDEST_JAX = (0, 10, 2)
#: Widths are multiples of this.
UNIT = 64
#: Of fewer rows a group on average, matrices are most of what is loaded: blocks are low and wide.
FEW_ROWS = 64


def unfit(rows: jax.Array, out_dtype: Any, *widths: Any) -> str | None:
    """Why rows [M, K] and matrices of these widths do not fit the kernels; None where they do."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"wants JAX {'.'.join(map(str, OLDEST_JAX))} or newer, got {jax.__version__}"
    for name in (jnp.dtype(rows.dtype).name, jnp.dtype(out_dtype).name):
        if name != "bfloat16":
            return f"takes and gives bfloat16, got {name}"
    if not all(isinstance(width, int) and width % UNIT == 0 for width in widths):
        return f"takes widths that are multiples of {UNIT}, got {' and '.join(map(str, widths))}"
    if not isinstance(rows.shape[0], int):
        return f"takes a fixed number of rows, got {rows.shape[0]}"
    return None


def is_present() -> bool:
    """Whether the process's default devices are Hopper GPUs."""
    device: Any = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


@with_kernel_settings
def rows_times_matrices(
    rows: jax.Array, matrices: jax.Array, starts: jax.Array, ends: jax.Array, transposed: bool
) -> jax.Array:
    """[M, K] and [E, K, N], or [E, N, K], to [M, N]; zeros in rows of no group.

    starts, ends: [E] i32, ascending, at most M; a group begins where the one before it ends.
    """
    num_groups, width = matrices.shape[0], matrices.shape[1 if transposed else 2]
    if 0 in (*rows.shape, width):
        return jnp.zeros((rows.shape[0], width), rows.dtype)
    kernels = _kernels()
    if rows.shape[0] < FEW_ROWS * num_groups and width % 128 == 0:
        blocks = kernels.Blocks(128 if width % 256 == 0 else 64, beside=True)
    else:
        blocks = kernels.Blocks(_columns(width))
    return kernels.rows_times_matrices(blocks, rows, matrices, starts, ends, transposed)


@with_kernel_settings
def sums_of_groups(
    lhs: jax.Array, grad: jax.Array, starts: jax.Array, ends: jax.Array
) -> jax.Array:
    """[M, K] and [M, N] to [E, K, N], whatever rows of other groups hold; bounds as above."""
    depth, width = lhs.shape[1], grad.shape[1]
    if 0 in (*lhs.shape, width):
        return jnp.zeros((starts.shape[0], depth, width), lhs.dtype)
    kernels = _kernels()
    blocks = kernels.Blocks(_columns(width))
    lhs = jnp.pad(lhs, ((0, 0), (0, -depth % blocks.block[0])))
    return kernels.sums_of_groups(blocks, lhs, grad, starts, ends)[:, :depth]


def _columns(width: int) -> int:
    """Columns of a block: as many as registers hold, and divide the width."""
    return next(columns for columns in (256, 192, 128, 64) if width % columns == 0)


def _kernels() -> Any:
    """`hopper_kernels`: Pallas for GPUs is not loaded where it is not used, and wants a package."""
    try:
        return importlib.import_module("taskmoe.kernels.hopper_kernels")
    except ModuleNotFoundError as error:
        if error.name != "absl":
            raise
        raise ModuleNotFoundError(
            "products on Hopper GPUs need the package absl-py: pip install 'taskmoe[gpu]', or "
            "choose implementation='ragged_dot'"
        ) from error
