"""What `study` is asked to gather and time."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.cli.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spec:
    """The study's folder and the sources of its text; sentences: of validation text a direction."""

    workdir: Path
    data: list[str]
    rounds: int
    sentences: int | None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("workdir", type=Path, help="folder that runs/study-*.sh wrote")
    p.add_argument("--data", action="append", required=True, help="its sources, as for evaluate")
    p.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="20 validation sentences a direction only")
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument("--png", type=Path, help="draw scores and sizes here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a number does not fit."""
    if a.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {a.rounds}")
    return Spec(a.workdir, a.data, a.rounds, 20 if a.quick else None)
