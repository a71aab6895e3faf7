"""Products of groups of rows on NVIDIA Hopper, by the Pallas kernels that come with JAX.

`jax.experimental.pallas.ops.gpu` holds a grouped matmul and its counterpart for gradients of
matrices, both made of the tensor cores' asynchronous products. They leave rows of no group as the
memory was, and sum over whole blocks of rows with what lies outside a group times zero; the
contract of `gmm` and `tgmm` is kept by masks around them. They take whole swizzled tiles of rows:
others are padded.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

#: Depth of the blocks that the kernels multiply, in elements: 128 bytes, a swizzled line.
BLOCK_K = 64
#: Rows of a swizzled tile.
TILE_ROWS = 8


def unfit(dtype: Any, out_dtype: Any, *widths: Any) -> str | None:
    """Why matrices of these widths and dtypes do not fit the kernels; None where they do."""
    for name in (jnp.dtype(dtype).name, jnp.dtype(out_dtype).name):
        if name != "bfloat16":
            return f"takes and gives bfloat16, got {name}"
    if not all(isinstance(width, int) and width % BLOCK_K == 0 for width in widths):
        return f"takes widths that are multiples of {BLOCK_K}, got {' and '.join(map(str, widths))}"
    return None


def is_present() -> bool:
    """Whether the process's default devices are Hopper GPUs."""
    device: Any = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", "") == "9.0"


def rows_times_matrices(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array, transposed: bool
) -> jax.Array:
    """[M, K] and [E, K, N], or [E, N, K], to [M, N]; what rows of no group get is undefined."""
    width = matrices.shape[1 if transposed else 2]
    kernels = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    blocks = _blocks(rows.shape[0], sizes.shape[0], width)
    more = {"group_sizes": sizes, "transpose_rhs": transposed, "block_k": BLOCK_K, **blocks}
    return kernels.ragged_dot(_in_tiles(rows), matrices, **more)[: rows.shape[0]]


def sums_of_groups(lhs: jax.Array, grad: jax.Array, sizes: jax.Array) -> jax.Array:
    """[M, K] and [M, N] to [E, K, N], with finite rows only."""
    kernels = importlib.import_module("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu")
    blocks = _blocks(lhs.shape[1], 1, grad.shape[1])
    lhs, grad = _in_tiles(lhs), _in_tiles(grad)
    return kernels.transposed_ragged_dot(lhs, grad, group_sizes=sizes, block_k=BLOCK_K, **blocks)


def _in_tiles(rows: jax.Array) -> jax.Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % TILE_ROWS), (0, 0)))


def _blocks(height: int, num_groups: int, width: int) -> dict[str, int]:
    """Blocks of the result, found by timing on an H100 at the sizes of real models."""
    block_m = 128 if height % 128 == 0 and height >= 128 * num_groups else 64
    block_n = next(n for n in (128, 192, 64) if width % n == 0)
    columns = width // block_n
    return {
        "block_m": block_m,
        "block_n": block_n,
        "max_concurrent_steps": 4,
        "grid_block_n": next(n for n in (4, 2, 1) if columns % n == 0),
    }
