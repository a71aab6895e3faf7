"""What is routed as one unit and how it is placed.

With "token" routing the units are the B*S tokens; with the other levels they are the B sequences,
so that queues, row plan and row movement never look at a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from taskmoe.kernels import Gating, RowPlan, row_plan
from taskmoe.moe.config import MoEConfig
from taskmoe.moe.gates import Told, gate_group, gate_logits, task_logits
from taskmoe.moe.parameters import Params


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
        gating = gate_group(config, params, logits, valid, draws, implementation)
        balance = None
    else:
        split = jax.tree.map(
            lambda a: a.reshape(groups, size, *a.shape[1:]), (logits, valid, draws)
        )
        each = jax.vmap(lambda a, b, c: gate_group(config, params, a, b, c, implementation))(*split)
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
    if jax.export.is_symbolic_dim(units):
        raise ValueError(
            f"capacity_factor must be None, or have a group_size, where a symbolic number of units "
            f"is routed together ({units}), got {config.capacity_factor}: or export for fixed sizes"
        )
    return math.ceil(config.capacity_factor * config.top_k * units / config.num_experts)
