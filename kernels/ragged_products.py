"""gmm, tgmm and expert_ffn for GPUs: products by `jax.lax.ragged_dot`, which XLA gives to cuDNN.

"tokamax" takes its products from that package's `ragged_dot` instead, which has kernels of its own
for some GPUs. The contract stands on top of either: rows before the first local group are rolled
away and back, rows of no group are zero whatever they hold, empty groups and any shape are fine.

Sums over a group's rows (tgmm, the gradients of matrices) are not left to it: with groups that are
not aligned cuDNN's were seen to be wrong (marin-community/marin issues 8339 and 8793). They are
ordinary matmuls over tiles of rows, as on CPU but larger.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import accumulator
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.options import ACTIVATIONS, FFNOptions, ProductOptions
from taskmoe.kernels.row_tiles import SYMBOLIC_ROWS, Tiles
from taskmoe.kernels.tiled_products import tgmm_in_tiles


def gmm(options: ProductOptions, lhs: jax.Array, rhs: jax.Array, groups: Groups) -> jax.Array:
    """`gmm`: [M, N]."""
    num_rows = lhs.shape[0]
    starts, ends = group_bounds(groups, options.num_groups, num_rows)
    if options.shifted:  # ragged_dot's first group begins with the first row
        lhs = jnp.roll(lhs, -starts[0], axis=0)
    out = _dot(options.implementation == "tokamax", options.transpose_rhs)(lhs, rhs, ends - starts)
    if options.shifted:
        out = jnp.roll(out, starts[0], axis=0)
    row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    return jnp.where((row >= starts[0]) & (row < ends[-1]), out, 0).astype(options.out_dtype)


@functools.cache
def _dot(by_tokamax: bool, transposed: bool) -> Callable[..., jax.Array]:
    """Rows [M, K] times matrices [E, K, N], or [E, N, K]: [M, N] of the accumulator's dtype."""
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )

    @jax.custom_batching.sequential_vmap  # neither has batches in all that may be batched
    def dot(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        product = jax.lax.ragged_dot_general
        if by_tokamax:
            product = importlib.import_module("tokamax").ragged_dot_general
        return product(lhs, rhs, sizes, dims, preferred_element_type=accumulator(lhs.dtype))

    return dot


def tgmm(options: ProductOptions, lhs: jax.Array, grad: jax.Array, groups: Groups) -> jax.Array:
    """`tgmm`: [E, K, N]."""
    return tgmm_in_tiles(options, lhs, grad, groups, _tiles(lhs.shape[0], options.num_groups))


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
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None,
    groups: Groups,
) -> tuple[jax.Array, list[jax.Array]]:
    """`expert_ffn` [M, D], and what comes before the activation: x W_in and x W_gate [M, F]."""
    acc = accumulator(x.dtype)
    kept = [
        gmm(_product(options, w_in, acc), x, w, groups) for w in (w_in, w_gate) if w is not None
    ]
    hidden = _activate(options, *kept).astype(x.dtype)
    return gmm(_product(options, w_out, x.dtype), hidden, w_out, groups), kept


def expert_ffn_backward(
    options: FFNOptions,
    x: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None,
    groups: Groups,
    kept: list[jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of x, w_in, w_out and w_gate."""
    acc = accumulator(x.dtype)

    def back(rows: jax.Array, w: jax.Array) -> jax.Array:
        return gmm(_product(options, w, acc, transpose_rhs=True), rows, w, groups)

    def total(rows: jax.Array, rows_grad: jax.Array, w: jax.Array) -> jax.Array:
        return tgmm(_product(options, w, w.dtype), rows, rows_grad, groups)

    hidden, pull = jax.vjp(lambda *kept: _activate(options, *kept), *kept)
    d_kept = [d.astype(x.dtype) for d in pull(back(grad, w_out))]
    into = [w for w in (w_in, w_gate) if w is not None]
    d_x = sum(back(d, w) for d, w in zip(d_kept, into, strict=True))
    d_in, *d_gate = (total(x, d, w) for d, w in zip(d_kept, into, strict=True))
    d_out = total(hidden.astype(x.dtype), grad, w_out)
    return jnp.asarray(d_x).astype(x.dtype), d_in, d_out, d_gate[0] if d_gate else None


def _activate(options: FFNOptions, up: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    act = ACTIVATIONS[options.activation]
    return act(up) if gate is None else act(gate) * up


def _product(
    options: FFNOptions, w: jax.Array, out_dtype: Any, transpose_rhs: bool = False
) -> ProductOptions:
    of = (out_dtype, w.shape[0], options.shifted, options.implementation, transpose_rhs)
    return ProductOptions(*of)
