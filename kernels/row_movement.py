"""Rows to their experts and back: `dispatch` and `combine`, each the other's gradient.

    dispatch: y[rows[t, j]] = x[t]
    combine:  out[t] = sum_j weights[t, j] * y[rows[t, j]]

The row plan decides what `rows` means. Destinations are distinct, so each row is of one token at
most: dispatch's gradient is a combine with unit weights, combine's a weighted dispatch, and that of
the weights a row-wise dot.

On TPU the tokens are held in VMEM while rows pass (`resident_rows_kernel`); where they do not fit,
or their width cannot be cut, rows are gathered from HBM one by one (`row_gather_kernel`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from taskmoe.kernels.checks import (
    accumulator,
    as_floats,
    as_integers,
    as_size,
    check_shape,
    match_varying,
    zeros_like_all,
)
from taskmoe.kernels.platforms import Op, check_implementation, with_plain_settings
from taskmoe.kernels.resident_rows_kernel import add, take
from taskmoe.kernels.row_gather_kernel import gather_rows

#: What a policy of `jax.checkpoint` calls the rows that `dispatch` moved.
DISPATCHED = "taskmoe_dispatched"


@with_plain_settings
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


@with_plain_settings
def combine_reference(y: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """The definition of `combine`."""
    placed = (rows >= 0) & (rows < y.shape[0])
    picked = jnp.where(placed[..., None], y[jnp.where(placed, rows, 0)], 0)
    acc = accumulator(y.dtype)
    return jnp.sum(picked.astype(acc) * weights[..., None].astype(acc), axis=1).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class MoveOptions:
    """num_rows: of the buffer that `dispatch` fills; None in what reads it."""

    num_rows: Any
    implementation: str | None


def _pulled(
    rows: jax.Array, weights: jax.Array | None, num_rows: Any
) -> tuple[jax.Array, jax.Array | None]:
    """What [num_rows] rows are: each one's token, -1 for none, and weight, anything for none."""
    flat = rows.reshape(-1)
    order = jnp.arange(flat.size, dtype=jnp.int32)
    flat = jnp.where((flat >= 0) & (flat < num_rows), flat, num_rows + order)
    source = jnp.full((num_rows,), -1, jnp.int32)
    source = source.at[flat].set(order, mode="drop", unique_indices=True)
    found = jnp.maximum(source, 0)
    if weights is not None:
        weights = weights.reshape(-1)[found]
    return jnp.where(source >= 0, found // rows.shape[1], -1), weights


def _column(weights: jax.Array | None) -> jax.Array | None:
    return None if weights is None else weights[:, None]


def _move_out_mosaic(
    options: MoveOptions, x: jax.Array, rows: jax.Array, weights: jax.Array | None
) -> jax.Array:
    token, weights = _pulled(rows, weights, options.num_rows)
    weights = None if weights is None else jnp.where(token >= 0, weights, 0)
    taken = take(x, token, weights, None)
    if taken is not None:
        return taken[0]
    return gather_rows(x, token[:, None], _column(weights), None)


def _move_out_xla(
    options: MoveOptions, x: jax.Array, rows: jax.Array, weights: jax.Array | None
) -> jax.Array:
    token, weights = _pulled(rows, weights, options.num_rows)
    values = x[jnp.maximum(token, 0)]
    if weights is not None:
        values = (values * weights[:, None]).astype(x.dtype)
    return jnp.where(token[:, None] >= 0, values, 0)


def _placed(y: jax.Array, rows: jax.Array) -> jax.Array:
    return (rows >= 0) & (rows < y.shape[0])


def _bring_back_mosaic(
    _: MoveOptions, y: jax.Array, rows: jax.Array, weights: jax.Array | None
) -> jax.Array:
    token, scale = _pulled(rows, weights, y.shape[0])
    added = add(y, token, scale, rows.shape[0])
    if added is not None:
        return added
    return gather_rows(y, jnp.where(_placed(y, rows), rows, -1), weights, None)


def _bring_back_xla(
    _: MoveOptions, y: jax.Array, rows: jax.Array, weights: jax.Array | None
) -> jax.Array:
    placed = _placed(y, rows)
    at = jnp.where(placed, rows, 0)
    total = jnp.zeros((rows.shape[0], y.shape[1]), accumulator(y.dtype))
    for j in range(rows.shape[1]):
        picked = jnp.where(placed[:, j, None], y[at[:, j]], 0).astype(total.dtype)
        total += picked if weights is None else picked * weights[:, j, None]
    return total.astype(y.dtype)


def _combine_gradient_mosaic(
    options: MoveOptions, y: jax.Array, rows: jax.Array, weights: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    token, scale = _pulled(rows, weights, y.shape[0])
    assert scale is not None
    scale = jnp.where(token >= 0, scale, 0)
    placed = _placed(y, rows)
    taken = take(grad, token, scale, y)
    if taken is not None:
        d_y, dots = taken
        assert dots is not None
        return d_y, jnp.where(placed, dots[jnp.where(placed, rows, 0)], 0)
    d_weights = gather_rows(y, jnp.where(placed, rows, -1), None, grad)
    return gather_rows(grad, token[:, None], _column(scale), None), d_weights


def _combine_gradient_xla(
    options: MoveOptions, y: jax.Array, rows: jax.Array, weights: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    back = dataclasses.replace(options, num_rows=y.shape[0])
    placed = _placed(y, rows)
    at = jnp.where(placed, rows, 0)
    acc = accumulator(y.dtype)
    columns = [
        jnp.sum(
            jnp.where(placed[:, j, None], y[at[:, j]], 0).astype(acc) * grad.astype(acc), axis=1
        )
        for j in range(rows.shape[1])
    ]
    return _move_out_xla(back, grad, rows, weights), jnp.stack(columns, axis=1)


MOVE_OUT = Op("dispatch", xla=_move_out_xla, mosaic=_move_out_mosaic)
BRING_BACK = Op("combine", xla=_bring_back_xla, mosaic=_bring_back_mosaic)
COMBINE_GRADIENT = Op(
    "combine_gradient", xla=_combine_gradient_xla, mosaic=_combine_gradient_mosaic
)


def _move_out(
    options: MoveOptions, x: jax.Array, rows: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """y[rows[t, j]] = weights[t, j] * x[t], zero elsewhere."""
    out = jax.ShapeDtypeStruct((options.num_rows, x.shape[1]), x.dtype)
    return MOVE_OUT(options, options.implementation, out, x, rows, weights)


def _bring_back(
    options: MoveOptions, y: jax.Array, rows: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """out[t] = sum_j weights[t, j] * y[rows[t, j]], summed in f32."""
    out = jax.ShapeDtypeStruct((rows.shape[0], y.shape[1]), y.dtype)
    return BRING_BACK(options, options.implementation, out, y, rows, weights)


def _combine_gradient(
    options: MoveOptions, y: jax.Array, rows: jax.Array, weights: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """d_y[rows[t, j]] = weights[t, j] * grad[t];  d_weights[t, j] = <y[rows[t, j]], grad[t]>, f32.

    Zero where nobody's, and where dropped.
    """
    out = (
        jax.ShapeDtypeStruct(y.shape, grad.dtype),
        jax.ShapeDtypeStruct(rows.shape, accumulator(y.dtype)),
    )
    found: tuple[jax.Array, jax.Array] = COMBINE_GRADIENT(
        options, options.implementation, out, y, rows, weights, grad
    )
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(x: jax.Array, rows: jax.Array, options: MoveOptions) -> jax.Array:
    return _move_out(options, x, rows)


def _dispatch_forward(
    x: jax.Array, rows: jax.Array, options: MoveOptions
) -> tuple[jax.Array, jax.Array]:
    return checkpoint_name(_dispatch(x, rows, options), DISPATCHED), rows


def _dispatch_backward(options: MoveOptions, rows: jax.Array, grad: jax.Array) -> tuple[Any, ...]:
    return _bring_back(options, grad, rows), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _combine(y: jax.Array, rows: jax.Array, weights: jax.Array, options: MoveOptions) -> jax.Array:
    return _bring_back(options, y, rows, weights)


def _combine_forward(
    y: jax.Array, rows: jax.Array, weights: jax.Array, options: MoveOptions
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _combine(y, rows, weights, options), (y, rows, weights)


def _combine_backward(
    options: MoveOptions, residuals: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[Any, ...]:
    y, rows, weights = residuals
    d_y, d_weights = _combine_gradient(options, y, rows, weights, grad)
    return d_y, None, d_weights.astype(weights.dtype)


_combine.defvjp(_combine_forward, _combine_backward)


def dispatch(
    x: jax.Array,
    rows: jax.Array,
    num_rows: int,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Copy each token's row to the k places that the row plan names.

        y[rows[t, j]] = x[t], zero elsewhere

    x: [T, D] bf16|f32, tokens, or whole sequences as rows of width S*D.
    rows: [T, k] i32, distinct destinations; values outside [0, num_rows) drop that copy. Where two
      are equal, either may win.
    num_rows: rows of the result, 1 or more (static).
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by the platform that is
      lowered for).

    Returns [num_rows, D] in x's dtype. Raises ValueError or TypeError where an argument does not
    fit. Gradient: `combine` with unit weights.
    """
    x, rows = _check_rows("x", x, rows)
    check_shape("rows", rows, (x.shape[0], "k"))
    num_rows = as_size("num_rows", num_rows)
    check_implementation(implementation)
    x, rows = match_varying(x, rows)
    if 0 in (*x.shape, *rows.shape):
        return zeros_like_all((num_rows, x.shape[1]), x.dtype, x, rows)
    if implementation == "reference":
        return dispatch_reference(x, rows, None, num_rows)
    return _dispatch(x, rows, MoveOptions(num_rows, implementation))


def combine(
    y: jax.Array,
    rows: jax.Array,
    weights: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Bring each token's rows back and add them up, weighted.

        out[t] = sum_j weights[t, j] * y[rows[t, j]]

    y: [N, D] bf16|f32, rows as `dispatch` laid them out.
    rows: [T, k] i32, distinct; values outside [0, N) contribute zero. Where two are equal, either
      may be left out.
    weights: [T, k] bf16|f32. Products and sums are f32.
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by the platform that is
      lowered for).

    Returns [T, D] in y's dtype; rows of y that nobody names, NaN included, reach no output. Raises
    ValueError or TypeError where an argument does not fit. Gradients: a weighted `dispatch` for y,
    row-wise dots for the weights.
    """
    y, rows = _check_rows("y", y, rows)
    weights = as_floats("weights", weights)
    check_shape("weights", weights, rows.shape)
    check_implementation(implementation)
    y, rows, weights = match_varying(y, rows, weights)
    if 0 in (*y.shape, *rows.shape):
        return zeros_like_all((rows.shape[0], y.shape[1]), y.dtype, y, rows, weights)
    if implementation == "reference":
        return combine_reference(y, rows, weights)
    return _combine(y, rows, weights, MoveOptions(None, implementation))


def _check_rows(name: str, x: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = as_floats(name, x)
    check_shape(name, x, ("rows", "D"))
    rows = as_integers("rows", rows)
    check_shape("rows", rows, ("T", "k"))
    return x, rows
