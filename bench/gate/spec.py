"""What `check` is asked to compare."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.cli.errors import InputError

BASELINE = Path(__file__).resolve().parent / "baseline"


@dataclasses.dataclass(frozen=True)
class Spec:
    """static, timed: which facts to look at. against: a revision whose speeds are the old ones."""

    static: bool
    timed: bool
    update: bool
    quick: bool
    everything: bool
    baseline: Path
    against: str | None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    part = p.add_mutually_exclusive_group()
    part.add_argument("--static", action="store_true", help="facts of the compiler only")
    part.add_argument("--timed", action="store_true", help="speeds only")
    p.add_argument(
        "--against",
        metavar="REV",
        help="compare speeds with this revision, both measured here in turns",
    )
    p.add_argument("--update", action="store_true", help="make what is found the baseline")
    p.add_argument("--quick", action="store_true", help="v5e only, fewer rounds at most")
    p.add_argument("--all", action="store_true", help="show static facts that are the same, too")
    p.add_argument("--baseline", type=Path, default=BASELINE, help="folder of the baseline")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where options do not go together."""
    if a.update and a.quick:
        raise InputError("--update measures in full: leave --quick out")
    if a.against is not None and (a.update or a.static):
        other = "--update" if a.update else "--static"
        raise InputError(f"--against compares speeds of two revisions: leave {other} out")
    return Spec(not a.timed, not a.static, a.update, a.quick, a.all, a.baseline, a.against)
