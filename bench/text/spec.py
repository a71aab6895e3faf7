"""What `text` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.options import need_at_least_one
from taskmoe.cli.errors import InputError

#: Of the smallest number of pairs that gives each direction some.
FEWEST = 5_000


@dataclasses.dataclass(frozen=True)
class Spec:
    """pairs: sentence pairs in all. workers: processes. work: folder for text and set, or None."""

    pairs: int
    workers: int
    work: Path | None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--pairs", type=int, default=1_000_000, help="sentence pairs to generate")
    p.add_argument(
        "--workers", type=int, help="processes beside the one that reads (default: one a core)"
    )
    p.add_argument(
        "--work",
        type=Path,
        help="new folder to work in, about 600 bytes a pair (default: a temporary one)",
    )
    p.add_argument("--quick", action="store_true", help="20,000 pairs")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where there are too few pairs or workers."""
    need_at_least_one(a, "workers")
    pairs = 20_000 if a.quick else a.pairs
    if pairs < FEWEST:
        raise InputError(f"--pairs must be at least {FEWEST}, got {pairs}")
    if a.work is not None and a.work.exists():
        raise InputError(f"--work {a.work} is there already; name a new folder")
    return Spec(pairs, a.workers or machine.cores(), a.work)
