"""`evaluate`: scores of a model on parallel text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.table import Table

from taskmoe.wmt.command_line import write_text
from taskmoe.wmt.commands.shared import add_decoding, decoding, load, out
from taskmoe.wmt.commands.text import add_data, text_to_score
from taskmoe.wmt.progress import bar
from taskmoe.wmt.scoring import Score, averages, score
from taskmoe.wmt.translation import translate


def run(a: argparse.Namespace) -> None:
    """Translate a split and print BLEU for each direction with sacreBLEU's signature."""
    model = load(a.model)
    text, title = text_to_score(a, a.split, model)
    if a.limit is not None:
        text = {p: (s[: a.limit], t[: a.limit]) for p, (s, t) in text.items()}
    requests = [(pair, line) for pair, (source, _) in text.items() for line in source]
    with bar("translating", "sentences", enabled=sys.stderr.isatty()) as progress:
        found = iter(translate(model, requests, decoding(a), progress))
    scores: dict[str, Score] = {}
    table = Table("direction", "BLEU", "sentences", title=f"{a.model} on {title}, {a.split}")
    for pair, (_, references) in text.items():
        scores[pair] = score(pair, [next(found) for _ in references], references)
        table.add_row(pair, f"{scores[pair].bleu:.2f}", str(scores[pair].sentences))
    for name, value in averages(scores).items():
        table.add_row(f"average {name}", f"{value:.2f}", "")
    out.print(table)
    for signature in sorted({s.signature for s in scores.values()}):
        out.print(f"signature: {signature}")
    if a.json is not None:
        result = {
            "model": str(a.model),
            "scores": {p: s._asdict() for p, s in scores.items()},
            "averages": averages(scores),
        }
        write_text(a.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command\'s arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    add_data(p)
    p.add_argument("--split", choices=("valid", "test", "train"), default="valid")
    p.add_argument("--limit", type=int, help="first sentences of each direction only")
    add_decoding(p)
    p.add_argument("--json", type=Path, help="write the scores here too")
