"""What `ops` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from taskmoe.bench.ops.cases import OPS, SHAPES, OpCase, all_cases, quick_cases, shape_cases
from taskmoe.cli.errors import InputError


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
    parser.add_argument("--json", type=Path, help="write everything to this file as well")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where an op or a shape is not known."""
    names = _chosen("op", a.ops, OPS)
    if a.shapes is None:
        cases = quick_cases() if a.quick else all_cases()
    else:
        cases = shape_cases(_chosen("shape", a.shapes, tuple(SHAPES)))
    words = ["ops", *(["--quick"] if a.quick else [])]
    for name, value in (("ops", a.ops), ("shapes", a.shapes)):
        words += [f"--{name} {value}"] if value is not None else []
    cases = [case for case in cases if case.op in names]
    return Spec(cases, 5 if a.quick else 9, " ".join(words), a.json)


def _chosen(what: str, text: str | None, known: Sequence[str]) -> Sequence[str]:
    names = known if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return names
