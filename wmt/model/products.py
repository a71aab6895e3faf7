"""Products and look-ups by parameters that are floats, or int8 with scales."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels.quantized import Quantized, QuantizedRows, product


def times(x: jax.Array, w: jax.Array | Quantized) -> jax.Array:
    """x [..., K] times a matrix [K, N]: [..., N] in x's dtype."""
    return product(x, w).astype(x.dtype) if isinstance(w, Quantized) else x @ w


def logits_of(x: jax.Array, softmax: jax.Array | Quantized) -> jax.Array:
    """x [..., D] times the softmax's matrix [D, V]: [..., V] f32."""
    if isinstance(softmax, Quantized):
        return product(x, softmax)
    return jnp.matmul(x, softmax, preferred_element_type=jnp.float32)


def looked_up(table: jax.Array | QuantizedRows, ids: jax.Array) -> jax.Array:
    """Rows of a table [V, D] by ids [...]: [..., D] of the table's dtype, f32 where it is int8."""
    if isinstance(table, QuantizedRows):
        return table.values[ids].astype(jnp.float32) * table.scales[ids]
    return table[ids]


def transposed(table: Any) -> Any:
    """A table [V, D] as the softmax's matrix [D, V]: a word's scale is its column's."""
    if isinstance(table, QuantizedRows):
        return Quantized(table.values.T, table.scales.T[None], "int8")
    return table.T
