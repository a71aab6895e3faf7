"""From generated text to a training set and batches, with clocks beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result
from taskmoe.bench.text.spec import Spec
from taskmoe.cli.progress import bar
from taskmoe.wmt.config import PRESETS, TrainConfig
from taskmoe.wmt.text import cldr
from taskmoe.wmt.text.folders import Folder
from taskmoe.wmt.text.preparing import Plan, prepare
from taskmoe.wmt.text.sources import cache_folder, open_source, read_held_out
from taskmoe.wmt.text.tokenizer import PAD
from taskmoe.wmt.text.training_set import TrainingSet

LANGUAGES = ("de", "fr", "es", "ro", "ru", "fi", "cs", "lt")
PAIRS = tuple(pair for x in LANGUAGES for pair in (f"en-{x}", f"{x}-en"))
HELD = 100  # sentence pairs of validation text a direction
PRESET = "small"  # whose vocabulary and buckets are taken
BATCHES_S = 3.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of `prepare`: seconds by the clock."""

    name: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prepared(Result):
    """pairs: read; kept: in the set. planted_left, lost: planted lines that are in the set, and
    others that are not, but for copied ones. Sizes in bytes. reading: seconds that one process
    needs to read all lines. open_s: from nothing to the first batch. batches_per_s,
    tokens_per_s and padding: of batches as one thread makes them.
    """

    machine: dict[str, str]
    pairs: int
    kept: int
    planted_left: int
    lost: int
    workers: int
    stages: list[Stage]
    reading: float
    text_bytes: int
    set_bytes: int
    part_bytes: int
    memory_bytes: int
    open_s: float
    batches_per_s: float
    tokens_per_s: float
    padding: float
    command: str = "text"


def measure(spec: Spec) -> Prepared:
    """Generate, prepare, and draw batches."""
    with tempfile.TemporaryDirectory(prefix="taskmoe-text-") as temporary:
        work = spec.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        text, wanted = generate(work / "text", spec.pairs)
        return _prepared(spec, work, text, wanted)


def _prepared(spec: Spec, work: Path, text: Path, wanted: dict[str, int]) -> Prepared:
    source = open_source(str(text))
    preset = PRESETS[PRESET]
    config = TrainConfig(**preset[1])
    began = time.perf_counter()
    for pair in PAIRS:
        for _ in source.stream("train", pair):
            pass
    reading = time.perf_counter() - began
    clock, part = _Clock(), work / "set.part"
    with bar("preparing", "sentences") as progress:

        def report(stage: str, done: int, total: int | None) -> None:
            clock.note(stage.split(maxsplit=1)[0], part)
            progress.stage(stage, done, total)

        held_out = read_held_out([source], {"en", *LANGUAGES})
        words = preset[0]["vocab_size"], "generated text", str(text)
        plan = Plan([source], PAIRS, held_out, {}, config, *words)
        made = prepare(work / "set", plan, spec.workers, report)
    clock.note("", part)
    kept = {p: sum(d.counts) + d.beyond for p, d in made.manifest.directions.items()}
    copied = {p: d.account.copied for p, d in made.manifest.directions.items()}
    began = time.perf_counter()
    data = TrainingSet(made.folder).data(PAIRS, config)
    data.batch(0)
    open_s = time.perf_counter() - began
    batches, tokens, places = 0, 0, 0
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < BATCHES_S:
        batch = data.batch(batches)
        batches += 1
        for side in (batch.source, batch.target_out):
            tokens += int((side != PAD).sum())
            places += side.size
    read = sum(one.account.read for one in made.manifest.directions.values())
    return Prepared(
        machine.describe(),
        read,
        sum(kept.values()),
        sum(max(0, kept[p] - wanted[p]) for p in PAIRS),
        sum(max(0, wanted[p] - copied[p] - kept[p]) for p in PAIRS),
        spec.workers,
        [Stage(name, round(seconds, 2)) for name, seconds in clock.seconds.items()],
        round(reading, 2),
        _size(text),
        _size(made.folder),
        clock.largest,
        _memory(spec.workers),
        round(open_s, 3),
        batches / spent,
        tokens / spent,
        1 - tokens / places,
    )


def generate(folder: Path, pairs: int) -> tuple[Path, dict[str, int]]:
    """Write numbered sentences of the embedded corpus, a few to a line; planted ones among them.

    Directions are of sizes up to 400 times one another's. Of 100 lines ten stood before and one is
    in the validation text. Returns the folder, and how many lines of each direction are neither.
    Raises InputError where the cache cannot be written.
    """
    corpus = cache_folder() / f"cldr-{cldr.fingerprint(cldr.CldrConfig())}"
    open_source("cldr").read("train", "en-de")  # writes it where it is not there
    source = Folder(corpus)
    folder.mkdir()
    sizes = _sizes(pairs)
    wanted = {}
    with bar("generating", "sentences") as progress:
        for number, (pair, size) in enumerate(zip(PAIRS, sizes, strict=True)):
            lines = list(zip(*source.read("train", pair), strict=True))
            a, b = pair.split("-")
            held = [[f"{x} {number} {i}" for x in lines[i]] for i in range(HELD)]
            for place, language in enumerate((a, b)):
                content = "".join(f"{both[place]}\n" for both in held)
                (folder / f"valid.{pair}.{language}").write_text(content, encoding="utf-8")
            good = 0
            paths = [folder / f"train.{pair}.{language}" for language in (a, b)]
            with paths[0].open("w") as left, paths[1].open("w") as right:
                for x, y, planted in _lines(lines, held, size):
                    good += not planted
                    left.write(f"{x}\n")
                    right.write(f"{y}\n")
            wanted[pair] = good
            progress(sum(sizes[: number + 1]), sum(sizes))
    return folder, wanted


def _lines(
    lines: list[tuple[str, str]], held: list[list[str]], size: int
) -> Iterator[tuple[str, str, bool]]:
    """(source, target, whether it is planted) of a direction."""
    before: list[tuple[str, str]] = []
    for i in range(size):
        if i % 10 == 9:
            yield *before[i // 10 % len(before)], True
        elif i % 100 == 50:
            x, y = held[i // 100 % len(held)]
            yield x, y, True
        else:
            few = [lines[(i + j) % len(lines)] for j in range(1 + i % 6)]
            both = tuple(f"{' '.join(part)} {i}" for part in zip(*few, strict=True))
            if len(before) < 4096:
                before.append((both[0], both[1]))
            yield both[0], both[1], False


def _sizes(pairs: int) -> list[int]:
    """Of 16 directions, from 1 to 400, so many in all."""
    share = 400 ** np.linspace(0, 1, len(PAIRS)) ** 1.15
    return [max(200, int(n)) for n in share / share.sum() * pairs]


class _Clock:
    """Seconds of each stage, and the largest size of the folder in which work lies."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.largest = 0
        self._stage, self._since, self._looked = "reading", time.perf_counter(), 0.0

    def note(self, stage: str, part: Path) -> None:
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        if stage != self._stage or now - self._looked > 5:
            self._looked = now
            self.largest = max(self.largest, _size(part))
        self._stage, self._since = stage, now


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # what is renamed meanwhile
            total += path.stat().st_size
    return total


def _memory(workers: int) -> int:
    """Most bytes of this process, and of so many like its largest child."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * (own + (child * workers if workers > 1 else 0))
