"""A training set: text that was cleaned and encoded once, in a folder, to be mapped into memory.

| file | what |
|---|---|
| `manifest.json` | what it was made of and how, each direction's counts and hashes |
| `spm.model` | the vocabulary |
| `train.en-de.npy` | a direction's tokens, see `taskmoe.wmt.text.rows` |
| `valid.en-de.en` | text to score, as it was: `taskmoe.wmt.text.folders` reads it |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from taskmoe.cli.errors import InputError, exhausted
from taskmoe.wmt.config import TrainConfig
from taskmoe.wmt.text.cleaning import Account
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.folders import Columns, Folder, columns_of
from taskmoe.wmt.text.languages import codes_of
from taskmoe.wmt.text.rows import Rows
from taskmoe.wmt.text.sampling import permuted
from taskmoe.wmt.text.tokenizer import PAD, Tokenizer

_CHUNK = 10_000  # lines that are decoded at once

MANIFEST, VOCABULARY = "manifest.json", "spm.model"
VERSION = 1
#: Fields of TrainConfig that say which text is kept, and of which the vocabulary is made.
CLEANING = (
    "max_sentences",
    "max_characters",
    "max_ratio",
    "drop_copied",
    "deduplicate",
    "drop_held_out",
    "vocab_sentences",
)


@dataclasses.dataclass(frozen=True)
class Direction:
    """One direction's text.

    account: of its cleaning. counts: pairs by tokens on their longer side, from 0 on. beyond: pairs
    with more tokens than the set keeps. sha256: of its rows.
    """

    account: Account
    counts: list[int]
    beyond: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a set says of itself.

    title: its sources' names. identity: the sources, the same from any working directory.
    cleaning: fields of TrainConfig by name. vocab_size: pieces that were asked for. longest: tokens
    of a side that are kept.
    """

    title: str
    identity: str
    cleaning: dict[str, Any]
    vocab_size: int
    longest: int
    vocabulary_sha256: str
    directions: dict[str, Direction]
    version: int = VERSION

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError, TypeError or KeyError where it is no manifest of this version."""
        fields = json.loads(text)
        if fields["version"] != VERSION:
            raise ValueError(f"it is of version {fields['version']}, this is {VERSION}")
        directions = {
            pair: Direction(**(one | {"account": Account(**one["account"])}))
            for pair, one in fields["directions"].items()
        }
        return cls(**(fields | {"directions": directions}))


def is_training_set(folder: Path) -> bool:
    """Whether a folder is one."""
    return (folder / MANIFEST).is_file()


def rows_file(folder: Path, pair: str) -> Path:
    """Where a direction's tokens are."""
    return folder / f"train.{pair}.npy"


class TrainingSet:
    """An opened set; its tokens are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where it is none, is of another version, or lacks a part."""
        self.folder = folder
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            self.manifest = Manifest.from_json(text)
        except OSError as error:
            if exhausted(error):
                raise
            raise InputError(f"{folder} is no training set: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{folder / MANIFEST} cannot be used: {error}") from None
        self.tokenizer = Tokenizer.load(folder / VOCABULARY)
        found = hashlib.sha256(self.tokenizer.model).hexdigest()
        if found != self.manifest.vocabulary_sha256:
            raise InputError(f"{folder / VOCABULARY} is another vocabulary than the set's")

    def data(self, pairs: tuple[str, ...], config: TrainConfig) -> TrainingData:
        """The text of some directions.

        Raises InputError for directions that it lacks, a file that is not as long as it was, a
        bucket for longer sentences than it keeps, and as TrainingData does.
        """
        there = self.manifest.directions
        if missing := [pair for pair in pairs if pair not in there]:
            raise InputError(
                f"{self.folder} has no training text of {', '.join(missing)}; "
                f"it has {', '.join(there)}"
            )
        cut = [pair for pair in pairs if there[pair].beyond]
        if config.buckets[-1] > self.manifest.longest and cut:
            raise InputError(
                f"{self.folder} keeps sentences of up to {self.manifest.longest} tokens, and there "
                f"are longer ones for a bucket of {config.buckets[-1]}; prepare it anew "
                f"with --set buckets=[...,{config.buckets[-1]}]"
            )
        rows = {pair: self.rows(pair) for pair in pairs}
        return TrainingData(rows, config, {pair: there[pair].sha256 for pair in pairs})

    def rows(self, pair: str) -> Rows:
        """The text of one direction; raises InputError where its file is not as long as it was."""
        one, file = self.manifest.directions[pair], rows_file(self.folder, pair)
        try:
            counts = np.array(one.counts, np.int64)
            tokens = int((2 * counts * np.arange(len(counts))).sum())
            return Rows(counts, np.load(file, mmap_mode="r")[:tokens], one.beyond)
        except (OSError, ValueError) as error:
            if exhausted(error):
                raise
            raise InputError(f"{file} is damaged: {error}; prepare the set anew") from None


class SetSource:
    """A training set as text: what is mapped for training is decoded, as the vocabulary spells it.

    The lines of a direction come in a random order that is always the same.
    """

    def __init__(self, folder: Path) -> None:
        self._set, self._scored = TrainingSet(folder), Folder(folder, _codes(folder))
        self.name, self.identity = str(folder), str(folder.resolve())

    def pairs(self, split: str) -> list[str]:
        """Directions that it has text of in a split, sorted."""
        if split == "train":
            return sorted(self._set.manifest.directions)
        return self._scored.pairs(split)

    def read(self, split: str, pair: str) -> Columns:
        """All lines of a direction."""
        if split != "train":
            return self._scored.read(split, pair)
        return columns_of(self.stream(split, pair))

    def stream(self, split: str, pair: str, start: int = 0) -> Iterator[tuple[str, str]]:
        """As `read`, from a line on, one at a time."""
        if split != "train":
            yield from self._scored.stream(split, pair, start)
            return
        rows, tokenizer = self._set.rows(pair), self._set.tokenizer
        for at in range(start, rows.up_to(rows.longest), _CHUNK):
            place = np.arange(at, min(at + _CHUNK, rows.up_to(rows.longest)))
            sides = rows.read(permuted(place, rows.up_to(rows.longest), (0,)), rows.longest)
            # The target's language stands in front of the source, and no token is that of padding.
            lines = [tokenizer.decode(_unpadded(side)) for side in sides]
            yield from zip(*lines, strict=True)

    def count(self, split: str, pair: str) -> int | None:
        """How many lines `stream` gives."""
        if split != "train":
            return self._scored.count(split, pair)
        return sum(self._set.manifest.directions[pair].counts)

    def stamps(self, split: str, pair: str) -> list[str]:
        """The hash of a direction's rows."""
        return [self._set.manifest.directions[pair].sha256]

    def left_aside(self, split: str) -> list[str]:
        """Nothing: all that it holds was written by `prepare`."""
        return []


def _codes(folder: Path) -> frozenset[str]:
    return codes_of(TrainingSet(folder).manifest.directions)


def _unpadded(side: np.ndarray) -> list[list[int]]:
    length = (side != PAD).sum(axis=1)
    return [row[:n].tolist() for row, n in zip(side, length, strict=True)]
