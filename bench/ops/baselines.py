"""Plain definitions of the ops with group sizes known when traced, and what others do instead."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def plain_gmm(sizes: tuple[int, ...], x: jax.Array, w: jax.Array) -> jax.Array:
    """gmm as one product a group; [M, K] and [E, K, N] to [M, N]."""
    starts, held, longest = _held(sizes)
    x = jnp.pad(x, ((0, longest), (0, 0)))

    def add(out: jax.Array, group: Any) -> tuple[jax.Array, None]:
        start, size, matrix = group
        product = jnp.where(_first(longest, size), _rows(x, start, longest) @ matrix, 0)
        product += _rows(out, start, longest)
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, axis=0), None

    groups = starts[held], np.asarray(sizes)[held], w if held.size == w.shape[0] else w[held]
    out = jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
    return jax.lax.scan(add, out, groups)[0][: x.shape[0] - longest]


def plain_tgmm(sizes: tuple[int, ...], x: jax.Array, g: jax.Array) -> jax.Array:
    """tgmm as one product a group; [M, K] and [M, N] to [E, K, N]."""
    starts, held, longest = _held(sizes)
    x, g = (jnp.pad(rows, ((0, longest), (0, 0))) for rows in (x, g))

    def product(_: None, group: Any) -> tuple[None, jax.Array]:
        start, size = group
        own = jnp.where(_first(longest, size), _rows(x, start, longest), 0)
        return None, own.T @ _rows(g, start, longest)

    found = jax.lax.scan(product, None, (starts[held], np.asarray(sizes)[held]))[1]
    return jnp.zeros((len(sizes), *found.shape[1:]), x.dtype).at[held].set(found)


def _held(sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """First rows of the groups, which of them have rows, and the largest size."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return starts, np.flatnonzero(sizes), max(sizes)


def _first(rows: int, size: jax.Array) -> jax.Array:
    return jnp.arange(rows)[:, None] < size


def _rows(x: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, rows)


def ffn(gmm: Callable[[Any, Any], Any], x: Any, w_in: Any, w_out: Any, *w_gate: Any) -> Any:
    """Experts' networks by a grouped product: relu, or silu and gated. [M, D]."""
    up = gmm(x, w_in)
    hidden = jax.nn.silu(gmm(x, w_gate[0])) * up if w_gate else jax.nn.relu(up)
    return gmm(hidden, w_out)


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


def ragged_outer(
    product: Callable[..., Any], num_groups: int, groups: jax.Array, x: jax.Array, g: jax.Array
) -> jax.Array:
    """tgmm as the gradient of a grouped product for its matrices."""
    zeros = jnp.zeros((num_groups, x.shape[1], g.shape[1]), x.dtype)
    return jax.vjp(lambda w: product(x, w, groups), zeros)[1](g)[0]


def one_hot_dispatch(rows: jax.Array, num_rows: int, x: jax.Array) -> jax.Array:
    """dispatch as an einsum with a one-hot tensor [T, k, N]."""
    hot = jax.nn.one_hot(rows, num_rows, dtype=x.dtype)
    return jnp.einsum("tkn,td->nd", hot, x)


def one_hot_combine(rows: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
    """combine as an einsum with a one-hot tensor [T, k, N]."""
    hot = jax.nn.one_hot(rows, y.shape[0], dtype=y.dtype)
    return jnp.einsum("tkn,tk,nd->td", hot, weights.astype(y.dtype), y)


def plain_layer(experts: np.ndarray, x: jax.Array, gate: jax.Array, *weights: Any) -> jax.Array:
    """A dropless MoE layer whose choice of experts [T, k] is known. [T, D]."""
    logits = jnp.dot(x, gate, preferred_element_type=jnp.float32)
    shares = jax.nn.softmax(jnp.take_along_axis(logits, jnp.asarray(experts), axis=1), axis=1)
    order = np.argsort(experts.reshape(-1), kind="stable")
    sizes = tuple(np.bincount(experts.reshape(-1), minlength=gate.shape[1]).tolist())
    token = order // experts.shape[1]
    out = ffn(functools.partial(plain_gmm, sizes), x[token], *weights)
    parts = (out * shares.reshape(-1)[order][:, None]).astype(x.dtype)
    return jnp.zeros_like(x).at[token].add(parts)


def sorted_layer(
    product: Callable[[Any, Any, Any], Any],
    top_k: int,
    x: jax.Array,
    gate: jax.Array,
    *weights: Any,
) -> jax.Array:
    """The layer as it is usually written: sort rows by expert, multiply, add up. [T, D].

    product: [M, K], [E, K, N] and group sizes [E] to [M, N].
    """
    values, experts = jax.lax.top_k(jnp.dot(x, gate, preferred_element_type=jnp.float32), top_k)
    order = jnp.argsort(experts.reshape(-1))
    sizes = jnp.bincount(experts.reshape(-1), length=gate.shape[1]).astype(jnp.int32)
    token = order // top_k
    out = ffn(lambda rows, w: product(rows, w, sizes), x[token], *weights)
    shares = jax.nn.softmax(values, axis=1).reshape(-1)[order]
    return jnp.zeros_like(x).at[token].add((out * shares[:, None]).astype(x.dtype))


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
