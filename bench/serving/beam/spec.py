"""What `beam` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import need_at_least_one, numbers
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import PRESETS

BATCHES: tuple[int, ...] = (1, 4, 16)
QUICK_BATCHES: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The model's size by its preset, hypotheses, sentences at once, and rounds."""

    config: str
    beam: int
    batches: tuple[int, ...]
    rounds: int


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--config", choices=list(PRESETS), default="base", help="size of the model")
    p.add_argument("--beam", type=int, default=4, help="hypotheses")
    p.add_argument("--batches", help=f"sentences at once: {','.join(map(str, BATCHES))}")
    p.add_argument("--rounds", type=int, default=7, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="one sentence, three rounds")
    p.add_argument("--png", type=Path, help="draw the times here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a number does not fit."""
    if a.beam < 2:
        raise InputError(f"--beam must be at least 2, got {a.beam}")
    need_at_least_one(a, "rounds")
    batches = QUICK_BATCHES if a.quick else BATCHES
    if a.batches:
        batches = tuple(sorted(set(numbers("--batches", a.batches))))
    return Spec(a.config, a.beam, batches, 3 if a.quick else a.rounds)
