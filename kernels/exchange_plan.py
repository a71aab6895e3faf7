"""What an exchange of rows sends where, and how the rows travel: for kernels that copy them.

f's rows for expert e begin at start_f(e) of its rows packed by expert, and arrive at place
first_t(e) + sum_g counts[g, e] of the rows of device t, which holds e, where g are the devices from
t on, around, before f: sorted by expert, and within one by the device that they came from. All of
it follows from the counts of all devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings


class Segments(NamedTuple):
    """What one device sends and gets: i32 [E] each, by peer from itself on, then by expert.

    sources: where each segment begins here. targets: where it begins on the peer. sizes: its rows.
    arrivals: rows of each segment that the peer sends here. hole_starts, hole_sizes: [E + 1], rows
    of the result that nobody writes.
    """

    sources: jax.Array
    targets: jax.Array
    sizes: jax.Array
    arrivals: jax.Array
    hole_starts: jax.Array
    hole_sizes: jax.Array


def neighbours(axis_name: str) -> tuple[jax.Array, jax.Array]:
    """Index on the axis and logical id on the mesh of every peer, from this device on: [n] each."""
    mesh = jax.sharding.get_abstract_mesh()
    size = mesh.shape[axis_name]
    order = (jax.lax.axis_index(axis_name) + jnp.arange(size, dtype=jnp.int32)) % size
    device = jnp.zeros_like(order)
    for name in mesh.axis_names:
        index = order if name == axis_name else jax.lax.axis_index(name)
        device = device * mesh.shape[name] + index
    return order, device


class _Layout(NamedTuple):
    """Where rows lie packed and sorted, i32 [from, to, expert of it] each.

    begin: first place where they are packed. packed: rows that fit there. place: first place where
    they are sorted. moved: rows that fit there too. gaps: [to, expert], free places behind the rows
    of each expert.
    """

    begin: jax.Array
    packed: jax.Array
    place: jax.Array
    moved: jax.Array
    gaps: jax.Array


def _layout(counts: jax.Array, packed_rows: int, sorted_rows: int, align: int) -> _Layout:
    peers, num_experts = counts.shape
    shape = (peers, peers, num_experts // peers)
    wanted = jnp.clip(counts.astype(jnp.int32), 0, packed_rows)
    begin = jnp.cumsum(wanted, axis=1) - wanted
    packed = jnp.clip(packed_rows - begin, 0, wanted).reshape(shape)
    totals = jnp.sum(packed, axis=0)
    gaps = -totals % align
    first = jnp.cumsum(totals + gaps, axis=1) - totals - gaps
    device = jnp.arange(peers)
    around = packed[(device + device[:, None]) % peers, device]  # [from `to` on, to, expert]
    before = jnp.cumsum(around, axis=0) - around
    place = first + before[(device[:, None] - device) % peers, device]
    moved = jnp.clip(sorted_rows - place, 0, packed)
    return _Layout(begin.reshape(shape), packed, place, moved, gaps)


def segments_there(
    counts: jax.Array, order: jax.Array, packed_rows: int, sorted_rows: int, align: int = 1
) -> Segments:
    """The segments of device order[0], from packed to sorted rows.

    counts: [n, E] i32, rows of each device for each expert. All devices cut what does not fit in
    the same way, so that each waits for what is sent. With `align` every expert's rows begin at a
    multiple of it where they are sorted.
    """
    of = _layout(counts, packed_rows, sorted_rows, align)
    me, last = order[0], order[-1]
    landing = of.place[:, me]
    room = of.packed[:, me].at[last].add(of.gaps[me])  # the gap lies behind the last peer's rows
    whole = jnp.clip(sorted_rows - landing, 0, room)
    ways = of.begin[me], of.place[me], of.moved[me], of.moved[:, me]
    return _ordered(order, *ways, landing, whole, sorted_rows)


def segments_back(
    counts: jax.Array, order: jax.Array, packed_rows: int, sorted_rows: int, align: int = 1
) -> Segments:
    """The segments of device order[0], from sorted rows back to packed: those of the way there."""
    of = _layout(counts, packed_rows, sorted_rows, align)
    me = order[0]
    ways = of.place[:, me], of.begin[:, me], of.moved[:, me], of.moved[me]
    return _ordered(order, *ways, of.begin[me], of.packed[me], packed_rows)


def _ordered(
    order: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    sizes: jax.Array,
    arrivals: jax.Array,
    landing: jax.Array,
    whole: jax.Array,
    end: int,
) -> Segments:
    """Segments by peer from this device on; arguments [n, E/n].

    landing, whole: first place of what each peer sends here, and places that are kept for it. end:
    of the result's rows.
    """
    tables = jnp.stack([sources, targets, sizes, arrivals, landing, whole])[:, order]
    sources, targets, sizes, arrivals, landing, whole = tables.reshape(6, -1)
    tail = jnp.sum(whole)[None]
    hole_starts = jnp.concatenate([landing + arrivals, tail])
    hole_sizes = jnp.concatenate([whole - arrivals, end - tail])
    return Segments(sources, targets, sizes, arrivals, hole_starts, hole_sizes)


def to_words(x: jax.Array) -> jax.Array:
    """Rows [M, W] as they travel: [M, 1, w] of 32 bits, w a multiple of 128."""
    per_word = 4 // x.dtype.itemsize
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % (per_word * tilings.LANES))))
    if per_word == 1:
        return x[:, None]
    low, high = (
        jax.lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32)
        for half in jnp.split(x, 2, axis=1)
    )
    return jax.lax.bitcast_convert_type(high << 16 | low, jnp.int32)[:, None]


def from_words(words: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Rows [M, width] from what `to_words` made of them."""
    words = words[:, 0]
    if jnp.dtype(dtype).itemsize == 4:
        return words[:, :width]
    bits = jax.lax.bitcast_convert_type(words, jnp.uint32)
    halves = (
        jax.lax.bitcast_convert_type(half.astype(jnp.uint16), dtype)
        for half in (bits & 0xFFFF, bits >> 16)
    )
    return jnp.concatenate(list(halves), axis=1)[:, :width]


def split_words(words: jax.Array, dtype: Any) -> list[jax.Array]:
    """Inside a kernel: words [m, w] as the values that share them, from both halves of their rows.

    f32 has a word to itself.
    """
    if jnp.dtype(dtype).itemsize == 4:
        return [words]
    return [
        jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
        for bits in (words << 16, words & jnp.int32(-65536))
    ]


def join_words(values: list[jax.Array], dtype: Any) -> jax.Array:
    """Inside a kernel: f32 values [m, w] each, rounded to dtype, as words that they share."""
    if jnp.dtype(dtype).itemsize == 4:
        return values[0]
    low, high = (
        jax.lax.bitcast_convert_type(v.astype(dtype).astype(jnp.float32), jnp.int32) for v in values
    )
    return jax.lax.shift_right_logical(low, 16) | high


def hbm_result_like(x: jax.Array, num_rows: int) -> Any:
    """A kernel's result [num_rows, 1, W] that XLA keeps in HBM, where peers write to it."""
    aval: Any = jax.typeof(x)
    return pltpu.HBM.from_type(aval.update(shape=(num_rows, *x.shape[1:])))
