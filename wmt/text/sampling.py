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
_ROUNDS = 8  # of the network that puts an epoch in order
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
        self._lock = threading.Lock()
        self._visits = _RunningSum(self._buckets_of_block)
        self._shares = [
            _RunningSum(functools.partial(self._shares_of_block, b)) for b in range(len(rows))
        ]

    def draw(self, step: int) -> Draw:
        """The draw of a step, the same whenever it is asked for; any thread may ask."""
        with self._lock:
            bucket, before, share = self._rows_of(step)
            pair = np.repeat(np.arange(len(share)), share)
            sentence = np.concatenate(
                [
                    self._queue(bucket, int(p), int(before[p]), int(share[p]))
                    for p in np.flatnonzero(share)
                ]
            )
        order = self._random(_ORDER, step).permutation(len(pair))
        return Draw(bucket, pair[order], sentence[order])

    def shares(self, step: int) -> np.ndarray:
        """[pairs] i64: how many rows of a step's batch each direction has."""
        with self._lock:
            return self._rows_of(step)[2]

    def _rows_of(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """A step's bucket, the rows that directions had of it before, and those that they have."""
        visits, now = self._visits.at(step)
        bucket = int(now.argmax())
        return bucket, *self._shares[bucket].at(int(visits[bucket]))

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
        epoch, place = np.divmod(np.arange(start, start + count), size)
        found = [
            permuted(place[epoch == e], size, (self._seed, _EPOCH, bucket, pair, int(e)))
            for e in np.unique(epoch)
        ]
        return np.concatenate(found)

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


def permuted(place: np.ndarray, size: int, seed: Sequence[int]) -> np.ndarray:
    """Where a permutation of `size` numbers has these places: [n] i64, each computed, none stored.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even count of bits; where
    it leaves [0, size) it is applied again, which leads back (Black and Rogaway 2002). That is four
    times at most on average. grain's shuffle does so too, but over 16 bits at least: milliseconds
    for each sentence of a small bucket.
    """
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found = place.astype(np.uint64)
    walking = np.arange(len(place))
    while len(walking):
        left, right = found[walking] >> half, found[walking] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)  # as splitmix64 does
            mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        found[walking] = left << half | right
        walking = walking[found[walking] >= size]
    return found.astype(np.int64)


def _ends(weight: np.ndarray) -> np.ndarray:
    """Cumulated shares, the last exactly 1; a share of 0 stays empty at the end, too."""
    ends = np.cumsum(weight) / weight.sum()
    ends[np.flatnonzero(weight)[-1] :] = 1.0
    return ends
