"""Expert parallelism: each device holds E/n experts and rows travel by two all-to-alls.

Each device gates its own units, lays the rows out as [E, C] (C the capacity, or the number of
local units when dropless: an expert is chosen at most once a unit) and sends every peer its
experts' part. The receiver packs what arrived by expert, so that padding is sent but never
multiplied, runs its experts and sends the results back the same way.

Bytes on the wire a device and layer: 2 * (n-1)/n * E * C * width * itemsize.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.kernels import combine, dispatch, expert_ffn, row_plan, top_k_gating
from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.routing import Params, capacity, metrics, unit_logits

EXPERT_AXIS = "expert"
SHARDED = ("w_in", "w_out", "w_gate")


def param_specs(params: Params) -> dict[str, P]:
    """How parameters lie on a mesh: experts over the axis "expert", the rest everywhere."""
    return {name: P(EXPERT_AXIS) if name in SHARDED else P() for name in params}


def exchange_apply(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    valid: jax.Array | None,
    task: jax.Array | None,
    sentence: jax.Array | None,
    mesh: Mesh,
    implementation: str | None,
) -> tuple[jax.Array, Metrics]:
    """The layer over a mesh with an axis "expert"; arguments and results as in `apply`.

    x [B, S, D] is sharded over all mesh axes by sequence. Capacity, where there is one, is counted
    on each device's own units, which are GShard's groups.
    """
    axes = mesh.axis_names
    peers = mesh.shape[EXPERT_AXIS]
    local_experts = config.num_experts // peers
    batch, length, d = x.shape
    if valid is None:
        valid = jnp.ones((batch, length), bool)

    def local(
        params: Params,
        x: jax.Array,
        valid: jax.Array,
        task: jax.Array | None,
        sentence: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        logits, unit_valid = unit_logits(params, config, x, valid, task, sentence)
        units = logits.shape[0]
        room = capacity(config, units) or units
        gating = top_k_gating(logits, config.top_k, valid=unit_valid, implementation=implementation)
        plan = row_plan(gating, capacity=room)
        sent = dispatch(
            x.reshape(units, -1), plan.rows, plan.num_rows, implementation=implementation
        )
        width = sent.shape[1]
        received = _all_to_all(sent.reshape(peers, local_experts * room, width))
        sizes = jnp.minimum(gating.counts.sum(0), room).reshape(peers, local_experts)
        packed, group_sizes = _pack(_all_to_all(sizes), room)
        rows = dispatch(
            received.reshape(-1, width), packed, packed.shape[0], implementation=implementation
        )
        out = expert_ffn(
            rows.reshape(-1, d),
            params["w_in"],
            params["w_out"],
            group_sizes * (width // d),
            activation=config.activation,
            w_gate=params.get("w_gate"),
            implementation=implementation,
        ).reshape(-1, width)
        ones = jnp.ones(packed.shape, jnp.float32)
        unpacked = combine(out, packed, ones, implementation=implementation)
        back = _all_to_all(unpacked.reshape(peers, local_experts * room, width))
        y = combine(
            back.reshape(plan.num_rows, width),
            plan.rows,
            gating.weights,
            implementation=implementation,
        ).reshape(x.shape)

        num_local = jnp.sum(unit_valid)
        num_valid = jax.lax.psum(num_local, axes)
        share = num_local / jnp.maximum(num_valid, 1).astype(jnp.float32)
        whole = gating._replace(
            counts=jax.lax.psum(gating.counts, axes),
            mean_probs=jax.lax.psum(gating.mean_probs * share, axes),
            z_loss=jax.lax.psum(gating.z_loss * share, axes),
        )
        placed = jax.lax.psum(jnp.sum(plan.rows < plan.num_rows), axes)
        return y, metrics(config, whole, num_valid, placed)

    by_sequence: Any = P(axes)
    arguments = (params, x, valid, task, sentence)
    in_specs = (param_specs(params), *(None if a is None else by_sequence for a in arguments[1:]))
    explicit = AxisType.Explicit in mesh.axis_types
    if explicit:  # shardings are part of the types there
        arguments = jax.tree.map(
            lambda leaf, spec: jax.reshard(leaf, NamedSharding(mesh, spec)), arguments, in_specs
        )
    y, report = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(by_sequence, P()))(
        *arguments
    )
    if explicit:
        y = jax.reshard(y, NamedSharding(mesh, jax.typeof(x).sharding.spec))
    return y, report


def _all_to_all(x: jax.Array) -> jax.Array:
    """[peers, ...]: part p goes to peer p; part p of the result came from peer p."""
    return jax.lax.all_to_all(x, EXPERT_AXIS, split_axis=0, concat_axis=0)


def _pack(counts: jax.Array, room: int) -> tuple[jax.Array, jax.Array]:
    """Where each received row [peer, expert, slot] goes so that rows lie packed by expert.

    counts: [peers, E_local] i32, rows received. Returns rows [peers*E_local*room, 1] i32 (the
    number of rows where a slot is empty) and group_sizes [E_local] i32.
    """
    peers, experts = counts.shape
    group_sizes = counts.sum(0)
    start = jnp.cumsum(group_sizes) - group_sizes
    before = jnp.cumsum(counts, axis=0) - counts
    slot = jnp.arange(room, dtype=jnp.int32)
    row = (start + before)[:, :, None] + slot
    row = jnp.where(slot < counts[:, :, None], row, peers * experts * room)
    return row.reshape(-1, 1).astype(jnp.int32), group_sizes
