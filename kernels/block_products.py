"""Products of blocks in VMEM, as several kernels make them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from taskmoe.kernels.options import Activation, hidden_units
from taskmoe.kernels.tiling import HIDDEN_CHUNK


def pieces(size: int, piece: int) -> list[pl.Slice]:
    """Slices that cut `size` into pieces, or one of all of it where they do not fit exactly."""
    piece = piece if size % piece == 0 else size
    return [pl.Slice(first, piece) for first in range(0, size, piece)]


def keep(x: jax.Array, left: Any, axis: int) -> jax.Array:
    """X with everything from index `left` of this axis on set to zero."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return zero_where_not(index < left, x)


def zero_where_not(held: jax.Array, x: jax.Array) -> jax.Array:
    """X where `held`, else zero: by way of f32, since Mosaic selects in 32 bits."""
    return jnp.where(held, x.astype(jnp.float32), 0).astype(x.dtype)


def dot(a: jax.Array, b: jax.Array, left: int = 1, right: int = 0) -> jax.Array:
    """Product over axis `left` of a and `right` of b, summed in f32."""
    dims: Any = (((left,), (right,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def before_activation(x: jax.Array, expert: Any, units: Any) -> list[jax.Array]:
    """x W_in + b_in and, where gated, x W_gate + b_gate, of these hidden units: [m, f] f32 each."""
    found = []
    for weight, bias in expert.into():
        product = dot(x, weight[:, units])
        found.append(product if bias is None else product + bias[:, units].astype(jnp.float32))
    return found


def through_expert(
    x: jax.Array, expert: Any, activation: Activation, units_left: Any = None
) -> jax.Array:
    """Rows [m, D] through an expert, or a block of its hidden units, in chunks: [m, D] f32.

    expert: `Experts` of refs to one, biases [1, N]; b_out is left to the caller.
    units_left: hidden units of the block that there are, where it overhangs the last one; what lies
      beyond may be NaN.
    """
    total = jnp.zeros((x.shape[0], expert.w_out.shape[1]), jnp.float32)
    for units in pieces(expert.w_in.shape[1], HIDDEN_CHUNK):
        hidden = hidden_units(activation, *before_activation(x, expert, units))
        hidden, w_out = hidden.astype(x.dtype), expert.w_out[units, :]
        if units_left is not None:
            left = units_left - units.start
            hidden, w_out = keep(hidden, left, axis=1), keep(w_out, left, axis=0)
        total += dot(hidden, w_out)
    return total
