"""exchange_ffn: rows to their experts' devices, through the experts and back, in one TPU kernel.

    home = back(expert_ffn(there(x)))        there, back: `exchange_rows`

There is no grid. A device starts the copies of all its rows, those for its peers' first experts
first, and then walks its own experts and the blocks of their rows: it waits until a block's rows
are there, multiplies them, and starts the way home of each peer's results as soon as its last block
is stored. While it multiplies, rows of the blocks to come and results of those before are on the
wire, and the next matrices are read into the other of two buffers. What nothing hides are the way
of the first rows (a device's own come first, and need none), the way home of the last, and the wait
for a block's rows while the one before could be multiplied: one block is read ahead. Rows of each
expert begin at a multiple of the block, so no block straddles experts and none is read while peers
still write to it.

An expert whose matrices fit in VMEM twice is read once. One that does not is cut along its hidden
units: a few blocks of its rows stay in VMEM, with sums in f32, while its matrices pass by, and the
next few read them again. What travels between devices is the same.

The backward pass is not fused: `exchange_rows` there, `expert_ffn`'s backward, `exchange_rows`.

VMEM: see `exchange_tiling.vmem_bytes`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import exchange_tiling as blocks
from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.checks import as_floats, check_shape, in_hbm, match_varying
from taskmoe.kernels.exchange_kernel import (
    COLLECTIVE_ID,
    Copies,
    block_rows,
    check_exchange,
    exchange_mosaic,
    for_each,
    handshake,
)
from taskmoe.kernels.exchange_plan import (
    hbm_result_like,
    neighbours,
    segments_back,
    segments_there,
)
from taskmoe.kernels.exchange_products import begin_sums, multiply_block
from taskmoe.kernels.exchange_scratch import Scratch, Semaphores, scratch_shapes
from taskmoe.kernels.exchange_tiling import ExchangeTiling, exchange_tiling
from taskmoe.kernels.exchange_walk import (
    Buffered,
    Matrices,
    Plan,
    Walk,
    go_out,
    visit_experts,
    walk_visits,
)
from taskmoe.kernels.expert_network import expert_ffn
from taskmoe.kernels.ffn_kernel import with_rows
from taskmoe.kernels.options import Activation, Experts, check_activation
from taskmoe.kernels.platforms import chip, interpret_mode, with_kernel_settings
from taskmoe.kernels.words_kernel import pack_block, pack_rows, unpack_block, unpack_rows

#: Each segment of rows has a semaphore; a core has about 500.
MAX_EXPERTS = 256


class ExchangeOptions(NamedTuple):
    """What is fixed when a call is traced. num_rows: that a device has room for."""

    num_rows: int
    axis_name: str
    activation: Activation
    tiling: ExchangeTiling


def room_for(tiling: ExchangeTiling, num_experts: int, num_rows: int) -> tuple[int, int]:
    """Places that the kernel has for rows that arrive, num_rows at least, and rows a block.

    num_experts: of this device, each of which begins a block.
    """
    return tilings.round_up(num_rows, tiling.rows) + num_experts * tiling.rows, tiling.rows


def tiling_for(
    x: jax.Array, counts: jax.Array, experts: Experts, num_rows: int
) -> ExchangeTiling | None:
    """Block sizes with which the kernel takes these shapes, for the chip at hand; None: none.

    x: [M, D]; counts: [n, E]; experts: the device's own E/n. They have too many segments where E
    exceeds MAX_EXPERTS, and are too wide where no block fits in VMEM.
    """
    own, d, f = experts.w_in.shape
    if counts.shape[1] > MAX_EXPERTS or x.dtype.itemsize > 4 or 0 in experts.w_in.shape:
        return None
    matrices = 2 if experts.w_gate is None else 3
    rows = min(x.shape[0], num_rows)
    return exchange_tiling(rows, d, f, own, matrices, x.dtype.itemsize, chip())


def kernel(
    plan: Plan,
    x_ref: Any,
    experts: Experts,
    received_ref: Any,
    results_ref: Any,
    home_ref: Any,
    scratch: Scratch,
    semaphores: Semaphores,
    *,
    activation: Activation,
    on_tpu: bool,
    piece: int,
) -> None:
    """The whole layer of one device. on_tpu: or interpreted. piece: the matrix unit's size."""
    dtype = scratch.x.dtype
    zeros_ref, sent, filled = scratch.zeros, semaphores.sent, semaphores.filled
    zeros_ref[...] = jnp.zeros_like(zeros_ref)
    of = plan.devices
    go = Copies(of, plan.there, x_ref, received_ref, zeros_ref, sent, semaphores.arrived, filled)
    come = Copies(
        of, plan.back, results_ref, home_ref, zeros_ref, sent, semaphores.returned, filled
    )
    own, peers, num_segments = go.own, go.peers, plan.there.sizes.shape[0]
    matrices = Matrices(plan, experts, scratch.experts, semaphores.read, on_tpu)
    load = Buffered(received_ref, scratch.rows, semaphores.loaded)
    store = Buffered(results_ref, scratch.results, semaphores.stored)
    last = matrices.cuts - 1

    def start_of(expert: Any) -> None:
        for_each(0, peers, lambda i: go_out(go, jax.lax.rem(peers - i, peers) * own + expert))

    def through(block: Any, place: Any, cut: Any, index: Any) -> None:
        held, x_ref, sums_ref = matrices.held(index), scratch.x.at[place], scratch.sums.at[place]

        @pl.when(cut == 0)
        def _begin() -> None:
            unpack_block(scratch.rows.at[load.slot(block)], x_ref, on_tpu)
            begin_sums(sums_ref, held.b_out, piece)

        def work(num_units: int) -> None:
            hidden_ref = scratch.hidden
            multiply_block(x_ref, held, hidden_ref, sums_ref, activation, num_units, piece)

        whole = held.w_in.shape[1]
        if matrices.tail == whole:
            work(whole)
        else:
            pl.when(cut < last)(lambda: work(whole))
            pl.when(cut == last)(lambda: work(matrices.tail))

        @pl.when(cut == last)
        def _finish() -> None:
            pack_block(sums_ref, scratch.results.at[store.slot(block)], dtype, on_tpu)

    handshake(plan.devices)
    matrices.start(0)
    for_each(0, own, start_of)
    for_each(0, num_segments, lambda hole: go.fill(hole, "start"))
    for_each(0, num_segments, lambda hole: go.fill(hole, "wait"))
    for_each(0, num_segments + 1, lambda hole: come.fill(hole, "start"))
    walk_visits(Walk(plan, go, come, load, store, matrices), through)
    for copies in (go, come):
        for_each(own, num_segments, copies.wait_sent)
    for_each(0, num_segments, come.wait_arrived)
    for_each(0, num_segments + 1, lambda hole: come.fill(hole, "wait"))


def cost(
    m: int, d: int, f: int, own: int, matrices: int, itemsize: int, tiling: ExchangeTiling
) -> pl.CostEstimate:
    """FLOPs and bytes of one device where each of its experts gets m / own rows."""
    sizes = [-(-m // own)] * own
    return pl.CostEstimate(
        flops=2 * matrices * m * d * f,
        transcendentals=m * f,
        bytes_accessed=blocks.moved_bytes(tiling, sizes, d, f, matrices, itemsize),
        remote_bytes_transferred=2 * m * blocks.row_bytes(d, itemsize),
    )


@functools.partial(jax.jit, static_argnames=("options",))
@with_kernel_settings
def exchange_ffn_mosaic(
    x: jax.Array, counts: jax.Array, experts: Experts, options: ExchangeOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel call: results [M, D] at home, rows received, and each expert's [E/n] of those.

    Rows received lie sorted by expert, each expert's rounded up to whole blocks.
    """
    tiling, matrices = options.tiling, 2 if experts.w_gate is None else 3
    own, d, f = experts.w_in.shape
    m, itemsize = x.shape[0], x.dtype.itemsize
    places, rows = room_for(tiling, own, options.num_rows)
    order, devices = neighbours(options.axis_name)
    sides = m, places, rows
    there, back = segments_there(counts, order, *sides), segments_back(counts, order, *sides)
    sizes = jnp.sum(there.arrivals.reshape(-1, own), axis=0)
    sizes += -sizes % rows
    visits = visit_experts(sizes // rows, places // rows, tiling.span(f))
    plan = Plan(devices, there, back, *visits)
    flat, tree = jax.tree.flatten((plan, pack_rows(x), with_rows(experts)))
    plan, words, experts = jax.tree.unflatten(tree, match_varying(*flat))
    zeros = block_rows(min(m, places), words.shape[2])
    smem, hbm = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pltpu.HBM))
    call = pl.pallas_call(
        functools.partial(
            kernel,
            activation=options.activation,
            on_tpu=interpret_mode() is None,
            piece=chip().mxu_column_size,
        ),
        in_specs=[
            jax.tree.map(lambda _: smem, plan),
            hbm,
            jax.tree.map(lambda _: hbm, experts),
        ],
        out_specs=(hbm, hbm, hbm),
        out_shape=tuple(hbm_result_like(words, size) for size in (places, places, m)),
        scratch_shapes=scratch_shapes(experts, tiling, words, zeros, counts.shape[1]),
        compiler_params=pltpu.CompilerParams(
            collective_id=COLLECTIVE_ID,
            vmem_limit_bytes=tilings.compiler_params(
                (), blocks.vmem_bytes(tiling, d, f, matrices, itemsize)
            ).vmem_limit_bytes,
        ),
        cost_estimate=cost(m, d, f, own, matrices, itemsize, tiling),
        name="taskmoe_exchange_ffn",
    )
    received, _, home = call(plan, *jax.tree.map(in_hbm, (words, experts)))
    return unpack_rows(home, d, x.dtype), unpack_rows(received, d, x.dtype), sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _exchange_ffn(
    x: jax.Array, counts: jax.Array, experts: Experts, options: ExchangeOptions
) -> jax.Array:
    return exchange_ffn_mosaic(x, counts, experts, options)[0]


def _exchange_ffn_forward(
    x: jax.Array, counts: jax.Array, experts: Experts, options: ExchangeOptions
) -> tuple[jax.Array, tuple[Any, ...]]:
    home, received, sizes = exchange_ffn_mosaic(x, counts, experts, options)
    return home, (received, sizes, counts, experts)


def _exchange_ffn_backward(
    options: ExchangeOptions, residuals: tuple[Any, ...], grad: jax.Array
) -> tuple[Any, ...]:
    received, sizes, counts, experts = residuals
    axis, rows = options.axis_name, options.tiling.rows

    def run(x: jax.Array, experts: Experts) -> jax.Array:
        named: Any = experts._asdict()
        return expert_ffn(
            x,
            named.pop("w_in"),
            named.pop("w_out"),
            sizes,
            activation=options.activation,
            implementation="mosaic",
            **named,
        )

    _, pull = jax.vjp(run, received, experts)
    d_sorted = exchange_mosaic(grad, counts, received.shape[0], axis, False, rows)
    d_received, d_experts = pull(d_sorted)
    d_x = exchange_mosaic(d_received, counts, grad.shape[0], axis, True, rows)
    return d_x, None, d_experts


_exchange_ffn.defvjp(_exchange_ffn_forward, _exchange_ffn_backward)


def exchange_ffn(
    x: jax.Array,
    counts: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    num_rows: int,
    *,
    activation: Activation = "relu",
    w_gate: jax.Array | None = None,
    b_in: jax.Array | None = None,
    b_out: jax.Array | None = None,
    b_gate: jax.Array | None = None,
    axis_name: str = "expert",
    tiling: ExchangeTiling | None = None,
) -> jax.Array:
    """Send rows to the devices of their experts, run them through, and bring the results home.

        exchange_rows(expert_ffn(exchange_rows(x, ...), ...), ..., back=True)

    On TPU and in interpret mode, for at most MAX_EXPERTS experts of any width that `tiling_for`
    finds blocks for.

    x, counts, num_rows, axis_name: as in `exchange_rows`, the way there.
    w_in, w_out, activation, w_gate, biases: as in `expert_ffn`, of the L = E/n experts of this
      device.
    tiling: block sizes; None for those that `tiling_for` finds.

    Returns [M, D] in x's dtype; rows past those that count are zero. Raises ValueError or TypeError
    where an argument does not fit. Gradients as of the three.
    """
    x, counts, num_rows = check_exchange("exchange_ffn", x, counts, num_rows, axis_name)
    local = counts.shape[1] // counts.shape[0]
    check_shape("w_in", w_in, (local, x.shape[1], "F"))
    if counts.shape[1] > MAX_EXPERTS:
        raise ValueError(f"counts must be of at most {MAX_EXPERTS} experts, got {counts.shape[1]}")
    if 0 in w_in.shape:
        raise ValueError(f"w_in must not be empty, got {list(w_in.shape)}")
    f = w_in.shape[2]
    check_shape("w_out", w_out, (local, f, x.shape[1]))
    if b_gate is not None and w_gate is None:
        raise ValueError("b_gate must be None without w_gate")
    experts = Experts(w_in, w_out, w_gate, b_in, b_out, b_gate)
    shapes = {"w_gate": w_in.shape, "b_in": (local, f), "b_gate": (local, f)}
    shapes["b_out"] = (local, x.shape[1])
    for name, array in experts._asdict().items():
        if array is not None:
            as_floats(name, array, ("x", x))
            check_shape(name, array, shapes.get(name, array.shape))
    check_activation(activation, w_gate is not None)
    blocks.check_tiling(tiling, f, x.dtype.itemsize)
    tiling = tiling or tiling_for(x, counts, experts, num_rows)
    if tiling is None:
        raise ValueError(
            f"w_in must be narrow enough for {tilings.LANES} hidden units of an expert to fit in "
            f"VMEM, got {list(w_in.shape)}"
        )
    flat, tree = jax.tree.flatten((x, counts, experts))
    x, counts, experts = jax.tree.unflatten(tree, match_varying(*flat))
    options = ExchangeOptions(num_rows, axis_name, activation, tiling)
    return _exchange_ffn(x, counts, experts, options)
