"""Folders of parallel text.

A folder holds, for a split such as "train", any of: pair files `train.en-de.en` + `train.en-de.de`
(Moses style, the pair named either way round), multi-parallel files `train.en`, `train.de`, ...
whose line N are all translations of each other, and tab-separated files `train.en-de.tsv` or, with
a header, `train.tsv`. Each may be gzipped, with `.gz` at its end. Validation text may also be
called `val` or `dev`. Codes are BCP 47's in either spelling, `train.pt-BR` or `train.pt_BR`; a file
that ends in no language, such as `train.log`, is left aside.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from taskmoe.cli.command_line import write_bytes
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.languages import codes_of, known, sides
from taskmoe.wmt.text.textfiles import (
    TsvFile,
    count_lines,
    is_tsv,
    plain_name,
    read_lines,
    stamp,
    stream_pairs,
)

SPLITS = {"train": ("train",), "valid": ("valid", "val", "dev"), "test": ("test",)}
Columns = tuple[list[str], list[str]]  # source lines, target lines
Pairs = dict[str, Columns]


class _Place(NamedTuple):
    """Where a language's lines are: a text file, or a column of a tab-separated one."""

    file: Path
    column: str | None = None

    def __str__(self) -> str:
        return str(self.file) + (f", column {self.column}" if self.column else "")


class Folder:
    """The text of a folder. Files are read when asked for, and once."""

    def __init__(self, path: Path, named: Collection[str] = ()) -> None:
        """named: codes that count although they are no languages.

        Raises InputError where there is no such folder.
        """
        if not path.is_dir():
            raise InputError(f"data folder {path} is not there")
        self.path = path
        self.name = str(path)
        self.identity = str(path.resolve())
        self._named = named
        self._lines: dict[_Place, list[str]] = {}
        self._tables: dict[Path, TsvFile] = {}
        self._found: dict[str, dict[str, tuple[_Place, _Place]]] = {}

    def pairs(self, split: str) -> list[str]:
        """Directions that the files of a split can serve, sorted."""
        return sorted(self._places(split))

    def left_aside(self, split: str) -> list[str]:
        """Files of a split that serve no direction, and columns of files that are no language's."""
        used = {place.file for both in self._places(split).values() for place in both}
        files = [path for name in SPLITS[split] for path in self._files(name).values()]
        columns = [
            f"{file.name}, column {column}"
            for file in sorted(used.intersection(self._tables))
            for column in self._tables[file].aside
        ]
        return [path.name for path in files if path not in used] + columns

    def read(self, split: str, pair: str) -> Columns:
        """All lines of a direction, empty ones included.

        Raises InputError for a pair that is not there, files of unequal length and all that
        `read_lines` and `TsvFile` do.
        """
        source, target = (self._read(place) for place in self._both(split, pair))
        if len(source) != len(target):
            a, b = self._both(split, pair)
            raise InputError(
                f"{a} has {len(source)} lines but {b} has {len(target)}: "
                "line N of one must translate line N of the other"
            )
        return source, target

    def stream(self, split: str, pair: str, start: int = 0) -> Iterator[tuple[str, str]]:
        """As `read`, from a line on, one at a time."""
        a, b = self._both(split, pair)
        if a.file == b.file:
            lines = self._table(a.file).stream(str(a.column), str(b.column))
        else:
            lines = stream_pairs(a.file, b.file)
        return itertools.islice(lines, start, None)

    def count(self, split: str, pair: str) -> int:
        """Lines of a direction's source."""
        return count_lines(self._both(split, pair)[0].file)

    def stamps(self, split: str, pair: str) -> list[str]:
        """What changes when a direction's files do."""
        return [stamp(file) for file in dict.fromkeys(x.file for x in self._both(split, pair))]

    def _both(self, split: str, pair: str) -> tuple[_Place, _Place]:
        split_pair(pair)
        places = self._places(split)
        if pair not in places:
            raise InputError(
                f"no {split} files for pair {pair} in {self.path}; "
                + (f"it has {', '.join(sorted(places))}" if places else f"it has no {split} files")
                + ("" if places else " of any pair")
            )
        return places[pair]

    def _read(self, place: _Place) -> list[str]:
        if place not in self._lines:
            self._lines[place] = (
                read_lines(place.file)
                if place.column is None
                else self._table(place.file).column(place.column)
            )
        return self._lines[place]

    def _table(self, file: Path) -> TsvFile:
        if file not in self._tables:
            self._tables[file] = TsvFile(file, self._named)
        return self._tables[file]

    def _files(self, name: str) -> dict[str, Path]:
        """A split's files by their names without .gz; a plain one stands before a packed one."""
        files: dict[str, Path] = {}
        for path in sorted(self.path.glob(f"{name}.*"), key=lambda p: (p.suffix == ".gz", p)):
            if path.is_file():
                files.setdefault(plain_name(path), path)
        return dict(sorted(files.items()))

    def _places(self, split: str) -> dict[str, tuple[_Place, _Place]]:
        """Direction -> where its two sides are; the first of a split's names that has it."""
        if split not in self._found:
            self._found[split] = self._look_up(split)
        return self._found[split]

    def _look_up(self, split: str) -> dict[str, tuple[_Place, _Place]]:
        found: dict[str, tuple[_Place, _Place]] = {}
        for name in SPLITS[split]:
            files = self._files(name)
            own: list[dict[str, _Place]] = []
            shared: list[dict[str, _Place]] = []
            alone: dict[str, _Place] = {}
            for file, path in files.items():
                parts = file.split(".")[1:]
                if is_tsv(path):
                    shared.append({x: _Place(path, x) for x in self._table(path).languages})
                elif len(parts) == 1:
                    if language := known(parts[0], self._named):
                        alone[language] = _Place(path)
                elif len(parts) == 2:
                    for a, b in sides(parts[0], self._named):
                        other = files.get(f"{name}.{parts[0]}.{b}")
                        if parts[1] == a and other is not None:
                            place = {a: _Place(path), b: _Place(other)}
                            own.append({known(x, self._named) or x: at for x, at in place.items()})
            for group in own:  # files named after this very direction stand before all others
                a, b = group
                found.setdefault(f"{a}-{b}", (group[a], group[b]))
            for group in [*own, *shared, alone]:
                for a, b in itertools.permutations(group, 2):
                    found.setdefault(f"{a}-{b}", (group[a], group[b]))
        return found


def write_splits(folder: Path, splits: Mapping[str, Pairs]) -> None:
    """Write `SPLIT.en-de.en` and `SPLIT.en-de.de` of all directions, as `Folder` reads them."""
    for split, text in splits.items():
        written: Pairs = {}
        for pair, columns in text.items():
            source, target = split_pair(pair)
            if written.get(f"{target}-{source}") == columns[::-1]:
                continue  # those files serve both directions
            written[pair] = columns
            for language, lines in zip((source, target), columns, strict=True):
                content = "".join(f"{line}\n" for line in lines)
                write_bytes(folder / f"{split}.{pair}.{language}", content.encode())


def read_pairs(folder: Path, split: str, pairs: tuple[str, ...]) -> Pairs:
    """Sentences of each direction: pair -> (source lines, target lines), equally long.

    split: "train", "valid" or "test". Lines where either side is empty are left out.
    Raises InputError for a folder or pair that is not there, files of unequal length and invalid
    UTF-8, naming files, counts and lines; and where a direction has no sentence.
    """
    text = Folder(folder, codes_of(pairs))
    return {pair: without_empty(*text.read(split, pair), f"{folder}, {pair}") for pair in pairs}


def columns_of(lines: Iterable[tuple[str, str]]) -> Columns:
    """Source and target lines, apart."""
    source: list[str] = []
    target: list[str] = []
    for a, b in lines:
        source.append(a)
        target.append(b)
    return source, target


def without_empty(source: list[str], target: list[str], name: str) -> Columns:
    """The lines where neither side is empty; raises InputError where none is left."""
    kept = [(s, t) for s, t in zip(source, target, strict=True) if s and t]
    if not kept:
        raise InputError(f"{name}: it holds no sentence pair")
    return [s for s, _ in kept], [t for _, t in kept]
