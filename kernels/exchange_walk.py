"""Inside `exchange_ffn_kernel`: blocks of rows are read, meet their experts, and are sent home.

Rows lie sorted by expert in whole blocks, so a walk over experts is one over blocks. A visit is
one expert and blocks of its rows that stay in VMEM while its matrices pass by: all of its blocks
where the matrices are whole, some where they are cut. Experts without rows are not visited.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.exchange_kernel import Copies
from taskmoe.kernels.exchange_plan import Segments
from taskmoe.kernels.options import Experts
from taskmoe.kernels.tiling import LANES

#: Blocks of matrices in VMEM: one is multiplied while the next is read.
MATRIX_BUFFERS = 2
#: Rows of a tile of an array in HBM, whatever its dtype.
TILE_ROWS = 8
#: How the axes of an expert's arrays [first, second] hold its hidden units; b_out has none.
HIDDEN_AXIS = {"w_in": 1, "w_out": 0, "w_gate": 1, "b_in": 1, "b_out": None, "b_gate": 1}


class Plan(NamedTuple):
    """What the kernel reads from SMEM.

    devices: [n] i32, logical ids of the peers. there, back: what travels. expert: [V] i32, of each
    visit. first: [V + 1] i32, first block of rows of each visit; behind the last that counts, all
    blocks. visits: [1] i32, how many count.
    """

    devices: Any
    there: Segments
    back: Segments
    expert: Any
    first: Any
    visits: Any


def visit_experts(
    blocks: jax.Array, most: int, span: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A plan's expert, first and visits.

    blocks: [E/n] i32, of each expert's rows, at most `most` in all. span: of a visit, at most; None
    for all of an expert's. Visits of one expert have about equally many: each is to take longer
    than reading the matrices does.
    """
    own, span = blocks.shape[0], span or max(most, 1)
    each = (blocks + span - 1) // span
    share = (blocks + each - 1) // jnp.maximum(each, 1)
    ends = jnp.cumsum(each)
    visit = jnp.arange(own + most // span + 1, dtype=jnp.int32)
    expert = jnp.minimum(jnp.sum(visit[:, None] >= ends, axis=1), own - 1).astype(jnp.int32)
    before = jnp.cumsum(blocks) - blocks
    begin = before[expert] + (visit - (ends - each)[expert]) * share[expert]
    first = jnp.where(visit < ends[-1], begin, jnp.sum(blocks)).astype(jnp.int32)
    return expert[:-1], first, ends[-1:].astype(jnp.int32)


class Buffered:
    """Copies between blocks of an array in HBM and buffers in VMEM that are used in turns."""

    def __init__(self, array_ref: Any, buffers_ref: Any, semaphores: Any) -> None:
        """array_ref: [blocks * rows, ...]. buffers_ref: [buffers, rows, ...]."""
        self._array, self._buffers, self._semaphores = array_ref, buffers_ref, semaphores
        self.rows = buffers_ref.shape[1]

    def slot(self, index: Any) -> Any:
        """The buffer of the index-th block."""
        return jax.lax.rem(index, self._buffers.shape[0])

    def _copy(self, index: Any, out: bool) -> Any:
        rows, slot = self.rows, self.slot(index)
        ends = self._array.at[pl.ds(index * rows, rows)], self._buffers.at[slot]
        return pltpu.make_async_copy(*(ends[::-1] if out else ends), self._semaphores.at[slot])

    def start(self, index: Any, out: bool = False) -> None:
        """Start reading, or writing `out`, the index-th."""
        self._copy(index, out).start()

    def wait(self, index: Any, out: bool = False) -> None:
        """Wait until it is there."""
        self._copy(index, out).wait()


class Matrices:
    """Copies of experts' matrices and biases, a block of hidden units at a time, to VMEM.

    Blocks are counted through all visits; each in turn has a buffer.
    """

    def __init__(
        self, plan: Plan, arrays: Experts, buffers: Experts, semaphores: Any, on_tpu: bool
    ) -> None:
        """arrays: [E/n, ...] in HBM; buffers: [buffers, ...].

        On a TPU arrays have whole tiles, and so have copies; an interpreted one ends where it ends.
        """
        self._plan, self._arrays, self._buffers = plan, arrays, buffers
        self._semaphores, self._on_tpu = semaphores, on_tpu
        self._units, self._block = arrays.w_in.shape[2], buffers.w_in.shape[2]
        self.cuts = -(-self._units // self._block)

    @property
    def tail(self) -> int:
        """Hidden units of the last block."""
        return self._units - (self.cuts - 1) * self._block

    def held(self, index: Any) -> Experts:
        """The buffers of the index-th block, as refs to one expert's."""
        slot = jax.lax.rem(index, MATRIX_BUFFERS)
        return jax.tree.map(lambda ref: ref.at[slot], self._buffers)

    def start(self, index: Any) -> None:
        """Start reading the index-th block, if there is one."""
        pl.when(index < self._plan.visits[0] * self.cuts)(lambda: self._each(index, "start"))

    def wait(self, index: Any) -> None:
        """Wait until it is there."""
        self._each(index, "wait")

    def _each(self, index: Any, act: str) -> None:
        visit, cut = (index, 0) if self.cuts == 1 else _divided(index, self.cuts)
        if self.tail == self._block:
            self._copy(index, visit, cut, act, self._block)
            return
        for is_last, units in ((False, self._block), (True, self.tail)):
            copy = functools.partial(self._copy, index, visit, cut, act, units)
            pl.when((cut == self.cuts - 1) == is_last)(copy)

    def _copy(self, index: Any, visit: Any, cut: Any, act: str, units: int) -> None:
        expert, slot = self._plan.expert[visit], jax.lax.rem(index, MATRIX_BUFFERS)
        for name, axis in HIDDEN_AXIS.items():
            array, buffer = getattr(self._arrays, name), getattr(self._buffers, name)
            if array is None:
                continue
            source, target = array.at[expert], buffer.at[slot]
            if axis is not None and self.cuts > 1:
                size = self._in_tiles(units, cut, LANES if axis else TILE_ROWS)
                before = (slice(None),) * axis
                begin = pl.multiple_of(cut * self._block, LANES)
                source = source.at[(*before, pl.ds(begin, size))]
                target = target.at[(*before, pl.ds(0, size))]
            getattr(pltpu.make_async_copy(source, target, self._semaphores.at[slot]), act)()

    def _in_tiles(self, units: int, cut: Any, tile: int) -> Any:
        """Units, rounded up to whole tiles, by way of `cut` so that Pallas sees no bound."""
        if units % tile == 0 or not self._on_tpu:
            return units
        left = self._units - cut * self._block
        return pl.multiple_of((left + tile - 1) // tile * tile, tile)


def _divided(index: Any, by: int) -> tuple[Any, Any]:
    return jax.lax.div(index, by), jax.lax.rem(index, by)


class Cursor:
    """A device's segments where their rows lie sorted: by expert, and within one by peer.

    A state is the next segment in that order and the row that counts for it: the first, or with
    `ends` the last.
    """

    def __init__(self, back: Segments, own: int, peers: int, ends: bool) -> None:
        self._back, self._own, self._peers, self._ends = back, own, peers, ends

    def begin(self) -> tuple[Any, Any]:
        """The state before all segments."""
        return jnp.int32(0), self._row(jnp.int32(0))

    def pass_rows(self, bound: Any, state: Any, act: Callable[[Any], None]) -> Any:
        """act on the segments whose row lies before the bound; the state behind them."""

        def step(state: Any) -> Any:
            act(self._segment(state[0]))
            return state[0] + 1, self._row(state[0] + 1)

        return jax.lax.while_loop(lambda state: state[1] < bound, step, state)

    def _segment(self, place: Any) -> Any:
        expert, peer = _divided(place, self._peers)
        return peer * self._own + expert

    def _row(self, place: Any) -> Any:
        last = self._own * self._peers - 1
        segment = self._segment(jnp.minimum(place, last))
        row = self._back.sources[segment] + (self._back.sizes[segment] - 1 if self._ends else 0)
        return jnp.where(place <= last, row, jnp.iinfo(jnp.int32).max)


def go_out(copies: Copies, segment: Any) -> None:
    """Start a segment's way: to a peer, or to where this device keeps it."""
    pl.when(segment < copies.own)(lambda: copies.keep(segment))
    pl.when(segment >= copies.own)(lambda: copies.send(segment))


class Walk(NamedTuple):
    """What a walk moves.

    go, come: rows between devices, there and home. load, store: blocks of rows and of results.
    matrices: what rows are multiplied with.
    """

    plan: Plan
    go: Copies
    come: Copies
    load: Buffered
    store: Buffered
    matrices: Matrices


def walk_visits(walk: Walk, through: Callable[[Any, Any, Any, Any], None]) -> None:
    """All visits of a device: one block of rows is read ahead, and so is one block of matrices.

    through(block, place, cut, index): multiplies a block of rows, held in this place, with the
      index-th block of matrices, the cut-th of its expert's. The last of these makes results.
    """
    plan, go, come, load, store, matrices = walk
    whole = matrices.cuts == 1  # then all conditions on the cut are known
    rows, cuts, num_visits = load.rows, matrices.cuts, plan.visits[0]
    num_blocks = plan.first[num_visits]
    arrivals, results = (Cursor(plan.back, go.own, go.peers, ends) for ends in (False, True))

    def read_block(i: Any, state: Any) -> Any:
        state = arrivals.pass_rows((i + 1) * rows, state, go.wait_arrived)
        load.start(i)
        return state

    def wrote_block(i: Any, state: Any) -> Any:
        store.wait(i, out=True)
        return results.pass_rows((i + 1) * rows, state, functools.partial(go_out, come))

    def when(condition: Any, act: Callable[[Any, Any], Any], i: Any, state: Any) -> Any:
        return jax.lax.cond(condition, lambda: act(i, state), lambda: state)

    def visit(v: jax.Array, states: Any) -> Any:
        first, end = plan.first[v], plan.first[v + 1]

        def block(cut: Any, i: jax.Array, states: Any) -> Any:
            came, went = states
            begins, ends = cut == 0, cut == cuts - 1
            came = when(begins & (i + 1 < num_blocks), read_block, i + 1, came)
            pl.when(begins)(lambda: load.wait(i))
            went = when(ends & (i >= first + 2), wrote_block, i - 2, went)
            through(i, 0 if whole else i - first, cut, v * cuts + cut)
            pl.when(ends)(lambda: store.start(i, out=True))
            return came, went

        def pass_by(cut: Any, states: Any) -> Any:
            index = v * cuts + cut
            matrices.start(index + 1)
            matrices.wait(index)
            return jax.lax.fori_loop(first, end, functools.partial(block, cut), states)

        came, went = pass_by(0, states) if whole else jax.lax.fori_loop(0, cuts, pass_by, states)
        went = when(end >= first + 2, wrote_block, end - 2, went)
        return came, wrote_block(end - 1, went)

    came = when(num_blocks > 0, read_block, jnp.int32(0), arrivals.begin())
    jax.lax.fori_loop(0, num_visits, visit, (came, results.begin()))
