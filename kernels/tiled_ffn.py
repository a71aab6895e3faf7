"""expert_ffn in tiles of rows by ordinary matmuls, forward and backward: the twin for CPU.

What comes before the activation, [M, F] in f32, is kept for the backward pass: on CPU that is
cheaper than the product.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels import row_tiles
from taskmoe.kernels.checks import accumulator
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.options import Experts, FFNOptions, hidden_units
from taskmoe.kernels.quantized import dense
from taskmoe.kernels.row_tiles import Tile, choose_tiles


def _dot(a: jax.Array, b: jax.Array, left: int = 1, right: int = 0) -> jax.Array:
    dims: Any = (((left,), (right,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=accumulator(a.dtype))


def _biased(product: jax.Array, bias: jax.Array | None, group: jax.Array) -> jax.Array:
    """Product [m, N] plus the group's bias of [E, N]."""
    return product if bias is None else product + row_tiles.pick(bias, group)


def _total(rows: jax.Array) -> jax.Array:
    """Sum of rows [m, N], [N]."""
    return jnp.sum(rows, axis=0, dtype=accumulator(rows.dtype))


def expert_ffn_xla(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
) -> jax.Array:
    """`expert_ffn` [M, D], where nothing is differentiated."""
    return _forward(options, x, experts, groups, keep=False)[0]


def expert_ffn_keeping_xla(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
) -> tuple[jax.Array, list[jax.Array]]:
    """`expert_ffn` [M, D], and x W_in and x W_gate [M, F]."""
    return _forward(options, x, experts, groups, keep=True)


def _forward(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
    keep: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    w_in, w_out = experts.w_in, experts.w_out
    num_rows, (num_groups, _, hidden_size) = x.shape[0], w_in.shape
    bounds = group_bounds(groups, num_groups, num_rows)
    tiles = choose_tiles(num_rows, *w_in.shape)
    into = experts.into()
    x = row_tiles.padded(x)

    def matrix(w: Any, group: jax.Array) -> jax.Array:
        return dense(row_tiles.pick(w, group), x.dtype)

    def per_tile(group: jax.Array, tile: Tile, state: Any) -> tuple[Any, Any]:
        out, kept = state
        xs = row_tiles.take(x, tile)
        up, *gates = (_biased(_dot(xs, matrix(w, group)), bias, group) for w, bias in into)
        hidden = hidden_units(options.activation, up, *gates)
        product = _dot(hidden.astype(x.dtype), matrix(w_out, group))
        product = _biased(product, experts.b_out, group)
        values = zip(kept, [up, *gates], strict=False)  # kept may be empty
        kept = [row_tiles.put(buffer, tile, value) for buffer, value in values]
        return (row_tiles.put(out, tile, product), kept), ()

    hidden_shape = (x.shape[0], hidden_size)
    kept = [jnp.zeros(hidden_shape, x.dtype) for _ in into] if keep else []
    init = jnp.zeros((x.shape[0], w_out.shape[2]), x.dtype), kept
    out, kept = row_tiles.for_each_tile(
        bounds, tiles, x.shape[0], per_tile, lambda _, __, state: state, init
    )
    return out[:num_rows], [value[:num_rows] for value in kept]


def expert_ffn_backward_xla(
    options: FFNOptions,
    x: jax.Array,
    experts: Experts,
    groups: Groups,
    kept: list[jax.Array],
    grad: jax.Array,
) -> tuple[jax.Array, Experts]:
    """Gradients of x and of the experts."""
    w_in = experts.w_in
    num_rows, num_groups = x.shape[0], w_in.shape[0]
    bounds = group_bounds(groups, num_groups, num_rows)
    tiles = choose_tiles(num_rows, *w_in.shape)
    weights = [w for w in experts[:3] if w is not None]
    parts, tree = jax.tree.flatten(experts)
    x, grad, *kept = (row_tiles.padded(rows) for rows in (x, grad, *kept))

    def per_tile(group: jax.Array, tile: Tile, state: Any) -> tuple[Any, Any]:
        d_x, d_weights = state
        inner, outer, *gates = (row_tiles.pick(w, group) for w in weights)
        xs, g = row_tiles.take(x, tile), row_tiles.take(grad, tile)
        d_hidden = _dot(g, outer, 1, 1)
        up, *pre_gate = (row_tiles.take(value, tile).astype(d_hidden.dtype) for value in kept)
        act = functools.partial(hidden_units, options.activation)
        hidden, pull = jax.vjp(act, up, *pre_gate)
        d_up, *d_gate = (d.astype(x.dtype) for d in pull(d_hidden))
        d_rows = _dot(d_up, inner, 1, 1)
        found = {"w_in": _dot(xs, d_up, 0, 0), "w_out": _dot(hidden.astype(x.dtype), g, 0, 0)}
        found |= {"b_in": _total(d_up), "b_out": _total(g)}
        if gates:
            d_rows += _dot(d_gate[0], gates[0], 1, 1)
            found |= {"w_gate": _dot(xs, d_gate[0], 0, 0), "b_gate": _total(d_gate[0])}
        held = [found[name] for name, part in experts._asdict().items() if part is not None]
        return (row_tiles.put(d_x, tile, d_rows), d_weights), held

    def per_group(group: jax.Array, sums: list[jax.Array], state: Any) -> Any:
        d_x, d_weights = state
        pairs = zip(d_weights, sums, strict=True)
        return d_x, [row_tiles.put_group(d, group, total) for d, total in pairs]

    init = jnp.zeros(x.shape, x.dtype), [jnp.zeros_like(part) for part in parts]
    d_x, d_parts = row_tiles.for_each_tile(bounds, tiles, x.shape[0], per_tile, per_group, init)
    return d_x[:num_rows], jax.tree.unflatten(tree, d_parts)
