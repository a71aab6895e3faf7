"""Attention of the Transformer, with the normalisation in front of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.products import times

Params = dict[str, Any]
EPSILON = 1e-6  # of RMS norm


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., D] over its root mean square, times scale [D]; summed in f32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
    return (wide * scale).astype(x.dtype)


def heads(x: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, S, D] -> [B, S, H, D/H]."""
    return x.reshape(*x.shape[:2], config.num_heads, -1)


def qkv(p: Params, x: jax.Array, config: ModelConfig) -> list[jax.Array]:
    """Queries, keys and values of self-attention over x [B, S, D]: [B, S, H, D/H] each."""
    fused = times(rms_norm(x, p["norm"]), p["qkv"])
    return [heads(part, config) for part in jnp.split(fused, 3, axis=-1)]


def query(p: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Queries of cross-attention: [B, S, H, D/H]."""
    return heads(times(rms_norm(x, p["norm"]), p["query"]), config)


def cross_key_value(p: Params, memory: jax.Array, config: ModelConfig) -> list[jax.Array]:
    """Keys and values of cross-attention over the encoder's output: [B, S, H, D/H] each."""
    return [heads(part, config) for part in jnp.split(times(memory, p["kv"]), 2, axis=-1)]


def attend(p: Params, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, T, H, D/H], k and v [B, S, H, D/H], mask broadcasting to [B, H, T, S]."""
    out = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return times(out.reshape(*q.shape[:2], -1), p["out"])


def by_head(x: jax.Array) -> jax.Array:
    """[B, S, H, D/H] -> [B, H, S, D/H]."""
    return jnp.swapaxes(x, 1, 2)


def attend_cached(
    p: Params, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """As `attend`, with k and v [B, H, S, D/H], so that no step copies a cache to transpose it."""
    # Keys as the left matrix, and heads moved after the product: with few queries XLA's CPU code
    # takes less than half the time so.
    scores = jnp.einsum("bhsd,bthd->bhst", k, q) * q.shape[-1] ** -0.5
    scores = jnp.swapaxes(scores, 2, 3)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
    out = by_head(jnp.einsum("bhts,bhsd->bhtd", weights, v))
    return times(out.reshape(*q.shape[:2], -1), p["out"])
