"""exchange_ffn: rows to their experts' devices, through the experts and back, in one TPU kernel.

    home = back(expert_ffn(there(x)))        there, back: `exchange_rows`

There is no grid. A device starts the copies of all its rows, those for its peers' first experts
first, and then walks its own experts and the blocks of their rows: it waits until a block's rows
are there, multiplies them, and starts the way home of each peer's results as soon as its last block
is stored. While it multiplies, rows of the blocks to come and results of those before are on the
wire, and the next expert's matrices are read into the other of two buffers. What nothing hides are
the way of the first rows (a device's own come first, and need none), the way home of the last, and
the wait for a block's rows while the one before could be multiplied: one block is read ahead.
Rows of each expert begin at a multiple of the block, so no block straddles experts and none is read
while peers still write to it.

The backward pass is not fused: `exchange_rows` there, `expert_ffn`'s backward, `exchange_rows`.

VMEM: two buffers of an expert's matrices, two each of a block of rows and of results, one block of
zeros, and a chunk's hidden activations.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.block_products import through_expert
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
    from_words,
    hbm_result_like,
    neighbours,
    pack,
    segments_back,
    segments_there,
    to_words,
    unpack,
)
from taskmoe.kernels.exchange_walk import Buffered, Plan, go_out, multiply
from taskmoe.kernels.expert_network import expert_ffn
from taskmoe.kernels.ffn_kernel import cost as ffn_cost
from taskmoe.kernels.options import Activation, Experts, check_activation
from taskmoe.kernels.platforms import chip, with_kernel_settings
from taskmoe.kernels.tiling import HIDDEN_CHUNK

#: Each segment of rows has a semaphore; a core has about 500.
MAX_EXPERTS = 256


def vmem_bytes(rows: int, d: int, f: int, matrices: int, itemsize: int) -> int:
    """VMEM of the kernel with blocks of this many rows."""
    words = d * itemsize
    chunk = min(f, HIDDEN_CHUNK)
    streams = 2 * matrices * d * f * itemsize + 4 * rows * words
    return streams + rows * (2 * d * 4 + chunk * 4 * matrices) + tilings.LANES * words


def row_block(x: jax.Array, num_experts: int, num_rows: int) -> int:
    """Rows a block: as in gmm, of the rows that a device gets when all get as many as they send."""
    return tilings.block_rows(min(x.shape[0], num_rows), num_experts, x.dtype.itemsize)


def room_for(x: jax.Array, num_experts: int, num_rows: int) -> tuple[int, int]:
    """Places that the kernel has for rows that arrive, num_rows at least, and rows a block.

    x: [M, D]; num_experts: of this device, each of which begins a block.
    """
    rows = row_block(x, num_experts, num_rows)
    return tilings.round_up(num_rows, rows) + num_experts * rows, rows


def can_fuse(
    x: jax.Array, counts: jax.Array, w_in: jax.Array, w_gate: jax.Array | None, num_rows: int
) -> bool:
    """Whether the kernel takes these shapes: whole words and registers, and room on the chip.

    x: [M, D]; counts: [n, E]; w_in: [E/n, D, F], the device's own, of which two must fit in VMEM.
    """
    local, d, f = w_in.shape
    itemsize, matrices = x.dtype.itemsize, 2 if w_gate is None else 3
    rows = row_block(x, local, num_rows)
    return (
        counts.shape[1] <= MAX_EXPERTS
        and d % (4 // itemsize * tilings.LANES) == 0
        and f % tilings.LANES == 0
        and vmem_bytes(rows, d, f, matrices, itemsize) <= tilings.vmem_budget_bytes(chip())
    )


class Scratch(NamedTuple):
    """VMEM: a block of zeros; two buffers of an expert's matrices, of rows and of results."""

    zeros: Any
    weights: Any
    rows: Any
    results: Any


class Semaphores(NamedTuple):
    """DMA semaphores: of the buffers two each, of arrivals one a segment."""

    read: Any
    loaded: Any
    stored: Any
    sent: Any
    arrived: Any
    returned: Any
    filled: Any


def kernel(
    plan: Plan,
    x_ref: Any,
    weights: Any,
    received_ref: Any,
    results_ref: Any,
    home_ref: Any,
    scratch: Scratch,
    semaphores: Semaphores,
    *,
    rows: int,
    activation: Activation,
    dtype: Any,
) -> None:
    """The whole layer of one device. rows: of a block."""
    zeros_ref, sent, filled = scratch.zeros, semaphores.sent, semaphores.filled
    zeros_ref[...] = jnp.zeros_like(zeros_ref)
    of = plan.devices
    go = Copies(of, plan.there, x_ref, received_ref, zeros_ref, sent, semaphores.arrived, filled)
    come = Copies(
        of, plan.back, results_ref, home_ref, zeros_ref, sent, semaphores.returned, filled
    )
    own, peers, num_segments = go.own, go.peers, plan.there.sizes.shape[0]
    held = [pair for pair in zip(weights, scratch.weights, strict=True) if pair[0] is not None]
    matrices = Buffered(held, semaphores.read)
    load = Buffered([(received_ref, scratch.rows)], semaphores.loaded, rows)
    store = Buffered([(results_ref, scratch.results)], semaphores.stored, rows)

    def start_of(expert: Any) -> None:
        for_each(0, peers, lambda i: go_out(go, jax.lax.rem(peers - i, peers) * own + expert))

    def one(expert: jax.Array) -> None:
        slot = jax.lax.rem(expert, 2)
        w_in, w_gate, w_out = (None if b is None else b.at[slot] for b in scratch.weights)
        held: Any = Experts(w_in, w_out, w_gate)

        def through(at: Any) -> None:
            x = unpack(scratch.rows[at, :, 0, :], dtype)
            y = through_expert(x, held, activation)
            scratch.results[at, :, 0, :] = pack(y, dtype)

        pl.when(expert + 1 < own)(lambda: matrices.start(expert + 1))
        matrices.wait(expert)
        multiply(expert, plan, go, come, load, store, through, rows)

    handshake(plan.devices)
    matrices.start(0)
    for_each(0, own, start_of)
    for_each(0, num_segments, lambda hole: go.fill(hole, "start"))
    for_each(0, num_segments, lambda hole: go.fill(hole, "wait"))
    for_each(0, num_segments + 1, lambda hole: come.fill(hole, "start"))
    for_each(0, own, one)
    for copies in (go, come):
        for_each(own, num_segments, copies.wait_sent)
    for_each(0, num_segments, come.wait_arrived)
    for_each(0, num_segments + 1, lambda hole: come.fill(hole, "wait"))


@functools.partial(jax.jit, static_argnames=("num_rows", "axis_name", "activation"))
@with_kernel_settings
def exchange_ffn_mosaic(
    x: jax.Array,
    counts: jax.Array,
    weights: tuple[jax.Array | None, ...],
    num_rows: int,
    axis_name: str,
    activation: Activation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel call: results [M, D] at home, rows received, and each expert's [E/n] of those.

    Rows received lie sorted by expert, each expert's rounded up to whole blocks.
    """
    w_in, w_gate, _ = weights
    assert w_in is not None
    own, d, f = w_in.shape
    count, itemsize = 2 if w_gate is None else 3, x.dtype.itemsize
    places, rows = room_for(x, own, num_rows)
    order, devices = neighbours(axis_name)
    sides = x.shape[0], places, rows
    there, back = segments_there(counts, order, *sides), segments_back(counts, order, *sides)
    sizes = jnp.sum(there.arrivals.reshape(-1, own), axis=0)
    sizes += -sizes % rows
    first = (jnp.cumsum(sizes) - sizes) // rows
    plan = Plan(devices, there, back, first, sizes // rows)
    flat, tree = jax.tree.flatten((plan, to_words(x), weights))
    plan, words, weights = jax.tree.unflatten(tree, match_varying(*flat))
    width = words.shape[2]
    zeros = block_rows(min(x.shape[0], places), width)
    smem, hbm = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pltpu.HBM))
    buffers = [None if w is None else pltpu.VMEM((2, *w.shape[1:]), w.dtype) for w in weights]
    semaphore: Any = pltpu.SemaphoreType.DMA
    work = ffn_cost(x.shape[0], d, f, own, count, itemsize)
    call = pl.pallas_call(
        functools.partial(kernel, rows=rows, activation=activation, dtype=x.dtype),
        in_specs=[
            jax.tree.map(lambda _: smem, plan),
            hbm,
            tuple(None if w is None else hbm for w in weights),
        ],
        out_specs=(hbm, hbm, hbm),
        out_shape=tuple(hbm_result_like(words, size) for size in (places, places, x.shape[0])),
        scratch_shapes=[
            Scratch(
                zeros=pltpu.VMEM((zeros, 1, width), words.dtype),
                weights=buffers,
                rows=pltpu.VMEM((2, rows, 1, width), words.dtype),
                results=pltpu.VMEM((2, rows, 1, width), words.dtype),
            ),
            Semaphores(
                read=semaphore((2,)),
                loaded=semaphore((2,)),
                stored=semaphore((2,)),
                sent=semaphore,
                arrived=semaphore((counts.shape[1],)),
                returned=semaphore((1,)),
                filled=semaphore,
            ),
        ],
        compiler_params=pltpu.CompilerParams(
            collective_id=COLLECTIVE_ID,
            vmem_limit_bytes=tilings.compiler_params(
                (), vmem_bytes(rows, d, f, count, itemsize)
            ).vmem_limit_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=work.flops,
            transcendentals=work.transcendentals,
            bytes_accessed=2 * work.bytes_accessed,
            remote_bytes_transferred=2 * x.size * itemsize,
        ),
        name="taskmoe_exchange_ffn",
    )
    received, _, home = call(plan, *jax.tree.map(in_hbm, (words, weights)))
    return from_words(home, d, x.dtype), from_words(received, d, x.dtype), sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _exchange_ffn(
    x: jax.Array,
    counts: jax.Array,
    weights: tuple[jax.Array | None, ...],
    num_rows: int,
    axis_name: str,
    activation: Activation,
) -> jax.Array:
    return exchange_ffn_mosaic(x, counts, weights, num_rows, axis_name, activation)[0]


def _exchange_ffn_forward(
    x: jax.Array,
    counts: jax.Array,
    weights: tuple[jax.Array | None, ...],
    num_rows: int,
    axis_name: str,
    activation: Activation,
) -> tuple[jax.Array, tuple[Any, ...]]:
    args = (x, counts, weights, num_rows, axis_name, activation)
    home, received, sizes = exchange_ffn_mosaic(*args)
    return home, (received, sizes, counts, weights)


def _exchange_ffn_backward(
    num_rows: int,
    axis_name: str,
    activation: Activation,
    residuals: tuple[Any, ...],
    grad: jax.Array,
) -> tuple[Any, ...]:
    received, sizes, counts, weights = residuals
    rows = row_block(grad, weights[0].shape[0], num_rows)

    def run(x: jax.Array, weights: tuple[Any, ...]) -> jax.Array:
        w_in, w_gate, w_out = weights
        return expert_ffn(
            x, w_in, w_out, sizes, activation=activation, w_gate=w_gate, implementation="mosaic"
        )

    _, pull = jax.vjp(run, received, weights)
    d_sorted = exchange_mosaic(grad, counts, received.shape[0], axis_name, False, rows)
    d_received, d_weights = pull(d_sorted)
    d_x = exchange_mosaic(d_received, counts, grad.shape[0], axis_name, True, rows)
    return d_x, None, d_weights


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
    axis_name: str = "expert",
) -> jax.Array:
    """Send rows to the devices of their experts, run them through, and bring the results home.

        exchange_rows(expert_ffn(exchange_rows(x, ...), ...), ..., back=True)

    Where `can_fuse` and on TPU or in interpret mode; elsewhere compose the three.

    x, counts, num_rows, axis_name: as in `exchange_rows`, the way there.
    w_in, w_out, activation, w_gate: as in `expert_ffn`, of the L = E/n experts of this device.

    Returns [M, D] in x's dtype; rows past those that count are zero. Raises ValueError or TypeError
    where an argument does not fit. Gradients as of the three.
    """
    x, counts, num_rows = check_exchange("exchange_ffn", x, counts, num_rows, axis_name)
    local = counts.shape[1] // counts.shape[0]
    check_shape("w_in", w_in, (local, x.shape[1], "F"))
    check_shape("w_out", w_out, (local, w_in.shape[2], x.shape[1]))
    for name, weight in (("w_in", w_in), ("w_out", w_out), ("w_gate", w_gate)):
        if weight is not None:
            as_floats(name, weight, ("x", x))
    if w_gate is not None:
        check_shape("w_gate", w_gate, w_in.shape)
    check_activation(activation, w_gate is not None)
    if not can_fuse(x, counts, w_in, w_gate, num_rows):
        raise ValueError(
            f"w_in must have D a multiple of {4 // x.dtype.itemsize * tilings.LANES}, F one of "
            f"{tilings.LANES}, fit twice in VMEM and be of at most {MAX_EXPERTS} experts, got "
            f"{list(w_in.shape)} of {counts.shape[1]}"
        )
    w_in, w_out, x, counts = match_varying(w_in, w_out, x, counts)
    if w_gate is not None:
        w_gate, _ = match_varying(w_gate, x)
    return _exchange_ffn(x, counts, (w_in, w_gate, w_out), num_rows, axis_name, activation)
