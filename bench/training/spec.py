"""What `training` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses

from taskmoe.bench.harness.options import chosen, need_at_least_one

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


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a size is unknown."""
    need_at_least_one(a, "rounds")
    sizes = chosen("--sizes", a.sizes, SIZES, SIZES)
    return Spec(["demo"], 3) if a.quick else Spec(sizes, a.rounds)
