"""From what a gate sees to a choice of experts: logits of units, and routers of every kind."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.kernels import Gating, given_gating, top_k_gating
from taskmoe.kernels.checks import accumulator
from taskmoe.kernels.router import denominator, score, weigh
from taskmoe.moe.config import MoEConfig
from taskmoe.moe.parameters import Params
from taskmoe.moe.routers import RouterFunction


class Chosen(NamedTuple):
    """What was chosen: experts [..., k] i32, and their weights [..., k]."""

    experts: jax.Array
    weights: jax.Array


class Told(NamedTuple):
    """What the caller of `apply` chose: experts [..., k] i32, and weights unless the gate weighs.

    logits: [U, E] f32, the gate's, where it weighs.
    """

    experts: jax.Array
    weights: jax.Array | None
    logits: jax.Array | None = None


def gate_logits(params: Params, config: MoEConfig, x: jax.Array) -> jax.Array:
    """Gate logits of x [..., D]: [..., E] f32, or f64 for x in f64, whatever the parameters are.

    By default JAX rounds what it multiplies, on GPU to TF32 and on TPU to bf16, from which close
    experts change places. x in f32 is multiplied unrounded, and so are its gradients, unless
    `jax_default_matmul_precision` says how. With x in bf16 JAX does as it does by default, which
    rounds nothing where the gate is in bf16 too.
    """
    wide, asked = accumulator(x.dtype), cast("Any", jax.config).jax_default_matmul_precision
    unrounded = asked is None and x.dtype != jnp.bfloat16
    x = x.astype(wide)
    if config.gate_norm is not None:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.gate_norm)
        x = x * (params["gate_scale"].astype(wide) * x.shape[-1] ** -0.5)
    precision = jax.lax.Precision.HIGHEST if unrounded else None
    logits = jnp.matmul(x, params["gate"].astype(wide), precision=precision)
    return logits + params["gate_bias"].astype(wide) if "gate_bias" in params else logits


def task_logits(params: Params, config: MoEConfig) -> jax.Array:
    """Gate logits of every task: [tasks, E] f32; with routing "static" from the given table."""
    if config.table is None:
        return gate_logits(params, config, params["task_embedding"])
    weights = config.table_weights or [[1.0 / config.top_k] * config.top_k] * len(config.table)
    # The logits whose scores, sqrt(softplus(z)), are the weights; the others are out of reach.
    square = np.square(np.array(weights, np.float64))
    logits = np.full((len(config.table), config.num_experts), -1e9, np.float32)
    found = square + np.log(-np.expm1(-square))
    np.put_along_axis(logits, np.array(config.table), found.astype(np.float32), axis=1)
    return jnp.asarray(logits)


def gate(
    config: MoEConfig,
    params: Params,
    logits: jax.Array,
    valid: jax.Array,
    implementation: str | None = None,
) -> Gating:
    """Gating of logits [U, E] by the configuration's router, times the experts' scales."""
    return scaled(params, unscaled_gate(config, params, logits, valid, implementation))


def unscaled_gate(
    config: MoEConfig,
    params: Params,
    logits: jax.Array,
    valid: jax.Array,
    implementation: str | None = None,
) -> Gating:
    """Gating of logits [U, E] by the configuration's router."""
    if config.router_function is not None:
        return _by_function(config, config.router_function, logits, valid)
    options: Any = {"router": config.chosen_by, "bias": params.get("choice_bias")}
    options["implementation"] = implementation
    return top_k_gating(logits, config.top_k, valid=valid, **options)


def scaled(params: Params, gating: Gating) -> Gating:
    """The gating with weights times the scales of their experts, where those have some."""
    if "expert_scale" not in params:
        return gating
    scale = params["expert_scale"].astype(gating.weights.dtype)[gating.experts]
    return gating._replace(weights=gating.weights * scale)


def gate_group(
    config: MoEConfig,
    params: Params,
    logits: jax.Array | Told,
    valid: jax.Array,
    draws: jax.Array | None,
    implementation: str | None,
) -> Gating:
    """Gating of one group; with second_policy "sampling" the choices after the first are drawn."""
    if isinstance(logits, Told):
        return scaled(params, _told(config, logits, valid))
    if draws is None or config.second_policy != "sampling":
        return gate(config, params, logits, valid, implementation)
    first = top_k_gating(logits, 1, valid=valid, implementation=implementation)
    lane = jnp.arange(logits.shape[1])
    tiny = jnp.finfo(jnp.float32).tiny
    gumbel = -jnp.log(-jnp.log(jnp.maximum(draws, tiny)))
    others = jnp.where(lane == first.experts, -1e9, jax.lax.stop_gradient(logits) + gumbel)
    later = top_k_gating(others, config.top_k - 1, valid=valid, implementation=implementation)
    experts = jnp.concatenate([first.experts, later.experts], axis=1)
    chosen = jnp.take_along_axis(logits, experts, axis=1).astype(jnp.float32)
    chosen = jnp.where(valid[:, None], chosen, 0)
    slots = later.slots + first.counts[0][later.experts]
    gating = Gating(
        experts=experts,
        weights=jnp.where(valid[:, None], jax.nn.softmax(chosen, axis=1), 0),
        slots=jnp.concatenate([first.slots, jnp.where(valid[:, None], slots, -1)], axis=1),
        counts=jnp.concatenate([first.counts, later.counts]),
        mean_probs=first.mean_probs,
        z_loss=first.z_loss,
    )
    return scaled(params, gating)


def _told(config: MoEConfig, told: Told, valid: jax.Array) -> Gating:
    """Gating of what the caller chose; an expert that is none counts as the nearest in sums."""
    if told.logits is None:
        assert told.weights is not None
        return given_gating(told.experts, told.weights, config.num_experts, valid=valid)
    logits = jnp.where(valid[:, None], told.logits, 0)
    near = jnp.clip(told.experts, 0, config.num_experts - 1)
    chosen = jnp.split(jnp.take_along_axis(logits, near, axis=1), config.top_k, axis=1)
    weights = jnp.concatenate(weigh(config.chosen_by, chosen, denominator(logits, 1)), axis=1)
    gating = given_gating(told.experts, weights, config.num_experts, valid=valid)
    return _with_statistics(config, gating, logits, valid)


def _with_statistics(
    config: MoEConfig, gating: Gating, logits: jax.Array, valid: jax.Array
) -> Gating:
    """The gating with what the auxiliary losses need of the logits [U, E]."""
    units = jnp.maximum(jnp.sum(valid), 1)
    lse = jnp.where(valid, jax.nn.logsumexp(logits, axis=1), 0)
    probs = probabilities(config, logits, valid)
    return gating._replace(
        mean_probs=jnp.sum(probs, axis=0) / units, z_loss=jnp.sum(lse**2) / units
    )


def probabilities(config: MoEConfig, logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Scores of logits [U, E] divided by their sum; 0 where a unit is not valid."""
    logits = jnp.where(valid[:, None], logits, 0)
    scores = score(config.chosen_by, logits, denominator(logits, 1))
    return scores / jnp.sum(scores, axis=1, keepdims=True) * valid[:, None]


def _by_function(
    config: MoEConfig, function: RouterFunction, logits: jax.Array, valid: jax.Array
) -> Gating:
    """Gating by a function; statistics are those of the logits' softmax."""
    logits = jnp.where(valid[:, None], logits, 0)
    experts, weights = function(logits, config.top_k)
    want = (logits.shape[0], config.top_k)
    for name, value in (("experts", experts), ("weights", weights)):
        if value.shape != want:
            raise ValueError(
                f"router must return {name} [U, k] = {list(want)}, got {list(value.shape)}"
            )
    gating = given_gating(experts, weights, config.num_experts, valid=valid)
    return _with_statistics(config, gating, logits, valid)
