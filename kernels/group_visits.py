"""Which blocks of rows meet which groups: the walk of the grouped kernels, found on device.

The sequential grid axis of gmm, tgmm and expert_ffn is a list of visits. A visit is one block of
rows and one group that has rows there. A block that straddles groups is visited once for each,
consecutively, so that its output stays in VMEM between them; empty groups are not visited. Blocks
without any row of the local groups are visited once, to be zeroed. Kernels that return a matrix a
group visit groups without rows once, for the same reason.

A kernel makes a `Visit` of the walk. A visit that owns its whole block works on it at once; one
that owns a part works in sub-blocks and skips those that it has no row in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from taskmoe.kernels.groups import Groups, group_bounds

#: Rows of the sub-blocks that a visit works in when it owns a part of its block.
SUB_ROWS = 128


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


def sub_rows(rows: int, size: int = SUB_ROWS) -> int:
    """Rows that a visit works on at a time where it owns a part of its block of so many.

    size: of a sub-block; products that sum over rows want as many as the MXU is deep.
    """
    return size if rows % size == 0 else rows


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

    def group_arrives(self) -> Any:
        """Whether the visit before was of another group."""
        return self._begins(self._walk.group)

    def group_leaves(self) -> Any:
        """Whether the next visit is of another group."""
        last, group = self._walk.num[0] - 1, self._walk.group
        behind = jnp.minimum(self._index + 1, last)
        return (self._index == last) | (group[behind] != group[self._index])

    def _begins(self, ref: Any) -> Any:
        before = jnp.maximum(self._index - 1, 0)
        return (self._index == 0) | (ref[before] != ref[self._index])

    def owned(self, start: Any, shape: tuple[int, ...]) -> jax.Array:
        """Which of the rows from `start` on belong to the group: bool of this shape."""
        row = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return (row >= self.low) & (row < self.high)

    def work(self, act: Callable[[Any, int, bool], None], sub_size: int = SUB_ROWS) -> None:
        """act(start, size, masked) on the whole block, or on parts where rows are not its own."""

        @pl.when(self.owns_all)
        def _whole() -> None:
            act(0, self.rows, False)

        @pl.when(~self.owns_all & (self.high > self.low))
        def _parts() -> None:
            size = sub_rows(self.rows, sub_size)

            def one(i: jax.Array, carry: None) -> None:
                act(pl.multiple_of(i * size, size), size, True)

            jax.lax.fori_loop(self.low // size, pl.cdiv(self.high, size), one, None)


def visit_blocks(
    groups: Groups, num_groups: int, num_rows: int, block_rows: int, every_group: bool = False
) -> Visits:
    """Every block of rows at least once, in order, and if so asked every group as well.

    Blocks before and after the local groups' rows are visited by the first and the last group that
    is visited anyway, so that no matrix is fetched for them; without any, group 0 visits all.
    """
    starts, ends, low, high = _bounds(groups, num_groups, num_rows)
    blocks, order = -(-num_rows // block_rows), jnp.arange(num_groups, dtype=jnp.int32)
    first, last = _blocks(starts, ends, num_rows, block_rows)
    held, nothing = ends > starts, jnp.zeros(num_groups, bool)
    if every_group:
        held, is_first, is_last = ~nothing, order == 0, order == num_groups - 1
    else:
        nothing = (low == high) & (order == 0)
        is_first, is_last = (held & (starts == low)) | nothing, (held & (ends == high)) | nothing
    first = jnp.where(is_first, 0, first)
    last = jnp.where(is_last, blocks - 1, last)
    count = jnp.where(held | nothing, last - first + 1, 0)
    return Visits(starts, ends, *_unroll(count, first, blocks + num_groups + 1))


def visit_groups(groups: Groups, num_groups: int, num_rows: int, block_rows: int) -> Visits:
    """Every group at least once, in order: for kernels whose output is a matrix a group."""
    starts, ends, _, _ = _bounds(groups, num_groups, num_rows)
    first, last = _blocks(starts, ends, num_rows, block_rows)
    length = -(-num_rows // block_rows) + num_groups
    return Visits(starts, ends, *_unroll(last - first + 1, first, length))


# What follows takes few operations of XLA, each a sum over comparisons of all pairs: on TPU one
# operation of so few numbers takes 2,000 cycles, whatever it does, and a gather is three.


def _bounds(groups: Groups, num_groups: int, num_rows: int) -> tuple[jax.Array, ...]:
    """`group_bounds`, and the first and one past the last row of all local groups, [E] i32 each."""
    count = groups.sizes.shape[0]
    if count * num_rows >= 1 << 31:  # sums of comparisons could overflow
        starts, ends = group_bounds(groups, num_groups, num_rows)
        return starts, ends, jnp.full_like(starts, starts[0]), jnp.full_like(ends, ends[-1])
    shape = (num_groups, count)
    local = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 1) - groups.offset
    sizes = jnp.clip(jnp.broadcast_to(groups.sizes, shape), 0, num_rows)
    before = (place < local, place <= local, place < 0, place < num_groups)
    sums = (jnp.sum(jnp.where(mask, sizes, 0), axis=1, dtype=jnp.int32) for mask in before)
    return tuple(jnp.minimum(total, num_rows) for total in sums)


def _blocks(
    starts: jax.Array, ends: jax.Array, num_rows: int, block_rows: int
) -> tuple[jax.Array, jax.Array]:
    """First and last block of each group's rows; of a group without rows one that is near."""
    first = jnp.minimum(starts, num_rows - 1) // block_rows
    return first, jnp.maximum(ends - 1, first * block_rows) // block_rows


def _unroll(
    count: jax.Array, first: jax.Array, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group and block of the i-th of sum(count) visits, [length] i32 each, and the sum, [1].

    Group e makes count[e] visits, at blocks from first[e] on. Places past the sum are not walked.
    """
    order = jnp.arange(count.shape[0], dtype=jnp.int32)
    stop = jnp.sum(jnp.where(order <= order[:, None], count, 0), axis=1, dtype=jnp.int32)
    begin = stop - count
    visit = jnp.arange(length, dtype=jnp.int32)
    own = (visit[:, None] >= begin) & (visit[:, None] < stop)
    group = jnp.sum(jnp.where(own, order, 0), axis=1, dtype=jnp.int32)
    block = jnp.where(own, visit[:, None] + (first - begin), 0)
    return group, jnp.sum(block, axis=1, dtype=jnp.int32), jnp.sum(count, keepdims=True)
