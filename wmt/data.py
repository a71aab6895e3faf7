"""Parallel text: reading folders, encoding, and batches that are a pure function of the step.

A folder holds, for a split such as "train", either pair files `train.en-de.en` + `train.en-de.de`
(Moses style, the pair named either way round) or multi-parallel files `train.en`, `train.de`, ...
whose line N are all translations of each other. UTF-8, one sentence a line.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taskmoe.wmt.config import TrainConfig, split_pair
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.tokenizer import BOS, PAD, Tokenizer

SPLITS = {"train": ("train",), "valid": ("valid", "val", "dev"), "test": ("test",)}
Pairs = dict[str, tuple[list[str], list[str]]]


def read_pairs(folder: Path, split: str, pairs: tuple[str, ...]) -> Pairs:
    """Sentences of each direction: pair -> (source lines, target lines), equally long.

    split: "train", "valid" or "test". Lines where either side is empty are left out.
    Raises InputError for a folder or pair that is not there, files of unequal length and invalid
    UTF-8, naming files, counts and lines.
    """
    if not folder.is_dir():
        raise InputError(f"data folder {folder} is not there")
    cache: dict[Path, list[str]] = {}
    out: Pairs = {}
    for pair in pairs:
        files = _find(folder, split, pair)
        for file in files:
            if file not in cache:
                cache[file] = _read_lines(file)
        source, target = (cache[file] for file in files)
        if len(source) != len(target):
            raise InputError(
                f"{files[0]} has {len(source)} lines but {files[1]} has {len(target)}: "
                "line N of one must translate line N of the other"
            )
        kept = [(s, t) for s, t in zip(source, target, strict=True) if s and t]
        if not kept:
            raise InputError(f"{files[0]} and {files[1]} hold no sentence pair")
        out[pair] = ([s for s, _ in kept], [t for _, t in kept])
    return out


def available_pairs(folder: Path, split: str) -> list[str]:
    """Directions that the folder's files of one split can serve, sorted."""
    found: set[str] = set()
    for name in SPLITS[split]:
        alone = [p.suffix[1:] for p in folder.glob(f"{name}.*") if p.name.count(".") == 1]
        found.update(f"{a}-{b}" for a in alone for b in alone if a != b)
        for path in folder.glob(f"{name}.*-*.*"):
            a, _, b = path.name.split(".")[1].partition("-")
            if (folder / f"{name}.{a}-{b}.{a}").is_file() and path.suffix == f".{b}":
                found.update((f"{a}-{b}", f"{b}-{a}"))
    return sorted(found)


def _find(folder: Path, split: str, pair: str) -> tuple[Path, Path]:
    source, target = split_pair(pair)
    for name in SPLITS[split]:
        for stem in (f"{name}.{source}-{target}", f"{name}.{target}-{source}", name):
            files = folder / f"{stem}.{source}", folder / f"{stem}.{target}"
            if all(f.is_file() for f in files):
                return files
    known = available_pairs(folder, split)
    raise InputError(
        f"no {split} files for pair {pair} in {folder}; "
        + (f"it has {', '.join(known)}" if known else f"it has no {split} files of any pair")
    )


def _read_lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not valid UTF-8 ({error.reason})") from None
    lines = text.split("\n")  # not splitlines: U+2028 and the like are part of a sentence
    if lines[-1] == "":
        lines.pop()
    return [line.strip() for line in lines]


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
    def of(cls, sequences: list[list[int]]) -> _Ragged:
        length = np.array([len(s) for s in sequences], np.int64)
        flat = np.fromiter((t for s in sequences for t in s), np.int32, int(length.sum()))
        return cls(flat, np.cumsum(length) - length, length)

    def padded(self, index: np.ndarray, width: int) -> np.ndarray:
        """[len(index), width] i32, PAD where a sequence has ended."""
        at = np.arange(width)
        inside = at < self.length[index][:, None]
        where = np.where(inside, self.start[index][:, None] + at, 0)
        return np.where(inside, self.flat[where], PAD).astype(np.int32)


class TrainingData:
    """Encoded training text of several directions, and the batch of any step.

    A batch is drawn from `(seed, step)` alone: first a length bucket, then for each row a direction
    with p ~ size^(1/T) (Kudugunta et al. 2021, section 4), then a sentence of that bucket, so a run
    that is resumed at a step sees the batches that an unbroken one would.
    """

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer, config: TrainConfig) -> None:
        self.config = config
        self.sizes = {pair: len(lines) for pair, (lines, _) in pairs.items()}
        self.too_long = dict.fromkeys(pairs, 0)
        sources: list[list[int]] = []
        targets: list[list[int]] = []
        self._members: list[list[np.ndarray]] = [[] for _ in config.buckets]  # [bucket][pair]
        for pair, (source_lines, target_lines) in pairs.items():
            target_language = split_pair(pair)[1]
            source = tokenizer.encode_source(source_lines, target_language)
            target = tokenizer.encode_target(target_lines)
            length = np.array([max(len(s), len(t)) for s, t in zip(source, target, strict=True)])
            bucket = np.searchsorted(config.buckets, length)
            for b in range(len(config.buckets)):
                self._members[b].append(np.flatnonzero(bucket == b) + len(sources))
            self.too_long[pair] = int((bucket == len(config.buckets)).sum())
            sources += source
            targets += target
        self._source = _Ragged.of(sources)
        self._target = _Ragged.of(targets)
        held = np.array([[len(m) for m in row] for row in self._members], float)  # [bucket, pair]
        if not held.sum():
            raise InputError(
                f"every sentence is longer than the longest bucket, {config.buckets[-1]} tokens"
            )
        # Probability of a direction is spread over its sentences, then gathered by bucket.
        total = held.sum(axis=0)
        wanted = np.where(total > 0, total, 1.0) ** (1 / config.temperature) * (total > 0)
        mass = held * (wanted / wanted.sum() / np.maximum(total, 1))
        self._pair_given_bucket = mass / np.maximum(mass.sum(axis=1, keepdims=True), 1e-300)
        rows = np.array([self.batch_rows(length) for length in config.buckets])
        steps = mass.sum(axis=1) / rows
        self._bucket = steps / steps.sum()

    def batch_rows(self, length: int) -> int:
        """Sentences in a batch of a bucket: `batch_tokens` source plus target positions."""
        return self.config.batch_tokens // (2 * length)

    def batch(self, step: int) -> Batch:
        """The batch of a step, the same whenever it is asked for."""
        rng = np.random.default_rng((self.config.seed, step))
        bucket = rng.choice(len(self._bucket), p=self._bucket)
        length = self.config.buckets[bucket]
        members = self._members[bucket]
        pair = rng.choice(len(members), self.batch_rows(length), p=self._pair_given_bucket[bucket])
        draw = rng.random(len(pair))
        index = np.array(
            [members[p][int(u * len(members[p]))] for p, u in zip(pair, draw, strict=True)]
        )
        target_out = self._target.padded(index, length)
        target_in = np.concatenate([np.full((len(pair), 1), BOS), target_out[:, :-1]], axis=1)
        return Batch(
            self._source.padded(index, length),
            target_in.astype(np.int32),
            target_out,
            pair.astype(np.int32),
        )
