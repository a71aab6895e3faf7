"""`export`: a model for serving without this library, as StableHLO or for CTranslate2."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskmoe.cli.command_line import check_new
from taskmoe.cli.errors import InputError
from taskmoe.wmt.commands.shared import build, load, out
from taskmoe.wmt.model.ctranslate2_export import WEIGHTS, export_ctranslate2
from taskmoe.wmt.model.export import PROGRAM, export
from taskmoe.wmt.model.shortlist import Shortlist
from taskmoe.wmt.model.translation import Decoding

#: What only the StableHLO program fixes, and what it is unless said.
PROGRAM_OPTIONS = {"beam": 4, "alpha": 0.6, "batch": None, "platforms": "cpu"}
#: Source tokens at most by format: a program always computes so many, CTranslate2 what is there.
LENGTHS = {"stablehlo": 64, "ctranslate2": 512}


def run(a: argparse.Namespace) -> None:
    """Write a model for servers: weights, vocabulary and search (StableHLO), or for CTranslate2."""
    model = load(a.model)
    check_new(a.out)
    length = LENGTHS[a.format] if a.length is None else a.length
    if a.format == "ctranslate2":
        for name in PROGRAM_OPTIONS:
            if getattr(a, name) is not None:
                raise InputError(f"--{name} fits --format stablehlo; CTranslate2 is told in use")
        words = None if a.shortlist is None else Shortlist.load(a.shortlist, model.tokenizer)
        size = export_ctranslate2(
            model, a.out, length=length, max_length=a.max_length, shortlist=words
        )
        out.print(f"{a.out / WEIGHTS}: {size:,} bytes in float32, up to {length} source ids")
        return
    if a.shortlist is not None:
        raise InputError("--shortlist fits --format ctranslate2; a program looks at all words")
    given = {name: getattr(a, name) for name in PROGRAM_OPTIONS}
    said = PROGRAM_OPTIONS | {name: value for name, value in given.items() if value is not None}
    platforms, batch = str(said.pop("platforms")), said.pop("batch")
    how = build(Decoding, said)
    size = export(
        model,
        a.out,
        batch=batch,
        length=length,
        max_length=a.max_length,
        beam=how.beam,
        alpha=how.alpha,
        platforms=tuple(platforms.split(",")),
    )
    out.print(
        f"{a.out / PROGRAM}: {size:,} bytes for {platforms}, "
        f"[{'any, up to ' if batch is None else f'{batch}, '}{length}] source ids, beam {how.beam}"
    )


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--out", type=Path, required=True, help="new folder")
    p.add_argument(
        "--format",
        choices=list(LENGTHS),
        default="stablehlo",
        help="stablehlo: the search as a program for JAX alone; ctranslate2: a dense model or "
        "sub-network for that engine (default: stablehlo)",
    )
    p.add_argument("--beam", type=int, help="hypotheses; 1 is greedy (default: 4)")
    p.add_argument("--alpha", type=float, help="length penalty (default: 0.6)")
    p.add_argument("--batch", type=int, help="sentences at once (default: any number)")
    p.add_argument("--length", type=int, help="source tokens (default: 64; ctranslate2: 512)")
    p.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="target tokens (default: of each sentence as many as translate takes)",
    )
    p.add_argument(
        "--shortlist", type=Path, metavar="FILE", help="ctranslate2: its words, as a vmap.txt"
    )
    p.add_argument("--platforms", help="of cpu, tpu, cuda, rocm, with commas (default: cpu)")
