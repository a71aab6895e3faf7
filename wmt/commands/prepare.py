"""`prepare`: cleaned text of any sources, or the embedded corpus, as a folder of files."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from rich.table import Table
from rich.text import Text

from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.settings import add_set, read_set, settable
from taskmoe.wmt.commands.shared import build, out, own_words
from taskmoe.wmt.commands.text import add_data, training_text
from taskmoe.wmt.config import TrainConfig, split_pair
from taskmoe.wmt.text import cldr
from taskmoe.wmt.text.cleaning import account_table
from taskmoe.wmt.text.folders import Pairs
from taskmoe.wmt.text.sources import all_pairs, read_all


def run(a: argparse.Namespace) -> None:
    """Write cleaned text of all sources, or else the embedded corpus, into a folder."""
    if a.data is None:
        _embedded(a)
    else:
        _cleaned(a)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    add_data(p, required=False)
    add_set(p, "TrainConfig that is about cleaning")
    p.add_argument("--json", type=Path, help="write the table of sizes here too")
    p.add_argument("--seed", type=int, default=0, help="of the embedded corpus")


def _cleaned(a: argparse.Namespace) -> None:
    fields = read_set(a.set, settable(TrainConfig), "TrainConfig")
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        raise InputError(f"{a.out} already holds something; name a new folder")
    source = training_text(a, build(TrainConfig, fields))
    splits = {"train": source.text}
    for split in ("valid", "test"):  # text to score stays as it is
        there = set(all_pairs(source.sources, split))
        pairs = [pair for pair in source.pairs if pair in there]
        splits[split] = read_all(source.sources, split, pairs)
    _write(a.out, splits)
    sizes = {s: {p: len(text[p][0]) if p in text else 0 for p in source.pairs}
             for s, text in splits.items() if s != "train"}  # fmt: skip
    out.print(account_table(f"{source.title} in {a.out}", source.accounts, sizes))
    if a.json is not None:
        table = {
            "sources": [s.name for s in source.sources],
            "train": {pair: account.to_dict() for pair, account in source.accounts.items()},
            **sizes,
        }
        write_text(a.json, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _write(folder: Path, splits: dict[str, Pairs]) -> None:
    """Write `SPLIT.en-de.en` and `SPLIT.en-de.de` of all directions; the folder appears whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, text in splits.items():
            for pair, columns in text.items():
                source, target = split_pair(pair)
                turned = f"{target}-{source}"
                written = (beside / f"{split}.{turned}.{source}").exists()
                if written and columns == text[turned][::-1]:
                    continue  # these files serve both directions
                for language, lines in zip((source, target), columns, strict=True):
                    content = "".join(f"{line}\n" for line in lines)
                    (beside / f"{split}.{pair}.{language}").write_bytes(content.encode())
        beside.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _embedded(a: argparse.Namespace) -> None:
    if a.pairs or a.set or a.json:
        raise InputError("--pairs, --set and --json are about the sources of --data; give one")
    config = build(cldr.CldrConfig, {"seed": a.seed})
    with bar("writing the corpus", "sentences") as progress:
        own_words(cldr.write_corpus, a.out, config, progress=progress)
    table = Table("pair", "train", "valid", "test", title=Text(str(a.out)))
    for language in cldr.LANGUAGES:
        counts = [_count(a.out / f"{s}.en-{language}.en") for s in ("train", "valid", "test")]
        table.add_row(f"en-{language}", *(f"{n:,}" for n in counts))
    out.print(table)


def _count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
