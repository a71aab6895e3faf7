"""gmm, tgmm and expert_ffn for GPUs.

    "mosaic_gpu"  Pallas kernels for Hopper, see `hopper_products`
    "ragged_dot"  `jax.lax.ragged_dot`; XLA gives it to cuDNN from 9.22 on, and multiplies all rows
                  with all matrices where that is older
    "tokamax"     that package's `ragged_dot`, which has kernels of its own for some GPUs

Without a choice it is "mosaic_gpu" where that fits, else "ragged_dot". The kernels keep the
contract of `gmm` and `tgmm` by themselves. Around the others' products it is kept here: rows before
the first local group are rolled away and back, and rows of no group are zero whatever they hold.

Sums over a group's rows (tgmm, the gradients of matrices) are left to "mosaic_gpu" alone: cuDNN's
were seen to be wrong where groups are not aligned (marin-community/marin issues 8339 and 8793), and
tokamax's were 2% to 4% off on an H100, beyond the rounding of bfloat16. Elsewhere they are ordinary
matmuls over tiles of rows, as on CPU but larger.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels import hopper_products
from taskmoe.kernels.checks import accumulator
from taskmoe.kernels.groups import Groups, group_bounds, of_each_row, sum_of_each_group
from taskmoe.kernels.options import Experts, FFNOptions, ProductOptions, hidden_units
from taskmoe.kernels.platforms import lowered_for
from taskmoe.kernels.quantized import both_dense
from taskmoe.kernels.row_tiles import SYMBOLIC_ROWS, Tiles
from taskmoe.kernels.tiled_products import tgmm_in_tiles


def gmm(options: ProductOptions, lhs: Any, rhs: Any, groups: Groups) -> jax.Array:
    """`gmm`: [M, N]. `Quantized` matrices are converted first: these products take none."""
    lhs, rhs = both_dense(lhs, rhs)
    num_rows = lhs.shape[0]
    starts, ends = group_bounds(groups, options.num_groups, num_rows)
    by = _choose(options, "gmm", lhs, *rhs.shape[1:])
    if by == "mosaic_gpu":
        return _hopper_gmm(options.transpose_rhs)(lhs, rhs, starts, ends)
    if options.shifted:  # the products' first group begins with the first row
        lhs = jnp.roll(lhs, -starts[0], axis=0)
    out = _dot(by, options.transpose_rhs)(lhs, rhs, ends - starts)
    if options.shifted:
        out = jnp.roll(out, starts[0], axis=0)
    own = _of_groups(num_rows, starts, ends)
    return jnp.where(own, out, 0).astype(options.out_dtype)


def _choose(options: ProductOptions, op: str, rows: jax.Array, *widths: Any) -> str:
    """Whose product it is; ValueError where the caller's choice does not fit."""
    if options.implementation not in (None, "mosaic_gpu"):
        return options.implementation
    unfit = hopper_products.unfit(rows, options.out_dtype, *widths)
    if options.implementation is None:
        fit = lowered_for.get() == "cuda" and hopper_products.is_present() and not unfit
        return "mosaic_gpu" if fit else "ragged_dot"
    if unfit:
        raise ValueError(f"implementation='mosaic_gpu' of {op} {unfit}: use None or 'ragged_dot'")
    return "mosaic_gpu"


def _of_groups(num_rows: Any, starts: jax.Array, ends: jax.Array) -> jax.Array:
    """[M, 1] bool: rows of local groups."""
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    return (row >= starts[0]) & (row < ends[-1])


@functools.cache
def _hopper_gmm(transposed: bool) -> Callable[..., jax.Array]:
    """`gmm` of rows, matrices, and the bounds of groups."""
    run = functools.partial(hopper_products.rows_times_matrices, transposed=transposed)
    return jax.custom_batching.sequential_vmap(run)


@functools.cache
def _dot(by: str, transposed: bool) -> Callable[..., jax.Array]:
    """Rows [M, K] times matrices [E, K, N], or [E, N, K]: [M, N]."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )

    @jax.custom_batching.sequential_vmap  # none has batches in all that may be batched
    def dot(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        product = jax.lax.ragged_dot_general
        if by == "tokamax":
            product = importlib.import_module("tokamax").ragged_dot_general
        return product(lhs, rhs, sizes, dims, preferred_element_type=accumulator(lhs.dtype))

    return dot


def tgmm(options: ProductOptions, lhs: jax.Array, grad: jax.Array, groups: Groups) -> jax.Array:
    """`tgmm`: [E, K, N]."""
    num_rows = lhs.shape[0]
    if _choose(options, "tgmm", lhs, lhs.shape[1], grad.shape[1]) != "mosaic_gpu":
        return tgmm_in_tiles(options, lhs, grad, groups, _tiles(num_rows, options.num_groups))
    starts, ends = group_bounds(groups, options.num_groups, num_rows)
    return _hopper_tgmm(lhs, grad, starts, ends)


_hopper_tgmm = jax.custom_batching.sequential_vmap(hopper_products.sums_of_groups)


def _tiles(num_rows: Any, num_groups: int) -> Tiles:
    """Tiles of about the mean group, 64 to 1024 rows: few launches, few rows that are masked."""
    if not isinstance(num_rows, int):
        return Tiles(SYMBOLIC_ROWS)
    rows = 64
    while rows < min(num_rows // num_groups, 1024):
        rows *= 2
    return Tiles(min(rows, num_rows))


def expert_ffn(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
) -> tuple[jax.Array, list[jax.Array]]:
    """`expert_ffn` [M, D], and what comes before the activation: x W_in and x W_gate [M, F]."""

    def times(rows: jax.Array, w: jax.Array, bias: jax.Array | None) -> jax.Array:
        out = gmm(_product(options, w, rows.dtype), rows, w, groups)
        return out if bias is None else out + of_each_row(bias, groups, x.shape[0])

    kept = [times(x, *into) for into in experts.into()]
    return times(_activate(options, *kept), experts.w_out, experts.b_out), kept


def expert_ffn_backward(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
    kept: list[jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, Experts]:
    """Gradients of x and of the experts."""
    acc, w_out = accumulator(x.dtype), experts.w_out

    def back(rows: jax.Array, w: jax.Array) -> jax.Array:
        return gmm(_product(options, w, rows.dtype, transpose_rhs=True), rows, w, groups)

    def total(rows: jax.Array, rows_grad: jax.Array, w: jax.Array) -> jax.Array:
        return tgmm(_product(options, w, rows.dtype), rows, rows_grad, groups)

    hidden, pull = jax.vjp(lambda *kept: _activate(options, *kept), *kept)
    d_kept = pull(back(grad, w_out))
    into = [w for w, _ in experts.into()]
    d_x = sum(back(d, w).astype(acc) for d, w in zip(d_kept, into, strict=True))
    d_in, *d_gate = (total(x, d, w) for d, w in zip(d_kept, into, strict=True))
    found = Experts(d_in, total(hidden, grad, w_out), *d_gate)
    rows = {"b_in": d_kept[0], "b_out": grad, "b_gate": d_kept[-1]}
    for name, of in rows.items():
        if (bias := getattr(experts, name)) is not None:
            sums = sum_of_each_group(of, groups, bias.shape[0]).astype(bias.dtype)
            found = found._replace(**{name: sums})
    return jnp.asarray(d_x).astype(x.dtype), found


def _activate(options: FFNOptions, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    wide = [z.astype(accumulator(up.dtype)) for z in (up, gate) if z is not None]
    return hidden_units(options.activation, *wide).astype(up.dtype)


def _product(
    options: FFNOptions, w: Any, dtype: Any, transpose_rhs: bool = False
) -> ProductOptions:
    of = (dtype, w.shape[0], options.shifted, options.implementation, transpose_rhs)
    return ProductOptions(*of)
