"""Where parallel text comes from: any mix of sources, each named by one word on the command line.

| name | what |
|---|---|
| `FOLDER` | Moses-style, multi-parallel or tab-separated files, see `taskmoe.wmt.text.folders` |
| `FILE.tsv` | one tab-separated file; training text unless its name begins with a split, `test.` |
| `hf:NAME/CONFIG` | a Hugging Face dataset, or a local one: `hf:FOLDER` |
| `sacrebleu:NAME` | a test set of sacreBLEU's, `sacrebleu:wmt14` or `sacrebleu:wmt14/full` |
| `cldr` | the embedded corpus, see `taskmoe.wmt.text.cldr` |

Files may be gzipped. After a file or a test set, `@train`, `@valid` or `@test` says which split it
is to serve: `sacrebleu:wmt13@valid`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text import cldr
from taskmoe.wmt.text.folders import SPLITS, Columns, Folder, Pairs, without_empty
from taskmoe.wmt.text.remote import HuggingFace, SacreBleu
from taskmoe.wmt.text.textfiles import is_tsv, plain_name, read_tsv


class Source(Protocol):
    """Parallel text by split ("train", "valid", "test") and direction.

    name: as it was asked for. identity: the same from any working directory.
    """

    @property
    def name(self) -> str:
        """As it was asked for."""

    @property
    def identity(self) -> str:
        """The same from any working directory."""

    def pairs(self, split: str) -> list[str]:
        """Directions that it has text of in a split, sorted."""

    def read(self, split: str, pair: str) -> Columns:
        """All lines of a direction, equally many, empty ones included."""

    def left_aside(self, split: str) -> list[str]:
        """What looks like text of a split but is in no language."""


class TsvFile:
    """One tab-separated file, which serves one split."""

    def __init__(self, path: Path, split: str | None = None, named: Collection[str] = ()) -> None:
        """split: the one to serve; None goes by the name's beginning, else it is "train".

        named: codes that count although they are no languages.
        """
        if not path.is_file():
            raise InputError(f"data file {path} is not there")
        begins = plain_name(path).split(".")[0]
        begun = next((s for s, names in SPLITS.items() if begins in names), "train")
        self.name, self.identity = str(path), str(path.resolve())
        self._path, self._split, self._codes = path, split or begun, named
        self._read_once: tuple[dict[str, list[str]], list[str]] | None = None

    def pairs(self, split: str) -> list[str]:
        """Directions between its columns, sorted; none for a split that it does not serve."""
        if split != self._split:
            return []
        return sorted(f"{a}-{b}" for a in self._read() for b in self._read() if a != b)

    def read(self, split: str, pair: str) -> Columns:
        """The two columns of a direction; raises InputError where it has none."""
        if pair not in self.pairs(split):
            raise InputError(f"{self.name} has no {split} columns of pair {pair}")
        source, target = split_pair(pair)
        return self._read()[source], self._read()[target]

    def left_aside(self, split: str) -> list[str]:
        """Columns that are no language's."""
        return [f"column {name}" for name in self._table()[1]] if split == self._split else []

    def _read(self) -> dict[str, list[str]]:
        return self._table()[0]

    def _table(self) -> tuple[dict[str, list[str]], list[str]]:
        if self._read_once is None:
            self._read_once = read_tsv(self._path, self._codes)
        return self._read_once


def cache_folder(path: Path | None = None) -> Path:
    """Where what can be made again is kept: `path`, else `taskmoe` in the user's cache folder.

    That is $XDG_CACHE_HOME, by default ~/.cache. It need not be there yet.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return path or Path(home).expanduser() / "taskmoe"


def open_source(
    name: str,
    *,
    limit: int | None = None,
    cache: Path | None = None,
    named: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """The source of a name; see this module's table.

    named: codes that are taken as they stand, although they are no languages.
    limit: training pairs to read of a direction at most, where reading more costs a download.
    cache: see `cache_folder`. progress: told of (done, total) while the embedded corpus is written.
    Raises InputError for a name that is none of these, or a folder or file that is not there.
    """
    word, at, split = name.rpartition("@")
    if not at or split not in SPLITS:
        word, split = name, ""
    kind, colon, rest = word.partition(":")
    if not word or (kind in ("hf", "sacrebleu") and colon and not rest):
        raise InputError(f"{name!r} names no source")
    if kind == "sacrebleu" and colon:
        return SacreBleu(rest, split or None)
    if is_tsv(Path(word)) and not Path(word).is_dir():
        return TsvFile(Path(word), split or None, named)
    if split:
        raise InputError(f"{name}: only a .tsv file or sacrebleu: test set takes @{split}")
    if kind == "hf" and colon:
        return HuggingFace(rest, limit, named)
    if name == "cldr":
        return _Cldr(cache_folder(cache), progress)
    return Folder(Path(name), named)


def open_sources(
    names: Sequence[str],
    *,
    limit: int | None = None,
    cache: Path | None = None,
    named: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Source]:
    """Several sources; raises InputError as `open_source` does, and for one named twice."""
    found = [
        open_source(name, limit=limit, cache=cache, named=named, progress=progress)
        for name in names
    ]
    for i, source in enumerate(found):
        if source.identity in [other.identity for other in found[:i]]:
            raise InputError(f"{source.name} is named twice")
    return found


def all_pairs(sources: Sequence[Source], split: str) -> list[str]:
    """Directions that any of the sources has text of in a split, sorted."""
    return sorted({pair for source in sources for pair in source.pairs(split)})


def read_all(
    sources: Sequence[Source], split: str, pairs: Sequence[str], limit: int | None = None
) -> Pairs:
    """Each direction's lines, one source after the other, empty lines included.

    limit: sentence pairs of a direction to take of each source at most.
    Raises InputError for a direction that no source has, and all that reading does.
    """
    out: Pairs = {}
    for pair in pairs:
        split_pair(pair)
        holders = [source for source in sources if pair in source.pairs(split)]
        if not holders:
            known = all_pairs(sources, split)
            raise InputError(
                f"no {split} text for pair {pair} in {names_of(sources)}; "
                + (f"there is {', '.join(known)}" if known else f"there is no {split} text at all")
            )
        out[pair] = ([], [])
        for holder in holders:
            for side, lines in zip(out[pair], holder.read(split, pair), strict=True):
                side.extend(lines[:limit])
    return out


def read_held_out(sources: Sequence[Source], languages: set[str]) -> dict[str, set[str]]:
    """Language -> every line of validation and test text, of directions between these languages."""
    held: dict[str, set[str]] = {language: set() for language in languages}
    for source in sources:
        for split in ("valid", "test"):
            for pair in source.pairs(split):
                if languages.issuperset(split_pair(pair)):
                    for language, lines in zip(
                        split_pair(pair), source.read(split, pair), strict=True
                    ):
                        held[language].update(lines)
    return held


def read_split(
    sources: Sequence[Source], split: str, pairs: Sequence[str], limit: int | None = None
) -> Pairs:
    """As `read_all`, without the lines where either side is empty: text to score."""
    text = read_all(sources, split, pairs, limit)
    return {p: without_empty(*sides, f"{names_of(sources)}, {p}") for p, sides in text.items()}


def names_of(sources: Sequence[Source]) -> str:
    """Their names in one line."""
    return " + ".join(source.name for source in sources)


class _Cldr:
    """The embedded corpus, written into the cache when it is first read."""

    name = identity = "cldr"

    def __init__(self, cache: Path, progress: Callable[[int, int], None] | None) -> None:
        self._config = cldr.CldrConfig()
        self._cache, self._progress = cache, progress
        self._folder: Folder | None = None

    def pairs(self, split: str) -> list[str]:
        return sorted(cldr.PAIRS)

    def left_aside(self, split: str) -> list[str]:
        return []

    def read(self, split: str, pair: str) -> Columns:
        if self._folder is None:
            path = self._cache / f"cldr-{cldr.fingerprint(self._config)}"
            try:
                cldr.write_corpus(path, self._config, progress=self._progress)
            except ValueError as error:  # the folder holds something else
                raise InputError(str(error)) from None
            except OSError as error:
                raise InputError(
                    f"cache folder {self._cache}: {error.strerror}; name another with --cache"
                ) from None
            self._folder = Folder(path)
        return self._folder.read(split, pair)
