"""Units through their experts on whichever device: what each strategy of `exchange` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from taskmoe.kernels import Quantized, combine, dispatch, expert_ffn
from taskmoe.kernels.exchange_ffn_kernel import exchange_ffn, room_for, tiling_for
from taskmoe.kernels.exchange_kernel import exchange_rows
from taskmoe.kernels.exchange_plan import neighbours, segments_there
from taskmoe.kernels.options import Experts
from taskmoe.moe.config import MoEConfig
from taskmoe.moe.parameters import Params
from taskmoe.moe.routing import Assignment, capacity


class Peers(NamedTuple):
    """The devices that exchange rows.

    number: how many. ragged: whether they have `lax.ragged_all_to_all`. axis: of the mesh.
    """

    number: int
    ragged: bool
    axis: str = "expert"


class Job(NamedTuple):
    """One device's part of a layer, inside `jax.shard_map`.

    params: the device's own experts. x: [U, W] units. assigned: where they go, with a padded plan
    for "all_to_all", any plan else.
    """

    params: Params
    config: MoEConfig
    x: jax.Array
    assigned: Assignment
    peers: Peers
    implementation: str | None


def run_here(job: Job) -> jax.Array:
    """Units [U, W] through the experts of this device, which has all that they were assigned to."""
    gating, plan, _ = job.assigned
    rows = dispatch(job.x, plan.rows, plan.num_rows, implementation=job.implementation)
    out = _experts(job, rows, plan.group_sizes)
    return combine(out, plan.rows, gating.weights, implementation=job.implementation)


def all_to_all(
    job: Job, swap: Callable[[jax.Array, Peers], jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """The strategy's `run`. swap: how the parts of an array [peers, ...] change places."""
    gating, plan, _ = job.assigned
    n, width = job.peers.number, job.x.shape[1]
    swap = swap or _swap
    room = plan.num_rows // job.config.num_experts
    sent = dispatch(job.x, plan.rows, plan.num_rows, implementation=job.implementation)
    received = swap(sent.reshape(n, -1, width), job.peers)
    filled = jnp.zeros(plan.num_rows, bool).at[plan.rows].set(True, mode="drop")
    place = swap(filled.reshape(n, -1), job.peers).reshape(n, -1, room)
    # Rows of one expert lie behind one another, peer by peer; empty places go nowhere.
    place = place.transpose(1, 0, 2)
    rank = jnp.cumsum(place.reshape(-1), dtype=jnp.int32).reshape(place.shape) - 1
    rows = jnp.where(place, rank, plan.num_rows).transpose(1, 0, 2).reshape(-1, 1)
    sizes = jnp.sum(place, axis=(1, 2), dtype=jnp.int32)
    out = _sorted_experts(job, received, rows, sizes, plan.num_rows)
    back = swap(out.reshape(received.shape), job.peers).reshape(plan.num_rows, -1)
    y = combine(back, plan.rows, gating.weights, implementation=job.implementation)
    return y, jnp.zeros_like(sizes[0])


class _Parcels(NamedTuple):
    """Rows that a device sends to its peers, and gets from them, cut to the room that there is.

    packed: [kU, W], my rows by expert. rows: [U, k], where each assignment lies there. starts,
    sizes: [n], each peer's part of them. places: [n], where my part begins among the peer's.
    coming: [n, E/n], rows that each peer sends to each of my experts. home: [n], where each peer's
    part of what I got begins among its own rows. lost: [] i32, rows of mine that go nowhere.
    """

    packed: jax.Array
    rows: jax.Array
    starts: jax.Array
    sizes: jax.Array
    places: jax.Array
    coming: jax.Array
    home: jax.Array
    lost: jax.Array


def _parcel(job: Job) -> _Parcels:
    n, local = job.peers.number, job.config.num_experts // job.peers.number
    rows, counts = _pack(job.assigned, job.config.num_experts)
    count = job.x.shape[0] * job.config.top_k
    packed = dispatch(job.x, rows, count, implementation=job.implementation)
    own = counts.reshape(n, local).sum(1)
    ends = jnp.cumsum(_swap(counts.reshape(n, local), job.peers), axis=1)
    if job.config.buffer_factor is None and not job.peers.ragged:  # the others need not be known
        starts = jnp.cumsum(own) - own
        coming = jnp.diff(ends, axis=1, prepend=0)
        return _Parcels(packed, rows, starts, own, starts, coming, starts, jnp.zeros_like(own[0]))
    me = jax.lax.axis_index(job.peers.axis)
    wanted = jax.lax.all_gather(own, job.peers.axis)  # [from, to]
    places = jnp.cumsum(wanted, axis=0) - wanted
    room = most_come(job.config, job.x.shape[0], n)
    sizes = jnp.clip(room - places, 0, wanted)  # the last to come find none
    starts = jnp.cumsum(wanted, axis=1) - wanted
    ends = jnp.minimum(ends, sizes[:, me, None])
    return _Parcels(
        packed=packed,
        rows=rows,
        starts=starts[me],
        sizes=sizes[me],
        places=places[me],
        coming=jnp.diff(ends, axis=1, prepend=0),
        home=starts[:, me],
        lost=jnp.sum(wanted[me] - sizes[me]),
    )


def _targets(parcels: _Parcels, segment: jax.Array, inside: jax.Array) -> jax.Array:
    """Where rows go that came as the `inside`-th of a segment, peer * E/n + expert, by expert."""
    n, local = parcels.coming.shape
    by_expert = parcels.coming.T.reshape(-1)
    first = (jnp.cumsum(by_expert) - by_expert).reshape(local, n).T.reshape(-1)
    return first[jnp.minimum(segment, n * local - 1)] + inside


def ragged(job: Job) -> tuple[jax.Array, jax.Array]:
    """The strategy's `run` where the backend has `lax.ragged_all_to_all`."""
    parcels = _parcel(job)
    room = most_come(job.config, job.x.shape[0], job.peers.number)
    incoming = parcels.coming.sum(1)
    arrive = jnp.cumsum(incoming) - incoming
    buffer = jnp.zeros((room, job.x.shape[1]), job.x.dtype)
    there = (parcels.starts, parcels.sizes, parcels.places, incoming)
    received = _ragged_swap(parcels.packed, buffer, there, job.peers)
    # A row's peer and expert follow from its place alone.
    place = jnp.arange(room, dtype=jnp.int32)
    ends = jnp.cumsum(parcels.coming.reshape(-1))
    segment = jnp.sum(place[:, None] >= ends, axis=1)
    inside = place - jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[segment]
    target = jnp.where(place < ends[-1], _targets(parcels, segment, inside), room)
    out = _sorted_experts(job, received, target[:, None], parcels.coming.sum(0), room)
    home = (arrive, incoming, parcels.home, parcels.sizes)
    back = _ragged_swap(out, jnp.zeros_like(parcels.packed), home, job.peers)
    weights = job.assigned.gating.weights
    return combine(back, parcels.rows, weights, implementation=job.implementation), parcels.lost


def packed(job: Job) -> tuple[jax.Array, jax.Array]:
    """`ragged` where the backend has no such collective: each peer's part is padded."""
    parcels = _parcel(job)
    n, width = job.peers.number, job.x.shape[1]
    room = most_come(job.config, job.x.shape[0], n)
    most = min(most_from_one(job.config, job.x.shape[0], n), room)
    lane = jnp.arange(most, dtype=jnp.int32)
    source = jnp.minimum(parcels.starts[:, None] + lane, parcels.packed.shape[0] - 1)
    mine = (lane < parcels.sizes[:, None])[..., None]
    received = _swap(jnp.where(mine, parcels.packed[source], 0), job.peers)
    ends = jnp.cumsum(parcels.coming, axis=1)
    expert = jnp.sum(lane[None, :, None] >= ends[:, None], axis=2)
    begin = jnp.concatenate([jnp.zeros((n, 1), ends.dtype), ends], axis=1)
    inside = lane - jnp.take_along_axis(begin, expert, axis=1)
    segment = expert + parcels.coming.shape[1] * jnp.arange(n)[:, None]
    target = jnp.where(lane < ends[:, -1:], _targets(parcels, segment, inside), room)
    sizes = parcels.coming.sum(0)
    out = _sorted_experts(job, received, target.reshape(-1, 1), sizes, room)
    returned = _swap(out.reshape(n, most, width), job.peers).reshape(n * most, width)
    row = jnp.arange(parcels.packed.shape[0], dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(row[:, None] >= parcels.starts[1:], axis=1), n - 1)
    lane = row - parcels.starts[owner]
    back = returned[jnp.minimum(owner * most + lane, n * most - 1)]
    back = jnp.where((lane < parcels.sizes[owner])[:, None], back, 0)
    weights = job.assigned.gating.weights
    return combine(back, parcels.rows, weights, implementation=job.implementation), parcels.lost


def all_gather(job: Job) -> tuple[jax.Array, jax.Array]:
    """The strategy's `run`."""
    n, local = job.peers.number, job.config.num_experts // job.peers.number

    def gather(part: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part, job.peers.axis, tiled=True)

    first = jax.lax.axis_index(job.peers.axis) * local
    placed = job.assigned.plan.rows < job.assigned.plan.num_rows
    # Experts relative to mine; one that is dropped or another's goes nowhere.
    experts = gather(jnp.where(placed, job.assigned.gating.experts, -1)) - first
    mine = (experts >= 0) & (experts < local)
    rows, sizes = _counting_sort(jnp.where(mine, experts, local), local)
    room = most_come(job.config, job.x.shape[0], n)
    packed = dispatch(gather(job.x), rows, room, implementation=job.implementation)
    out = _experts(job, packed, sizes)
    weights = gather(job.assigned.gating.weights)
    part = combine(out, rows, weights, implementation=job.implementation)
    y = jax.lax.psum_scatter(part, job.peers.axis, tiled=True)
    return y, jnp.maximum(jnp.sum(sizes) - room, 0)


def mosaic(job: Job) -> tuple[jax.Array, jax.Array]:
    """The strategy's `run`."""
    n, local = job.peers.number, job.config.num_experts // job.peers.number
    axis, weights = job.peers.axis, job.assigned.gating.weights
    rows, counts = _pack(job.assigned, job.config.num_experts)
    num_packed = job.x.shape[0] * job.config.top_k
    packed = dispatch(job.x, rows, num_packed, implementation=job.implementation)
    counts = jax.lax.all_gather(counts, axis)  # [n, E]
    room, align = most_come(job.config, job.x.shape[0], n), 1
    experts = Experts(**{name: job.params.get(name) for name in Experts._fields})
    fused = (
        job.implementation in (None, "mosaic")
        and job.x.shape[1] == job.config.d_model
        and not isinstance(experts.w_in, Quantized)
    )
    tiling = tiling_for(packed, counts, experts, room) if fused else None
    if tiling is not None:
        named: Any = experts._asdict() | {"activation": job.config.activation, "tiling": tiling}
        back = exchange_ffn(packed, counts, num_rows=room, axis_name=axis, **named)
        room, align = room_for(tiling, local, room)
    else:
        received = exchange_rows(packed, counts, room, axis_name=axis)
        mine = counts.sum(0).reshape(n, local)[jax.lax.axis_index(axis)]
        out = _experts(job, received, mine)
        back = exchange_rows(out, counts, num_packed, axis_name=axis, back=True)
    sent = segments_there(counts, neighbours(axis)[0], num_packed, room, align).sizes
    lost = counts[jax.lax.axis_index(axis)].sum() - sent.sum()
    return combine(back, rows, weights, implementation=job.implementation), lost


def _sorted_experts(
    job: Job, received: jax.Array, rows: jax.Array, sizes: jax.Array, room: int
) -> jax.Array:
    """Received rows through my experts and back into the places they were received in.

    rows: [R, 1], each one's place sorted by expert. room: rows that any can be sorted into.
    """
    received = received.reshape(-1, received.shape[-1])
    packed = dispatch(received, rows, room, implementation=job.implementation)
    out = _experts(job, packed, sizes)
    ones = jnp.ones(rows.shape, jnp.float32)
    return combine(out, rows, ones, implementation=job.implementation)


def _experts(job: Job, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows [N, W] of whole units, sorted by expert, through the experts; sizes count units."""
    width = rows.shape[1]
    names = ("w_gate", "b_in", "b_out", "b_gate")
    optional: Any = {name: job.params.get(name) for name in names}
    return expert_ffn(
        rows.reshape(-1, job.config.d_model),
        job.params["w_in"],
        job.params["w_out"],
        sizes * (width // job.config.d_model),
        activation=job.config.activation,
        implementation=job.implementation,
        **optional,
    ).reshape(-1, width)


def _pack(assigned: Assignment, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Rows of my assignments packed by expert, without those dropped, and each expert's number."""
    placed = assigned.plan.rows < assigned.plan.num_rows
    return _counting_sort(jnp.where(placed, assigned.gating.experts, num_experts), num_experts)


def _counting_sort(experts: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Row of each assignment [U, k], sorted by expert, and rows an expert [number].

    An expert of `number` goes nowhere: its row is past the end, whatever room there is.
    """
    flat = experts.T.reshape(-1)  # first choices before any second, as everywhere
    hit = (flat[:, None] == jnp.arange(number)).astype(jnp.int32)
    counts = jnp.sum(hit, axis=0)
    place = jnp.cumsum(hit, axis=0) - hit + jnp.cumsum(counts) - counts
    row = jnp.sum(place * hit, axis=1)
    row = jnp.where(flat < number, row, jnp.iinfo(jnp.int32).max)
    return row.reshape(experts.shape[1], experts.shape[0]).T.astype(jnp.int32), counts


def room_each(config: MoEConfig, units: int) -> int | None:
    """Rows an expert has room for on one device; None when dropless."""
    size = config.group_size or units
    room = capacity(config, size)
    return None if room is None else units // size * room


def most_from_one(config: MoEConfig, units: int, peers: int) -> int:
    """The most rows that one device can have for another."""
    return min(config.top_k, config.num_experts // peers) * units


def most_come(config: MoEConfig, units: int, peers: int) -> int:
    """Rows that a device has room for: all that can come to it, or as many as it was told."""
    most = peers * most_from_one(config, units, peers)
    if config.buffer_factor is None:
        return most
    return min(most, math.ceil(config.buffer_factor * config.top_k * units))


def _swap(x: jax.Array, peers: Peers) -> jax.Array:
    """[peers, ...]: part p goes to peer p; part p of the result came from peer p."""
    return jax.lax.all_to_all(x, peers.axis, split_axis=0, concat_axis=0)


def _ragged_swap(x: jax.Array, out: jax.Array, travel: Any, peers: Peers) -> jax.Array:
    """travel: [n] each, where each peer's part begins in x, its size, its place there, my sizes."""
    starts, sizes, places, incoming = (part.astype(jnp.int32) for part in travel)
    return jax.lax.ragged_all_to_all(x, out, starts, sizes, places, incoming, axis_name=peers.axis)
