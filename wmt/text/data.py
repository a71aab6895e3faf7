"""Encoded training text, and batches that are a pure function of the step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import TrainConfig, split_pair
from taskmoe.wmt.text.folders import Pairs as Pairs
from taskmoe.wmt.text.folders import available_pairs as available_pairs
from taskmoe.wmt.text.folders import read_pairs as read_pairs
from taskmoe.wmt.text.pipeline import BatchIterator
from taskmoe.wmt.text.sampling import Schedule
from taskmoe.wmt.text.tokenizer import BOS, PAD, Tokenizer

_CHUNK = 10_000  # lines that are lists of Python integers at a time
_MOST_EPOCHS = 1000  # of a bucket's sentences in one batch: each is a permutation to draw


class Batch(NamedTuple):
    """One step's sentences, padded with 0 to one bucket length L.

    source: [B, L] i32, `<2xx> ... </s>`; target_in: [B, L] i32, `<s> ...`; target_out: [B, L] i32,
    `... </s>`; pair: [B] i32, index into the configuration's pairs.
    """

    source: np.ndarray
    target_in: np.ndarray
    target_out: np.ndarray
    pair: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """Token sequences end to end: sequence i is flat[start[i] : start[i] + length[i]]."""

    flat: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, sequences: Iterator[list[int]]) -> _Ragged:
        flat, length = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        while chunk := list(itertools.islice(sequences, _CHUNK)):
            length.append(np.array([len(s) for s in chunk], np.int64))
            tokens = itertools.chain.from_iterable(chunk)
            flat.append(np.fromiter(tokens, np.int32, int(length[-1].sum())))
        lengths = np.concatenate(length)
        return cls(np.concatenate(flat), np.cumsum(lengths) - lengths, lengths)

    def padded(self, index: np.ndarray, width: int) -> np.ndarray:
        """[len(index), width] i32, PAD where a sequence has ended."""
        at = np.arange(width)
        inside = at < self.length[index][:, None]
        where = np.where(inside, self.start[index][:, None] + at, 0)
        return np.where(inside, self.flat[where], PAD).astype(np.int32)


class TrainingData:
    """Encoded training text of several directions, and the batch of any step.

    A batch depends on the seed and the step alone, so a run that is resumed at a step sees the
    batches that an unbroken one would: first a length bucket, then for its rows directions in
    proportion to p ~ size^(1/T) (Kudugunta et al. 2021, section 4), then sentences of that bucket,
    each once an epoch. See `taskmoe.wmt.text.sampling`.
    """

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer, config: TrainConfig) -> None:
        """Encode the text and share it out over the buckets.

        Raises InputError where every sentence of a direction is longer than the longest bucket, and
        for batches of more than 1,000 times the sentences that a bucket has.
        """
        self.config = config
        self.sizes = {pair: len(lines) for pair, (lines, _) in pairs.items()}
        self.too_long = dict.fromkeys(pairs, 0)

        def encoded(side: int) -> Iterator[list[int]]:
            for pair, columns in pairs.items():
                language = split_pair(pair)[1]
                for at in range(0, len(columns[side]), _CHUNK):
                    lines = columns[side][at : at + _CHUNK]
                    yield from (
                        tokenizer.encode_target(lines)
                        if side
                        else tokenizer.encode_source(lines, language)
                    )

        self._source, self._target = _Ragged.of(encoded(0)), _Ragged.of(encoded(1))
        longest = np.maximum(self._source.length, self._target.length)
        bucket = np.searchsorted(config.buckets, longest)
        self._members: list[list[np.ndarray]] = [[] for _ in config.buckets]  # [bucket][pair]
        start = 0
        for pair, size in self.sizes.items():
            own = bucket[start : start + size]
            for b, members in enumerate(self._members):
                members.append(np.flatnonzero(own == b) + start)
            self.too_long[pair] = int((own == len(config.buckets)).sum())
            start += size
        held = np.array([[len(m) for m in row] for row in self._members])
        for pair, count in zip(self.sizes, held.sum(axis=0), strict=True):
            if not count:
                raise InputError(
                    f"pair {pair}: every sentence is longer than the longest bucket, "
                    f"{config.buckets[-1]} tokens"
                )
        rows = [config.batch_rows(length) for length in config.buckets]
        for length, count, there in zip(config.buckets, rows, held.sum(axis=1), strict=True):
            if there and count > _MOST_EPOCHS * there:
                raise InputError(
                    f"batch_tokens={config.batch_tokens} makes batches of {count:,} sentences, but "
                    f"there are only {there:,} for the bucket of {length} tokens; at most "
                    f"{2 * length * _MOST_EPOCHS * there:,} fit this text"
                )
        self._schedule = Schedule(held, rows, config.temperature, config.seed)

    def batch(self, step: int, shard: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step, the same whenever it is asked for.

        shard: (i, n) is the i-th of n equal parts of the batch's rows, in their order.
        Raises InputError where the rows cannot be shared evenly.
        """
        self.check_shard(shard)
        draw = self._schedule.draw(step)
        length, members = self.config.buckets[draw.bucket], self._members[draw.bucket]
        share = len(draw.pair) // shard[1]
        rows = slice(shard[0] * share, (shard[0] + 1) * share)
        pair = draw.pair[rows]
        index = np.array(
            [members[p][i] for p, i in zip(pair, draw.sentence[rows], strict=True)], np.int64
        )
        target_out = self._target.padded(index, length)
        target_in = np.concatenate([np.full((len(pair), 1), BOS), target_out[:, :-1]], axis=1)
        return Batch(
            self._source.padded(index, length),
            target_in.astype(np.int32),
            target_out,
            pair.astype(np.int32),
        )

    def check_shard(self, shard: tuple[int, int]) -> None:
        """Raise InputError unless batches of every bucket can be shared evenly."""
        index, count = shard
        if not 0 <= index < count:
            raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard}")
        for length in self.config.buckets:
            rows = self.config.batch_rows(length)
            if rows % count:
                raise InputError(
                    f"a batch of bucket {length} has {rows} sentences, which "
                    f"{count} processes cannot share evenly; set row_multiple={count}"
                )

    def iterator(
        self, start_step: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> BatchIterator[Batch]:
        """The batches from a step on, made ahead in the background; see `BatchIterator`.

        Raises InputError where the rows cannot be shared evenly.
        """
        self.check_shard(shard)
        make = functools.partial(self.batch, shard=shard)
        return BatchIterator(make, start_step, self.fingerprint)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all encoded text in its order: batches of a step are equal where it is."""
        digest = hashlib.sha256(repr(list(self.sizes.items())).encode())
        for side in (self._source, self._target):
            digest.update(side.length.tobytes())
            digest.update(side.flat.tobytes())
        return digest.hexdigest()[:32]
