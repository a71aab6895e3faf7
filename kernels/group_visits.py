"""Which blocks of rows meet which groups: the walk of the grouped kernels, found on device.

It is a small kernel of its own, on the scalar unit: a few bundles a group and a visit. In XLA one
operation on so few numbers takes 2,000 cycles, whatever it does.

The sequential grid axis of gmm, tgmm and expert_ffn is a list of visits. A visit is one block of
rows and one group that has rows there. A block that straddles groups is visited once for each,
consecutively, so that its output stays in VMEM between them; empty groups are not visited. Blocks
without any row of the local groups are visited once, to be zeroed. Kernels that return a matrix a
group visit groups without rows once, for the same reason.

A kernel makes a `Visit` of the walk, which works on its rows in parts that begin at the first of
them: as tall as may be, for the matrix enters the MXU once for each, and few more rows than it has.
What a part holds of other groups' rows is masked, which is nearly free.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.checks import result_like
from taskmoe.kernels.groups import Groups

#: Most and least rows of a part of a block. Fewer take as long: the matrix enters the MXU for them.
#: The most is above 512, so that groups that have about as many are mostly one part.
TALLEST_PART, SHORTEST_PART = 640, 128
#: The tallest of expert_ffn, whose products are many: taller ones are faster by a twentieth.
FFN_PART = 256


class Visits(NamedTuple):
    """The walk, prefetched to SMEM.

    starts: [E] i32, first row of each local group
    ends: [E] i32, one past its last row
    group: [V] i32, group of each visit
    block: [V] i32, block of rows of each visit
    num: [1] i32, visits that count: the grid's bound on device
    """

    starts: jax.Array
    ends: jax.Array
    group: jax.Array
    block: jax.Array
    num: jax.Array


def part_sizes(rows: int, tallest: int = TALLEST_PART, often: int | None = None) -> list[int]:
    """Rows of the parts in which a visit works on a block of so many.

    The first is that of the loop, `often` or the tallest; the others follow, tallest first.
    """
    if rows % SHORTEST_PART:
        return [rows]
    first = min(rows, often or tallest)
    sizes = range(min(rows, tallest), 0, -SHORTEST_PART)
    return [first, *(size for size in sizes if size != first)]


class Visit:
    """The visit that a kernel makes: what of its block of rows belongs to its group.

    low, high: first and one past the last of its rows, counted inside the block. owns_all: whether
    that is the whole block.
    """

    def __init__(self, walk: Visits, index: Any, rows: int) -> None:
        """walk: in SMEM. index: of the visit. rows: of a block."""
        self._walk, self._index, self.rows = walk, index, rows
        group, first = walk.group[index], walk.block[index] * rows
        self.low = jnp.maximum(walk.starts[group] - first, 0)
        self.high = jnp.minimum(walk.ends[group] - first, rows)
        self.owns_all = (self.low == 0) & (self.high == rows)

    def block_arrives(self) -> Any:
        """Whether the visit before was at another block."""
        return self._begins(self._walk.block)

    def block_leaves(self) -> Any:
        """Whether the next visit is at another block."""
        return self._ends(self._walk.block)

    def group_arrives(self) -> Any:
        """Whether the visit before was of another group."""
        return self._begins(self._walk.group)

    def group_leaves(self) -> Any:
        """Whether the next visit is of another group."""
        return self._ends(self._walk.group)

    def _ends(self, ref: Any) -> Any:
        last = self._walk.num[0] - 1
        return (self._index == last) | (ref[jnp.minimum(self._index + 1, last)] != ref[self._index])

    def _begins(self, ref: Any) -> Any:
        before = jnp.maximum(self._index - 1, 0)
        return (self._index == 0) | (ref[before] != ref[self._index])

    def owned(self, start: Any, shape: tuple[int, ...]) -> jax.Array:
        """Which of the rows from `start` on belong to the group: bool of this shape."""
        row = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (row >= self.low) & (row < self.high)

    def only_own(self, x: jax.Array, start: Any) -> jax.Array:
        """Rows x [m, n] from `start` on, zero where they are not the group's, even where NaN."""
        if x.dtype.itemsize != 2:
            return jnp.where(self.owned(start, x.shape), x, 0)
        # Two rows lie in one word: one operation for both, where a select takes five.
        row = start + 2 * jax.lax.broadcasted_iota(jnp.int32, (x.shape[0] // 2, x.shape[1]), 0)
        even, odd = ((r >= self.low) & (r < self.high) for r in (row, row + 1))
        held = jnp.where(even, 0xFFFF, 0) | jnp.where(odd, -0x10000, 0)
        return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & held, x.dtype)

    def work(
        self,
        act: Callable[[Any, int], None],
        unit: int,
        tallest: int = TALLEST_PART,
        often: int | None = None,
    ) -> None:
        """act(start, size) on parts of the block that lie side by side and hold the visit's rows.

        Those of `often` rows come first, in a loop, then one of what is left, as tall as may be.
        unit: of what starts are multiples, a register's height of rows. often: the tallest, if not
        given.
        """
        sizes = part_sizes(self.rows, tallest, often)
        least = min(sizes)
        first = self.low & -unit
        units = (self.high > self.low).astype(jnp.int32)
        if least < self.rows:
            units *= _quotient(self.high - first + least - 1, least)
        begin = jnp.minimum(first, self.rows - units * least)

        def one(i: jax.Array, carry: None) -> None:
            act(pl.multiple_of(begin + i * sizes[0], unit), sizes[0])

        step = sizes[0] // least
        count = _quotient(units, step)
        rest = max(sizes) - sizes[0]
        if rest:  # a taller one takes the place of the last and of so much more
            count -= ((count > 0) & (units - count * step == rest // least)).astype(jnp.int32)
        jax.lax.fori_loop(0, count, one, None)
        begin += count * sizes[0]
        left = units - count * step
        for size in sizes[1:]:
            pl.when(left == size // least)(
                functools.partial(act, pl.multiple_of(begin, unit), size)
            )

    def write(self, ref: Any, value: jax.Array, part: Any, columns: Any, mixed: int) -> None:
        """Rows value [m, n] of a part into ref: the group's own, and any that come after them.

        Rows of groups before, of which the first `mixed` may hold some, are put back as they were.
        Those of groups after are not there yet, and `finish` clears what is nobody's.
        """
        if mixed <= 0:
            ref[part, columns] = value.astype(ref.dtype)
            return
        mixed = min(part.size, mixed)
        top = pl.ds(part.start, mixed)
        old = ref[top, columns].astype(value.dtype)
        ref[part, columns] = value.astype(ref.dtype)
        own = self.owned(part.start, old.shape)
        ref[top, columns] = jnp.where(own, value[:mixed], old).astype(ref.dtype)

    def begin(self, ref: Any, when: Any) -> None:
        """Zero a block of results, at its first visit, where rows before the visit's are nobody's.

        when: whether this step is the first of the visit.
        """

        @pl.when(when & self.block_arrives() & ((self.low > 0) | (self.high <= self.low)))
        def _zero() -> None:
            ref[...] = jnp.zeros_like(ref)

    def finish(self, ref: Any, when: Any, unit: int, every_group: bool = False) -> None:
        """Zero rows of a block of results, at its last visit, that come after the visit's.

        when: whether this step is the last of the visit. unit: a register's height of results.
        every_group: whether the walk visits groups without rows, one of which may be the last.
        """
        unit = self.rows if self.rows % unit else unit

        def clear(i: jax.Array, carry: None) -> None:
            part = pl.ds(pl.multiple_of(i * unit, unit), unit)
            old = ref[part, :]
            row = i * unit + jax.lax.broadcasted_iota(jnp.int32, old.shape, 0)
            kept = jnp.where(row < self.high, old.astype(jnp.float32), 0)
            ref[part, :] = kept.astype(ref.dtype)

        written = self.high > self.low
        if every_group:  # a block's first visit, of a group without rows, has zeroed all
            written |= ~self.block_arrives()

        @pl.when(when & self.block_leaves() & written & (self.high < self.rows))
        def _clear() -> None:
            jax.lax.fori_loop(_quotient(self.high, unit), self.rows // unit, clear, None)


def mixed_rows(rows: int, unit: int, tallest: int = TALLEST_PART) -> int:
    """Most rows of other groups before the visit's own in a part of a block; see `Visit.work`.

    A part begins at a whole register, and where it would end beyond the block begins earlier.
    """
    least = part_sizes(rows, tallest)[-1]
    return rows if least == rows else least + unit


def visit_blocks(
    groups: Groups, num_groups: int, num_rows: int, block_rows: int, every_group: bool = False
) -> Visits:
    """Every block of rows at least once, in order, and if so asked every group as well.

    Blocks before and after the local groups' rows are visited by the first and the last group that
    is visited anyway, so that no matrix is fetched for them; without any, group 0 visits all.
    """
    return _walk(groups, num_groups, num_rows, block_rows, every_group, every_block=True)


def visit_groups(groups: Groups, num_groups: int, num_rows: int, block_rows: int) -> Visits:
    """Every group at least once, in order: for kernels whose output is a matrix a group."""
    return _walk(groups, num_groups, num_rows, block_rows, every_group=True, every_block=False)


def _walk(
    groups: Groups,
    num_groups: int,
    num_rows: int,
    block_rows: int,
    every_group: bool,
    every_block: bool,
) -> Visits:
    length = pl.cdiv(num_rows, block_rows) + num_groups + 1
    counts = (num_groups, num_groups, length, length, 1)
    call = pl.pallas_call(
        functools.partial(
            kernel,
            num_rows=num_rows,
            block_rows=block_rows,
            every_group=every_group,
            every_block=every_block,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[],
            out_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(counts),
        ),
        out_shape=[result_like(groups.sizes, (n,), jnp.int32) for n in counts],
        name="taskmoe_visits",
    )
    return Visits(*call(groups.sizes, groups.offset.reshape(1)))


def kernel(
    sizes_ref: Any,
    offset_ref: Any,
    *refs: Any,
    num_rows: int,
    block_rows: int,
    every_group: bool,
    every_block: bool,
) -> None:
    """The walk, from the sizes [G] of all groups and the number [1] of the first local one."""
    walk = Visits(*refs)
    count, offset, blocks = sizes_ref.shape[0], offset_ref[0], pl.cdiv(num_rows, block_rows)

    def size_of(group: Any) -> Any:
        size = sizes_ref[jnp.clip(group, 0, count - 1)]
        return jnp.where((group >= 0) & (group < count), jnp.maximum(size, 0), 0)

    def end_of(start: Any, size: Any) -> Any:
        """One past the last row; rows that are not there are cut off."""
        return start + jnp.minimum(size, num_rows - start)

    def visit(group: Any) -> Callable[[Any, Any], Any]:
        def one(block: Any, index: Any) -> Any:
            walk.group[index], walk.block[index] = group, block
            return index + 1

        return one

    def visits(group: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        start, size, index = carry
        end = end_of(start, size)
        walk.starts[group], walk.ends[group] = start, end
        first = _quotient(start, block_rows)
        if every_group:  # one without rows is near those that have some
            first = jnp.minimum(first, blocks - 1)
        near = first + 1
        if every_block:
            first = jnp.where(index == 0, 0, first)
        stop = _quotient(end - 1, block_rows) + 1
        stop = jnp.where(end > start, stop, near if every_group else first)
        visit(group)(first, index)  # most have one; of a group without, the next writes over it
        index = index + (stop > first).astype(jnp.int32)
        index = jax.lax.fori_loop(first + 1, stop, visit(group), index)
        return end, size_of(offset + group + 1), index  # loaded while this one is worked on

    def skip(group: Any, start: Any) -> Any:
        return end_of(start, size_of(group))

    zero = jnp.int32(0)
    start = jax.lax.fori_loop(0, jnp.minimum(offset, count), skip, zero)
    held = walk.starts.shape[0]
    _, _, index = jax.lax.fori_loop(0, held, visits, (start, size_of(offset), zero))
    if every_block:  # those behind the last visit are its group's, or group 0's
        last = jnp.maximum(index - 1, 0)
        group = jnp.where(index == 0, 0, walk.group[last])
        first = jnp.where(index == 0, 0, walk.block[last] + 1)
        index = jax.lax.fori_loop(first, blocks, visit(group), index)
    walk.num[0] = index
    # What fetches ahead may look at the place behind the last.
    visit(walk.group[index - 1])(walk.block[index - 1], index)


def _quotient(x: Any, size: int) -> Any:
    """x // size of what is not negative, which the scalar unit shifts where it can."""
    if size & (size - 1):
        return jax.lax.div(x, jnp.int32(size))
    return jax.lax.shift_right_logical(x, jnp.int32(size.bit_length() - 1))
