"""Where parallel text comes from: any mix of sources, each named by one word on the command line.

| name | what |
|---|---|
| `SET` | a training set that `prepare` wrote |
| `FOLDER` | Moses-style, multi-parallel or tab-separated files, see `taskmoe.wmt.text.folders` |
| `FILE.tsv` | one tab-separated file; training text unless its name begins with a split, `test.` |
| `NAME.de-en` | two Moses files, `NAME.de-en.de` and `NAME.de-en.en`; as above |
| `hf:NAME/CONFIG` | a Hugging Face dataset, or a local one: `hf:FOLDER` |
| `sacrebleu:NAME` | a test set of sacreBLEU's, `sacrebleu:wmt14` or `sacrebleu:wmt14/full` |
| `cldr` | the embedded corpus, see `taskmoe.wmt.text.cldr` |

Files may be gzipped, and a pattern names all that it fits: `corpus/*.de-en`. After files or a test
set, `@train`, `@valid` or `@test` says which split it is to serve: `sacrebleu:wmt13@valid`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text import cldr
from taskmoe.wmt.text.corpus_files import MosesCorpus, TsvCorpus, moses_files
from taskmoe.wmt.text.folders import SPLITS, Columns, Folder, Pairs, without_empty
from taskmoe.wmt.text.remote import HuggingFace, SacreBleu
from taskmoe.wmt.text.textfiles import is_tsv
from taskmoe.wmt.text.training_set import SetSource, is_training_set

_NAMES = 6  # of sources in a title


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

    def stream(self, split: str, pair: str, start: int = 0) -> Iterator[tuple[str, str]]:
        """As `read`, from a line on, one at a time: memory does not grow with the text."""

    def count(self, split: str, pair: str) -> int | None:
        """How many lines `stream` gives; None where only reading them tells."""

    def stamps(self, split: str, pair: str) -> list[str]:
        """What is another when the text is, as far as that is known without reading it."""


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
        return TsvCorpus(Path(word), split or None, named)
    if not Path(word).is_dir() and moses_files(word, named):
        return MosesCorpus(word, split or None, named)
    if split:
        raise InputError(
            f"{name}: only a .tsv file, Moses files or sacrebleu: test set take @{split}"
        )
    if kind == "hf" and colon:
        return HuggingFace(rest, limit, named)
    if name == "cldr":
        return _Cldr(cache_folder(cache), progress)
    if is_training_set(Path(name)):
        return SetSource(Path(name))
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
        for given in names
        for name in _matches(given, named)
    ]
    for i, source in enumerate(found):
        if source.identity in [other.identity for other in found[:i]]:
            raise InputError(f"{source.name} is named twice")
    return found


def _matches(name: str, named: Collection[str]) -> list[str]:
    """The names that a pattern fits, sorted; a name that is none is itself."""
    word, at, split = name.rpartition("@")
    if not at or split not in SPLITS:
        word, split = name, ""
    if not glob.has_magic(word) or word.startswith(("hf:", "sacrebleu:")) or Path(word).exists():
        return [name]
    found = [path for path in glob.glob(word) if Path(path).is_dir() or is_tsv(Path(path))]
    for path in glob.glob(f"{word}.*"):  # Moses files are named without their ends
        prefix = path.removesuffix(".gz").rpartition(".")[0]
        if moses_files(prefix, named):
            found.append(prefix)
    if not found:
        raise InputError(
            f"data folder {name} is not there, and as a pattern it fits no folder, .tsv file or "
            "Moses files"
        )
    return [f"{path}{at and split and f'@{split}'}" for path in sorted(set(found))]


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
            raise InputError(no_text(sources, split, pair))
        out[pair] = ([], [])
        for holder in holders:
            for side, lines in zip(out[pair], holder.read(split, pair), strict=True):
                side.extend(lines[:limit])
    return out


def no_text(sources: Sequence[Source], split: str, pair: str) -> str:
    """That no source has text of a direction, and what there is."""
    known = all_pairs(sources, split)
    there = f"there is {', '.join(known)}" if known else f"there is no {split} text at all"
    return f"no {split} text for pair {pair} in {names_of(sources)}; {there}"


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
    names = [source.name for source in sources]
    more = len(names) - _NAMES
    return " + ".join(names if more < 1 else [*names[:_NAMES], f"{more} more"])


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
        return self._there().read(split, pair)

    def stream(self, split: str, pair: str, start: int = 0) -> Iterator[tuple[str, str]]:
        return self._there().stream(split, pair, start)

    def count(self, split: str, pair: str) -> int | None:
        return self._there().count(split, pair)

    def stamps(self, split: str, pair: str) -> list[str]:
        return [cldr.fingerprint(self._config)]

    def _there(self) -> Folder:
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
        return self._folder
