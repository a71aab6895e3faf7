"""What `tune` is asked to compile."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import chosen
from taskmoe.bench.tpu.cases import CHIPS, DTYPES, SHAPES, TILED
from taskmoe.cli.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spec:
    """One op at one shape for one chip, and how many block sizes to try beside the rule's."""

    chip: str
    op: str
    shape: str
    dtype: str
    tries: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tune`."""
    parser.add_argument("--chip", required=True, help=f"one of {', '.join(CHIPS)}")
    parser.add_argument("--op", required=True, help=f"one of {', '.join(TILED)}, forward")
    parser.add_argument("--shape", required=True, help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="bf16", help=f"one of {', '.join(DTYPES)}")
    parser.add_argument("--tries", type=int, default=8, help="block sizes beside the rule's")
    parser.add_argument("--json", type=Path, help="write everything to this file as well")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where an option names what is not there."""
    known = {"chip": CHIPS, "op": TILED, "shape": SHAPES, "dtype": DTYPES}
    for what, names in known.items():
        chosen(what, getattr(a, what), names, names)
    if (a.chip, a.dtype) == ("v3", "bf16"):
        raise InputError("v3 takes kernels in f32 only: give --dtype f32")
    if a.tries < 1:
        raise InputError(f"--tries must be at least 1, got {a.tries}")
    return Spec(a.chip, a.op, a.shape, a.dtype, a.tries)
