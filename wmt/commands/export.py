"""`export`: a model for serving without this library."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskmoe.wmt.commands.shared import build, load, out
from taskmoe.wmt.model.export import PROGRAM, export
from taskmoe.wmt.model.saved import check_new
from taskmoe.wmt.model.translation import Decoding


def run(a: argparse.Namespace) -> None:
    """Write a model's safetensors, vocabulary and its search as StableHLO for a fixed batch."""
    model = load(a.model)
    how = build(Decoding, {"beam": a.beam, "alpha": a.alpha, "batch": a.batch})
    check_new(a.out)
    size = export(
        model,
        a.out,
        batch=how.batch,
        length=a.length,
        max_length=a.max_length,
        beam=how.beam,
        alpha=how.alpha,
        platforms=tuple(a.platforms.split(",")),
    )
    out.print(
        f"{a.out / PROGRAM}: {size:,} bytes for {a.platforms}, "
        f"[{how.batch}, {a.length}] source ids, beam {how.beam}"
    )


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--out", type=Path, required=True, help="new folder")
    p.add_argument("--beam", type=int, default=4, help="hypotheses; 1 is greedy")
    p.add_argument("--alpha", type=float, default=0.6, help="length penalty")
    p.add_argument("--batch", type=int, default=16, help="sentences at once")
    p.add_argument("--length", type=int, default=64, help="source tokens")
    p.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="target tokens (default: of each sentence as many as translate takes)",
    )
    p.add_argument("--platforms", default="cpu", help="of cpu, tpu, cuda, rocm, with commas")
