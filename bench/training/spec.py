"""What `training` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.cli.errors import InputError

#: Size -> sentences and tokens of each, on either side; its other numbers are the preset's.
SIZES = {"demo": (64, 16), "tiny": (64, 32), "small": (32, 32), "base": (16, 32)}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes, and how often each is timed."""

    sizes: list[str]
    rounds: int


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--sizes", default="demo,tiny,small", help=f"of {', '.join(SIZES)}")
    p.add_argument("--rounds", type=int, default=9, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="the demo's size, three rounds")
    p.add_argument("--json", type=Path, help="write the results here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a size is unknown."""
    sizes = [size.strip() for size in a.sizes.split(",")]
    if unknown := [size for size in sizes if size not in SIZES]:
        raise InputError(f"--sizes must be of {', '.join(SIZES)}, got {unknown[0]!r}")
    if a.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {a.rounds}")
    return Spec(["demo"], 3) if a.quick else Spec(sizes, a.rounds)
