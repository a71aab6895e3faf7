"""Corpora that are named by their files: a tab-separated one, or two of Moses' kind."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Collection, Iterator
from pathlib import Path

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.folders import SPLITS, Columns, columns_of
from taskmoe.wmt.text.languages import known, sides
from taskmoe.wmt.text.textfiles import TsvFile, count_lines, plain_name, stamp, stream_pairs


class _Corpus(abc.ABC):
    """Serves one split: the one that is asked for, else that which the name's beginning says."""

    def __init__(self, name: str, split: str | None) -> None:
        path = Path(name)
        begins = plain_name(path).split(".")[0]
        begun = next((s for s, names in SPLITS.items() if begins in names), "train")
        self.name, self.identity = name, str(path.resolve())
        self._split = split or begun

    @abc.abstractmethod
    def languages(self) -> list[str]:
        """Those that it has text of."""

    def pairs(self, split: str) -> list[str]:
        """Directions between its languages, sorted; none for a split that it does not serve."""
        if split != self._split:
            return []
        return sorted(f"{a}-{b}" for a, b in itertools.permutations(self.languages(), 2))

    def read(self, split: str, pair: str) -> Columns:
        """All lines of a direction; raises InputError where it has none."""
        return columns_of(self.stream(split, pair))

    def stream(self, split: str, pair: str, start: int = 0) -> Iterator[tuple[str, str]]:
        """As `read`, from a line on, one at a time."""
        if pair not in self.pairs(split):
            raise InputError(f"{self.name} has no {split} text of pair {pair}")
        return itertools.islice(self._lines(*split_pair(pair)), start, None)

    @abc.abstractmethod
    def _lines(self, source: str, target: str) -> Iterator[tuple[str, str]]:
        """All lines of two languages."""


class TsvCorpus(_Corpus):
    """One tab-separated file."""

    def __init__(self, path: Path, split: str | None = None, named: Collection[str] = ()) -> None:
        """split: the one to serve; None goes by the name's beginning, else it is "train".

        named: codes that count although they are no languages.
        """
        if not path.is_file():
            raise InputError(f"data file {path} is not there")
        super().__init__(str(path), split)
        self._path, self._named = path, named
        self._opened: TsvFile | None = None

    def languages(self) -> list[str]:
        """Those of its columns."""
        return self._file().languages

    def left_aside(self, split: str) -> list[str]:
        """Columns that are no language's."""
        return [f"column {x}" for x in self._file().aside] if split == self._split else []

    def count(self, split: str, pair: str) -> int:
        """Its lines."""
        return count_lines(self._path)

    def stamps(self, split: str, pair: str) -> list[str]:
        """What changes when its file does."""
        return [stamp(self._path)]

    def _lines(self, source: str, target: str) -> Iterator[tuple[str, str]]:
        return self._file().stream(source, target)

    def _file(self) -> TsvFile:
        if self._opened is None:
            self._opened = TsvFile(self._path, self._named)
        return self._opened


class MosesCorpus(_Corpus):
    """Two files, `NAME.de-en.de` and `NAME.de-en.en`, each plain or gzipped, named without ends."""

    def __init__(self, name: str, split: str | None = None, named: Collection[str] = ()) -> None:
        """name: `NAME.de-en`. named: codes that count although they are no languages."""
        super().__init__(name, split)
        written = moses_files(name, named)
        if written is None:
            raise InputError(f"{name}: no two files {name}.xx, one of each language of its pair")
        self._files = {known(code, named) or code: path for code, path in written.items()}

    def languages(self) -> list[str]:
        """Both."""
        return list(self._files)

    def left_aside(self, split: str) -> list[str]:
        """Nothing: it is named by its languages."""
        return []

    def count(self, split: str, pair: str) -> int:
        """Lines of the source's file."""
        return count_lines(self._files[split_pair(pair)[0]])

    def stamps(self, split: str, pair: str) -> list[str]:
        """What changes when its files do."""
        return [stamp(path) for path in self._files.values()]

    def _lines(self, source: str, target: str) -> Iterator[tuple[str, str]]:
        return stream_pairs(self._files[source], self._files[target])


def moses_files(name: str, named: Collection[str] = ()) -> dict[str, Path] | None:
    """Language as it is written -> file of `NAME.de-en`; None where there are no such two."""
    pair = name.rpartition(".")[2]
    for both in sides(Path(pair).name, named):
        found = {
            code: path
            for code in both
            for path in (Path(f"{name}.{code}.gz"), Path(f"{name}.{code}"))
            if path.is_file()
        }
        if len(found) == 2:
            return found
    return None
