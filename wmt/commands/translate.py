"""`translate`: lines in, lines out."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.shared import (
    add_decoding,
    check_pair,
    decoding,
    load,
    own_words,
    read_bytes,
)
from taskmoe.wmt.model.translation import translate, translate_n_best
from taskmoe.wmt.text.textfiles import lines_of


def run(a: argparse.Namespace) -> None:
    """Translate lines from a file or standard input to standard output, in their order."""
    model = load(a.model)
    pair = a.pair or (model.config.pairs[0] if len(model.config.pairs) == 1 else None)
    if pair is None:
        raise InputError(f"--pair must say which of {', '.join(model.config.pairs)}")
    check_pair(pair)
    stream = sys.stdin.buffer.read() if a.input is None else read_bytes(a.input)
    lines = lines_of(stream, a.input or "standard input")
    note = functools.partial(print, file=sys.stderr)
    with bar("translating", "sentences", enabled=sys.stderr.isatty()) as progress:
        requests = [(pair, line) for line in lines]
        if a.n_best is None:
            text = "".join(
                f"{line}\n" for line in translate(model, requests, decoding(a), progress, note)
            )
        else:
            found = own_words(
                translate_n_best, model, requests, decoding(a), a.n_best, progress, note
            )
            text = "".join(
                f"{i} ||| {hypothesis.text} ||| {hypothesis.score:.4f}\n"
                for i, hypotheses in enumerate(found)
                for hypothesis in hypotheses
            )
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode())  # UTF-8 in, UTF-8 out, whatever the terminal's is
    sys.stdout.buffer.flush()


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command\'s arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--pair", help="direction; not needed where the model knows but one")
    p.add_argument("--input", type=Path, help="file with a sentence a line; default stdin")
    p.add_argument(
        "--n-best",
        type=int,
        metavar="N",
        help="print `line ||| translation ||| score` for the N best of the beam, lines from 0",
    )
    add_decoding(p)
