"""Inside `exchange_ffn_kernel`: an expert's blocks of rows are read, multiplied and sent home."""

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


class Plan(NamedTuple):
    """What the kernel reads from SMEM.

    devices: [n] i32, logical ids of the peers. there, back: what travels. first, blocks: [E/n] i32,
    first block of rows of each expert, and how many there are.
    """

    devices: Any
    there: Segments
    back: Segments
    first: Any
    blocks: Any


class Buffered:
    """Copies between arrays in HBM and two buffers each in VMEM, used in turns."""

    def __init__(self, pairs: list[tuple[Any, Any]], semaphores: Any, rows: int = 1) -> None:
        """pairs: of array and its buffers. rows: that travel at once."""
        self._pairs, self._semaphores, self._rows = pairs, semaphores, rows

    def _copies(self, index: Any, out: bool) -> list[Any]:
        slot = jax.lax.rem(index, 2)
        copies = []
        for array_ref, buffer_ref in self._pairs:
            at = index if self._rows == 1 else pl.ds(index * self._rows, self._rows)
            ends = array_ref.at[at], buffer_ref.at[slot]
            copies.append(
                pltpu.make_async_copy(*(ends[::-1] if out else ends), self._semaphores.at[slot])
            )
        return copies

    def start(self, index: Any, out: bool = False) -> None:
        """Start reading, or writing `out`, the index-th."""
        for copy in self._copies(index, out):
            copy.start()

    def wait(self, index: Any, out: bool = False) -> None:
        """Wait until it is there."""
        for copy in self._copies(index, out):
            copy.wait()


class Cursor:
    """An expert's segments where its rows lie sorted, one after the other, one a peer.

    A state is the next peer and the row that counts for its segment: the first, or with `ends` the
    last.
    """

    def __init__(self, back: Segments, expert: Any, own: int, peers: int, ends: bool) -> None:
        self._back, self._expert, self._own, self._peers = back, expert, own, peers
        self._ends = ends

    def begin(self) -> tuple[Any, Any]:
        """The state before all segments."""
        return jnp.int32(0), self._row(jnp.int32(0))

    def pass_rows(self, bound: Any, state: Any, act: Callable[[Any], None]) -> Any:
        """act on the segments whose row lies before the bound; the state behind them."""

        def step(state: Any) -> Any:
            act(state[0] * self._own + self._expert)
            return state[0] + 1, self._row(state[0] + 1)

        return jax.lax.while_loop(lambda state: state[1] < bound, step, state)

    def _row(self, peer: Any) -> Any:
        segment = jnp.minimum(peer, self._peers - 1) * self._own + self._expert
        row = self._back.sources[segment] + (self._back.sizes[segment] - 1 if self._ends else 0)
        return jnp.where(peer < self._peers, row, jnp.iinfo(jnp.int32).max)


def go_out(copies: Copies, segment: Any) -> None:
    """Start a segment's way: to a peer, or to where this device keeps it."""
    pl.when(segment < copies.own)(lambda: copies.keep(segment))
    pl.when(segment >= copies.own)(lambda: copies.send(segment))


def multiply(
    expert: Any,
    plan: Plan,
    go: Copies,
    come: Copies,
    load: Buffered,
    store: Buffered,
    through: Callable[[Any], None],
    rows: int,
) -> None:
    """An expert's blocks of rows, one being read and one written while one is multiplied.

    through: multiplies the block in the buffers of this number.
    """
    first, end = plan.first[expert], plan.first[expert] + plan.blocks[expert]
    arrivals, results = (
        Cursor(plan.back, expert, go.own, go.peers, ends) for ends in (False, True)
    )

    def read_block(i: Any, state: Any) -> Any:
        state = arrivals.pass_rows((i + 1) * rows, state, go.wait_arrived)
        load.start(i)
        return state

    def wrote_block(i: Any, state: Any) -> Any:
        store.wait(i, out=True)
        return results.pass_rows((i + 1) * rows, state, functools.partial(go_out, come))

    def block(i: jax.Array, states: Any) -> Any:
        came, went = states
        came = jax.lax.cond(i + 1 < end, lambda: read_block(i + 1, came), lambda: came)
        load.wait(i)
        went = jax.lax.cond(i >= first + 2, lambda: wrote_block(i - 2, went), lambda: went)
        through(jax.lax.rem(i, 2))
        store.start(i, out=True)
        return came, went

    @pl.when(first < end)
    def _some() -> None:
        states = read_block(first, arrivals.begin()), results.begin()
        _, went = jax.lax.fori_loop(first, end, block, states)
        went = jax.lax.cond(end >= first + 2, lambda: wrote_block(end - 2, went), lambda: went)
        wrote_block(end - 1, went)
