"""What is routed as one unit, how it is scored, and what the layer reports about it.

With "token" routing the units are the B*S tokens; with "sentence" and "task" they are the B
sequences, so that queues, row plan and row movement never look at a token.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from taskmoe.kernels import Gating
from taskmoe.moe.config import Metrics, MoEConfig

Params = dict[str, jax.Array]


def gate_logits(params: Params, x: jax.Array) -> jax.Array:
    """Gate logits of x [..., D]: [..., E] f32, whatever the dtype of the parameters."""
    return x.astype(jnp.float32) @ params["gate"].astype(jnp.float32)


def task_logits(params: Params) -> jax.Array:
    """Gate logits of every task: [num_tasks, E] f32."""
    return gate_logits(params, params["task_embedding"])


def unit_logits(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    valid: jax.Array | None,
    task: jax.Array | None,
    sentence: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Gate logits [U, E] f32 of the units that are routed, and which of them are valid [U] bool."""
    batch, length, d = x.shape
    if valid is None:
        valid = jnp.ones((batch, length), bool)
    if config.routing == "token":
        return gate_logits(params, x.reshape(batch * length, d)), valid.reshape(-1)
    if config.routing == "task":
        return task_logits(params)[task], valid.any(axis=1)
    if sentence is not None:
        return gate_logits(params, sentence), valid.any(axis=1)
    total = jnp.sum(jnp.where(valid[..., None], x.astype(jnp.float32), 0), axis=1)
    mean = total / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
    return gate_logits(params, mean), valid.any(axis=1)


def capacity(config: MoEConfig, units: int) -> int | None:
    """Rows an expert has room for among `units` routed together; None when dropless."""
    if config.capacity_factor is None:
        return None
    return math.ceil(config.capacity_factor * config.top_k * units / config.num_experts)


def metrics(config: MoEConfig, gating: Gating, num_valid: jax.Array, placed: jax.Array) -> Metrics:
    """Losses and statistics from the sums that the gating pass already made.

    num_valid: [] i32, valid units; placed: [] i32, assignments that found room.
    """
    units = jnp.maximum(num_valid, 1).astype(jnp.float32)
    probs = gating.mean_probs
    first = gating.counts[0].astype(jnp.float32) / units
    balance = config.num_experts * jnp.sum(first * probs)
    log_probs = jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))
    return Metrics(
        aux_loss=config.load_balance_weight * balance + config.z_loss_weight * gating.z_loss,
        load_balance_loss=balance,
        z_loss=gating.z_loss,
        dropped=jnp.where(
            num_valid > 0, 1 - placed.astype(jnp.float32) / (units * config.top_k), 0.0
        ),
        load=gating.counts.sum(0).astype(jnp.float32) / (units * config.top_k),
        entropy=-jnp.sum(probs * log_probs),
    )
