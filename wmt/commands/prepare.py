"""`prepare`: a training set or cleaned text of any sources, or the embedded corpus, in a folder."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from taskmoe.cli.command_line import check_new, write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.settings import add_set, read_set, settable
from taskmoe.wmt.commands.shared import build, check_apart, load, out, own_words
from taskmoe.wmt.commands.text import (
    add_data,
    named_text,
    splits_to_score,
    text_plan,
    training_text,
)
from taskmoe.wmt.config import PRESETS, TrainConfig
from taskmoe.wmt.model.saved import whole_folder
from taskmoe.wmt.text import blocks, cldr
from taskmoe.wmt.text.cleaning import Account, account_table, look
from taskmoe.wmt.text.folders import write_splits
from taskmoe.wmt.text.preparing import prepare
from taskmoe.wmt.text.sources import Source
from taskmoe.wmt.training.stopping import ending_at_once

_SAMPLES = 3
_SETTABLE = [*settable(TrainConfig), "vocab_size"]


def run(a: argparse.Namespace) -> None:
    """Write a training set or cleaned text of all sources, or else the embedded corpus."""
    if a.out is None and not a.dry_run:
        raise InputError("--out FOLDER says where to write; --dry-run writes nothing")
    if a.data is None:
        _embedded(a)
        return
    check_apart(a, "dry_run", "json", "vocabulary", "workers")
    check_apart(a, "text", "vocabulary", "workers")
    given = read_set(a.set, _SETTABLE, "TrainConfig")
    size = given.pop("vocab_size", PRESETS[a.config][0]["vocab_size"])
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"--set vocab_size must be a whole number of at least 1, got {size!r}")
    config = build(TrainConfig, {**PRESETS[a.config][1], "seed": a.seed, **given})
    if a.dry_run:
        _look_only(a, config)
    elif a.text:
        _cleaned(a, config)
    else:
        _set(a, config, size)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--out", type=Path, help="folder to write")
    add_data(p, required=False)
    p.add_argument(
        "--config",
        choices=list(PRESETS),
        default="tiny",
        help="whose vocabulary's size and longest bucket are taken",
    )
    add_set(p, _SETTABLE, "TrainConfig that is about text, or vocab_size")
    p.add_argument(
        "--vocabulary", type=Path, metavar="MODEL", help="take a trained model's vocabulary"
    )
    p.add_argument("--text", action="store_true", help="write cleaned text, not a training set")
    p.add_argument(
        "--dry-run", action="store_true", help="write nothing: count, and show first sentences"
    )
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that look at text and encode it (default: one a core; for little text one)",
    )
    p.add_argument("--json", type=Path, help="write the table of sizes here too")
    p.add_argument(
        "--seed", type=int, default=0, help="of the vocabulary's sample, or the embedded corpus"
    )


def _set(a: argparse.Namespace, config: TrainConfig, size: int) -> None:
    if a.workers is not None and a.workers < 1:
        raise InputError(f"--workers must be at least 1, got {a.workers}")
    vocabulary = size if a.vocabulary is None else load(a.vocabulary).tokenizer
    plan = text_plan(a, config, vocabulary)
    kept = ending_at_once(f"what is done is kept in {a.out}.part")
    with kept, bar("preparing", "sentences", enabled=sys.stderr.isatty()) as progress:
        made = prepare(a.out, plan, a.workers, progress.stage).manifest
    accounts = {pair: one.account for pair, one in made.directions.items()}
    longer = {pair: one.beyond for pair, one in made.directions.items()}
    out.print(account_table(f"{made.title} in {a.out}", accounts, {"longer": longer}))
    sizes = {s: {p: len(lines[0]) for p, lines in t.items()} for s, t in plan.splits.items()}
    _write_json(a, plan.sources, accounts, {"longer": longer, **sizes})


def _cleaned(a: argparse.Namespace, config: TrainConfig) -> None:
    check_new(a.out)
    named, train, accounts = training_text(a, config)
    splits = {"train": train, **splits_to_score(named)}
    with whole_folder(a.out) as beside:
        write_splits(beside, splits)
    sizes = {s: {p: len(text[p][0]) if p in text else 0 for p in named.pairs}
             for s, text in splits.items() if s != "train"}  # fmt: skip
    out.print(account_table(f"{named.title} in {a.out}", accounts, sizes))
    _write_json(a, named.sources, accounts, sizes)


def _look_only(a: argparse.Namespace, config: TrainConfig) -> None:
    with named_text(a, config) as (sources, pairs, *_):
        pass
    table = Table("direction", "read", "empty", "long", "same", "first sentences", box=box.SIMPLE)
    with bar("counting", "sentences", enabled=sys.stderr.isatty()) as progress:
        for pair in pairs:
            counts = dict.fromkeys(("read", "empty", "long", "copied"), 0)
            samples: list[tuple[str, str]] = []
            for source in sources:
                if pair not in source.pairs("train"):
                    continue
                lines = itertools.islice(source.stream("train", pair), config.max_sentences)
                while some := list(itertools.islice(lines, blocks.LINES)):
                    looked = look(some, config, [None, None])
                    samples.extend(looked.lines[: _SAMPLES - len(samples)])
                    counts = {name: counts[name] + looked.counts[name] for name in counts}
                    progress(counts["read"], None)
            shown = "\n".join(f"{x[:60]} | {y[:60]}" for x, y in samples)
            table.add_row(pair, *(f"{n:,}" for n in counts.values()), Text(shown))
    out.print(table)


def _write_json(
    a: argparse.Namespace,
    sources: Sequence[Source],
    accounts: dict[str, Account],
    columns: dict[str, dict[str, int]],
) -> None:
    if a.json is not None:
        table = {
            "sources": [s.name for s in sources],
            "train": {pair: account.to_dict() for pair, account in accounts.items()},
            **columns,
        }
        write_text(a.json, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _embedded(a: argparse.Namespace) -> None:
    about = ("pairs", "set", "json", "vocabulary", "text", "dry_run", "workers", "cache")
    if given := [f"--{name.replace('_', '-')}" for name in about if getattr(a, name)]:
        raise InputError(f"{', '.join(given)}: only for the sources of --data; give one")
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
