"""What `task` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses

from taskmoe import moe
from taskmoe.bench.harness.options import need_at_least_one
from taskmoe.cli.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spec:
    """The layer, its tokens, and how often it is timed."""

    config: moe.MoEConfig
    tokens: int
    rounds: int


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--tokens", type=int, default=4096)
    p.add_argument("--experts", type=int, default=32)
    p.add_argument("--d-model", type=int, default=512)
    p.add_argument("--d-ff", type=int, default=2048, help="hidden width of an expert")
    p.add_argument("--rounds", type=int, default=15, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="five rounds at a quarter of the tokens")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a size does not fit."""
    need_at_least_one(a, "tokens", "experts", "d_model", "d_ff", "rounds")
    try:
        config = moe.MoEConfig(a.d_model, a.d_ff, a.experts, routing="task", num_tasks=16)
    except ValueError as error:
        raise InputError(str(error)) from None
    tokens, rounds = (max(1, a.tokens // 4), 5) if a.quick else (a.tokens, a.rounds)
    return Spec(config, tokens, rounds)
