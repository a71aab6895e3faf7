"""`shortlist`: which words translations into a language are made of, for a faster search."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich import box
from rich.table import Table

from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.shared import check_limit, load, out, own_words
from taskmoe.wmt.commands.text import add_data, text_to_score
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.model.shortlist import learn_candidates, shortlist_of
from taskmoe.wmt.text.lexicon import learnt_from


def run(a: argparse.Namespace) -> None:
    """Learn from parallel text which words translate which; translate --shortlist uses it."""
    model = load(a.model)
    check_limit(a.limit)
    text, title = text_to_score(a, a.split, model, a.limit)
    tokenizer, made = model.tokenizer, {}
    table = Table("direction", "sentences", "always", "for a piece, mean", box=box.SIMPLE)
    with bar("aligning", "directions", enabled=sys.stderr.isatty()) as progress:
        for number, (pair, (lines, references)) in enumerate(text.items(), 1):
            source = tokenizer.encode_source(lines[: a.limit], split_pair(pair)[1])
            source = [ids[1:-1] for ids in source]  # without language and end
            target = [ids[:-1] for ids in tokenizer.encode_target(references[: a.limit])]
            own = own_words(
                learn_candidates,
                source,
                target,
                tokenizer.vocab_size,
                first=a.first,
                best=a.best,
            )
            made[pair] = own
            used = {i for ids in source for i in ids}
            learnt = len(learnt_from(source, target))
            mean = sum(len(own.of(i)) for i in used) / max(len(used), 1)
            table.add_row(
                pair, f"{learnt:,} of {len(source):,}", f"{len(own.first):,}", f"{mean:.1f}"
            )
            progress(number, len(text))
    shortlist_of(made, tokenizer).save(a.out)
    out.print(table)
    out.print(f"{a.out}: words for {len(made)} directions, from {title}")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    add_data(p)
    p.add_argument("--split", choices=("train", "valid"), default="train")
    p.add_argument("--out", type=Path, required=True, help="file to write")
    p.add_argument(
        "--limit",
        type=int,
        default=100_000,
        metavar="N",
        help="first sentences of each direction that are looked at",
    )
    p.add_argument(
        "--first", type=int, default=100, metavar="N", help="words that every sentence may have"
    )
    p.add_argument(
        "--best", type=int, default=100, metavar="N", help="words that each source piece brings"
    )
