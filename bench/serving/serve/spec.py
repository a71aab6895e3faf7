"""What `serve` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import need_at_least_one, numbers
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import PRESETS

BATCHES: tuple[int, ...] = (1, 4, 16, 64)
QUICK_BATCHES: tuple[int, ...] = (1, 4)
BEAMS: tuple[int, ...] = (1, 4)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A model folder with its direction and text, or a preset of random weights; what is timed.

    sentences: of the text at most. words: that the softmax looks at; None is all.
    """

    model: Path | None
    pair: str | None
    text: Path | None
    config: str
    batches: tuple[int, ...]
    beams: tuple[int, ...]
    sentences: int
    rounds: int
    words: int | None = None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--model", type=Path, help="folder of a sub-network or dense model")
    p.add_argument("--pair", help="its direction; not needed where it knows but one")
    p.add_argument("--text", type=Path, help="file with a sentence a line, for --model")
    p.add_argument(
        "--config",
        choices=list(PRESETS),
        default="base",
        help="without --model: a sub-network of this size with random weights, and random sources",
    )
    p.add_argument("--batches", help=f"sentences at once: {','.join(map(str, BATCHES))}")
    p.add_argument("--beams", help=f"hypotheses: {','.join(map(str, BEAMS))}")
    p.add_argument("--sentences", type=int, default=256, help="of the text at most")
    p.add_argument(
        "--words",
        type=int,
        metavar="N",
        help="all engines look at N words of the vocabulary, as with a shortlist",
    )
    p.add_argument("--rounds", type=int, default=3, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="up to four sentences, three rounds")
    p.add_argument("--png", type=Path, help="draw the speeds here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where arguments do not fit one another."""
    if (a.model is None) != (a.text is None):
        raise InputError("--model and --text go together")
    if a.pair is not None and a.model is None:
        raise InputError("--pair is a direction of --model, which is not given")
    if a.words is not None and a.model is not None:
        raise InputError("--words is for random weights; a model's translations want their words")
    need_at_least_one(a, "sentences", "rounds", "words")
    batches = QUICK_BATCHES if a.quick else BATCHES
    if a.batches:
        batches = tuple(sorted(set(numbers("--batches", a.batches))))
    beams = tuple(sorted(set(numbers("--beams", a.beams)))) if a.beams else BEAMS
    rounds = 3 if a.quick else a.rounds
    return Spec(a.model, a.pair, a.text, a.config, batches, beams, a.sentences, rounds, a.words)
