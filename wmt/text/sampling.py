"""Which sentences the batch of a step holds, as a pure function of (seed, step).

A step draws a length bucket. Batches of one bucket, its visits 0, 1, 2, ..., share out their rows
over directions in proportion to p ~ size^(1/T) by systematic sampling: each direction gets its
expected number of rows rounded up or down, so how many rows it has had before a visit is a sum of
small integers and needs no batch to be drawn. That number says where in its queue the direction
stands: every epoch is a permutation of its own, and no sentence comes again before all others of
its bucket and direction have come.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1024  # steps or visits whose random numbers are made, and summed up, at once
_BUCKET, _SHARE, _EPOCH, _ORDER = range(4)  # streams of random numbers of one seed


class Draw(NamedTuple):
    """bucket: of the batch. pair: [rows] i64 index of each row's direction. sentence: [rows] i64,
    its number among those of this bucket and direction."""

    bucket: int
    pair: np.ndarray
    sentence: np.ndarray


class Schedule:
    """The draws of a run."""

    def __init__(
        self, sizes: np.ndarray, rows: Sequence[int], temperature: float, seed: int
    ) -> None:
        """sizes: [buckets, pairs], sentences of each. rows: [buckets], of a batch, all above 0.

        Raises ValueError where there is no sentence.
        """
        if not sizes.sum():
            raise ValueError("there is no sentence to draw")
        self._sizes, self._rows, self._seed = sizes, rows, seed
        # The probability of a direction is spread over its sentences, then gathered by bucket.
        total = sizes.sum(axis=0)
        wanted = np.where(total > 0, total, 1.0) ** (1 / temperature) * (total > 0)
        mass = sizes * (wanted / wanted.sum() / np.maximum(total, 1))
        steps = mass.sum(axis=1) / np.array(rows)
        self._bucket_ends = _ends(steps)
        self._pair_ends = [_ends(row) if row.any() else None for row in mass]
        self._epochs: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self._lock = threading.Lock()
        self._visits = _RunningSum(self._buckets_of_block)
        self._shares = [
            _RunningSum(functools.partial(self._shares_of_block, b)) for b in range(len(rows))
        ]

    def draw(self, step: int) -> Draw:
        """The draw of a step, the same whenever it is asked for; any thread may ask."""
        with self._lock:
            visits, now = self._visits.at(step)
            bucket = int(now.argmax())
            before, share = self._shares[bucket].at(int(visits[bucket]))
            pair = np.repeat(np.arange(len(share)), share)
            sentence = np.concatenate(
                [
                    self._queue(bucket, int(p), int(before[p]), int(share[p]))
                    for p in np.flatnonzero(share)
                ]
            )
        order = self._random(_ORDER, step).permutation(len(pair))
        return Draw(bucket, pair[order], sentence[order])

    def _buckets_of_block(self, block: int) -> np.ndarray:
        """[_BLOCK, buckets] i64: 1 at the bucket of each step."""
        u = self._random(_BUCKET, block).random(_BLOCK)
        chosen = np.searchsorted(self._bucket_ends, u, side="right")
        return (chosen[:, None] == np.arange(len(self._rows))).astype(np.int64)

    def _shares_of_block(self, bucket: int, block: int) -> np.ndarray:
        """[_BLOCK, pairs] i64: rows of each direction at each visit of a bucket."""
        ends = self._pair_ends[bucket]
        assert ends is not None  # a bucket without sentences is never drawn
        u = self._random(_SHARE, bucket, block).random(_BLOCK)
        # Row j belongs to the direction in whose part of [0, rows) the point j + u lies.
        upto = np.ceil(ends * self._rows[bucket] - u[:, None]).astype(np.int64)
        return np.diff(upto, axis=1, prepend=0)

    def _queue(self, bucket: int, pair: int, start: int, count: int) -> np.ndarray:
        """[count] i64: the sentences at places start, start + 1, ... of a direction's queue."""
        size = int(self._sizes[bucket, pair])
        place = np.arange(start, start + count)
        parts = []
        for epoch in range(int(place[0] // size), int(place[-1] // size) + 1):
            kept = self._epochs.get((bucket, pair))
            if kept is None or kept[0] != epoch:
                shuffled = self._random(_EPOCH, bucket, pair, epoch).permutation(size)
                kept = self._epochs[bucket, pair] = epoch, shuffled.astype(np.uint32)
            parts.append(kept[1][place[place // size == epoch] % size])
        return np.concatenate(parts).astype(np.int64)

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, *map(int, stream)))


class _RunningSum:
    """Rows of a table that is made in blocks, and the sum of all rows before one."""

    def __init__(self, make: Callable[[int], np.ndarray]) -> None:
        """make: block number -> [_BLOCK, columns]."""
        self._make = make
        self._before: list[np.ndarray] = []  # [block] -> sum of all blocks before it
        self._block = -1
        self._rows = np.zeros((0, 0), np.int64)
        self._sums = self._rows

    def at(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(sum of rows before `index`, the row): [columns] i64 each."""
        block, within = divmod(index, _BLOCK)
        if block != self._block:
            if not self._before:
                self._before.append(np.zeros(self._make(0).shape[1], np.int64))
            while len(self._before) <= block:
                self._before.append(self._before[-1] + self._make(len(self._before) - 1).sum(0))
            self._block, self._rows = block, self._make(block)
            self._sums = self._before[block] + np.cumsum(self._rows, axis=0) - self._rows
        return self._sums[within], self._rows[within]


def _ends(weight: np.ndarray) -> np.ndarray:
    """Cumulated shares, the last exactly 1; a share of 0 stays empty at the end, too."""
    ends = np.cumsum(weight) / weight.sum()
    ends[np.flatnonzero(weight)[-1] :] = 1.0
    return ends
