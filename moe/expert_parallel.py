"""Expert parallelism: each device holds E/n experts and its own sequences; rows travel.

What is local (routing, losses) and what is summed over devices stands here; how rows travel stands
in `exchange`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.kernels.checks import in_interpret_mode
from taskmoe.kernels.exchange_kernel import check_can_run
from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.exchange import EXPERT_AXIS, Peers, choose, run_experts
from taskmoe.moe.routing import Noise, Params, assign, metrics, unit_logits

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
    noise: Noise,
    mesh: Mesh,
    strategy: str,
    implementation: str | None,
) -> tuple[jax.Array, Metrics]:
    """The layer over a mesh with an axis "expert"; arguments and results as in `apply`.

    x [B, S, D] is sharded over all mesh axes by sequence. Capacity, where there is one, is counted
    on each device's own units, in groups of `group_size` where that is given.
    """
    if strategy == "mosaic":
        check_can_run("strategy='mosaic'")
    axes = mesh.axis_names
    peers = Peers(mesh.shape[EXPERT_AXIS], mesh.devices.flat[0].platform != "cpu")
    batch, length, _ = x.shape
    if valid is None:
        valid = jnp.ones((batch, length), bool)

    def local(
        params: Params,
        x: jax.Array,
        valid: jax.Array,
        task: jax.Array | None,
        sentence: jax.Array | None,
        noise: Noise,
    ) -> tuple[jax.Array, Metrics]:
        logits, unit_valid = unit_logits(params, config, x, valid, task, sentence, noise)
        units = logits.shape[0]
        chosen = choose(strategy, config, units, peers)
        padded = units if chosen in ("all_to_all", "kept") else None
        assigned = assign(config, logits, unit_valid, noise, implementation, padded)
        y = run_experts(
            chosen, params, config, x.reshape(units, -1), assigned, peers, implementation
        ).reshape(x.shape)

        gating, plan, balance = assigned
        num_local = jnp.sum(unit_valid)
        num_valid = jax.lax.psum(num_local, axes)
        share = num_local / jnp.maximum(num_valid, 1).astype(jnp.float32)
        whole = gating._replace(
            counts=jax.lax.psum(gating.counts, axes),
            mean_probs=jax.lax.psum(gating.mean_probs * share, axes),
            z_loss=jax.lax.psum(gating.z_loss * share, axes),
        )
        if balance is not None:
            balance = jax.lax.psum(balance * share, axes)
        placed = jax.lax.psum(jnp.sum(plan.rows < plan.num_rows), axes)
        return y, metrics(config, whole, num_valid, placed, balance)

    by_sequence: Any = P(axes)
    arguments = (params, x, valid, task, sentence, noise)
    in_specs = (
        param_specs(params),
        *jax.tree.map(lambda _: by_sequence, arguments[1:]),
    )
    explicit = AxisType.Explicit in mesh.axis_types
    if explicit:  # shardings are part of the types there
        arguments = jax.tree.map(
            lambda leaf, spec: jax.reshard(leaf, NamedSharding(mesh, spec)), arguments, in_specs
        )
    y, report = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=(by_sequence, P()),
        check_vma=not in_interpret_mode(),  # JAX's interpreter does not know varying axes
    )(*arguments)
    if explicit:
        y = jax.reshard(y, NamedSharding(mesh, jax.typeof(x).sharding.spec))
    return y, report
