"""Facts of the compiler and speeds, here and as they were: what changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from taskmoe.bench.gate import static, timed, verdicts
from taskmoe.bench.gate.revision import checked_out
from taskmoe.bench.gate.spec import Spec
from taskmoe.bench.gate.timed import Speed
from taskmoe.bench.gate.verdicts import Change, Interval
from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result, from_json
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.tpu import compiler
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

STATIC, TIMED = "static.json", "timed.json"
#: What must be the same for static facts to be comparable, and what for timings.
COMPILED_BY = ("jax", "jaxlib", "libtpu")
TIMED_ON = ("jax", "jaxlib", "cpu", "cpu_details")
#: Subject of a timing -> its workload.
WORKLOADS = {"decoding, tokens/s": "decode", "training step, tokens/s": "train"}
#: Names of the two sides.
HERE, THERE = "here", "there"


class NotComparable(InputError):
    """A stored baseline is not there, or of another machine or compiler."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found here, what changed, and what could not be compared.

    static: subject -> fact -> value. timed: subject -> speed. baseline: where both were stored,
    where they were; everything: whether facts that are the same are shown too; against: the
    revision that speeds were compared with, if it is not the baseline.
    """

    machine: dict[str, str]
    changes: list[Change]
    static: static.Facts | None = None
    timed: dict[str, Speed] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    updated: Path | None = None
    everything: bool = False
    against: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What --json writes."""
        told = dataclasses.asdict(self)
        kept = {name: told[name] for name in ("machine", "static", "timed", "notes", "changes")}
        return {"command": "check", **{name: v for name, v in kept.items() if v is not None}}


@dataclasses.dataclass(frozen=True)
class StoredFacts(Result):
    """The baseline of static facts, and what made it."""

    machine: dict[str, str]
    facts: static.Facts


@dataclasses.dataclass(frozen=True)
class StoredSpeeds(Result):
    """The baseline of speeds by subject, and what made it."""

    machine: dict[str, str]
    facts: dict[str, Speed]


Stored = TypeVar("Stored", StoredFacts, StoredSpeeds)


def measure(spec: Spec) -> Checked:
    """Compare.

    Raises InputError where the baseline of static facts is missing or not comparable, either one is
    damaged, libtpu is missing, or the other revision cannot be measured.
    """
    here = machine.describe() | {"cpu_details": machine.cpu_details()}
    with contextlib.ExitStack() as stack:
        # What does not fit is told before anything runs.
        there = stack.enter_context(checked_out(spec.against)) if spec.against else None
        old_facts = _baseline(spec, STATIC, here) if spec.static else {}
        old_speeds: dict[str, Speed] = {}
        notes: list[str] = []
        if spec.timed and there is None:
            try:
                old_speeds = _baseline(spec, TIMED, here)
            except NotComparable as why:
                notes = [f"Speeds were not compared: {why}; or name a revision with --against."]
        changes: list[Change] = []
        facts, speeds = None, None
        if spec.static:
            facts = _static(spec.quick)
            found = verdicts.compare(old_facts, facts)
            # Of a quick run, nothing is gone because it was not looked at.
            changes += [c for c in found if not (spec.quick and c.verdict == "gone")]
        if spec.timed and (old_speeds or there is not None or spec.update):
            sides: dict[str, timed.Start] = {HERE: timed.worker}
            if there is not None:
                sides[THERE] = timed.of_revision(*there)
            told = _timed(spec, sides, old_speeds)
            speeds, old_speeds = told[HERE], told.get(THERE, old_speeds)
            changes += _slower(speeds, old_speeds)
    updated = spec.baseline if spec.update else None
    if updated is not None and facts is not None:
        _store(updated / STATIC, StoredFacts(here, facts))
    if updated is not None and speeds is not None:
        _store(updated / TIMED, StoredSpeeds(here, speeds))
    return Checked(here, changes, facts, speeds, notes, updated, spec.everything, spec.against)


def _baseline(spec: Spec, name: str, here: Mapping[str, str]) -> Any:
    """The stored facts; none where they are to be rewritten and cannot be compared with."""
    kind: Any = StoredFacts if name == STATIC else StoredSpeeds
    same = COMPILED_BY if name == STATIC else TIMED_ON
    try:
        return stored(kind, spec.baseline / name, here, same).facts
    except InputError:
        if spec.update:
            return {}
        raise


def stored(
    kind: type[Stored], path: Path, here: Mapping[str, str], same: tuple[str, ...]
) -> Stored:
    """A stored baseline.

    same: what must be of its machine as it is here. Raises NotComparable where it is not, or
    nothing is stored, and InputError where the file is damaged.
    """
    part = "--static" if path.name == STATIC else "--timed"
    make = f"make one with: python -m taskmoe.bench check {part} --update"
    try:
        found = from_json(kind, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise NotComparable(f"baseline {path} is not there; {make}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"baseline {path} is damaged ({why}); {make}") from None
    theirs = found.machine
    differ = [key for key in same if theirs.get(key) != here.get(key)]
    if differ:
        was, now = theirs.get(differ[0], "none"), here.get(differ[0], "none")
        said = f"was made with {differ[0]} {was}, here is {now}: not comparable"
        raise NotComparable(f"baseline {path} {said}; {make}")
    return found


def _static(quick: bool) -> static.Facts:
    compiler.need_libtpu()
    serving.use_host_devices(static.DEVICES)
    return static.collect(("v5e",) if quick else tuple(static.KERNELS))


def _timed(
    spec: Spec, sides: Mapping[str, timed.Start], old: Mapping[str, Speed]
) -> dict[str, dict[str, Speed]]:
    """Side -> subject -> speed. old: as stored, where there is one side only."""
    effort = timed.QUICK if spec.quick else timed.CHECK
    if spec.update:
        effort = timed.BASELINE
    subjects = {workload: subject for subject, workload in WORKLOADS.items()}

    def decided(workload: str, so_far: Mapping[str, Interval]) -> bool:
        before = so_far.get(THERE, old.get(subjects[workload]))
        return before is None or verdicts.decided(verdicts.slower(before, so_far[HERE]))

    with bar("timing", "processes") as move:
        found = timed.collect(sides, list(subjects), effort, decided, move)
    return {
        side: {subjects[workload]: one.speed() for workload, one in each.items()}
        for side, each in found.items()
    }


def _slower(new: Mapping[str, Speed], old: Mapping[str, Speed]) -> list[Change]:
    return [
        verdicts.judge_timed(subject, old[subject], speed)
        if subject in old
        else Change(subject, verdicts.TIMED_FACT, None, speed.median, None, "new")
        for subject, speed in new.items()
    ]


def _store(path: Path, found: Result) -> None:
    write_text(path, json.dumps(found.to_json(), indent=1) + "\n")
