"""Routers that are functions: from gate logits [U, E] f32 and top_k to experts and weights [U, k].

The rest are a `taskmoe.kernels.Router` each, which the gating kernel knows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskmoe.kernels.platforms import with_plain_settings

RouterFunction = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


@with_plain_settings
def sparse_mixer(
    logits: jax.Array, top_k: int, *, jitter: float = 0.01
) -> tuple[jax.Array, jax.Array]:
    """SparseMixer-v2's choice where nothing is drawn: each weight is a softmax over near rivals.

        e_j = argmax z of experts not chosen yet, m its logit
        w_j = exp(m) / sum exp(z_i),  i not chosen yet with (m - z_i) / max(|z_i|, m) <= 2 jitter

    logits: [U, E] f32. Returns experts [U, k] i32, best first, and weights [U, k] f32.

    Liu et al. 2024, GRIN (arXiv 2409.12136); PhiMoE serves with it. Its training draws experts and
    estimates the gate's gradient by Heun's method, which this does not.
    """
    lane = jnp.arange(logits.shape[1])
    left = jnp.ones(logits.shape, bool)
    experts, weights = [], []
    for _ in range(top_k):
        open_ = jnp.where(left, logits, -jnp.inf)
        best = jnp.max(open_, axis=1, keepdims=True)
        expert = jnp.argmax(open_, axis=1).astype(jnp.int32)
        near = (best - logits) / jnp.maximum(jnp.abs(logits), best) <= 2 * jitter
        odds = jax.nn.softmax(jnp.where(left & near, logits, -jnp.inf), axis=1)
        chosen = lane == expert[:, None]
        experts.append(expert)
        weights.append(jnp.sum(jnp.where(chosen, odds, 0), axis=1))
        left &= ~chosen
    return jnp.stack(experts, axis=1), jnp.stack(weights, axis=1)


#: By the names that transformers gives to their architectures.
ROUTER_FUNCTIONS: dict[str, RouterFunction] = {"phimoe": sparse_mixer}
