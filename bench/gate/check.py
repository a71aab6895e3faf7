"""The regression gate: facts of the compiler and speeds against a stored baseline.

Static facts (kernels compiled for TPU without one: bundles, MXU slots, spills, VMEM; collectives
and their bytes in the HLO of expert-parallel layers) are compared exactly: worse by more than 2%,
or a new collective, is a regression. Speeds of a training step and of decoding are ratios to a
frozen calibration that runs in turns with them; a regression is a time whose interval lies wholly
above 8% more. Exit code 1 on a regression, with a last line that names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from taskmoe.bench.gate import static as static_facts
from taskmoe.bench.gate import timed as timed_facts
from taskmoe.bench.gate import verdicts
from taskmoe.bench.gate.verdicts import Change, Interval
from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import out
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.tpu import compiler
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

BASELINE = Path(__file__).resolve().parent / "baseline"
STATIC, TIMED = "static.json", "timed.json"
#: What must be the same for static facts to be comparable, and what for timings.
COMPILED_BY = ("jax", "jaxlib", "libtpu")
TIMED_ON = ("jax", "jaxlib", "cpu", "cpu_details")
#: Subject of a timing -> its workload.
WORKLOADS = {"decoding, tokens/s": "decode", "training step, tokens/s": "train"}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    part = p.add_mutually_exclusive_group()
    part.add_argument("--static", action="store_true", help="facts of the compiler only")
    part.add_argument("--timed", action="store_true", help="speeds only")
    p.add_argument("--update", action="store_true", help="make what is found the baseline")
    p.add_argument("--quick", action="store_true", help="v5e only, fewer rounds at most")
    p.add_argument("--all", action="store_true", help="show static facts that are the same, too")
    p.add_argument("--baseline", type=Path, default=BASELINE, help="folder of the baseline")
    p.add_argument("--json", type=Path, help="write everything to this file as well")


def run(a: argparse.Namespace) -> int:
    """Compare and print; 1 on a regression, with a last line that names the culprit.

    Raises InputError where a baseline is missing, damaged, or not comparable, or libtpu is missing.
    """
    if a.update and a.quick:
        raise InputError("--update measures in full: leave --quick out")
    here = machine.describe() | {"cpu_details": machine.cpu_details()}
    # What does not fit is told before anything runs.
    old_static = None if a.timed else _stored(a, STATIC, here, COMPILED_BY)
    old_timed = None if a.static else _stored(a, TIMED, here, TIMED_ON)
    changes: list[Change] = []
    found: dict[str, Any] = {"command": "check", "machine": here}
    if not a.timed:
        compiler.need_libtpu()
        facts = _static(a.quick)
        found["static"] = facts
        changes += _against(facts, (old_static or {}).get("facts", {}), a.quick)
        if a.update:
            _write(a.baseline / STATIC, here, facts)
    if not a.static:
        timed = _timed(a, (old_timed or {}).get("facts", {}))
        found["timed"] = timed
        changes += _timed_changes(timed, (old_timed or {}).get("facts", {}))
        if a.update:
            _write(a.baseline / TIMED, here, timed)
    found["changes"] = [dataclasses.asdict(change) for change in changes]
    if a.json is not None:
        write_text(a.json, json.dumps(found, indent=1) + "\n")
    out.print(table(changes, everything=a.all))
    if a.update:
        moved = [c for c in changes if c.verdict != "same"]
        out.print(f"baseline {a.baseline} rewritten: {len(moved)} of {len(changes)} facts changed")
        return 0
    failed = [change for change in changes if change.fails]
    if failed:
        out.print("Where that is meant: python -m taskmoe.bench check --update, and commit it.")
    out.print(last_line(changes, failed), soft_wrap=True)
    return int(bool(failed))


def _stored(
    a: argparse.Namespace, name: str, here: dict[str, str], same: tuple[str, ...]
) -> dict[str, Any] | None:
    """The stored baseline; None where it is to be rewritten and cannot be compared with."""
    path = a.baseline / name
    part = "--static" if name == STATIC else "--timed"
    make = f"make one with: python -m taskmoe.bench check {part} --update"
    problem = None
    stored: dict[str, Any] = {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        theirs = stored["machine"]
        for facts in stored["facts"].values():
            dict(facts)
            if name == TIMED:
                Interval(*(float(facts[key]) for key in ("median", "low", "high")))
        differ = [key for key in same if theirs.get(key) != here.get(key)]
        if differ:
            was, now = theirs.get(differ[0], "none"), here.get(differ[0], "none")
            problem = f"was made with {differ[0]} {was}, here is {now}: not comparable; {make}"
    except FileNotFoundError:
        problem = f"is not there; {make}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is damaged ({type(error).__name__}: {error}); {make}"
    if problem is None:
        return stored
    if a.update:
        return None
    raise InputError(f"baseline {path} {problem}")


def _static(quick: bool) -> static_facts.Facts:
    serving.use_host_devices(static_facts.DEVICES)
    return static_facts.collect(("v5e",) if quick else tuple(static_facts.KERNELS))


def _against(new: static_facts.Facts, old: static_facts.Facts, quick: bool) -> list[Change]:
    """What changed; of a quick run, nothing is gone because it was not looked at."""
    return [c for c in verdicts.compare(old, new) if not (quick and c.verdict == "gone")]


def _timed(a: argparse.Namespace, old: dict[str, Any]) -> dict[str, dict[str, Any]]:
    effort = timed_facts.QUICK if a.quick else timed_facts.CHECK
    if a.update:
        effort = timed_facts.BASELINE
    subjects = {workload: subject for subject, workload in WORKLOADS.items()}

    def decided(workload: str, so_far: Interval) -> bool:
        known = old.get(subjects[workload])
        return known is None or verdicts.decided(verdicts.slower(_interval(known), so_far))

    with bar("timing", "processes") as move:
        timed = timed_facts.collect(list(subjects), effort, decided, move)
    return {subjects[workload]: one.facts() for workload, one in timed.items()}


def _timed_changes(new: dict[str, Any], old: dict[str, Any]) -> list[Change]:
    fact = verdicts.TIMED_FACT
    return [
        verdicts.judge_timed(subject, _interval(old[subject]), _interval(facts))
        if subject in old
        else Change(subject, fact, None, facts["median"], None, "new")
        for subject, facts in new.items()
    ]


def _interval(facts: dict[str, Any]) -> Interval:
    return Interval(float(facts["median"]), float(facts["low"]), float(facts["high"]))


def _write(path: Path, here: dict[str, str], facts: Any) -> None:
    write_text(path, json.dumps({"machine": here, "facts": facts}, indent=1) + "\n")


def table(changes: list[Change], *, everything: bool = False) -> Table:
    """Old, new, change and verdict of what changed and of every timing."""
    static = [c for c in changes if c.fact != verdicts.TIMED_FACT]
    said = []
    if static:
        same = sum(c.verdict == "same" for c in static)
        where = "" if everything else " (--all shows them)"
        said.append(f"{same} of {len(static)} static facts are as stored{where}.")
    if len(static) < len(changes):
        said.append(
            "Timings: seconds of a run over those of a calibration run beside it, and the "
            f"{verdicts.CONFIDENCE:.0%} interval of the change."
        )
    table = Table(title="Against the baseline", caption=" ".join(said))
    for heading in ("subject", "fact"):
        table.add_column(heading)
    for heading in ("old", "new", "change"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", no_wrap=True)
    for c in changes:
        if everything or c.verdict != "same" or c.interval is not None:
            style = "bold red" if c.fails else "green" if c.verdict == "better" else ""
            table.add_row(
                c.subject, c.fact, _number(c.old), _number(c.new), change_words(c), c.verdict,
                style=style,
            )  # fmt: skip
    return table


def change_words(c: Change) -> str:
    """By how much a fact changed, in its own direction; of a timing with its interval."""
    if c.interval is not None:
        return f"{c.interval.median:+.1%} ({c.interval.low:+.1%} to {c.interval.high:+.1%})"
    if isinstance(c.old, str) or isinstance(c.new, str) or c.old is None or c.new is None:
        return ""
    return f"{c.new / c.old - 1:+.1%}" if c.old else f"{c.new - c.old:+,}"


def last_line(changes: list[Change], failed: list[Change]) -> str:
    """What came out of it, in one line that names the culprit where there is one."""
    if not failed:
        open_ones = sum(c.verdict == "undecided" for c in changes)
        rest = f", {open_ones} undecided within the limit of rounds" if open_ones else ""
        return f"no regression in {len(changes)} facts{rest}"
    worst = max(failed, key=lambda c: float("inf") if c.worse is None else c.worse)
    others = list(dict.fromkeys(c.subject for c in failed if c.subject != worst.subject))
    more = f" (also: {'; '.join(others)})" if others else ""
    old, new = _number(worst.old) or "none", _number(worst.new)
    if worst.fact == "error":
        return f"regression: {worst.subject} does not compile: {new}{more}"
    by = change_words(worst)
    return f"regression: {worst.subject}: {worst.fact} {old} -> {new}, {by}{more}"


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
