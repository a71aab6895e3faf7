"""What keeps experts balanced, and what a layer reports about one batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from taskmoe.kernels import Gating
from taskmoe.kernels.checks import as_floats, check_shape
from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.gates import probabilities


def balance_bias(bias: jax.Array, load: jax.Array, rate: float = 1e-3) -> jax.Array:
    """The choice bias after a step: up where an expert had less than the mean load, else down.

        b_e + rate * sign(mean(load) - load_e)

    bias: [E], `params["choice_bias"]`. load: [E], of `Metrics`. Raises ValueError or TypeError
    where they do not fit. Wang et al. 2024, Auxiliary-loss-free load balancing (arXiv 2408.15664).
    """
    bias, load = as_floats("bias", bias), as_floats("load", load)
    check_shape("bias", bias, ("E",))
    check_shape("load", load, bias.shape)
    return bias + rate * jnp.sign(jnp.mean(load) - load).astype(bias.dtype)


def sequence_balance(
    config: MoEConfig, logits: jax.Array, gating: Gating, valid: jax.Array
) -> jax.Array:
    """Load-balance loss of each sequence alone, and the mean weighed by their valid tokens: [] f32.

        E * sum_e f_e P_e,  f the share of a sequence's assignments, P its mean probability

    logits: [B*S, E]. valid: [B, S].
    """
    probs = probabilities(config, logits, valid.reshape(-1))
    assigned = jnp.where(gating.slots >= 0, gating.experts, config.num_experts)
    hit = jax.nn.one_hot(assigned, config.num_experts).sum(1)  # zeros past the last expert
    tokens = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)  # [B, 1]
    mean = lambda a: a.reshape(*valid.shape, -1).sum(1) / tokens  # noqa: E731
    each = config.num_experts * jnp.sum(mean(hit) / config.top_k * mean(probs), axis=1)
    share = jnp.sum(valid, axis=1) / jnp.maximum(jnp.sum(valid), 1)
    return jnp.sum(share * each)


def metrics(
    config: MoEConfig,
    gating: Gating,
    num_valid: jax.Array,
    placed: jax.Array,
    balance: jax.Array | None = None,
) -> Metrics:
    """Losses and statistics from the sums that the gating pass already made.

    num_valid: [] i32, valid units; placed: [] i32, assignments that found room. balance: the
    load-balance loss where it is not that of gating's sums.
    """
    units = jnp.maximum(num_valid, 1).astype(jnp.float32)
    probs = gating.mean_probs
    counted = gating.counts[0] if config.balance == "first" else gating.counts.sum(0)
    if balance is None:
        share = counted.astype(jnp.float32) / units
        balance = config.num_experts * jnp.sum(share * probs)
    z_loss = gating.z_loss
    if config.routing == "static":
        balance, z_loss = jnp.zeros_like(balance), jnp.zeros_like(z_loss)
    log_probs = jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny))
    return Metrics(
        aux_loss=config.load_balance_weight * balance + config.z_loss_weight * z_loss,
        load_balance_loss=balance,
        z_loss=z_loss,
        dropped=(num_valid * config.top_k - placed) / (units * config.top_k),
        load=gating.counts.sum(0).astype(jnp.float32) / (units * config.top_k),
        entropy=-jnp.sum(probs * log_probs),
    )
