"""`prepare`: the embedded corpus as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from taskmoe.wmt import cldr
from taskmoe.wmt.commands.shared import build, out, own_words
from taskmoe.wmt.progress import bar


def run(a: argparse.Namespace) -> None:
    """Write the embedded CLDR corpus, 30 directions, into a folder."""
    config = build(cldr.CldrConfig, {"seed": a.seed})
    with bar("writing the corpus", "sentences") as progress:
        own_words(cldr.write_corpus, a.out, config, progress=progress)
    table = Table("pair", "train", "valid", "test", title=str(a.out))
    for language in cldr.LANGUAGES:
        counts = [_count(a.out / f"{s}.en-{language}.en") for s in ("train", "valid", "test")]
        table.add_row(f"en-{language}", *(f"{n:,}" for n in counts))
    out.print(table)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command\'s arguments."""
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--seed", type=int, default=0)


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
