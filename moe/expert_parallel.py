"""The layer's work on one device, and the same on a mesh: each holds E/n experts and its sequences.

What is local (routing, losses) and what is summed over devices stands here; how rows travel stands
in `exchange`, what the axes of a mesh are for in `mesh`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.kernels import Gating
from taskmoe.kernels.checks import vary_over
from taskmoe.kernels.exchange_kernel import check_can_run
from taskmoe.kernels.platforms import interpret_mode
from taskmoe.moe.balance import metrics, sequence_balance
from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.exchange import STRATEGIES, choose
from taskmoe.moe.extraction import dense_ffn, fold, shared_ffn
from taskmoe.moe.gates import Chosen, Told, gate, task_logits
from taskmoe.moe.mesh import Layout
from taskmoe.moe.nested import nested_shard_map
from taskmoe.moe.parameters import EXPERT_PARAMS, Params
from taskmoe.moe.routing import Noise, assign, unit_logits, weigh_input
from taskmoe.moe.travel import Job, Peers, run_here


class Batch(NamedTuple):
    """What a layer is applied to; every array but a scalar task begins with the sequences.

    x: [B, S, D]. valid: [B, S] bool. task: [B] or [] i32. sentence: [B, D]. noise: of the routing.
    told: experts [B, S, k] and perhaps weights that the caller chose. gate_input: [B, S, D], what
    the gate sees.
    """

    x: jax.Array
    valid: jax.Array
    task: jax.Array | None = None
    sentence: jax.Array | None = None
    noise: Noise = Noise()
    told: Told | None = None
    gate_input: jax.Array | None = None


def apply_here(
    params: Params,
    config: MoEConfig,
    batch: Batch,
    implementation: str | None,
    strategy: str = "auto",
    layout: Layout | None = None,
) -> tuple[jax.Array, Metrics, Chosen]:
    """The layer on one device, or with a layout one device's part of it, inside `jax.shard_map`."""
    axes = () if layout is None else layout.batch
    params = _biased_once(params, layout)
    logits, unit_valid = unit_logits(params, config, *batch)
    units = unit_valid.shape[0]
    x = batch.x.reshape(units, -1)
    peers, travel = Peers(1, ragged=False), None
    if layout is not None and layout.expert is not None:
        peers = Peers(layout.peers, layout.ragged, layout.expert)
        travel = STRATEGIES[choose(strategy, config, units, peers)]
    padded = units if travel is not None and travel.padded else None
    assigned = assign(config, logits, unit_valid, batch.noise, implementation, padded, params)
    first = assigned.gating
    x, assigned = weigh_input(config, x, assigned)
    job = Job(params, config, x, assigned, peers, implementation)
    y, lost = (run_here(job), jnp.int32(0)) if travel is None else travel.run(job)
    gating, plan, balance = assigned
    if config.balance == "sequence":
        of_gate = logits.logits if isinstance(logits, Told) else logits
        assert of_gate is not None
        balance = sequence_balance(config, of_gate, gating, batch.valid)
    num_valid = jnp.sum(unit_valid)
    placed = jnp.sum(plan.rows < plan.num_rows) - lost
    report = _over_devices(config, gating, num_valid, placed, balance, axes)
    y = y.reshape(batch.x.shape)
    if config.shared:
        y = (y + dense_ffn(shared_ffn(params, config), batch.x, jnp.float32)).astype(y.dtype)
    places = batch.x.shape[: 2 if config.routing in ("token", "given") else 1]
    chosen = Chosen(*(a.reshape(*places, config.top_k) for a in (first.experts, first.weights)))
    return _whole(y, layout), report, chosen


def apply_one_task(
    params: Params,
    config: MoEConfig,
    batch: Batch,
    implementation: str | None,
    layout: Layout | None = None,
) -> tuple[jax.Array, Metrics, Chosen]:
    """The layer for a batch of one task, as the dense FFN that its experts fold into.

    On a mesh the devices that hold the task's experts hand them to all others.
    """
    assert batch.task is not None
    axes = () if layout is None else layout.batch
    params = _biased_once(params, layout)
    some = batch.valid.any()[None]  # only padding counts nowhere
    logits = task_logits(params, config)[batch.task][None]
    gating = gate(config, params, logits, jnp.ones(1, bool))
    experts, weights = gating.experts[0], gating.weights[0]
    if layout is not None and layout.expert is not None:
        own = params["w_in"].shape[0]
        local = experts - jax.lax.axis_index(layout.expert) * own
        mine = (local >= 0) & (local < own)
        held = {name: params[name] for name in EXPERT_PARAMS if name in params}
        picked = jax.tree.map(
            lambda w: _from_owners(w[jnp.clip(local, 0, own - 1)], mine, layout.expert), held
        )
        params, experts = params | picked, jnp.arange(config.top_k)
    y = dense_ffn(fold(params, config, experts, weights), batch.x, jnp.float32)
    y = _whole(y, layout).astype(batch.x.dtype)
    counted = gate(config, params, logits, some, implementation)
    num_valid = jnp.sum(some)
    each = (batch.x.shape[0], config.top_k)
    chosen = Chosen(*(jnp.broadcast_to(a, each) for a in (gating.experts, gating.weights)))
    report = _over_devices(config, counted, num_valid, config.top_k * num_valid, None, axes)
    return y, report, chosen


def _from_owners(w: jax.Array, mine: jax.Array, axis: str | None) -> jax.Array:
    """Parameters [k, ...] of experts, each from the one device of the axis that has it."""
    if w.dtype == jnp.float8_e4m3fn:  # which nobody adds up
        raw = _from_owners(jax.lax.bitcast_convert_type(w, jnp.int8), mine, axis)
        return jax.lax.bitcast_convert_type(raw, w.dtype)
    return jax.lax.psum(jnp.where(mine.reshape(-1, *[1] * (w.ndim - 1)), w, 0), axis)


def _biased_once(params: Params, layout: Layout | None) -> Params:
    """Parameters whose b_out one device alone adds, of those that share the hidden units."""
    if layout is None or not layout.hidden or "b_out" not in params:
        return params
    first = jax.lax.axis_index(layout.hidden) == 0
    bias = vary_over(params["b_out"], layout.hidden)
    return params | {"b_out": jnp.where(first, bias, 0)}


def _whole(y: jax.Array, layout: Layout | None) -> jax.Array:
    """Sums over the shares of hidden units, in f32."""
    if layout is None or not layout.hidden:
        return y
    return jax.lax.psum(vary_over(y.astype(jnp.float32), layout.hidden), layout.hidden).astype(
        y.dtype
    )


def _over_devices(
    config: MoEConfig,
    gating: Gating,
    num_local: jax.Array,
    placed: jax.Array,
    balance: jax.Array | None,
    axes: tuple[str, ...],
) -> Metrics:
    """Metrics of the whole batch from those of each device's part of it."""
    if not axes:
        return metrics(config, gating, num_local, placed, balance)

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(vary_over(x, axes), axes)

    num_valid = total(num_local)
    share = num_local / jnp.maximum(num_valid, 1).astype(jnp.float32)
    whole = gating._replace(
        counts=total(gating.counts),
        mean_probs=total(gating.mean_probs * share),
        z_loss=total(gating.z_loss * share),
    )
    balance = None if balance is None else total(balance * share)
    return metrics(config, whole, num_valid, total(placed), balance)


def apply_on_mesh(
    params: Params,
    config: MoEConfig,
    batch: Batch,
    implementation: str | None,
    strategy: str,
    layout: Layout,
) -> tuple[jax.Array, Metrics, Chosen]:
    """The layer over a mesh; arguments and results as in `apply`.

    Capacity, where there is one, is counted on each device's own units, in groups of `group_size`
    where that is given. A batch that the mesh does not divide is padded by sequences that are not
    valid.
    """
    if strategy == "mosaic":
        check_can_run("strategy='mosaic'", layout.platform)
    size, one_task = batch.x.shape[0], batch.task is not None and batch.task.ndim == 0
    task, batch = batch.task, batch._replace(task=None if one_task else batch.task)
    if layout.explicit:
        kept = jax.typeof(batch.x).sharding.spec
        if size % layout.batch_parts:
            batch = jax.tree.map(lambda a: jax.reshard(a, NamedSharding(_mesh(layout), P())), batch)
    batch = _padded(batch, -size % layout.batch_parts)

    def local(params: Params, batch: Batch, task: jax.Array | None) -> Any:
        if one_task:
            whole = batch._replace(task=task)
            return apply_one_task(params, config, whole, implementation, layout)
        return apply_here(params, config, batch, implementation, strategy, layout)

    arguments = (params, batch, task if one_task else None)
    specs = (
        layout.of_params(params),
        jax.tree.map(lambda _: layout.of_batch(), batch),
        P() if one_task else None,
    )
    if not layout.free:  # all axes are manual already
        y, report, chosen = local(*arguments)
        return y[:size], report, jax.tree.map(lambda a: a[:size], chosen)
    if layout.explicit:  # shardings are part of the types there
        arguments = jax.tree.map(
            lambda leaf, spec: jax.reshard(leaf, NamedSharding(_mesh(layout), spec)),
            arguments,
            specs,
        )
    if len(layout.free) < len(layout.mesh.axis_names):

        def in_floats(*arguments: Any) -> Any:
            y, report, chosen = local(*arguments)
            return y, report, chosen._replace(experts=chosen.experts.astype(jnp.float32))

        results = (layout.of_batch(), P(), layout.of_batch())
        y, report, chosen = nested_shard_map(in_floats, layout.free, specs, results)(*arguments)
        chosen = chosen._replace(experts=chosen.experts.astype(jnp.int32))
        return y[:size], report, jax.tree.map(lambda a: a[:size], chosen)
    y, report, chosen = jax.shard_map(
        local,
        mesh=None if _in_use(layout) else layout.mesh,
        in_specs=specs,
        out_specs=(layout.of_batch(), P(), layout.of_batch()),
        axis_names=set(layout.free),
        # JAX's interpreter does not know varying axes where kernels talk to peers.
        check_vma=strategy != "mosaic" or interpret_mode() is None,
    )(*arguments)

    def first(a: jax.Array, spec: P) -> jax.Array:
        if not layout.explicit:
            return a[:size]
        if a.shape[0] != size:
            a = jax.reshard(a, NamedSharding(_mesh(layout), P()))[:size]
        return jax.reshard(a, NamedSharding(_mesh(layout), spec))

    by_batch = P(kept[0]) if layout.explicit else P()
    return (
        first(y, kept if layout.explicit else P()),
        report,
        jax.tree.map(lambda a: first(a, by_batch), chosen),
    )


def _in_use(layout: Layout) -> bool:
    """Whether the layout's mesh is the one that code is traced under."""
    current = jax.sharding.get_abstract_mesh()
    return not current.empty and current.axis_names == layout.mesh.axis_names


def _mesh(layout: Layout) -> Any:
    return jax.sharding.get_abstract_mesh() if _in_use(layout) else layout.mesh


def _padded(batch: Batch, rows: int) -> Batch:
    """The batch with more sequences, none of them valid."""
    if rows == 0:
        return batch
    return jax.tree.map(lambda a: jnp.pad(a, [(0, rows)] + [(0, 0)] * (a.ndim - 1)), batch)
