"""What a training step and decoding are compared with when they are timed: a frozen imitation.

A machine's speed changes within minutes, and not for all work alike; so this is the same kind of
work as the workloads in `frozen`: small matrix products in a loop, attention over a cache that
grows, softmax, sorting rows by expert, moving them, a loop over blocks of rows with a matrix each,
and a large softmax; forward and backward with an Adam update for training. It uses nothing of
taskmoe, so that no change of the library changes it.

Do not edit: every stored ratio is a ratio to this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

D, F, E, HEADS, VOCABULARY, LAYERS, BLOCK = 64, 128, 8, 4, 1024, 4, 16


def decoding(batch: int = 32, positions: int = 24) -> Callable[[], Any]:
    """A compiled loop over positions of `batch` sequences; a call starts it."""
    params = _params()
    shape = (LAYERS, batch, HEADS, positions, D // HEADS)
    cache = jnp.zeros(shape), jnp.zeros(shape)

    def program(params: Any, cache: Any, token: jax.Array) -> jax.Array:
        def step(position: jax.Array, state: Any) -> Any:
            token, (keys, values) = state
            x = params["embedding"][token]
            seen = jnp.arange(positions) <= position
            for i, layer in enumerate(params["layers"]):
                q, k, v = (
                    part.reshape(batch, HEADS, 1, -1)
                    for part in jnp.split(_norm(x) @ layer["qkv"], 3, axis=-1)
                )
                at = (i, 0, 0, position, 0)
                keys = jax.lax.dynamic_update_slice(keys, k[None], at)
                values = jax.lax.dynamic_update_slice(values, v[None], at)
                x = x + _attention(q, keys[i], values[i], seen).reshape(batch, D) @ layer["out"]
                x = x + _feed_forward(layer, _norm(x))
            logits = _norm(x) @ params["softmax"]
            best = jnp.max(logits, axis=-1, keepdims=True)
            index = jnp.arange(VOCABULARY)
            return jnp.min(jnp.where(logits == best, index, VOCABULARY - 1), axis=-1), (
                keys,
                values,
            )

        return jax.lax.fori_loop(0, positions, step, (token, cache))[0]

    inputs = params, cache, jnp.arange(batch)
    return functools.partial(jax.jit(program).lower(*inputs).compile(), *inputs)


def training(batch: int = 8, length: int = 16) -> Callable[[], Any]:
    """A compiled step of Adam on a next-token loss; a call makes one step from the same state."""
    params = _params()
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, VOCABULARY)
    causal = jnp.tril(jnp.ones((length, length), bool))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embedding"][tokens]
        for layer in params["layers"]:
            q, k, v = (
                part.reshape(batch, length, HEADS, -1).swapaxes(1, 2)
                for part in jnp.split(_norm(x) @ layer["qkv"], 3, axis=-1)
            )
            y = _attention(q, k, v, causal).swapaxes(1, 2)
            x = x + y.reshape(batch, length, D) @ layer["out"]
            y = _feed_forward(layer, _norm(x).reshape(-1, D))
            x = x + y.reshape(x.shape)
        logits = _norm(x) @ params["softmax"]
        chosen = jnp.take_along_axis(logits, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0])

    def program(params: Any, first: Any, second: Any, tokens: jax.Array) -> Any:
        grads = jax.grad(loss)(params, tokens)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.98 * v + 0.02 * g * g, second, grads)
        params = jax.tree.map(
            lambda p, m, v: p - 1e-3 * m * jax.lax.rsqrt(v + 1e-8), params, first, second
        )
        return params, first, second

    zeros = jax.tree.map(jnp.zeros_like, params)
    inputs = params, zeros, zeros, tokens
    return functools.partial(jax.jit(program).lower(*inputs).compile(), *inputs)


def _params() -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 3 + 6 * LAYERS))

    def matrix(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-2] ** -0.5

    def layer() -> Any:
        return {
            "qkv": matrix(D, 3 * D),
            "out": matrix(D, D),
            "gate": matrix(D, E),
            "w_in": matrix(E, D, F),
            "w_out": matrix(E, F, D),
        }

    return {
        "embedding": matrix(VOCABULARY, D),
        "softmax": matrix(D, VOCABULARY),
        "layers": [layer() for _ in range(LAYERS)],
    }


def _norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    scores = jnp.where(seen, jnp.einsum("bhtd,bhsd->bhts", q, k), -1e9)
    return jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores), v)


def _feed_forward(layer: Any, x: jax.Array) -> jax.Array:
    """Rows [T, D] to two experts each: sorted by expert, in blocks of rows with a matrix each."""
    chosen, experts = jax.lax.top_k(jax.nn.softmax(x @ layer["gate"]), 2)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)
    rows = x[order // 2].reshape(-1, BLOCK, D)
    owners = flat[order].reshape(-1, BLOCK)[:, 0]

    def block(_: None, inputs: Any) -> Any:
        rows, owner = inputs
        hidden = jax.nn.relu(rows @ layer["w_in"][owner])
        return None, hidden @ layer["w_out"][owner]

    _, out = jax.lax.scan(block, None, (rows, owners))
    back = jnp.zeros((flat.size, D)).at[order].set(out.reshape(-1, D))
    return jnp.einsum("tk,tkd->td", chosen, back.reshape(x.shape[0], 2, D))
