"""Rows to their experts and back: `dispatch` and `combine`, each the other's gradient.

    dispatch: y[rows[t, j]] = x[t]
    combine:  out[t] = sum_j weights[t, j] * y[rows[t, j]]

The row plan decides what `rows` means. Destinations are distinct, so no gradient adds up where a
gather will do: dispatch's is a combine with unit weights, combine's a weighted dispatch, and that
of the weights a row-wise dot.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import (
    accumulator,
    check_float,
    check_int,
    check_shape,
    choose_implementation,
    match_varying,
)
from taskmoe.kernels.row_gather_kernel import gather_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def dispatch_reference(
    x: jax.Array, rows: jax.Array, weights: jax.Array | None, num_rows: int
) -> jax.Array:
    """The definition of `dispatch`, and with weights of `combine`'s gradient."""
    values = jnp.broadcast_to(x[:, None], (*rows.shape, x.shape[1]))
    if weights is not None:
        values = (values * weights[..., None]).astype(x.dtype)
    target = jnp.where((rows >= 0) & (rows < num_rows), rows, num_rows)
    out = jnp.zeros((num_rows, x.shape[1]), x.dtype)
    return out.at[target.reshape(-1)].set(values.reshape(-1, x.shape[1]), mode="drop")


def combine_reference(y: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """The definition of `combine`."""
    placed = (rows >= 0) & (rows < y.shape[0])
    picked = jnp.where(placed[..., None], y[jnp.where(placed, rows, 0)], 0)
    acc = accumulator(y.dtype)
    return jnp.sum(picked.astype(acc) * weights[..., None].astype(acc), axis=1).astype(y.dtype)


def _sources(rows: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """For each destination row the assignment t*k+j that fills it, and whether there is one."""
    flat = rows.reshape(-1)
    order = jnp.arange(flat.size, dtype=jnp.int32)
    flat = jnp.where((flat >= 0) & (flat < num_rows), flat, num_rows + order)
    source = jnp.full((num_rows,), -1, jnp.int32)
    source = source.at[flat].set(order, mode="drop", unique_indices=True)
    return jnp.maximum(source, 0), source >= 0


def _move_out(
    x: jax.Array, rows: jax.Array, weights: jax.Array | None, num_rows: int, implementation: str
) -> jax.Array:
    """y[rows[t, j]] = weights[t, j] * x[t], zero elsewhere."""
    source, filled = _sources(rows, num_rows)
    token = source // rows.shape[1]
    if weights is not None:
        weights = weights.reshape(-1)[source][:, None]
    if implementation == "mosaic":
        return gather_rows(x, jnp.where(filled, token, -1)[:, None], weights)
    values = x[token]
    if weights is not None:
        values = (values * weights).astype(x.dtype)
    return jnp.where(filled[:, None], values, 0)


def _bring_back(
    y: jax.Array, rows: jax.Array, weights: jax.Array | None, implementation: str
) -> jax.Array:
    """out[t] = sum_j weights[t, j] * y[rows[t, j]], summed in f32."""
    placed = (rows >= 0) & (rows < y.shape[0])
    if implementation == "mosaic":
        return gather_rows(y, jnp.where(placed, rows, -1), weights)
    at = jnp.where(placed, rows, 0)
    total = jnp.zeros((rows.shape[0], y.shape[1]), accumulator(y.dtype))
    for j in range(rows.shape[1]):
        picked = jnp.where(placed[:, j, None], y[at[:, j]], 0).astype(total.dtype)
        total += picked if weights is None else picked * weights[:, j, None]
    return total.astype(y.dtype)


def _row_dots(y: jax.Array, rows: jax.Array, grad: jax.Array, implementation: str) -> jax.Array:
    """dots[t, j] = <y[rows[t, j]], grad[t]> in f32; 0 where dropped."""
    placed = (rows >= 0) & (rows < y.shape[0])
    if implementation == "mosaic":
        return gather_rows(y, jnp.where(placed, rows, -1), grad=grad)
    at = jnp.where(placed, rows, 0)
    acc = accumulator(y.dtype)
    columns = [
        jnp.sum(
            jnp.where(placed[:, j, None], y[at[:, j]], 0).astype(acc) * grad.astype(acc), axis=1
        )
        for j in range(rows.shape[1])
    ]
    return jnp.stack(columns, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dispatch(x: jax.Array, rows: jax.Array, num_rows: int, implementation: str) -> jax.Array:
    return _move_out(x, rows, None, num_rows, implementation)


def _dispatch_forward(
    x: jax.Array, rows: jax.Array, num_rows: int, implementation: str
) -> tuple[jax.Array, jax.Array]:
    return _dispatch(x, rows, num_rows, implementation), rows


def _dispatch_backward(
    num_rows: int, implementation: str, rows: jax.Array, grad: jax.Array
) -> tuple[Any, ...]:
    return _bring_back(grad, rows, None, implementation), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(y: jax.Array, rows: jax.Array, weights: jax.Array, implementation: str) -> jax.Array:
    return _bring_back(y, rows, weights, implementation)


def _combine_forward(
    y: jax.Array, rows: jax.Array, weights: jax.Array, implementation: str
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _combine(y, rows, weights, implementation), (y, rows, weights)


def _combine_backward(
    implementation: str, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[Any, ...]:
    y, rows, weights = residuals
    d_y = _move_out(grad, rows, weights, y.shape[0], implementation)
    return d_y, None, _row_dots(y, rows, grad, implementation).astype(weights.dtype)


_combine.defvjp(_combine_forward, _combine_backward)


def dispatch(
    x: Float[Array, "T D"],
    rows: Int[Array, "T k"],
    num_rows: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """Copy each token's row to the k places that the row plan names.

        y[rows[t, j]] = x[t], zero elsewhere

    x: [T, D] bf16|f32, tokens, or whole sequences as rows of width S*D.
    rows: [T, k] i32, distinct destinations; values outside [0, num_rows) drop that copy. Where two
      are equal, either may win.
    num_rows: rows of the result, 1 or more (static).
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by platform).

    Returns [num_rows, D] in x's dtype. Raises ValueError or TypeError where an argument does not
    fit. Gradient: `combine` with unit weights.
    """
    _check_rows("x", x, rows)
    check_shape("rows", rows, (x.shape[0], "k"))
    if not isinstance(num_rows, int) or num_rows < 1:
        raise ValueError(f"num_rows must be an int of at least 1, got {num_rows!r}")
    chosen = choose_implementation("dispatch", implementation)
    x, rows = match_varying(x, rows)
    if chosen == "reference":
        return dispatch_reference(x, rows, None, num_rows)
    return _dispatch(x, rows, num_rows, chosen)


def combine(
    y: Float[Array, "N D"],
    rows: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """Bring each token's rows back and add them up, weighted.

        out[t] = sum_j weights[t, j] * y[rows[t, j]]

    y: [N, D] bf16|f32, rows as `dispatch` laid them out.
    rows: [T, k] i32; values outside [0, N) contribute zero. Distinct, for the gradient's sake.
    weights: [T, k] bf16|f32. Products and sums are f32.
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by platform).

    Returns [T, D] in y's dtype; rows of y that nobody names, NaN included, reach no output. Raises
    ValueError or TypeError where an argument does not fit. Gradients: a weighted `dispatch` for y,
    row-wise dots for the weights.
    """
    _check_rows("y", y, rows)
    check_float("weights", weights)
    check_shape("weights", weights, rows.shape)
    chosen = choose_implementation("combine", implementation)
    y, rows, weights = match_varying(y, rows, weights)
    if chosen == "reference":
        return combine_reference(y, rows, weights)
    return _combine(y, rows, weights, chosen)


def _check_rows(name: str, x: jax.Array, rows: jax.Array) -> None:
    check_shape(name, x, ("rows", "D"))
    check_float(name, x)
    check_shape("rows", rows, ("T", "k"))
    check_int("rows", rows)
    if x.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(x.shape)}")
