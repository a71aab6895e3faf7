"""What is routed as one unit, how it is scored and placed, and what the layer reports about it.

With "token" routing the units are the B*S tokens; with the other levels they are the B sequences,
so that queues, row plan and row movement never look at a token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.kernels import Gating, RowPlan, given_gating, row_plan, top_k_gating
from taskmoe.kernels.router import denominator, score, weigh
from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.routers import RouterFunction

Params = dict[str, jax.Array]


def gate_logits(params: Params, config: MoEConfig, x: jax.Array) -> jax.Array:
    """Gate logits of x [..., D]: [..., E] f32, whatever the dtype of the parameters."""
    x = x.astype(jnp.float32)
    if config.gate_norm is not None:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.gate_norm)
        x = x * (params["gate_scale"].astype(jnp.float32) * x.shape[-1] ** -0.5)
    logits = x @ params["gate"].astype(jnp.float32)
    return logits + params["gate_bias"].astype(jnp.float32) if "gate_bias" in params else logits


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


class Noise(NamedTuple):
    """What routing draws while training; None where the configuration draws nothing.

    policy: [B, u, n] f32 in [0, 1): with second_policy "random" n = top_k - 1, an assignment is
      dropped where the draw is at least twice its weight; with "sampling" n = E, logits get
      `-log(-log(draw))` added before the choices after the first are taken.
    jitter: [B, u, D] f32 factors. u is the number of units a sequence: S, or 1.
    """

    policy: jax.Array | None = None
    jitter: jax.Array | None = None


def draw_noise(config: MoEConfig, key: jax.Array | None, batch: int, length: int) -> Noise:
    """Noise of one call for [batch, length] tokens; none without a key."""
    if key is None or config.by_task:
        return Noise()
    first, second = jax.random.split(key)
    units = length if config.routing == "token" else 1
    draws = {"all": 0, "random": config.top_k - 1, "sampling": config.num_experts}
    policy = jitter = None
    if config.second_policy != "all" and config.top_k > 1:
        policy = jax.random.uniform(first, (batch, units, draws[config.second_policy]))
    if config.jitter:
        shape = (batch, units, config.d_model)
        jitter = jax.random.uniform(second, shape, minval=-1, maxval=1) * config.jitter + 1
    return Noise(policy, jitter)


def unit_logits(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    valid: jax.Array,
    task: jax.Array | None,
    sentence: jax.Array | None,
    noise: Noise,
    told: Told | None,
    gate_input: jax.Array | None,
) -> tuple[jax.Array | Told, jax.Array]:
    """Gate logits [U, E] f32 of the units that are routed, and which of them are valid [U] bool.

    What the caller has chosen stands for the logits, or goes with them.
    """
    batch, length, d = x.shape
    if told is not None:
        told = jax.tree.map(lambda a: a.reshape(batch * length, config.top_k), told)
        if told.weights is not None:
            return told, valid.reshape(-1)
    if config.by_task:
        return task_logits(params, config)[task], valid.any(axis=1)
    if config.routing == "token":
        seen = x if gate_input is None else gate_input
        seen, unit_valid = seen.reshape(batch * length, d), valid.reshape(-1)
    elif sentence is not None:
        seen, unit_valid = sentence, valid.any(axis=1)
    else:
        total = jnp.sum(jnp.where(valid[..., None], x.astype(jnp.float32), 0), axis=1)
        seen = total / jnp.maximum(valid.sum(axis=1, keepdims=True), 1)
        unit_valid = valid.any(axis=1)
    if noise.jitter is not None:
        seen = seen.astype(jnp.float32) * noise.jitter.reshape(seen.shape)
    logits = gate_logits(params, config, seen)
    return logits if told is None else told._replace(logits=logits), unit_valid


class Assignment(NamedTuple):
    """Where units go.

    gating: statistics over all units; slots and counts before any capacity. plan: rows and sizes.
    balance: [] f32, the load-balance loss over groups; None where all units are one group, whose
      loss follows from gating's statistics.
    """

    gating: Gating
    plan: RowPlan
    balance: jax.Array | None


def assign(
    config: MoEConfig,
    logits: jax.Array | Told,
    valid: jax.Array,
    noise: Noise,
    implementation: str | None,
    capacity_room: int | None = None,
    params: Params | None = None,
) -> Assignment:
    """Choose experts for units [U, E] and give each assignment its row.

    params: the layer's, of which the router may want some.
    capacity_room: rows an expert, where a dropless layer wants a padded plan all the same.
    Raises ValueError where group_size does not divide the units.
    """
    units = valid.shape[0]
    size = config.group_size or units
    if units % size:
        raise ValueError(f"group_size must divide the {units} units routed together, got {size}")
    groups = units // size
    room = capacity(config, size)
    params = params or {}
    draws = None if noise.policy is None else noise.policy.reshape(units, -1)
    if config.group_size is None:
        gating = _gate(config, params, logits, valid, draws, implementation)
        balance = None
    else:
        split = jax.tree.map(
            lambda a: a.reshape(groups, size, *a.shape[1:]), (logits, valid, draws)
        )
        each = jax.vmap(lambda a, b, c: _gate(config, params, a, b, c, implementation))(*split)
        gating, balance = _merge(config, each, jnp.sum(split[1], axis=1))
    if room is None:
        return Assignment(gating, row_plan(gating, capacity=capacity_room), balance)
    slots = gating.slots
    kept = (slots >= 0) & (slots < room)
    if draws is not None and config.second_policy == "random":
        kept = kept.at[:, 1:].set(kept[:, 1:] & (draws < 2 * gating.weights[:, 1:]))
    group = jnp.arange(units, dtype=jnp.int32)[:, None] // size
    slots = jnp.where(kept, group * room + slots, groups * room)
    plan = row_plan(gating._replace(slots=slots), capacity=groups * room)
    if config.renormalise:
        left = jnp.where(plan.rows < plan.num_rows, gating.weights, 0)
        had, kept_sum = (jnp.sum(w, axis=1, keepdims=True) for w in (gating.weights, left))
        some = kept_sum > 0
        scale = jnp.where(some, had / jnp.where(some, kept_sum, 1), 0)
        gating = gating._replace(weights=left * scale)
    return Assignment(gating, plan, balance)


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


def _told(config: MoEConfig, told: Told, valid: jax.Array) -> Gating:
    """Gating of what the caller chose; an expert that is none counts as the nearest in sums."""
    weights, logits = told.weights, told.logits
    if logits is None:
        return given_gating(told.experts, weights, config.num_experts, valid=valid)
    logits = jnp.where(valid[:, None], logits, 0)
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


def sequence_balance(
    config: MoEConfig, logits: jax.Array, gating: Gating, valid: jax.Array
) -> jax.Array:
    """Load-balance loss of each sequence alone, and the mean weighed by their valid tokens: [] f32.

        E * sum_e f_e P_e,  f the share of a sequence's assignments, P its mean probability

    logits: [B*S, E]. valid: [B, S].
    """
    probs = probabilities(config, logits, valid.reshape(-1))
    hit = jax.nn.one_hot(gating.experts, config.num_experts).sum(1) * valid.reshape(-1, 1)
    tokens = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)  # [B, 1]
    mean = lambda a: a.reshape(*valid.shape, -1).sum(1) / tokens  # noqa: E731
    each = config.num_experts * jnp.sum(mean(hit) / config.top_k * mean(probs), axis=1)
    share = jnp.sum(valid, axis=1) / jnp.maximum(jnp.sum(valid), 1)
    return jnp.sum(share * each)


def weigh_input(
    config: MoEConfig, x: jax.Array, assigned: Assignment
) -> tuple[jax.Array, Assignment]:
    """Units times their weights, and weights of 1, where the router weighs what goes in."""
    if config.chosen_by.weighs == "output":
        return x, assigned
    weights = assigned.gating.weights  # [U, 1]
    chosen = (assigned.gating.slots >= 0).astype(weights.dtype)
    gating = assigned.gating._replace(weights=chosen)
    return (x * weights).astype(x.dtype), assigned._replace(gating=gating)


def balance_bias(bias: jax.Array, load: jax.Array, rate: float = 1e-3) -> jax.Array:
    """The choice bias after a step: up where an expert had less than the mean load, else down.

        b_e + rate * sign(mean(load) - load_e)

    bias: [E], `params["choice_bias"]`. load: [E], of `Metrics`. Wang et al. 2024, Auxiliary-loss-
    free load balancing (arXiv 2408.15664).
    """
    return bias + rate * jnp.sign(jnp.mean(load) - load).astype(bias.dtype)


def _gate(
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


def _merge(config: MoEConfig, each: Gating, num_valid: jax.Array) -> tuple[Gating, jax.Array]:
    """One gating of [G, S, ...] and the load-balance loss, groups weighed by their valid units."""
    share = num_valid / jnp.maximum(jnp.sum(num_valid), 1).astype(jnp.float32)  # [G]
    counted = each.counts[:, 0] if config.balance == "first" else each.counts.sum(1)
    counted = counted / jnp.maximum(num_valid, 1).astype(jnp.float32)[:, None]
    balance = config.num_experts * jnp.sum(share * jnp.sum(counted * each.mean_probs, axis=1))
    merged = Gating(
        experts=each.experts.reshape(-1, each.experts.shape[2]),
        weights=each.weights.reshape(-1, each.weights.shape[2]),
        slots=each.slots.reshape(-1, each.slots.shape[2]),
        counts=each.counts.sum(axis=0),
        mean_probs=share @ each.mean_probs,
        z_loss=share @ each.z_loss,
    )
    return merged, balance


def capacity(config: MoEConfig, units: int) -> int | None:
    """Rows an expert has room for among `units` routed together; None when dropless."""
    if config.capacity_factor is None:
        return None
    return math.ceil(config.capacity_factor * config.top_k * units / config.num_experts)


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
