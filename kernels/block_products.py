"""Products of blocks in VMEM, as several kernels make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from taskmoe.kernels.options import Activation, hidden_units
from taskmoe.kernels.quantized import Quantized
from taskmoe.kernels.tiling import HIDDEN_CHUNK, LANES

#: Rows of a quantised matrix that are converted at a time.
CONVERTED_ROWS = 512


def pieces(size: int, piece: int) -> list[pl.Slice]:
    """Slices that cut `size` into pieces, the last one what is left.

    One of all of it where it is no multiple of a register's lanes, where a piece must end.
    """
    if size % min(piece, LANES):
        piece = size
    return [pl.Slice(first, min(piece, size - first)) for first in range(0, size, piece)]


def passes(parts: Sequence[pl.Slice], most: int) -> int:
    """Fewest passes of a loop over these slices, each over at most so many of them; see `each`.

    A pass begins at a multiple of a register's lanes, so it may have to take more, or all of them.
    Fewer slices than a pass takes are left over.
    """
    count, size = _even(parts), parts[0].size
    found = 1
    for n in range(2, count + 1):
        written = count // n
        if count // found > most and count // written == n and written * size % LANES == 0:
            found = n
    return found


def each(parts: Sequence[pl.Slice], passes: int, act: Callable[[Any], None]) -> None:
    """act(part) on each of these slices, which lie side by side, in so many passes of a loop.

    What a pass does is written out, and so are the slices that are left over: all of them would
    take the compiler minutes.
    """
    written, size = _even(parts) // passes, parts[0].size

    def one(first: Any) -> None:
        for part in parts[:written]:
            act(pl.ds(first + part.start, part.size))

    def some(i: jax.Array, carry: None) -> None:
        one(pl.multiple_of(i * written * size, LANES))

    if passes == 1:
        one(0)
    else:
        jax.lax.fori_loop(0, passes, some, None)
    for part in parts[passes * written :]:
        act(part)


def _even(parts: Sequence[pl.Slice]) -> int:
    """How many of the slices are as long as the first: all, or all but the last."""
    return len([part for part in parts if part.size == parts[0].size])


def keep(x: jax.Array, left: Any, axis: int) -> jax.Array:
    """X with everything from index `left` of this axis on set to zero."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return zero_where_not(index < left, x)


def zero_where_not(held: jax.Array, x: jax.Array) -> jax.Array:
    """X where `held`, else zero: by way of f32, since Mosaic selects in 32 bits."""
    return jnp.where(held, x.astype(jnp.float32), 0).astype(x.dtype)


def dot(a: jax.Array, b: jax.Array, left: int = 1, right: int = 0) -> jax.Array:
    """Product over axis `left` of a and `right` of b, summed in f32, or of int8 in int32."""
    dims: Any = (((left,), (right,)), ((), ()))
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, dims, preferred_element_type=sums)


def within_scales(w: Any, size: int, block: int, piece: int) -> list[pl.Slice]:
    """`pieces` of `size` rows, or columns, of w, none of which has two scales a column.

    block: those that share a scale, where w is `Quantized`.
    """
    if isinstance(w, Quantized) and w.blocks > 1:
        piece = math.gcd(size, block, piece)
    return pieces(size, piece)


def scale_index(w: Quantized, row: Any, block: int) -> Any:
    """Which of its blocks of scales this row of a matrix is of.

    Rows past the last, where a block overhangs, have the scales of the last.
    """
    return 0 if w.blocks == 1 else jnp.minimum(row // block, w.blocks - 1)


def product(
    x: jax.Array,
    w: Any,
    rows: Any,
    columns: Any,
    depth: int,
    begin: Any = 0,
    left: Any = None,
) -> jax.Array:
    """x [m, k] times k rows and some columns of a matrix: [m, n] f32.

    w: a ref, or `Quantized` of refs, whose values are converted to x's dtype and whose scales
      multiply sums over the rows that share them.
    depth: rows of the whole matrix, of which w's begin at `begin`.
    left: rows from rows.start on that there are, where w overhangs the matrix; what lies beyond
      counts nothing.
    """
    if not isinstance(w, Quantized):
        held = w[rows, columns]
        return dot(x, held if left is None else keep(held, left, axis=0))
    total: Any = 0
    block = depth // w.blocks
    for part in within_scales(w, rows.size, block, CONVERTED_ROWS):
        first = rows.start + part.start
        held = w.values[pl.ds(first, part.size), columns].astype(x.dtype)
        if left is not None:
            held = keep(held, left - part.start, axis=0)
        sums = dot(x[:, part.start : part.start + part.size], held)
        total += sums * w.scales[scale_index(w, begin + first, block), :, columns]
    return total


def before_activation(x: jax.Array, expert: Any, units: Any) -> list[jax.Array]:
    """x W_in + b_in and, where gated, x W_gate + b_gate, of these hidden units: [m, f] f32 each."""
    found, width = [], x.shape[1]
    for weight, bias in expert.into():
        sums = product(x, weight, pl.Slice(0, width), units, width)
        found.append(sums if bias is None else sums + bias[:, units].astype(jnp.float32))
    return found


def through_expert(
    x: jax.Array,
    expert: Any,
    activation: Activation,
    units_left: Any = None,
    begin: Any = 0,
    hidden_size: int = 0,
) -> jax.Array:
    """Rows [m, D] through an expert, or a block of its hidden units, in chunks: [m, D] f32.

    expert: `Experts` of refs to one, biases [1, N]; b_out is left to the caller.
    units_left: hidden units of the block that there are, where it overhangs the last one; what lies
      beyond may be NaN.
    begin: the block's first of the expert's `hidden_size` units; both count where it is quantised.
    """
    total = jnp.zeros((x.shape[0], expert.w_out.shape[1]), jnp.float32)
    for units in pieces(expert.w_in.shape[1], HIDDEN_CHUNK):
        hidden = hidden_units(activation, *before_activation(x, expert, units))
        hidden, left = hidden.astype(x.dtype), None
        if units_left is not None:
            left = units_left - units.start
            hidden = keep(hidden, left, axis=1)
        total += product(hidden, expert.w_out, units, slice(None), hidden_size, begin, left)
    return total
