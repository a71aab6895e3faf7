"""What `tune` is asked to compile."""

from __future__ import annotations

import argparse
import dataclasses

from taskmoe.bench.harness.options import chosen, need_at_least_one
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


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where an option names what is not there."""
    known = {"chip": CHIPS, "op": TILED, "shape": SHAPES, "dtype": DTYPES}
    for what, names in known.items():
        chosen(f"--{what}", getattr(a, what), names, names)
    if (a.chip, a.dtype) == ("v3", "bf16"):
        raise InputError("v3 takes kernels in f32 only: give --dtype f32")
    need_at_least_one(a, "tries")
    return Spec(a.chip, a.op, a.shape, a.dtype, a.tries)
