"""Encoded sentence pairs, by length: what training reads, in memory or mapped from a file.

The pairs whose longer side has n tokens are an array [count, 2, n], source and target, padded. The
arrays of all lengths lie end to end, short ones first, so that a pair's place is computed and no
index is kept, and any length buckets are runs of rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.tokenizer import PAD, Tokenizer

_CHUNK = 10_000  # lines that are lists of Python integers at a time


@dataclasses.dataclass(frozen=True)
class Rows:
    """The pairs of one direction.

    counts: [longest + 1] i64, pairs whose longer side has so many tokens. flat: 1-D, unsigned,
    their tokens. beyond: pairs that are longer and left out.
    """

    counts: np.ndarray
    flat: np.ndarray
    beyond: int = 0

    def __post_init__(self) -> None:
        tokens = 2 * self.counts * np.arange(len(self.counts))
        if tokens.sum() != len(self.flat):
            raise ValueError(f"{tokens.sum()} tokens belong to these counts, got {len(self.flat)}")
        object.__setattr__(self, "_first", np.cumsum(self.counts) - self.counts)
        object.__setattr__(self, "_at", np.cumsum(tokens) - tokens)

    @property
    def size(self) -> int:
        """Pairs, those left out included."""
        return int(self.counts.sum()) + self.beyond

    @property
    def longest(self) -> int:
        """Most tokens on a side."""
        return len(self.counts) - 1

    def up_to(self, length: int) -> int:
        """Pairs that have at most so many tokens on their longer side; they are the first rows."""
        return int(self.counts[: length + 1].sum())

    def read(self, row: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of some rows: [len(row), width] i32 each, PAD where a side has ended.

        No row may be longer than `width`.
        """
        first, begins = self._first, self._at  # type: ignore[attr-defined]
        length = np.searchsorted(first, row, side="right") - 1
        start = begins[length] + 2 * length * (row - first[length])
        at = np.arange(width)
        inside = at < length[:, None]
        where = np.where(inside, start[:, None] + at, 0)
        # Where padding stands any token is read, and a mapped file's first one is at hand.
        source = np.where(inside, self.flat[where], PAD).astype(np.int32)
        where += np.where(inside, length[:, None], 0)
        return source, np.where(inside, self.flat[where], PAD).astype(np.int32)

    def digest(self) -> str:
        """SHA-256 of all pairs, hexadecimal."""
        digest = hashlib.sha256(self.counts.astype(np.int64).tobytes())
        for at in range(0, len(self.flat), 1 << 22):  # a mapped file is never in memory whole
            digest.update(np.ascontiguousarray(self.flat[at : at + (1 << 22)]).tobytes())
        return digest.hexdigest()


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned integers that hold a vocabulary's ids."""
    return np.min_scalar_type(vocab_size - 1)


def encode(
    pair: str, lines: tuple[Sequence[str], Sequence[str]], tokenizer: Tokenizer, longest: int
) -> Rows:
    """The rows of a direction's lines, in their order among those of a length.

    longest: tokens of a side; pairs with more are left out and counted.
    """
    language = split_pair(pair)[1]
    kept: list[tuple[np.ndarray, np.ndarray]] = []  # lengths, tokens [n, 2 * length] end to end
    beyond = 0
    for at in range(0, len(lines[0]), _CHUNK):
        source, target = (side[at : at + _CHUNK] for side in lines)
        encoded = (
            tokenizer.encode_source(list(source), language),
            tokenizer.encode_target(list(target)),
        )
        sides = [_Ragged.of(side) for side in encoded]
        length = np.maximum(sides[0].length, sides[1].length)
        fits = np.flatnonzero(length <= longest)
        beyond += len(length) - len(fits)
        order = fits[np.argsort(length[fits], kind="stable")]
        counts = np.bincount(length[order], minlength=longest + 1)
        flat = [
            np.stack([side.padded(part, n) for side in sides], axis=1).ravel()
            for n, part in enumerate(np.split(order, np.cumsum(counts)[:-1]))
        ]
        kept.append((counts, np.concatenate(flat).astype(token_type(tokenizer.vocab_size))))
    rows = joined([Rows(counts, flat) for counts, flat in kept], longest, tokenizer.vocab_size)
    return dataclasses.replace(rows, beyond=beyond)


def joined(parts: Sequence[Rows], longest: int, vocab_size: int) -> Rows:
    """The rows of several parts, of a length one part after the other."""
    counts = np.sum([part.counts for part in parts], axis=0, initial=0) + np.zeros(
        longest + 1, np.int64
    )
    flat = np.zeros(int((2 * counts * np.arange(longest + 1)).sum()), token_type(vocab_size))
    place(parts, counts, flat)
    return Rows(counts.astype(np.int64), flat, sum(part.beyond for part in parts))


def place(parts: Iterable[Rows], counts: np.ndarray, flat: np.ndarray) -> None:
    """Copy parts to where they belong among all rows of these counts; flat may be a mapped file."""
    tokens = 2 * counts * np.arange(len(counts))
    at = np.cumsum(tokens) - tokens
    for part in parts:
        own = 2 * part.counts * np.arange(len(part.counts))
        ends = np.cumsum(own)
        for n in np.flatnonzero(own):
            flat[at[n] : at[n] + own[n]] = part.flat[ends[n] - own[n] : ends[n]]
        at += own


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """Token sequences end to end: sequence i is flat[start[i] : start[i] + length[i]]."""

    flat: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> _Ragged:
        length = np.array([len(s) for s in sequences], np.int64)
        tokens: Iterator[int] = itertools.chain.from_iterable(sequences)
        flat = np.fromiter(tokens, np.int32, int(length.sum()))
        return cls(flat, np.cumsum(length) - length, length)

    def padded(self, index: np.ndarray, width: int) -> np.ndarray:
        """[len(index), width] i32, PAD where a sequence has ended."""
        at = np.arange(width)
        inside = at < self.length[index][:, None]
        where = np.where(inside, self.start[index][:, None] + at, 0)
        return np.where(inside, self.flat[where], PAD).astype(np.int32)
