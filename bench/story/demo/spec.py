"""What `demo` is asked to do."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import need_at_least_one
from taskmoe.cli.errors import InputError
from taskmoe.wmt.text.cldr import CldrConfig

BATCHES, QUICK_BATCHES = (8, 32, 128, 512), (8, 32)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The report's folder, training steps of each model, test sentences, sequences decoded."""

    out: Path
    steps: int
    sentences: int
    batches: tuple[int, ...]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report")
    p.add_argument("--steps", type=int, default=600, help="training steps of each model")
    p.add_argument("--sentences", type=int, default=50, help="test sentences of each direction")
    p.add_argument("--quick", action="store_true", help="at most 60 steps and 5 sentences: a look")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a number does not fit."""
    most = CldrConfig().test
    need_at_least_one(a, "steps")
    if not 1 <= a.sentences <= most:
        raise InputError(f"--sentences must be from 1 to {most}, got {a.sentences}")
    if a.quick:
        return Spec(a.out, min(a.steps, 60), min(a.sentences, 5), QUICK_BATCHES)
    return Spec(a.out, a.steps, a.sentences, BATCHES)
