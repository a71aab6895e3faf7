"""Text that other packages fetch and keep: Hugging Face datasets and sacreBLEU's test sets."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.text.folders import Columns
from taskmoe.wmt.text.languages import known, sides
from taskmoe.wmt.text.textfiles import read_lines, stamp

_HUB_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}


class HuggingFace:
    """`hf:NAME/CONFIG`: a dataset whose records hold `{"translation": {"de": ..., "en": ...}}`.

    NAME/CONFIG is the name on the Hub and, after its last slash, the configuration, as in
    `wmt14/de-en`; or a local folder (of `save_to_disk`, or one that `load_dataset` reads), alone or
    followed by `/CONFIG`. Records are streamed: where a limit is set, no more are fetched.
    """

    def __init__(self, spec: str, limit: int | None = None, named: Collection[str] = ()) -> None:
        """limit: training records to read at most; text to score is read whole.

        named: codes that count although they are no languages.
        Needs the `datasets` package.
        """
        self.name = f"hf:{spec}"
        self.identity = f"hf:{Path(spec).resolve() if Path(spec).exists() else spec}"
        self._spec, self._limit, self._named = spec, limit, named
        self._splits: dict[str, Any] | None = None
        self._columns: dict[str, dict[str, list[str]]] = {}

    def pairs(self, split: str) -> list[str]:
        """Directions between the languages of the split's first record, sorted."""
        stream = self._stream(split)
        if stream is None:
            return []
        languages = self._languages(split, stream)
        return sorted(f"{a}-{b}" for a, b in itertools.permutations(languages, 2))

    def read(self, split: str, pair: str) -> Columns:
        """All lines of a direction, "" where a record lacks the language.

        Raises InputError for a dataset, split or pair that is not there or cannot be fetched, and
        for a record of another form, with its number.
        """
        source, target = split_pair(pair)
        if pair not in self.pairs(split):
            raise InputError(f"{self.name} has no {split} records of pair {pair}")
        if split not in self._columns:
            lines = list(self._records(split))
            languages = self._languages(split, self._stream(split))
            self._columns[split] = {x: [line[x] for line in lines] for x in languages}
        return self._columns[split][source], self._columns[split][target]

    def stream(self, split: str, pair: str, start: int = 0) -> Iterator[tuple[str, str]]:
        """As `read`, from a record on, one at a time."""
        source, target = split_pair(pair)
        if pair not in self.pairs(split):
            raise InputError(f"{self.name} has no {split} records of pair {pair}")
        return ((line[source], line[target]) for line in self._records(split, start))

    def count(self, split: str, pair: str) -> int | None:
        """Records of a split, where the dataset's description says it."""
        stream = self._stream(split)
        described = getattr(getattr(stream, "info", None), "splits", None) or {}
        part = described.get(getattr(stream, "split", None))
        known = len(stream) if hasattr(stream, "__len__") else getattr(part, "num_examples", None)
        limit = self._limit if split == "train" else None
        return known if known is None or limit is None else min(known, limit)

    def stamps(self, split: str, pair: str) -> list[str]:
        """A local folder's files; of the Hub nothing is known before it is read."""
        whole = Path(self._spec)
        folder = whole if whole.is_dir() else whole.parent
        files = sorted(folder.rglob("*")) if folder.is_dir() and folder != Path() else []
        return [stamp(file) for file in files if file.is_file()]

    def _records(self, split: str, start: int = 0) -> Iterator[dict[str, str]]:
        """The text of each record by language."""
        stream = self._stream(split)
        assert stream is not None  # pairs() has seen it
        limit = self._limit if split == "train" else None
        keys = self._languages(split, stream)
        with self._foreign("reading"):
            rest = stream.skip(start) if start else stream
            for number, record in enumerate(
                itertools.islice(rest, limit and max(limit - start, 0)), start + 1
            ):
                texts = self._translation(split, number, record)
                line = {}
                for language, key in keys.items():
                    text = texts.get(key)
                    if text is not None and not isinstance(text, str):
                        raise InputError(
                            f"{self.name}, {split} record {number}: {key!r} is no text but "
                            f"{type(text).__name__}"
                        )
                    # A line of a text file could not hold a newline either.
                    line[language] = " ".join((text or "").split("\n")).strip()
                yield line

    def left_aside(self, split: str) -> list[str]:
        """Keys of the first record's translation that are no languages."""
        stream = self._stream(split)
        with self._foreign("reading"):
            for record in stream if stream is not None else ():
                keys = map(str, self._translation(split, 1, record))
                return [f"key {key}" for key in keys if known(key, self._named) is None]
        return []

    def _languages(self, split: str, stream: Any) -> dict[str, str]:
        """Languages of the first record -> their keys."""
        with self._foreign("reading"):
            for record in stream:
                keys = sorted(map(str, self._translation(split, 1, record)))
                found = {known(key, self._named): key for key in keys}
                return {language: key for language, key in found.items() if language is not None}
        return {}

    def _translation(self, split: str, number: int, record: Any) -> dict[str, Any]:
        texts = record.get("translation") if isinstance(record, dict) else None
        if not isinstance(texts, dict):
            raise InputError(
                f'{self.name}, {split} record {number}: no {{"translation": {{"xx": ...}}}} but '
                f"{', '.join(map(str, record)) or 'nothing'}"
            )
        return texts

    def _stream(self, split: str) -> Any:
        """The records of a split; None where the dataset has no such split."""
        if self._splits is None:
            self._splits = self._open()
        return next((self._splits[x] for x in _HUB_SPLITS[split] if x in self._splits), None)

    def _open(self) -> dict[str, Any]:
        try:
            import datasets  # optional, and slow to import
        except ImportError:
            raise InputError(
                f"{self.name}: this needs the package datasets; pip install 'taskmoe[hf]'"
            ) from None
        datasets.disable_progress_bars()
        for library in ("datasets", "huggingface_hub"):  # each retry would be a line on stderr
            logging.getLogger(library).setLevel(logging.CRITICAL)
        whole, (name, _, config) = Path(self._spec), self._spec.rpartition("/")
        with self._foreign("opening"):
            for folder in (whole, Path(name)) if name else (whole,):
                if any((folder / x).is_file() for x in ("dataset_dict.json", "state.json")):
                    saved = datasets.load_from_disk(str(folder))
                    return dict(saved) if isinstance(saved, dict) else {"train": saved}
                if folder.is_dir():
                    chosen = None if folder == whole else config
                    return dict(datasets.load_dataset(str(folder), chosen, streaming=True))
            if not name:
                raise InputError(f"{self.name}: write hf:NAME/CONFIG, as in hf:wmt14/de-en")
            return dict(datasets.load_dataset(name, config, streaming=True))

    @contextlib.contextmanager
    def _foreign(self, doing: str) -> Iterator[None]:
        """Whatever goes wrong in `datasets` is told as a sentence about this source.

        It raises errors of a dozen packages (arrow, fsspec, httpx, ...) without a common base.
        """
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.name}: {doing} it failed: {error}") from None


class SacreBleu:
    """`sacrebleu:NAME`: a test set that the sacrebleu package downloads once and keeps.

    It serves one split: validation where the name says so (`wmt17/dev`, `mtedx/valid`), else test.
    A set is read in the directions that it was made for; of several references the first is taken.
    """

    def __init__(self, spec: str, split: str | None = None) -> None:
        """split: the one to serve. Raises InputError for a name that sacrebleu does not know."""
        from sacrebleu.dataset import DATASETS

        if spec not in DATASETS:
            raise InputError(
                f"sacrebleu:{spec}: sacrebleu knows no such test set; it knows "
                f"{', '.join(sorted(DATASETS))}"
            )
        self.name = self.identity = f"sacrebleu:{spec}"
        self._data = DATASETS[spec]
        part = spec.partition("/")[2]
        self._split = split or ("valid" if part.startswith(("dev", "valid")) else "test")

    def pairs(self, split: str) -> list[str]:
        """Directions of the test set, sorted; none for a split that it does not serve."""
        if split != self._split:
            return []
        return sorted(self._named())

    def left_aside(self, split: str) -> list[str]:
        """Nothing: it knows its languages."""
        return []

    def _named(self) -> dict[str, str]:
        """Directions -> what sacrebleu calls them."""
        found: dict[str, str] = {}
        for name in self._data.langpairs:
            both = sides(name)
            if len(both) == 1:
                found["-".join(known(side) or side for side in both[0])] = name
        return found

    def read(self, split: str, pair: str) -> Columns:
        """All lines of a direction; raises InputError where they cannot be downloaded or read."""
        if pair not in self.pairs(split):
            raise InputError(f"{self.name} has no {split} text of pair {pair}")
        try:
            name = self._named()[pair]
            source = self._data.get_source_file(name)
            target = self._data.get_reference_files(name)[0]
        except (Exception, SystemExit) as error:  # SystemExit: its answer to a wrong checksum
            raise InputError(
                f"{self.name}: sacrebleu could not fetch it ({error}); it needs the network "
                f"once, or the set's files in {Path(self._data._outdir)}"
            ) from None
        columns = read_lines(Path(source)), read_lines(Path(target))
        if len(columns[0]) != len(columns[1]):
            raise InputError(
                f"{source} has {len(columns[0])} lines but {target} has {len(columns[1])}; "
                "delete both and sacrebleu makes them anew"
            )
        return columns

    def stream(self, split: str, pair: str, start: int = 0) -> Iterator[tuple[str, str]]:
        """As `read`, from a line on, one at a time."""
        return itertools.islice(zip(*self.read(split, pair), strict=True), start, None)

    def count(self, split: str, pair: str) -> int | None:
        """Known when it is read."""
        return None

    def stamps(self, split: str, pair: str) -> list[str]:
        """Nothing: a test set never changes."""
        return []
