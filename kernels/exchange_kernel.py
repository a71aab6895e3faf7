"""exchange_rows as a Pallas TPU kernel: rows to the devices of their experts and back, by DMA.

    there: out_t[first_t(e) + sum_g counts[g, e] + i] = x_f[start_f(e) + i],  i < counts[f, e]
    back:  the same copies with source and destination swapped

of the i-th row that device f has for expert e, which device t holds: f's rows lie packed by expert
from start_f(e) on, t's rows lie packed by its own experts, and within one by the device they came
from, beginning with t itself: g are the devices from t on, around, before f. No row is padded, and
none is sorted after it has arrived. The gradient of each way is the other way.

There is no grid. Every device tells its peers that it has entered (before that nobody may write
there) and waits for their word; then it starts all its copies, beginning with the device before it,
so that not all send to the first, and fills the rows that nobody writes with zeros; then it waits
for its own copies to have left and for its peers' to have arrived. A segment of rows travels as
blocks and a remainder of powers of two, so that every copy has a static size, and all are in flight
at once. Copies overlap with one another and with the zeros, and not with other kernels: the matmul
that takes the rows begins when all have arrived.

Rows travel as [rows, 1, W] of 32 bits, where a row is contiguous and may begin anywhere; the two
halves of a 16-bit row share words. VMEM: one block of zeros.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.checks import (
    as_floats,
    as_integers,
    as_size,
    check_shape,
    in_hbm,
    match_varying,
)
from taskmoe.kernels.exchange_plan import (
    Segments,
    hbm_result_like,
    neighbours,
    segments_back,
    segments_there,
)
from taskmoe.kernels.platforms import interpret_mode, with_kernel_settings, with_plain_settings
from taskmoe.kernels.words_kernel import pack_rows, unpack_rows

#: Most rows, and most bytes, of one copy.
BLOCK_ROWS, BLOCK_BYTES = 128, 1 << 20
#: Names the barrier that all calls share: they keep one pattern, over one axis.
COLLECTIVE_ID = 11


@with_plain_settings
def exchange_rows_reference(
    x: jax.Array, counts: jax.Array, num_rows: int, back: bool = False, align: int = 1
) -> jax.Array:
    """The definition, with every device's rows in one array: [n, M, W] to [n, num_rows, W]."""
    peers, num_experts = counts.shape
    packed = num_rows if back else x.shape[1]
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(counts, 0), axis=1), packed)
    counts = jnp.diff(ends, axis=1, prepend=0)
    row = jnp.arange(packed)
    expert = jnp.sum(row[None, :, None] >= ends[:, None], axis=2)  # [n, packed]
    held = expert < num_experts
    expert = jnp.minimum(expert, num_experts - 1)
    source = jnp.arange(peers)[:, None]
    target = expert // (num_experts // peers)
    totals = jnp.sum(counts, axis=0).reshape(peers, -1)
    totals += -totals % align
    first = (jnp.cumsum(totals, axis=1) - totals).reshape(-1)
    turn = (source + jnp.arange(num_experts) // (num_experts // peers)) % peers  # from target on
    around = jnp.take_along_axis(counts, turn, axis=0)
    before = (jnp.cumsum(around, axis=0) - around)[(source - target) % peers, expert]
    place = first[expert] + before + row - (ends - counts)[source, expert]
    if back:
        found = x.at[target, place].get(mode="fill", fill_value=0)
        return jnp.where(held[..., None], found, 0)
    out = jnp.zeros((peers, num_rows, x.shape[2]), x.dtype)
    return out.at[target, jnp.where(held, place, num_rows)].set(x, mode="drop")


def cost(num_rows: int, out_rows: int, width: int, peers: int) -> pl.CostEstimate:
    """Bytes of sending num_rows rows of `width` words, evenly, and of writing out_rows."""
    sent = num_rows * width * 4
    return pl.CostEstimate(
        flops=0,
        transcendentals=0,
        bytes_accessed=sent + out_rows * width * 4,
        remote_bytes_transferred=sent * (peers - 1) // peers,
    )


def for_each_piece(size: Any, largest: int, act: Callable[[Any, int], None]) -> None:
    """act(first row, rows) for pieces of static size that make up `size` rows."""
    whole = size // largest

    def block(i: jax.Array, carry: None) -> None:
        act(i * largest, largest)

    jax.lax.fori_loop(0, whole, block, None)
    at, piece = whole * largest, largest // 2
    while piece:
        pl.when((size & piece) != 0)(functools.partial(act, at, piece))
        at += size & piece
        piece //= 2


def mesh_place(device: jax.Array) -> Any:
    """Index on every axis of the mesh of the device with this logical id; newer Pallas asks so."""
    place: list[jax.Array] = []
    for size in reversed(jax.sharding.get_abstract_mesh().axis_sizes[1:]):
        place.insert(0, jax.lax.rem(device, size))
        device = jax.lax.div(device, size)
    return (device, *place)


@dataclasses.dataclass(frozen=True)
class Copies:
    """The copies of one way inside a kernel; the first segments are those the device keeps.

    tables: of refs in SMEM. source_ref, target_ref: [rows, 1, W] HBM, the latter written by peers.
    zeros_ref: [rows, 1, W] VMEM; its rows are those of the largest copy. sent, filled: semaphores.
    arrived: one semaphore for all segments, [1], or one for each.
    """

    devices_ref: Any
    tables: Segments
    source_ref: Any
    target_ref: Any
    zeros_ref: Any
    sent: Any
    arrived: Any
    filled: Any

    @property
    def own(self) -> int:
        """Experts of a device, and segments that it keeps."""
        return int(self.tables.sizes.shape[0] // self.peers)

    @property
    def peers(self) -> int:
        """Devices that exchange rows, this one included."""
        return int(self.devices_ref.shape[0])

    def _arrived(self, segment: Any) -> Any:
        return self.arrived.at[jax.lax.rem(segment, self.arrived.shape[0])]

    def _pieces(self, size: Any, act: Callable[[Any, int], None]) -> None:
        for_each_piece(size, self.zeros_ref.shape[0], act)

    def _ends(self, segment: Any, at: Any, rows: int) -> tuple[Any, Any]:
        source, target = self.tables.sources[segment] + at, self.tables.targets[segment] + at
        return self.source_ref.at[pl.ds(source, rows)], self.target_ref.at[pl.ds(target, rows)]

    def _remote(self, segment: Any, at: Any, rows: int) -> Any:
        peer, expert = segment // self.own, jax.lax.rem(segment, self.own)
        return pltpu.make_async_remote_copy(
            *self._ends(segment, at, rows),
            self.sent,
            self._arrived((self.peers - peer) * self.own + expert),  # as the peer counts around
            device_id=mesh_place(self.devices_ref[peer]),
        )

    def keep(self, segment: Any) -> None:
        """Start the local copies of one of the device's own segments."""

        def start(at: Any, rows: int) -> None:
            ends = self._ends(segment, at, rows)
            pltpu.make_async_copy(*ends, self._arrived(segment)).start()

        self._pieces(self.tables.sizes[segment], start)

    def send(self, segment: Any) -> None:
        """Start the copies of a segment to a peer."""

        def start(at: Any, rows: int) -> None:
            self._remote(segment, at, rows).start()

        self._pieces(self.tables.sizes[segment], start)

    def wait_sent(self, segment: Any) -> None:
        """Wait until a segment has left."""

        def wait(at: Any, rows: int) -> None:
            self._remote(segment, at, rows).wait_send()

        self._pieces(self.tables.sizes[segment], wait)

    def wait_arrived(self, segment: Any) -> None:
        """Wait until a segment, from a peer or kept, is here: as many bytes as its copies have."""

        def wait(at: Any, rows: int) -> None:
            place = self.target_ref.at[pl.ds(0, rows)]
            pltpu.make_async_copy(place, place, self._arrived(segment)).wait()

        self._pieces(self.tables.arrivals[segment], wait)

    def fill(self, hole: Any, act: str) -> None:
        """Start, or wait for, the zeros of a hole."""

        def one(at: Any, rows: int) -> None:
            place = self.target_ref.at[pl.ds(self.tables.hole_starts[hole] + at, rows)]
            zeros = self.zeros_ref.at[pl.ds(0, rows)]
            getattr(pltpu.make_async_copy(zeros, place, self.filled), act)()

        self._pieces(self.tables.hole_sizes[hole], one)


def handshake(devices_ref: Any) -> None:
    """Tell all peers that this device has entered the kernel, and wait until all have."""
    entered, peers = pltpu.get_barrier_semaphore(), devices_ref.shape[0]

    def tell(peer: jax.Array) -> None:
        pl.semaphore_signal(entered, device_id=mesh_place(devices_ref[peer]))

    for_each(1, peers, tell)
    pl.semaphore_wait(entered, peers - 1)


def for_each(first: int, end: int, act: Callable[[jax.Array], None]) -> None:
    """act(i) for i in [first, end)."""
    jax.lax.fori_loop(first, end, lambda i, _: act(i), None)


def kernel(
    devices_ref: Any,
    tables: Any,
    x_ref: Any,
    out_ref: Any,
    zeros_ref: Any,
    sent: Any,
    arrived: Any,
    filled: Any,
) -> None:
    """The whole exchange of one device."""
    zeros_ref[...] = jnp.zeros_like(zeros_ref)
    copies = Copies(devices_ref, tables, x_ref, out_ref, zeros_ref, sent, arrived, filled)
    own, num_segments, num_holes = copies.own, tables.sizes.shape[0], tables.hole_sizes.shape[0]
    handshake(devices_ref)
    for_each(own, num_segments, lambda i: copies.send(num_segments - 1 + own - i))
    for_each(0, own, copies.keep)
    for_each(0, num_holes, lambda hole: copies.fill(hole, "start"))
    for_each(own, num_segments, copies.wait_sent)
    for_each(0, num_segments, copies.wait_arrived)
    for_each(0, num_holes, lambda hole: copies.fill(hole, "wait"))


def block_rows(num_rows: int, width: int) -> int:
    """Rows of the largest copy: a power of two that fits in either side and in a block."""
    most = max(1, min(num_rows, BLOCK_ROWS, BLOCK_BYTES // (width * 4)))
    return 1 << (most.bit_length() - 1)


@functools.partial(
    jax.jit, static_argnames=("num_rows", "axis_name", "back", "align")
)  # where an operand lies is decided under jit only
@with_kernel_settings
def exchange_mosaic(
    x: jax.Array, counts: jax.Array, num_rows: int, axis_name: str, back: bool, align: int
) -> jax.Array:
    """The kernel call; arguments as in `exchange_rows`, validated."""
    sides = (num_rows, x.shape[0]) if back else (x.shape[0], num_rows)
    order, devices = neighbours(axis_name)
    tables = (segments_back if back else segments_there)(counts, order, *sides, align)
    words, devices, *parts = match_varying(pack_rows(x), devices, *tables)
    width, peers = words.shape[2], order.shape[0]
    block = block_rows(min(sides), width)
    smem: Any = pl.BlockSpec(memory_space=pltpu.SMEM)
    call = pl.pallas_call(
        kernel,
        in_specs=[smem, Segments(*len(parts) * [smem]), pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
        out_shape=hbm_result_like(words, num_rows),
        scratch_shapes=[
            pltpu.VMEM((block, 1, width), words.dtype),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA((1,)),
            pltpu.SemaphoreType.DMA,
        ],
        compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE_ID),
        cost_estimate=cost(x.shape[0], num_rows, width, peers),
        name="taskmoe_exchange_rows",
    )
    return unpack_rows(call(devices, Segments(*parts), in_hbm(words)), x.shape[1], x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _exchange(
    x: jax.Array, counts: jax.Array, num_rows: int, axis_name: str, back: bool, align: int
) -> jax.Array:
    return exchange_mosaic(x, counts, num_rows, axis_name, back, align)


def _exchange_forward(
    x: jax.Array, counts: jax.Array, num_rows: int, axis_name: str, back: bool, align: int
) -> tuple[jax.Array, tuple[Any, ...]]:
    out = exchange_mosaic(x, counts, num_rows, axis_name, back, align)
    return out, (counts, jnp.empty((x.shape[0], 0)))


def _exchange_backward(
    num_rows: int,
    axis_name: str,
    back: bool,
    align: int,
    residuals: tuple[Any, ...],
    grad: jax.Array,
) -> tuple[Any, ...]:
    counts, like = residuals
    return _exchange(grad, counts, like.shape[0], axis_name, not back, align), None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def check_can_run(what: str, platform: str) -> None:
    """ValueError unless kernels traced for this platform run: on TPU, or in interpret mode."""
    if platform != "tpu" and interpret_mode() is None:
        raise ValueError(
            f"{what} runs on TPU, or inside "
            "jax.experimental.pallas.tpu.force_tpu_interpret_mode(); the devices of the mesh are "
            f"{platform!r}"
        )


def check_exchange(
    op: str, x: Any, counts: Any, num_rows: Any, axis_name: str
) -> tuple[jax.Array, jax.Array, int]:
    """Rows, counts and rows of the result of an exchange that can run here.

    ValueError or TypeError where they do not fit.
    """
    x, num_rows = as_floats("x", x), as_size("num_rows", num_rows)
    check_shape("x", x, ("M", "W"))
    if x.dtype.itemsize > 4:
        raise TypeError(f"x must be bfloat16 or float32, got {x.dtype}")
    if x.size == 0:
        raise ValueError(f"x must not be empty, got shape {list(x.shape)}")
    peers = jax.lax.axis_size(axis_name)
    counts = as_integers("counts", counts)
    check_shape("counts", counts, (peers, "E"))
    if counts.shape[1] == 0 or counts.shape[1] % peers:
        raise ValueError(
            f"counts must have a multiple of {peers} experts (axis {axis_name!r}), "
            f"got {counts.shape[1]}"
        )
    device = jax.sharding.get_abstract_mesh().abstract_device
    check_can_run(op, jax.default_backend() if device is None else device.platform)
    return x, counts, num_rows


def exchange_rows(
    x: jax.Array,
    counts: jax.Array,
    num_rows: int,
    *,
    axis_name: str = "expert",
    back: bool = False,
    align: int = 1,
) -> jax.Array:
    """Send rows to the devices that hold their experts, or their results back.

    Inside `jax.shard_map` over all axes of a mesh, of which `axis_name` has n devices; each holds
    E/n experts in order.

    x: [M, W] bf16|f32, my rows packed by expert; with `back` the rows of my experts, packed by
      expert and within one by the device that they came from, from mine on and around.
    counts: [n, E] i32, rows that each device has for each expert, the same on all n; negative
      counts as 0.
    num_rows: rows of the result (static): room for all that any device gets.
    back: the way. `exchange_rows(exchange_rows(x, counts, N), counts, M, back=True)` is x up to its
      last row that counts.
    align: with it every expert's rows begin at a multiple of it where they are sorted by expert,
      with zeros between.

    Returns [num_rows, W] in x's dtype: with and without `back` what the other takes. Rows that
    nobody sends are zero; of what exceeds M or num_rows the last is dropped. Raises ValueError or
    TypeError where an argument does not fit, and off TPU. Gradient: the other way.
    """
    x, counts, num_rows = check_exchange("exchange_rows", x, counts, num_rows, axis_name)
    x, counts = match_varying(x, counts)
    return _exchange(x, counts, num_rows, axis_name, back, align)
