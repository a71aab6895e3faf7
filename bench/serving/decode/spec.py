"""What `decode` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import need_at_least_one, numbers
from taskmoe.cli.errors import InputError

BATCHES, QUICK_BATCHES = (64, 256, 1024, 4096), (64, 512)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Host devices, sequences in all, rounds, and the folder of trained models, if any."""

    devices: int
    batches: list[int]
    rounds: int
    models: Path | None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--devices", type=int, default=8, help="host devices")
    p.add_argument("--batches", help=f"sequences in all: {','.join(map(str, BATCHES))}")
    p.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="two batches, three rounds: a minute or so")
    p.add_argument(
        "--models",
        type=Path,
        help="folder with dense/model, token/model and task/model, as the demo's work folder; or "
        "with dense-0 and so on, as a study's",
    )
    p.add_argument("--png", type=Path, help="draw throughput over batch here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a number does not fit."""
    if not 1 <= a.devices <= 64:
        raise InputError(f"--devices must be from 1 to 64 on one host, got {a.devices}")
    need_at_least_one(a, "rounds")
    batches = [b for b in (QUICK_BATCHES if a.quick else BATCHES) if b % a.devices == 0]
    if a.batches is not None:
        batches = sorted(set(numbers("--batches", a.batches, a.devices)))
    return Spec(a.devices, batches, 3 if a.quick else a.rounds, a.models)
