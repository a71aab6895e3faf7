"""How rows travel to the devices that hold their experts, and back.

Each device routes its own U units to E experts, of which every device holds E/n. Whatever the
strategy, results and gradients are those of one device, up to the order of sums. Rows that a device
sends for one layer, there and back, and rows of its largest buffers, with C rows of room an expert
and B rows of room for what comes to a device: min(k, E/n) n U, or f k U with a buffer_factor f:

                 sent              held
    all_to_all   2 (n-1)/n E C     3 E C          a padded [E, C] buffer by `lax.all_to_all`, as in
                                                  GShard; C is the capacity, or U when dropless
    ragged       2 (n-1)/n k U     2 k U + 2 B    the rows themselves by `lax.ragged_all_to_all`;
                                                  a backend that has none sends them packed and
                                                  padded for each peer: 2 (n-1) min(k, E/n) U
    all_gather   2 (n-1) U         n U + 2 B      every device gets all units, runs its experts'
                                                  rows, and a reduce-scatter adds the parts up
    mosaic       2 (n-1)/n k U     2 k U + 2 B    the rows themselves, by remote DMA of a Pallas TPU
                                                  kernel straight to their places among their
                                                  expert's rows: no row is padded, or sorted again

Where tokens are routed, "mosaic" runs the experts in the same kernel, block by block as rows
arrive, while other rows and results are on the wire; gradients travel before and after their
matmuls. Experts too large for VMEM pass through it in blocks. Experts that are quantised, more
than 256, and too wide for a block of 128 hidden units run in a kernel of their own.

"auto" takes of the first three the one with the fewest rows sent and held; "mosaic" is for the
caller to choose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from taskmoe.moe.config import MoEConfig
from taskmoe.moe.travel import (
    Job,
    Peers,
    all_gather,
    all_to_all,
    mosaic,
    most_come,
    most_from_one,
    packed,
    ragged,
    room_each,
)

Rows = Callable[[MoEConfig, int, Peers], float]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A way for rows to travel.

    run: units [U, W] through their experts on whichever device: [U, W], weighted and added up; also
      the number of assignments, [] i32, that found no room on this device, or of its own that found
      none elsewhere: the sum over devices is that of all that were dropped on the way
    sent, held: rows that one device sends for one layer, there and back, and rows of its largest
      buffers, by the table above
    padded: whether it wants a padded plan
    """

    run: Callable[[Job], tuple[jax.Array, jax.Array]]
    sent: Rows
    held: Rows
    padded: bool = False


def choose(name: str, config: MoEConfig, units: int, peers: Peers) -> str:
    """The strategy itself, or for "auto" the one that sends and holds the fewest rows."""
    if name != "auto":
        return name

    def cost(name: str) -> float:
        strategy = STRATEGIES[name]
        return strategy.sent(config, units, peers) + strategy.held(config, units, peers)

    return min(("all_to_all", "ragged", "all_gather"), key=cost)


def bytes_sent(
    name: str, config: MoEConfig, units: int, peers: Peers, itemsize: int, width: int
) -> tuple[str, float]:
    """(the strategy that is taken, bytes that one device sends for one layer, there and back).

    units: [U] of one device. width: of a unit, in numbers of `itemsize` bytes.
    """
    chosen = choose(name, config, units, peers)
    return chosen, STRATEGIES[chosen].sent(config, units, peers) * width * itemsize


def _padded_rows(config: MoEConfig, units: int) -> int:
    return config.num_experts * (room_each(config, units) or units)


def _far(peers: Peers) -> float:
    """Share of rows whose expert another device holds."""
    return (peers.number - 1) / peers.number


def _exact(config: MoEConfig, units: int, peers: Peers) -> float:
    return 2 * _far(peers) * config.top_k * units


def _ragged_sent(config: MoEConfig, units: int, peers: Peers) -> float:
    if peers.ragged:
        return _exact(config, units, peers)
    return 2.0 * (peers.number - 1) * most_from_one(config, units, peers.number)


def _mosaic_held(config: MoEConfig, units: int, peers: Peers) -> float:
    return 2.0 * (config.top_k * units + most_come(config, units, peers.number))


def _ragged_held(config: MoEConfig, units: int, peers: Peers) -> float:
    n = peers.number
    padded = 0 if peers.ragged else n * most_from_one(config, units, n)
    return _mosaic_held(config, units, peers) + padded


#: By name; "auto" is one of the first three.
STRATEGIES = {
    "all_to_all": Strategy(
        all_to_all,
        sent=lambda config, units, peers: 2 * _far(peers) * _padded_rows(config, units),
        held=lambda config, units, peers: 3.0 * _padded_rows(config, units),
        padded=True,
    ),
    "ragged": Strategy(
        lambda job: (ragged if job.peers.ragged else packed)(job), _ragged_sent, _ragged_held
    ),
    "all_gather": Strategy(
        all_gather,
        sent=lambda config, units, peers: 2.0 * (peers.number - 1) * units,
        held=lambda config, units, peers: (
            peers.number * units + 2.0 * most_come(config, units, peers.number)
        ),
    ),
    "mosaic": Strategy(mosaic, _exact, _mosaic_held),
}
