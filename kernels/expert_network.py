"""Expert feed-forward networks over rows sorted by expert.

    out[i] = act(x[i] W_in[g(i)]) W_out[g(i)]
    out[i] = (act(x[i] W_gate[g(i)]) * (x[i] W_in[g(i)])) W_out[g(i)]     gated (SwiGLU and kin)

Backward of the Pallas kernel recomputes the hidden activations; the XLA twin keeps what comes
before the activation, [M, F] in f32, which on CPU is cheaper than the product. Shazeer 2020, GLU
variants (arXiv 2002.05202).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from taskmoe.kernels import row_tiles
from taskmoe.kernels.checks import (
    accumulator,
    check_float,
    check_shape,
    choose_implementation,
    match_varying,
)
from taskmoe.kernels.ffn_backward_kernel import expert_ffn_backward_mosaic
from taskmoe.kernels.ffn_kernel import ACTIVATIONS, expert_ffn_mosaic
from taskmoe.kernels.grouped_matmul import check_groups, gmm_reference
from taskmoe.kernels.tiling import Tiling, check_tiling

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

Activation = Literal["relu", "gelu", "silu"]


def expert_ffn_reference(
    x: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    activation: Activation,
) -> jax.Array:
    """The definition of `expert_ffn`."""
    acc = accumulator(x.dtype)
    act = ACTIVATIONS[activation]

    def times(rows: jax.Array, matrices: jax.Array, dtype: Any) -> jax.Array:
        return gmm_reference(rows, matrices, group_sizes, group_offset, False, dtype)

    hidden = times(x, w_in, acc)
    hidden = act(hidden) if w_gate is None else act(times(x, w_gate, acc)) * hidden
    return times(hidden.astype(x.dtype), w_out, x.dtype)


def _dot(a: jax.Array, b: jax.Array, left: int = 1, right: int = 0) -> jax.Array:
    dims: Any = (((left,), (right,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=accumulator(a.dtype))


def _forward_xla(
    x: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    activation: Activation,
    keep: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """The result, and if asked to keep them x W_in and x W_gate [M, F], in the accumulator's dtype.

    They are not asked for where nothing is differentiated.
    """
    num_rows, (num_groups, _, hidden_size) = x.shape[0], w_in.shape
    act = ACTIVATIONS[activation]
    bounds = row_tiles.group_bounds(group_sizes, group_offset, num_groups, num_rows)
    tiles = row_tiles.choose_tiles(num_rows, *w_in.shape)
    into = [w_in] if w_gate is None else [w_in, w_gate]

    def per_tile(group: jax.Array, tile: row_tiles.Tile, state: Any) -> tuple[Any, Any]:
        out, kept = state
        xs = row_tiles.take(x, tile)
        up, *gates = (_dot(xs, row_tiles.pick(w, group)) for w in into)
        hidden = act(gates[0]) * up if gates else act(up)
        product = _dot(hidden.astype(x.dtype), row_tiles.pick(w_out, group))
        values = zip(kept, [up, *gates], strict=False)  # kept may be empty
        kept = [row_tiles.put(buffer, tile, value) for buffer, value in values]
        return (row_tiles.put(out, tile, product), kept), ()

    def zeros(width: int, dtype: Any) -> jax.Array:
        return match_varying(jnp.zeros((num_rows, width), dtype), x)[0]

    kept = [zeros(hidden_size, accumulator(x.dtype)) for _ in into] if keep else []
    init = zeros(w_out.shape[2], x.dtype), kept
    out, kept = row_tiles.for_each_tile(
        bounds, tiles, num_rows, per_tile, lambda _, __, state: state, init
    )
    return out, kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _expert_ffn(
    x: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    activation: Activation,
    implementation: str,
    tiling: Tiling | None,
) -> jax.Array:
    args = (x, w_in, w_out, w_gate, group_sizes, group_offset, activation)
    if implementation == "mosaic":
        return expert_ffn_mosaic(*args, tiling)
    return _forward_xla(*args, keep=False)[0]


def _expert_ffn_forward(
    x: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    w_gate: jax.Array | None,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    activation: Activation,
    implementation: str,
    tiling: Tiling | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
    args = (x, w_in, w_out, w_gate, group_sizes, group_offset)
    if implementation == "mosaic":
        return _expert_ffn(*args, activation, implementation, tiling), (args, [])
    out, kept = _forward_xla(*args, activation, keep=True)
    return out, (args, kept)


def _expert_ffn_backward(
    activation: Activation,
    implementation: str,
    tiling: Tiling | None,
    residuals: tuple[Any, ...],
    grad: jax.Array,
) -> tuple[Any, ...]:
    operands, kept = residuals
    if implementation == "mosaic":
        return *expert_ffn_backward_mosaic(operands, grad, activation), None, None
    x, w_in, w_out, w_gate, group_sizes, group_offset = operands
    num_rows, num_groups = x.shape[0], w_in.shape[0]
    act = ACTIVATIONS[activation]
    bounds = row_tiles.group_bounds(group_sizes, group_offset, num_groups, num_rows)
    tiles = row_tiles.choose_tiles(num_rows, *w_in.shape)
    weights = [w_in, w_out] if w_gate is None else [w_in, w_out, w_gate]

    def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return match_varying(jnp.zeros(shape, dtype), x)[0]

    def per_tile(group: jax.Array, tile: row_tiles.Tile, state: Any) -> tuple[Any, Any]:
        d_x, d_weights = state
        inner, outer, *gates = (row_tiles.pick(w, group) for w in weights)
        xs, g = row_tiles.take(x, tile), row_tiles.take(grad, tile)
        up, *pre_gate = (row_tiles.take(value, tile) for value in kept)
        d_hidden = _dot(g, outer, 1, 1)
        if gates:
            hidden, pull = jax.vjp(lambda s, u: act(s) * u, pre_gate[0], up)
            d_gate, d_up = pull(d_hidden)
        else:
            hidden, pull = jax.vjp(act, up)
            (d_up,) = pull(d_hidden)
        d_up = d_up.astype(x.dtype)
        d_rows = _dot(d_up, inner, 1, 1)
        products = [_dot(xs, d_up, 0, 0), _dot(hidden.astype(x.dtype), g, 0, 0)]
        if gates:
            d_gate = d_gate.astype(x.dtype)
            d_rows += _dot(d_gate, gates[0], 1, 1)
            products.append(_dot(xs, d_gate, 0, 0))
        return (row_tiles.put(d_x, tile, d_rows), d_weights), products

    def per_group(group: jax.Array, sums: list[jax.Array], state: Any) -> Any:
        d_x, d_weights = state
        pairs = zip(d_weights, sums, strict=True)
        return d_x, [row_tiles.put_group(d, group, total) for d, total in pairs]

    init = zeros(x.shape, x.dtype), [zeros(w.shape, w.dtype) for w in weights]
    d_x, (d_in, d_out, *d_gates) = row_tiles.for_each_tile(
        bounds, tiles, num_rows, per_tile, per_group, init
    )
    return d_x, d_in, d_out, d_gates[0] if d_gates else None, None, None


_expert_ffn.defvjp(_expert_ffn_forward, _expert_ffn_backward)


def expert_ffn(
    x: Float[Array, "M D"],
    w_in: Float[Array, "E D F"],
    w_out: Float[Array, "E F D"],
    group_sizes: Int[Array, " G"],
    *,
    activation: Activation = "relu",
    w_gate: Float[Array, "E D F"] | None = None,
    group_offset: int | Int[Array, ""] | None = None,
    tiling: Tiling | None = None,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """Run each group of rows through its expert's feed-forward network.

        out[i] = act(x[i] W_in) W_out,  or gated  (act(x[i] W_gate) * (x[i] W_in)) W_out

    x: [M, D] bf16|f32, rows sorted by expert.
    w_in: [E, D, F], same dtype.
    w_out: [E, F, D], same dtype.
    group_sizes: [G] i32, rows of each expert; negative counts as 0, rows past M are cut off.
    activation: "relu", "gelu" (tanh form) or "silu", taken in f32.
    w_gate: [E, D, F] or None; the activation is on x W_gate (silu: SwiGLU, gelu: GeGLU).
    group_offset: scalar i32, the group that w_in[0] belongs to; None means 0 and wants E == G.
    tiling: a `Tiling` (m rows, k = D, n hidden units) that overrides the forward kernel's choice of
      block sizes ("mosaic" only).
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by platform).

    Returns [M, D] in x's dtype; hidden activations are rounded to x's dtype before W_out. Rows past
    sum(group_sizes) and of experts that are not held are zero, whatever x holds there; gradients of
    experts without rows are zero. Raises ValueError or TypeError where an argument does not fit.

    Shazeer 2020 (arXiv 2002.05202) for the gated forms; Gale et al. 2022 (arXiv 2211.15841).
    """
    check_shape("x", x, ("M", "D"))
    check_float("x", x)
    check_shape("w_in", w_in, ("E", x.shape[1], "F"))
    check_float("w_in", w_in, ("x", x))
    num_groups, _, hidden = w_in.shape
    check_shape("w_out", w_out, (num_groups, hidden, x.shape[1]))
    check_float("w_out", w_out, ("x", x))
    if w_gate is not None:
        check_shape("w_gate", w_gate, w_in.shape)
        check_float("w_gate", w_gate, ("x", x))
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}"
        )
    offset = check_groups(group_sizes, group_offset, num_groups, "w_in.shape[0]")
    check_tiling(tiling, x.shape[1], hidden, x.dtype.itemsize)
    if tiling is not None and tiling.k != x.shape[1]:
        raise ValueError(f"tiling.k must be D={x.shape[1]} in expert_ffn, got {tiling.k}")
    chosen = choose_implementation("expert_ffn", implementation)
    arrays = (x, w_in, w_out, group_sizes, offset)
    if w_gate is None:
        x, w_in, w_out, group_sizes, offset = match_varying(*arrays)
    else:
        x, w_in, w_out, group_sizes, offset, w_gate = match_varying(*arrays, w_gate)
    args = (x, w_in, w_out, w_gate, group_sizes, offset, activation)
    if chosen == "reference":
        return expert_ffn_reference(*args)
    return _expert_ffn(*args, chosen, tiling)
