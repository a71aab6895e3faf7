"""What `ops` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import chosen
from taskmoe.bench.ops.cases import OPS, SHAPES, OpCase, all_cases, quick_cases, shape_cases


@dataclasses.dataclass(frozen=True)
class Spec:
    """Cases and rounds. command: as it was typed. json: where results go as they come."""

    cases: list[OpCase]
    rounds: int
    command: str
    json: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ops`."""
    parser.add_argument("--quick", action="store_true", help="fewer spreads of rows, fewer rounds")
    parser.add_argument("--ops", help=f"comma-separated: {','.join(OPS)}")
    parser.add_argument(
        "--shapes", help=f"sizes of models instead, comma-separated: {','.join(SHAPES)} (for a GPU)"
    )


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where an op or a shape is not known."""
    names = chosen("--ops", a.ops, OPS, OPS)
    if a.shapes is None:
        cases = quick_cases() if a.quick else all_cases()
    else:
        cases = shape_cases(chosen("--shapes", a.shapes, SHAPES, SHAPES))
    words = ["ops", *(["--quick"] if a.quick else [])]
    for name, value in (("ops", a.ops), ("shapes", a.shapes)):
        words += [f"--{name} {value}"] if value is not None else []
    cases = [case for case in cases if case.op in names]
    return Spec(cases, 5 if a.quick else 9, " ".join(words), a.json)
