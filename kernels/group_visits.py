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


def sub_rows(rows: int) -> int:
    """Rows that a visit works on at a time where it owns a part of its block of so many."""
    return SUB_ROWS if rows % SUB_ROWS == 0 else rows


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

    def work(self, act: Callable[[Any, int, bool], None]) -> None:
        """act(start, size, masked) on the whole block, or on parts where rows are not its own."""

        @pl.when(self.owns_all)
        def _whole() -> None:
            act(0, self.rows, False)

        @pl.when(~self.owns_all & (self.high > self.low))
        def _parts() -> None:
            size = sub_rows(self.rows)

            def one(i: jax.Array, carry: None) -> None:
                act(pl.multiple_of(i * size, size), size, True)

            jax.lax.fori_loop(self.low // size, pl.cdiv(self.high, size), one, None)


def visit_blocks(
    bounds: tuple[jax.Array, jax.Array], num_rows: int, block_rows: int, every_group: bool = False
) -> Visits:
    """Every block of rows at least once, in order, and if so asked every group as well."""
    starts, ends = bounds
    num_groups, blocks = starts.shape[0], -(-num_rows // block_rows)
    held = (ends > starts) | every_group
    some = jnp.any(held)
    # Rows [low, high) belong to local groups; the blocks before and after them hold none.
    low = jnp.where(some, starts[0], 0)
    high = jnp.where(some, ends[-1], 0)
    first = jnp.minimum(starts, num_rows - 1) // block_rows
    last = jnp.maximum(ends - 1, first * block_rows) // block_rows
    after = -(-high // block_rows)
    before = jnp.minimum(low, num_rows - 1) // block_rows
    count = jnp.where(held, last - first + 1, 0)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), first, after[None]])
    count = jnp.concatenate([before[None], count, (blocks - after)[None]])
    segment, place, num = _unroll(count, blocks + num_groups + 1)
    # The zeroing visits borrow a group that is visited anyway, so that no matrix is fetched for
    # them.
    order = jnp.arange(num_groups, dtype=jnp.int32)
    lowest = jnp.min(jnp.where(held, order, num_groups - 1))
    highest = jnp.max(jnp.where(held, order, 0))
    group = jnp.clip(segment - 1, lowest, jnp.maximum(lowest, highest))
    return Visits(starts, ends, group, first[segment] + place, num[None])


def visit_groups(bounds: tuple[jax.Array, jax.Array], num_rows: int, block_rows: int) -> Visits:
    """Every group at least once, in order: for kernels whose output is a matrix a group."""
    starts, ends = bounds
    first = jnp.minimum(starts, num_rows - 1) // block_rows
    count = jnp.where(ends > starts, (ends - 1) // block_rows - first + 1, 1)
    segment, place, num = _unroll(count, -(-num_rows // block_rows) + starts.shape[0])
    return Visits(starts, ends, segment, first[segment] + place, num[None])


def _unroll(count: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Segment and place in it of the i-th of sum(count) visits, [length] i32 each, and the sum.

    Places past the sum repeat the last visit's segment and are not walked.
    """
    stop = jax.lax.cumsum(count.astype(jnp.int32))
    visit = jnp.minimum(jnp.arange(length, dtype=jnp.int32), stop[-1] - 1)
    segment = jnp.sum(visit[:, None] >= stop, axis=1, dtype=jnp.int32)
    return segment, visit - (stop - count)[segment], stop[-1]
