"""From sources to a training set, in stages that each write what they have done.

    read        lines of a direction in blocks: looked at one by one, those worth it stay as text
    judge       of all blocks of a direction: lengths that go together, duplicates, held-out text
    vocabulary  from lines that are kept, drawn with p ~ size^(1/T) over languages
    encode      block by block
    merge       the blocks of a direction into one file

All lies in `OUT.part` until the set is whole, and a run that was stopped goes on there: what a
stage has finished has its name, what it was at has another. Blocks hold a fixed number of lines, so
memory does not grow with the text, but for about 20 bytes a line of the largest direction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from taskmoe.cli.command_line import check_new, remove_folder, write_bytes, write_text
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import TrainConfig, split_pair
from taskmoe.wmt.text import blocks
from taskmoe.wmt.text.cleaning import Account, held_keys, judge
from taskmoe.wmt.text.folders import Pairs, write_splits
from taskmoe.wmt.text.rows import Rows, place, token_type
from taskmoe.wmt.text.sources import Source
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.text.training_set import (
    CLEANING,
    MANIFEST,
    VERSION,
    VOCABULARY,
    Direction,
    Manifest,
    TrainingSet,
    rows_file,
)
from taskmoe.wmt.text.vocabulary import drawn_vocabulary
from taskmoe.wmt.text.workers import workers

Report = Callable[[str, int, int | None], None]
_FEW = 200_000  # lines for which the start of workers takes longer than they save


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is made of what.

    sources, pairs: which text. held_out: language -> lines of validation and test text. splits:
    text to score, split -> direction -> lines. config: how text is cleaned, the longest sentence
    and the vocabulary's temperature, sentences and seed. vocabulary: one that is there, or the size
    of one to train.
    """

    sources: Sequence[Source]
    pairs: tuple[str, ...]
    held_out: Mapping[str, set[str]]
    splits: Mapping[str, Pairs]
    config: TrainConfig
    vocabulary: Tokenizer | int
    title: str
    identity: str

    def holders(self, pair: str) -> list[Source]:
        """The sources that have training text of a direction."""
        return [source for source in self.sources if pair in source.pairs("train")]

    def description(self) -> dict[str, Any]:
        """All that the set depends on, as JSON has it."""
        vocabulary = self.vocabulary
        fields = dataclasses.asdict(self.config)
        return {
            "version": VERSION,
            "block": blocks.LINES,
            "sources": self.identity,
            "pairs": list(self.pairs),
            "files": sorted({
                stamp
                for pair in self.pairs
                for source in self.holders(pair)
                for stamp in source.stamps("train", pair)
            }),
            "held_out": _digest({x: sorted(lines) for x, lines in self.held_out.items()}),
            "splits": _digest(self.splits),
            "vocabulary": vocabulary
            if isinstance(vocabulary, int)
            else hashlib.sha256(vocabulary.model).hexdigest(),
            **{name: fields[name] for name in (*CLEANING, "temperature", "seed")},
            "longest": self.config.buckets[-1],
        }  # fmt: skip


def prepare(
    out: Path, plan: Plan, count: int | None = 1, report: Report = lambda *_: None
) -> TrainingSet:
    """Write a training set; a run that was stopped is gone on with.

    count: processes that look at text and encode it, beside this one which reads; None is one a
    core, or for little text this one alone. report: called with (stage, lines done, lines in all
    or None).
    Raises InputError where `out` is there, another run is at it, `out.part` is of other text or
    settings, text is wrong, or a disk is full: what is done stays and the same call goes on.
    """
    check_new(out)
    try:
        return write_set(out, plan, count, report)
    except OSError as error:
        where = error.filename or part_of(out)
        raise InputError(
            f"{where}: {error.strerror or error}; what is done is kept in {part_of(out)}, and the "
            "same command goes on"
        ) from None


def write_set(out: Path, plan: Plan, count: int | None, report: Report) -> TrainingSet:
    """As `prepare`, where `out` is not there; a disk that takes no more is its OSError."""
    part = part_of(out)
    try:
        part.mkdir(parents=True, exist_ok=True)
        with _alone_in(part):
            _claim(part, plan)
            _stages(part, plan, count, report)
            if out.exists():
                out.rmdir()
            os.replace(part / "set", out)
        with contextlib.suppress(OSError):  # the set is whole all the same
            remove_folder(part)
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, as the system does where memory is short; what is done "
            f"is kept in {part}, and the same command goes on; `prepare --workers 1` needs less"
        ) from None
    return TrainingSet(out)


def part_of(out: Path) -> Path:
    """Where a set lies until it is whole."""
    return out.with_name(f"{out.name}.part")


def _processes(count: int | None, lines: Iterable[int | None]) -> int:
    """How many are to work on so many lines; None is a number that is not known."""
    if count is not None:
        return count
    for sum_so_far in itertools.accumulate(float("inf") if n is None else n for n in lines):
        if sum_so_far > _FEW:  # the rest need not be counted
            return len(os.sched_getaffinity(0))
    return 1


def _stages(part: Path, plan: Plan, count: int | None, report: Report) -> None:
    directions = [_Direction(part / pair, pair, plan) for pair in plan.pairs]
    held = held_keys(plan.held_out)
    (part / "set").mkdir(exist_ok=True)
    for begun in (part / "set").glob(".*"):  # what a killed run was writing
        begun.unlink()
    processes = _processes(count, (direction.total for direction in directions))
    with workers(processes, blocks.begin_looking, (plan.config, held)) as run:
        for number, direction in enumerate(directions, 1):
            stage = f"reading {direction.pair} ({number} of {len(directions)})"
            direction.read(run, functools.partial(report, stage))
    for number, direction in enumerate(directions, 1):
        report(f"judging {direction.pair}", number - 1, len(directions))
        direction.judge()
    report("vocabulary", 0, 1)
    tokenizer = _vocabulary(part / "set" / VOCABULARY, plan, directions)
    total, done = sum(direction.kept() for direction in directions), 0
    shared = (tokenizer.model, plan.config.buckets[-1])
    with workers(_processes(count, [total]), blocks.begin_encoding, shared) as run:
        for direction in directions:
            for lines in direction.encode(run):
                done += lines
                report("encoding", done, total)
    made = {}
    for number, direction in enumerate(directions, 1):
        report(f"merging {direction.pair}", number - 1, len(directions))
        made[direction.pair] = direction.merge(part / "set", tokenizer.vocab_size)
    write_splits(part / "set", plan.splits)
    fields = dataclasses.asdict(plan.config)
    manifest = Manifest(
        title=plan.title,
        identity=plan.identity,
        cleaning={name: fields[name] for name in CLEANING},
        vocab_size=plan.vocabulary if isinstance(plan.vocabulary, int) else tokenizer.vocab_size,
        longest=plan.config.buckets[-1],
        vocabulary_sha256=hashlib.sha256(tokenizer.model).hexdigest(),
        directions=made,
    )
    write_text(part / "set" / MANIFEST, manifest.to_json())


class _Direction:
    """One direction's blocks on their way, in a folder of its own."""

    def __init__(self, folder: Path, pair: str, plan: Plan) -> None:
        self.folder, self.pair, self._plan = folder, pair, plan
        folder.mkdir(exist_ok=True)

    @functools.cached_property
    def total(self) -> int | None:
        """Lines to look at; None where only reading them tells."""
        limit = self._plan.config.max_sentences
        counts = [source.count("train", self.pair) for source in self._plan.holders(self.pair)]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        return sum(count if limit is None else min(count, limit) for count in known)

    def read(self, run: Any, report: Callable[[int, int | None], None]) -> None:
        """Look at all lines, in blocks."""
        whole = self.folder / "read.json"
        if whole.exists():
            return
        done = blocks.LINES * self._looked_at()
        for lines in run(blocks.look_at_block, self._blocks_to_read()):
            done += lines
            report(done, self.total)
        write_text(whole, json.dumps({"blocks": self._looked_at()}))

    def _looked_at(self) -> int:
        return sum(1 for _ in self.folder.glob("*.looked.npz"))

    def _block(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def _blocks(self) -> list[Path]:
        """All of them, once they are read."""
        count = json.loads((self.folder / "read.json").read_text())["blocks"]
        return [self._block(number) for number in range(count)]

    def _blocks_to_read(self) -> Iterator[tuple[Path, list[tuple[str, str]], tuple[str, str]]]:
        limit = self._plan.config.max_sentences
        sources = self._plan.holders(self.pair)
        # Blocks that are whole already from the first on need not be read again.
        ready = next(i for i in itertools.count() if not blocks.is_looked_at(self._block(i)))
        number = 0
        for source in sources:
            start = 0
            if len(sources) == 1 and limit is None:
                start, number = ready * blocks.LINES, ready
            lines = source.stream("train", self.pair, start)
            lines = itertools.islice(lines, limit)
            while some := list(itertools.islice(lines, blocks.LINES)):
                if not blocks.is_looked_at(self._block(number)):
                    yield self._block(number), some, split_pair(self.pair)
                number += 1

    def judge(self) -> None:
        """Decide which lines are kept."""
        whole = self.folder / "judged.json"
        if whole.exists():
            return
        every = self._blocks()
        kept, account = judge(self.pair, lambda: map(blocks.read_looked, every), self._plan.config)
        sizes = [int(mask.sum()) for mask in kept]
        named = {block.name: mask for block, mask in zip(every, kept, strict=True)}
        blocks.save(self.folder / "kept.npz", **named)
        fields = {"kept": sizes, "account": dataclasses.asdict(account)}
        write_text(whole, json.dumps(fields))

    def _judged(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads((self.folder / "judged.json").read_text())
        return fields

    def kept(self) -> int:
        """Lines that are."""
        return sum(self._judged()["kept"])

    def lines(self, which: np.ndarray) -> Iterator[tuple[str, str]]:
        """Some of the lines that are kept, by rising number."""
        sizes = self._judged()["kept"]
        ends = np.cumsum(sizes)
        with np.load(self.folder / "kept.npz") as masks:
            for number in np.unique(np.searchsorted(ends, which, side="right")):
                block = self._block(number)
                lines, kept = blocks.read_lines(block), np.flatnonzero(masks[block.name])
                first = ends[number] - sizes[number]
                for i in which[(which >= first) & (which < ends[number])]:
                    yield lines[kept[i - first]]

    def encode(self, run: Any) -> Iterator[int]:
        """Encode block by block, which gives how many lines each has."""
        if (self.folder / "merged.json").exists():
            yield self.kept()
            return
        every = self._blocks()
        done = [blocks.is_encoded(block) for block in every]
        yield sum(itertools.compress(self._judged()["kept"], done))
        with np.load(self.folder / "kept.npz") as masks:
            jobs = (
                (block, masks[block.name], self.pair)
                for block, is_done in zip(every, done, strict=True)
                if not is_done
            )
            yield from run(blocks.encode_block, jobs)

    def merge(self, out: Path, vocab_size: int) -> Direction:
        """Write the direction's file of tokens."""
        whole, file = self.folder / "merged.json", rows_file(out, self.pair)
        if not whole.exists():
            every = self._blocks()
            counts, beyond = np.zeros(self._plan.config.buckets[-1] + 1, np.int64), 0
            for rows in map(blocks.read_rows, every):
                counts, beyond = counts + rows.counts, beyond + rows.beyond
            size = int((2 * counts * np.arange(len(counts))).sum())
            beside = file.with_name(f".{file.name}")
            # An empty array cannot be mapped.
            flat = np.lib.format.open_memmap(beside, "w+", token_type(vocab_size), (max(size, 1),))
            with beside.open("r+b") as held:
                # A mapped file that has no room yet would end the process where the disk is full.
                os.posix_fallocate(held.fileno(), 0, beside.stat().st_size)
            place(map(blocks.read_rows, every), counts, flat)
            flat.flush()
            digest = Rows(counts, flat[:size], beyond).digest()
            del flat
            os.replace(beside, file)
            made = {"counts": counts.tolist(), "beyond": beyond, "sha256": digest}
            write_text(whole, json.dumps(made))
            for block in every:
                block.with_suffix(".rows.npz").unlink()
        account = Account(**self._judged()["account"])
        return Direction(account=account, **json.loads(whole.read_text()))


def _vocabulary(path: Path, plan: Plan, directions: Sequence[_Direction]) -> Tokenizer:
    """The set's vocabulary; where it is to be trained, on lines drawn from those that are kept."""
    if path.exists():
        return Tokenizer.load(path)
    made = plan.vocabulary
    if isinstance(made, int):
        made = drawn_vocabulary(made, plan.config, directions)
    made = made.with_languages(sorted({split_pair(pair)[1] for pair in plan.pairs}))
    write_bytes(path, made.model)
    return made


@contextlib.contextmanager
def _alone_in(part: Path) -> Iterator[None]:
    with (part / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is at work in {part}; wait for it or end it") from None
        yield


def _claim(part: Path, plan: Plan) -> None:
    """Write down what is made, or see that it is the same as what was begun.

    A plan without its set is of a run that ended, and was killed before it removed the part.
    """
    path, ours = part / "plan.json", plan.description()
    if path.exists() and not (part / "set").exists():
        for left in part.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != ".lock":
                left.unlink()
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{part} was begun with other {name} ({_short(theirs.get(name))} there, "
                    f"{_short(value)} here); delete it to begin anew"
                )
    else:
        write_text(path, json.dumps(ours, indent=1, ensure_ascii=False) + "\n")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:77]}..."


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
