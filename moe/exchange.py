"""How rows travel to the devices that hold their experts, and back.

Each device routes its own U units to E experts, of which every device holds E/n. Whatever the
strategy, results and gradients are those of one device, up to the order of sums. Rows that a device
sends for one layer, there and back (n devices, C rows of room an expert):

    all_to_all   2 (n-1)/n E C   a padded [E, C] buffer by `lax.all_to_all`, as in GShard; C is the
                                 capacity, or U when dropless
    ragged       2 (n-1)/n k U   the rows themselves by `lax.ragged_all_to_all`; where the backend
                                 has none, 2 (n-1) min(k, E/n) U: packed, padded for each peer
    all_gather   2 (n-1) U       every device gets all units, runs its experts' rows, and a
                                 reduce-scatter adds the parts up
    mosaic       2 (n-1)/n k U   the rows themselves, by remote DMA of a Pallas TPU kernel straight
                                 to their places among their expert's rows: no row is padded, or
                                 sorted again. Where tokens are routed and two experts fit in
                                 VMEM the experts run in the same kernel, block by block as rows
                                 arrive, while other rows and results are on the wire; gradients
                                 travel before and after their matmuls. TPU, or interpret mode

"auto" takes of the first three the one with the fewest rows: "mosaic" sends as few as "ragged"
does on TPU, and is for the caller to choose. "kept" is all_to_all with every part kept instead of
sent: it gives wrong results, and what a step costs without its exchange.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from taskmoe.kernels import combine, dispatch, expert_ffn
from taskmoe.kernels.checks import choose_implementation
from taskmoe.kernels.exchange_ffn_kernel import can_fuse, exchange_ffn
from taskmoe.kernels.exchange_kernel import exchange_rows
from taskmoe.moe.config import MoEConfig
from taskmoe.moe.routing import Assignment, Params, capacity

EXPERT_AXIS = "expert"
STRATEGIES = ("auto", "all_to_all", "ragged", "all_gather", "mosaic", "kept")


class Peers(NamedTuple):
    """The devices that exchange rows.

    number: how many. ragged: whether they have `lax.ragged_all_to_all`. connected: False keeps
    every part instead of sending it.
    """

    number: int
    ragged: bool
    connected: bool = True


def rows_sent(strategy: str, config: MoEConfig, units: int, peers: Peers) -> float:
    """Rows that one device sends for one layer, there and back, by the table above."""
    n, e, k = peers.number, config.num_experts, config.top_k
    if strategy == "kept":
        return 0.0
    if strategy == "all_to_all":
        return 2 * (n - 1) / n * e * (_room(config, units) or units)
    if strategy == "mosaic":
        return 2 * (n - 1) / n * k * units
    if strategy == "ragged":
        return (
            2 * (n - 1) / n * k * units if peers.ragged else 2 * (n - 1) * _most(config, units, n)
        )
    return 2.0 * (n - 1) * units


def choose(strategy: str, config: MoEConfig, units: int, peers: Peers) -> str:
    """The strategy itself, or for "auto" the one that sends the fewest rows."""
    if strategy != "auto":
        return strategy
    return min(STRATEGIES[1:4], key=lambda name: rows_sent(name, config, units, peers))


def run_experts(
    strategy: str,
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    assigned: Assignment,
    peers: Peers,
    implementation: str | None,
) -> jax.Array:
    """Units [U, W] through their experts on whichever device: [U, W], weighted and added up.

    Inside `jax.shard_map` over the axis "expert". params: the device's own experts. assigned: with
    a padded plan for "all_to_all", any plan else.
    """
    runs = {
        "all_to_all": _all_to_all,
        "ragged": _ragged,
        "all_gather": _all_gather,
        "mosaic": _mosaic,
    }
    if strategy == "kept":
        strategy, peers = "all_to_all", peers._replace(connected=False)
    run = runs[strategy]
    return run(params, config, x, assigned, peers, implementation)


def _all_to_all(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    assigned: Assignment,
    peers: Peers,
    implementation: str | None,
) -> jax.Array:
    gating, plan, _ = assigned
    swap = _swap if peers.connected else jnp.copy
    room = plan.num_rows // config.num_experts
    sent = dispatch(x, plan.rows, plan.num_rows, implementation=implementation)
    received = swap(sent.reshape(peers.number, -1, x.shape[1]))
    filled = jnp.zeros(plan.num_rows, bool).at[plan.rows].set(True, mode="drop")
    place = swap(filled.reshape(peers.number, -1)).reshape(peers.number, -1, room)
    # Rows of one expert lie behind one another, peer by peer; empty places go nowhere.
    place = place.transpose(1, 0, 2)
    rank = jnp.cumsum(place.reshape(-1), dtype=jnp.int32).reshape(place.shape) - 1
    rows = jnp.where(place, rank, plan.num_rows).transpose(1, 0, 2).reshape(-1, 1)
    sizes = jnp.sum(place, axis=(1, 2), dtype=jnp.int32)
    out = _local_experts(params, config, received, rows, sizes, implementation)
    back = swap(out.reshape(received.shape)).reshape(plan.num_rows, -1)
    return combine(back, plan.rows, gating.weights, implementation=implementation)


def _ragged(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    assigned: Assignment,
    peers: Peers,
    implementation: str | None,
) -> jax.Array:
    units, width = x.shape
    n, local = peers.number, config.num_experts // peers.number
    rows, counts = _pack(assigned, config.num_experts)
    packed = dispatch(x, rows, units * config.top_k, implementation=implementation)
    counts = counts.reshape(n, local)
    theirs = _swap(counts)  # [n, local]: what each peer sends to my experts
    most = _most(config, units, n)
    sizes, starts = _spans(counts.sum(1))
    if peers.ragged:
        all_sizes = jax.lax.all_gather(sizes, EXPERT_AXIS)  # [from, to]
        me = jax.lax.axis_index(EXPERT_AXIS)
        before = jnp.cumsum(all_sizes, axis=0) - all_sizes
        incoming = all_sizes[:, me]
        travel = _Travel(starts, sizes, before[me], incoming)
        buffer = jnp.zeros((n * most, width), x.dtype)
        received = _ragged_swap(packed, buffer, travel)
        # A row's peer and expert follow from its place alone.
        place = jnp.arange(n * most, dtype=jnp.int32)
        ends = jnp.cumsum(theirs.reshape(-1))
        segment = jnp.sum(place[:, None] >= ends, axis=1)
        inside = place - jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[segment]
        held = place < ends[-1]
    else:
        lane = jnp.arange(most, dtype=jnp.int32)
        source = starts[:, None] + lane
        sent = jnp.where(
            (lane < sizes[:, None])[..., None],
            packed[jnp.minimum(source, packed.shape[0] - 1)],
            0,
        )
        received = _swap(sent).reshape(n * most, width)
        ends = jnp.cumsum(theirs, axis=1)
        segment = jnp.sum(lane[None, :, None] >= ends[:, None], axis=2)  # expert of each row
        begin = jnp.concatenate([jnp.zeros((n, 1), ends.dtype), ends], axis=1)
        inside = (lane - jnp.take_along_axis(begin, segment, axis=1)).reshape(-1)
        held = (lane < ends[:, -1:]).reshape(-1)
        segment = (segment + local * jnp.arange(n)[:, None]).reshape(-1)
    # Where each of my experts' rows from each peer begin, in rows packed by expert.
    by_expert = theirs.T.reshape(-1)
    first = (jnp.cumsum(by_expert) - by_expert).reshape(local, n).T.reshape(-1)
    segment = jnp.minimum(segment, n * local - 1)
    target = jnp.where(held, first[segment] + inside, n * most).astype(jnp.int32)
    out = _local_experts(params, config, received, target[:, None], theirs.sum(0), implementation)
    if peers.ragged:
        home = _Travel(
            jnp.cumsum(incoming) - incoming,
            incoming,
            (jnp.cumsum(all_sizes, axis=1) - all_sizes)[:, me],
            sizes,
        )
        back = _ragged_swap(out, jnp.zeros_like(packed), home)
    else:
        returned = _swap(out.reshape(n, most, width)).reshape(n * most, width)
        owner = jnp.sum(jnp.arange(packed.shape[0])[:, None] >= (starts + sizes), axis=1)
        owner = jnp.minimum(owner, n - 1)
        lane = jnp.arange(packed.shape[0], dtype=jnp.int32) - starts[owner]
        back = returned[jnp.minimum(owner * most + lane, n * most - 1)]
    return combine(back, rows, assigned.gating.weights, implementation=implementation)


def _all_gather(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    assigned: Assignment,
    peers: Peers,
    implementation: str | None,
) -> jax.Array:
    n, local = peers.number, config.num_experts // peers.number

    def gather(part: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part, EXPERT_AXIS, tiled=True)

    first = jax.lax.axis_index(EXPERT_AXIS) * local
    placed = assigned.plan.rows < assigned.plan.num_rows
    # Experts relative to mine; one that is dropped or another's goes nowhere.
    experts = gather(jnp.where(placed, assigned.gating.experts, -1)) - first
    mine = (experts >= 0) & (experts < local)
    rows, sizes = _counting_sort(jnp.where(mine, experts, local), local)
    num_rows = n * _most(config, x.shape[0], n)
    packed = dispatch(gather(x), rows, num_rows, implementation=implementation)
    out = _experts(params, config, packed, sizes, implementation)
    weights = gather(assigned.gating.weights)
    part = combine(out, rows, weights, implementation=implementation)
    return jax.lax.psum_scatter(part, EXPERT_AXIS, tiled=True)


def _mosaic(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    assigned: Assignment,
    peers: Peers,
    implementation: str | None,
) -> jax.Array:
    n, local = peers.number, config.num_experts // peers.number
    rows, counts = _pack(assigned, config.num_experts)
    packed = dispatch(x, rows, x.shape[0] * config.top_k, implementation=implementation)
    counts = jax.lax.all_gather(counts, EXPERT_AXIS)  # [n, E]
    most = n * _most(config, x.shape[0], n)
    w_in, w_out, w_gate = params["w_in"], params["w_out"], params.get("w_gate")
    fuse = (
        choose_implementation("expert_ffn", implementation) == "mosaic"
        and x.shape[1] == config.d_model
        and can_fuse(packed, counts, w_in, w_gate, most)
    )
    if fuse:
        options: Any = {"activation": config.activation, "w_gate": w_gate}
        back = exchange_ffn(packed, counts, w_in, w_out, most, axis_name=EXPERT_AXIS, **options)
    else:
        received = exchange_rows(packed, counts, most, axis_name=EXPERT_AXIS)
        mine = counts.sum(0).reshape(n, local)[jax.lax.axis_index(EXPERT_AXIS)]
        out = _experts(params, config, received, mine, implementation)
        back = exchange_rows(out, counts, packed.shape[0], axis_name=EXPERT_AXIS, back=True)
    return combine(back, rows, assigned.gating.weights, implementation=implementation)


def _local_experts(
    params: Params,
    config: MoEConfig,
    received: jax.Array,
    rows: jax.Array,
    sizes: jax.Array,
    implementation: str | None,
) -> jax.Array:
    """Received rows through my experts and back into the places they were received in."""
    received = received.reshape(-1, received.shape[-1])
    packed = dispatch(received, rows, rows.shape[0], implementation=implementation)
    out = _experts(params, config, packed, sizes, implementation)
    ones = jnp.ones(rows.shape, jnp.float32)
    return combine(out, rows, ones, implementation=implementation)


def _experts(
    params: Params,
    config: MoEConfig,
    rows: jax.Array,
    sizes: jax.Array,
    implementation: str | None,
) -> jax.Array:
    """Rows [N, W] of whole units, sorted by expert, through the experts; sizes count units."""
    width = rows.shape[1]
    return expert_ffn(
        rows.reshape(-1, config.d_model),
        params["w_in"],
        params["w_out"],
        sizes * (width // config.d_model),
        activation=config.activation,
        w_gate=params.get("w_gate"),
        implementation=implementation,
    ).reshape(-1, width)


def _pack(assigned: Assignment, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Rows of my assignments packed by expert, without those dropped, and each expert's number."""
    placed = assigned.plan.rows < assigned.plan.num_rows
    return _counting_sort(jnp.where(placed, assigned.gating.experts, num_experts), num_experts)


def _counting_sort(experts: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """Row of each assignment [U, k], sorted by expert, and rows an expert [number].

    An expert of `number` goes nowhere: its row is past the end.
    """
    flat = experts.T.reshape(-1)  # first choices before any second, as everywhere
    hit = (flat[:, None] == jnp.arange(number)).astype(jnp.int32)
    counts = jnp.sum(hit, axis=0)
    place = jnp.cumsum(hit, axis=0) - hit + jnp.cumsum(counts) - counts
    row = jnp.sum(place * hit, axis=1)
    row = jnp.where(flat < number, row, flat.size)
    return row.reshape(experts.shape[1], experts.shape[0]).T.astype(jnp.int32), counts


def _room(config: MoEConfig, units: int) -> int | None:
    """Rows an expert has room for on one device; None when dropless."""
    size = config.group_size or units
    room = capacity(config, size)
    return None if room is None else units // size * room


def _most(config: MoEConfig, units: int, peers: int) -> int:
    """The most rows that one device can have for another."""
    return min(config.top_k, config.num_experts // peers) * units


def _swap(x: jax.Array) -> jax.Array:
    """[peers, ...]: part p goes to peer p; part p of the result came from peer p."""
    return jax.lax.all_to_all(x, EXPERT_AXIS, split_axis=0, concat_axis=0)


class _Travel(NamedTuple):
    """Where each peer's part begins in mine, how long it is, where it begins there, what I get."""

    starts: jax.Array
    sizes: jax.Array
    starts_there: jax.Array
    sizes_here: jax.Array


def _ragged_swap(x: jax.Array, out: jax.Array, travel: _Travel) -> jax.Array:
    args: Any = (part.astype(jnp.int32) for part in travel)
    starts, sizes, starts_there, sizes_here = args
    return jax.lax.ragged_all_to_all(
        x, out, starts, sizes, starts_there, sizes_here, axis_name=EXPERT_AXIS
    )


def _spans(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sizes and where each span begins when they lie behind one another."""
    return sizes, jnp.cumsum(sizes) - sizes
