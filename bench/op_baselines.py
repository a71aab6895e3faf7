"""Plain definitions of the ops with group sizes known when traced, and what others do instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _slices(sizes: tuple[int, ...]) -> Iterator[tuple[int, slice]]:
    start = 0
    for group, size in enumerate(sizes):
        yield group, slice(start, start + size)
        start += size


def plain_gmm(sizes: tuple[int, ...], x: jax.Array, w: jax.Array) -> jax.Array:
    """gmm as one product a group; [M, K] and [E, K, N] to [M, N]."""
    return jnp.concatenate([x[rows] @ w[group] for group, rows in _slices(sizes)])


def plain_tgmm(sizes: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    """tgmm as one product a group; [M, K] and [M, N] to [E, K, N]."""
    return jnp.stack([x[rows].T @ g[rows] for _, rows in _slices(sizes)])


def plain_ffn(sizes: tuple[int, ...], x: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """expert_ffn with relu as two products a group; [M, D]."""
    return plain_gmm(sizes, jax.nn.relu(plain_gmm(sizes, x, w_in)), w_out)


def plain_gating(top_k: int, logits: jax.Array) -> Any:
    """Weights [T, k], mean probabilities [E] and queue places [T, k], by sorting."""
    order = jnp.argsort(-logits, axis=1, stable=True)[:, :top_k]
    weights = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=1), axis=1)
    return weights, jax.nn.softmax(logits, axis=1).mean(axis=0), _queue(order, logits.shape[1])


def one_hot_gating(top_k: int, logits: jax.Array) -> Any:
    """The same as GShard's Algorithm 1 is usually written: top_k, one-hot and a cumulative sum."""
    values, order = jax.lax.top_k(logits, top_k)
    mean = jax.nn.softmax(logits, axis=1).mean(axis=0)
    return jax.nn.softmax(values, axis=1), mean, _queue(order, logits.shape[1])


def _queue(experts: jax.Array, num_experts: int) -> jax.Array:
    """Place of each assignment in its expert's queue, first choices first; [T, k] f32."""
    hot = jax.nn.one_hot(experts.T.reshape(-1), num_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(hot, axis=0) - hot) * hot, axis=1)
    return place.reshape(experts.T.shape).T.astype(jnp.float32)


def ragged_outer(groups: jax.Array, num_groups: int, x: jax.Array, g: jax.Array) -> jax.Array:
    """tgmm as the gradient of lax.ragged_dot for its matrices."""
    zeros = jnp.zeros((num_groups, x.shape[1], g.shape[1]), x.dtype)
    return jax.vjp(lambda w: jax.lax.ragged_dot(x, w, groups), zeros)[1](g)[0]


def one_hot_dispatch(rows: jax.Array, num_rows: int, x: jax.Array) -> jax.Array:
    """dispatch as an einsum with a one-hot tensor [T, k, N]."""
    hot = jax.nn.one_hot(rows, num_rows, dtype=x.dtype)
    return jnp.einsum("tkn,td->nd", hot, x)


def one_hot_combine(rows: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """combine as an einsum with a one-hot tensor [T, k, N]."""
    hot = jax.nn.one_hot(rows, y.shape[0], dtype=y.dtype)
    return jnp.einsum("tkn,tk,nd->td", hot, weights.astype(y.dtype), y)


def plain_layer(
    experts: np.ndarray, x: jax.Array, gate: jax.Array, w_in: jax.Array, w_out: jax.Array
) -> jax.Array:
    """A dropless MoE layer with relu, expert by expert; experts [T, k] is known. [T, D]."""
    logits = jnp.take_along_axis(x @ gate, jnp.asarray(experts), axis=1)
    weights = jax.nn.softmax(logits, axis=1)
    y = jnp.zeros_like(x)
    for e in range(w_in.shape[0]):
        token, choice = np.nonzero(experts == e)
        out = jax.nn.relu(x[token] @ w_in[e]) @ w_out[e]
        y = y.at[token].add(out * weights[token, choice][:, None])
    return y


def gshard_layer(
    top_k: int,
    capacity_factor: float,
    group: int,
    x: jax.Array,
    gate: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
) -> jax.Array:
    """The layer as GShard's one-hot einsums, tokens in groups that queue by themselves. [T, D].

    Tokens over capacity contribute nothing (Lepikhin et al. 2020, arXiv 2006.16668, Algorithm 1
    and Algorithm 2).
    """
    tokens, d = x.shape
    num_experts = gate.shape[1]
    capacity = math.ceil(capacity_factor * top_k * group / num_experts)
    x = x.reshape(-1, group, d)

    def assignments(x: jax.Array) -> jax.Array:
        values, order = jax.lax.top_k(x @ gate, top_k)
        weights = jax.nn.softmax(values, axis=1)
        place = _queue(order, num_experts).astype(jnp.int32)
        expert = jax.nn.one_hot(order, num_experts, dtype=x.dtype)
        slot = jax.nn.one_hot(place, capacity, dtype=x.dtype)  # a zero row beyond capacity
        return jnp.einsum("sk,ske,skc->sec", weights.astype(x.dtype), expert, slot)

    combined = jax.vmap(assignments)(x)
    dispatched = jax.lax.stop_gradient((combined > 0).astype(x.dtype))
    rows = jnp.einsum("gsec,gsd->egcd", dispatched, x)
    hidden = jax.nn.relu(jnp.einsum("egcd,edf->egcf", rows, w_in))
    out = jnp.einsum("egcf,efd->egcd", hidden, w_out)
    return jnp.einsum("gsec,egcd->gsd", combined, out).reshape(tokens, d)
