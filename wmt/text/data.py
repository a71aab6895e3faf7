"""Encoded training text, and batches that are a pure function of the step."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import TrainConfig
from taskmoe.wmt.text.folders import Pairs as Pairs
from taskmoe.wmt.text.folders import read_pairs as read_pairs
from taskmoe.wmt.text.pipeline import BatchIterator
from taskmoe.wmt.text.rows import Rows, encode
from taskmoe.wmt.text.sampling import Schedule
from taskmoe.wmt.text.tokenizer import BOS, Tokenizer

_MOST_EPOCHS = 1000  # of a bucket's sentences in one batch: each has an order of its own


class Batch(NamedTuple):
    """One step's sentences, padded with 0 to one bucket length L.

    source: [B, L] i32, `<2xx> ... </s>`; target_in: [B, L] i32, `<s> ...`; target_out: [B, L] i32,
    `... </s>`; pair: [B] i32, index into the configuration's pairs.
    """

    source: np.ndarray
    target_in: np.ndarray
    target_out: np.ndarray
    pair: np.ndarray


class TrainingData:
    """Encoded training text of several directions, and the batch of any step.

    A batch depends on the seed and the step alone, so a run that is resumed at a step sees the
    batches that an unbroken one would: first a length bucket, then for its rows directions in
    proportion to p ~ size^(1/T) (Kudugunta et al. 2021, section 4), then sentences of that bucket,
    each once an epoch. See `taskmoe.wmt.text.sampling` and `taskmoe.wmt.text.rows`.
    """

    def __init__(
        self,
        rows_of: Mapping[str, Rows],
        config: TrainConfig,
        digests: Mapping[str, str] | None = None,
    ) -> None:
        """rows_of: direction -> its text. digests: of each direction's rows, where they are known.

        Raises InputError where every sentence of a direction is longer than the longest bucket, and
        for batches of more than 1,000 times the sentences that a bucket has.
        """
        self.config = config
        self._rows, self._digests = list(rows_of.values()), dict(digests or {})
        self.sizes = {pair: rows.size for pair, rows in rows_of.items()}
        ends = np.array([[rows.up_to(n) for rows in self._rows] for n in config.buckets])
        held = np.diff(ends, axis=0, prepend=0)  # [buckets, pairs]
        self._first = ends - held
        self.too_long = {
            pair: rows.size - int(most)
            for (pair, rows), most in zip(rows_of.items(), ends[-1], strict=True)
        }
        for pair, count in zip(self.sizes, ends[-1], strict=True):
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

    @classmethod
    def encoded(cls, text: Pairs, tokenizer: Tokenizer, config: TrainConfig) -> Self:
        """Text that is small enough to be encoded into memory."""
        longest = config.buckets[-1]
        return cls({p: encode(p, lines, tokenizer, longest) for p, lines in text.items()}, config)

    def batch(self, step: int, shard: tuple[int, int] = (0, 1)) -> Batch:
        """The batch of a step, the same whenever it is asked for.

        shard: (i, n) is the i-th of n equal parts of the batch's rows, in their order.
        Raises InputError where the rows cannot be shared evenly.
        """
        self.check_shard(shard)
        draw = self._schedule.draw(step)
        length = self.config.buckets[draw.bucket]
        share = len(draw.pair) // shard[1]
        own = slice(shard[0] * share, (shard[0] + 1) * share)
        pair, sentence = draw.pair[own], draw.sentence[own]
        source, target_out = (np.zeros((share, length), np.int32) for _ in range(2))
        for p in np.unique(pair):
            rows = pair == p
            row = self._first[draw.bucket, p] + sentence[rows]
            source[rows], target_out[rows] = self._rows[p].read(row, length)
        target_in = np.concatenate([np.full((share, 1), BOS), target_out[:, :-1]], axis=1)
        return Batch(source, target_in.astype(np.int32), target_out, pair.astype(np.int32))

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
        digests = list(self.digests().values())
        return hashlib.sha256(repr([list(self.sizes.items()), digests]).encode()).hexdigest()[:32]

    def digests(self) -> dict[str, str]:
        """SHA-256 of each direction's encoded text, hexadecimal."""
        if not self._digests:
            self._digests = {p: r.digest() for p, r in zip(self.sizes, self._rows, strict=True)}
        return dict(self._digests)
