"""What `study` is asked to gather and time."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import chosen, need_at_least_one
from taskmoe.cli.errors import InputError

#: System -> what it is: routing of its encoder and decoder, or how it came about.
SYSTEMS = {
    "narrow": "dense (the paper's, d_ff)",
    "dense": "dense (equal compute)",
    "token": "token/token",
    "sentence": "sentence/sentence",
    "target": "target/target",
    "token-target": "token/target",
    "static": "static by target",
    "distilled": "dense, distilled from token/token",
    "pruned": "token/token, pruned for each target",
    "reaped": "token/token, pruned by gate weight times output norm",
}
#: System that is cut out of another, a model a target language -> that one, the whole.
WHOLE = {"pruned": "token", "reaped": "token"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """The study's folder and the sources of its text.

    sentences: of validation text a direction. high_resource: sentence pairs from which on a
    direction is; None tells none apart.
    """

    workdir: Path
    data: list[str]
    rounds: int
    sentences: int | None
    systems: list[str]
    high_resource: int | None = None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("workdir", type=Path, help="folder that runs/study-*.sh wrote")
    p.add_argument("--data", action="append", required=True, help="its sources, as for evaluate")
    p.add_argument(
        "--systems", help=f"those that were trained, comma-separated: {','.join(SYSTEMS)} (all)"
    )
    p.add_argument(
        "--high-resource",
        type=int,
        metavar="N",
        help="directions trained on so many sentence pairs are high-resource (default: none is)",
    )
    p.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="20 validation sentences a direction only")
    p.add_argument("--png", type=Path, help="draw scores and sizes here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a number does not fit."""
    need_at_least_one(a, "rounds", "high_resource")
    systems = chosen("--systems", a.systems, SYSTEMS, SYSTEMS)
    if "dense" not in systems:
        raise InputError(
            f"--systems must hold dense, which others are held against, got {a.systems}"
        )
    for name, whole in WHOLE.items():
        if name in systems and whole not in systems:
            raise InputError(
                f"--systems must hold {whole}, which {name} is cut out of, got {a.systems}"
            )
    sentences = 20 if a.quick else None
    return Spec(a.workdir, a.data, a.rounds, sentences, systems, a.high_resource)
