"""Routers that are functions: from gate logits [U, E] f32 and top_k to experts and weights [U, k].

The rest are a `taskmoe.kernels.Router` each, which the gating kernel knows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import as_floats, as_size, check_shape
from taskmoe.kernels.platforms import with_plain_settings

RouterFunction = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


@with_plain_settings
def sparse_mixer(
    logits: jax.Array, top_k: int, *, jitter: float = 0.01, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """SparseMixer-v2: each weight is a softmax over near rivals.

        m = max z of experts not chosen yet
        p = softmax(z) over i not chosen yet with (m - z_i) / max(|z_i|, m) <= 2 jitter
        e_j = argmax p, w_j = p[e_j]

    key: while training. Then `e_j` is drawn from p, and three times of four a weight is a third
    where the draw is not the best: Heun's third-order estimate of the gate's gradient, which stays
    that of p[e_j]. A layer takes what was drawn by routing "given".

    logits: [U, E] bf16|f32. top_k: from 1 to E. Returns experts [U, k] i32, in the order of choice,
    and weights [U, k] in logits' dtype. Raises ValueError or TypeError where an argument does not
    fit.

    Liu et al. 2024, GRIN (arXiv 2409.12136); PhiMoE.
    """
    logits = as_floats("logits", logits)
    check_shape("logits", logits, ("U", "E"))
    if as_size("top_k", top_k) > logits.shape[1]:
        raise ValueError(f"top_k must be at most E={logits.shape[1]}, got {top_k}")
    lane = jnp.arange(logits.shape[1])
    left = jnp.ones(logits.shape, bool)
    experts, weights = [], []
    for turn in range(top_k):
        open_ = jnp.where(left, logits, -jnp.inf)
        best = jnp.max(open_, axis=1, keepdims=True)
        expert = first = jnp.argmax(open_, axis=1).astype(jnp.int32)
        near = (best - logits) / jnp.maximum(jnp.abs(logits), best) <= 2 * jitter
        rivals = jnp.where(left & near, logits, -jnp.inf)
        whole = jnp.ones(expert.shape, bool)
        if key is not None:
            draw, step = jax.random.split(jax.random.fold_in(key, turn))
            expert = jax.random.categorical(draw, rivals, axis=1).astype(jnp.int32)
            whole = (expert == first) | (jax.random.uniform(step, expert.shape) > 0.75)
        chosen = lane == expert[:, None]
        weight = jnp.sum(jnp.where(chosen, jax.nn.softmax(rivals, axis=1), 0), axis=1)
        experts.append(expert)
        # Value and gradient part: the gradient is that of the whole weight.
        weights.append(weight - jax.lax.stop_gradient(jnp.where(whole, 0, weight * (2 / 3))))
        left &= ~chosen
    return jnp.stack(experts, axis=1), jnp.stack(weights, axis=1)


#: By the names that transformers gives to their architectures.
ROUTER_FUNCTIONS: dict[str, RouterFunction] = {"phimoe": sparse_mixer}
