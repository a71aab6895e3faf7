"""`translate`: lines in, lines out."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.shared import (
    add_decoding,
    add_expert_parallel,
    decoding,
    load,
    spread,
)
from taskmoe.wmt.model.translation import Hypothesis, translate_n_best
from taskmoe.wmt.text.languages import codes_of, direction
from taskmoe.wmt.text.textfiles import stream_lines


def run(a: argparse.Namespace) -> None:
    """Translate lines from a file or standard input to standard output, in their order.

    Each piece of the input is answered as soon as it is translated: in a pipe, what has come so
    far.
    """
    model = load(a.model)
    pairs = model.config.pairs
    if a.pair is None and len(pairs) > 1:
        raise InputError(f"--pair must say which of {', '.join(pairs)}")
    pair = pairs[0] if a.pair is None else direction(a.pair, codes_of(pairs))
    how = decoding(a, model)
    model, where = spread(a, model)
    if a.n_best is not None and not 1 <= a.n_best <= how.beam:
        raise InputError(f"--n-best must be in [1, {how.beam}], the --beam, got {a.n_best}")
    note = functools.partial(print, file=sys.stderr)
    shown = sys.stderr.isatty() and not sys.stdout.isatty()  # else the translations show it
    done = 0
    with _input(a.input) as file, bar("translating", "sentences", enabled=shown) as progress:
        at_once = how.batch * (_SORTED if _is_regular(file) else 1)
        for lines in stream_lines(file, a.input or "standard input"):
            for at in range(0, len(lines), at_once):
                requests = [(pair, line) for line in lines[at : at + at_once]]
                found = translate_n_best(
                    model, requests, how, a.n_best or 1, None, note, done, where,
                    scored=a.n_best is not None,
                )  # fmt: skip
                _write(_texts(found) if a.n_best is None else _n_best(found, done))
                done += len(requests)
                progress(done, done + len(lines) - at - len(requests))


#: Batches of a file that are sorted by length before any is translated; of a pipe it is one.
_SORTED = 16


@contextlib.contextmanager
def _input(path: Path | None) -> Iterator[BinaryIO]:
    if path is None:
        if sys.stdin is None:
            raise InputError("standard input is closed; name a file with --input")
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    with file:
        yield file if path.suffix != ".gz" else cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _is_regular(file: BinaryIO) -> bool:
    """Whether it is a file of the disk, or of memory, which has all of its lines at once."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:
        return True


def _texts(found: list[list[Hypothesis]]) -> Iterator[str]:
    """The best of each, an empty sentence's line is empty."""
    for hypotheses in found:
        yield f"{hypotheses[0].text if hypotheses else ''}\n"


def _n_best(found: list[list[Hypothesis]], before: int) -> Iterator[str]:
    """Lines of a list; an empty sentence has its line too."""
    for i, hypotheses in enumerate(found, before):
        for hypothesis in hypotheses or [Hypothesis("", 0.0)]:
            yield f"{i} ||| {hypothesis.text} ||| {hypothesis.score:.4f}\n"


def _write(lines: Iterable[str]) -> None:
    """To standard output, at once: UTF-8 in, UTF-8 out, whatever the terminal's is."""
    text = "".join(lines).encode()
    if sys.stdout is None:
        raise InputError("standard output is closed")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        raise InputError("standard output was closed before all was translated") from None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--pair", help="direction; not needed where the model knows but one")
    p.add_argument(
        "--input", type=Path, help="file with a sentence a line, may be gzipped (default stdin)"
    )
    p.add_argument(
        "--n-best",
        type=int,
        metavar="N",
        help="print `line ||| translation ||| score` for the N best of the beam, lines from 0",
    )
    add_decoding(p)
    add_expert_parallel(p)
