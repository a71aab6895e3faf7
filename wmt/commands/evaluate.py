"""`evaluate`: scores of a model on parallel text."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.shared import (
    add_decoding,
    add_expert_parallel,
    add_tokenize,
    check_limit,
    decoding,
    load,
    out,
    sizes_of,
    spread,
)
from taskmoe.wmt.commands.text import add_data, text_to_score
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.translation import task_ids, translate
from taskmoe.wmt.text.folders import Pairs
from taskmoe.wmt.text.languages import codes_of, direction
from taskmoe.wmt.text.scoring import (
    Comparison,
    averages,
    check_tokenizer,
    compare,
    score,
    uncut,
)
from taskmoe.wmt.text.textfiles import read_lines


def run(a: argparse.Namespace) -> None:
    """Translate a split and print BLEU and chrF of each direction with sacreBLEU's signatures."""
    check_limit(a.limit)
    model = load(a.model)
    other = None if a.against is None else load(a.against)
    for each in (model, other):
        if each is not None:
            decoding(a, each)  # before hours of translation
    text, title = text_to_score(a, a.split, model)
    for pair in text:
        check_tokenizer(pair, a.tokenize)
        task_ids(model.config, pair)
        if other is not None:
            task_ids(other.config, pair)
    more = _references(a, text)
    if a.limit is not None:
        text = {p: (s[: a.limit], t[: a.limit]) for p, (s, t) in text.items()}
    ours = _translations(a, model, text)
    if a.out is not None:
        for pair, lines in ours.items():
            name = f"{a.split}.{pair}.{split_pair(pair)[1]}"
            write_text(a.out / name, "".join(f"{line}\n" for line in lines))
    scores = {pair: score(pair, ours[pair], text[pair][1], a.tokenize, more[pair]) for pair in text}
    columns = ["direction", "BLEU", "chrF", "sentences"]
    comparisons: dict[str, Comparison] = {}
    if other is not None:
        theirs = _translations(a, other, text)
        with out.status("drawing bootstrap samples"):
            comparisons = {
                p: compare(p, ours[p], theirs[p], text[p][1], 1000, a.tokenize, more[p])
                for p in text
            }
        columns += ["BLEU of the other", "p"]
    table = Table(*columns, title=Text(f"{a.model} on {title}, {a.split}"))
    for pair, found in scores.items():
        row = [pair, f"{found.bleu:.2f}", f"{found.chrf:.2f}", str(found.sentences)]
        if pair in comparisons:
            row += [f"{comparisons[pair].other:.2f}", f"{comparisons[pair].p:.4f}"]
        table.add_row(*row)
    means = {
        name: averages(
            {pair: getattr(found, name) for pair, found in table_of.items()},
            trained=model.config.pairs,
            sizes=sizes_of(a.model),
            high_resource=a.high_resource,
        )
        for name, table_of in (("bleu", scores), ("chrf", scores), ("other", comparisons))
    }
    for name, value in means["bleu"].items():
        row = [f"average {name}", f"{value:.2f}", f"{means['chrf'][name]:.2f}"]
        table.add_row(*row, "", *(f"{level[name]:.2f}" for level in (means["other"],) if level))
    out.print(table)
    signatures: dict[str, list[str]] = {}
    for pair, found in scores.items():
        signatures.setdefault(found.signature, []).append(pair)
    for signature, pairs in signatures.items():
        out.print(f"BLEU signature of {', '.join(pairs)}: {signature}")
    for signature in sorted({found.chrf_signature for found in scores.values()}):
        out.print(f"chrF signature: {signature}")
    if len(signatures) > 1 and means["bleu"]:
        out.print("BLEU averages are over directions of different signatures")
    if whole := [pair for pair in scores if uncut(pair, a.tokenize)]:
        out.print(
            f"BLEU of {', '.join(whole)} takes whole clauses for words: go by chrF, or by "
            "--tokenize flores200 or char"
        )
    if comparisons:
        out.print(f"p: paired bootstrap, 1000 samples, against {a.against}")
    if a.json is not None:
        result = {
            "model": str(a.model),
            "scores": {p: s._asdict() for p, s in scores.items()},
            "averages": means["bleu"],
            "one_signature": len(signatures) == 1,
            "averages_chrf": means["chrf"],
            "against": {p: c._asdict() for p, c in comparisons.items()},
            "averages_against": means["other"],
        }
        write_text(a.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def _references(a: argparse.Namespace, text: Pairs) -> dict[str, list[list[str]]]:
    """Further references of each direction, by --reference, as many lines as --limit leaves."""
    found: dict[str, list[list[str]]] = {pair: [] for pair in text}
    for word in a.reference:
        pair, equals, name = word.partition("=")
        if not equals:
            raise InputError(f"--reference wants PAIR=FILE, got {word!r}")
        pair = direction(pair, codes_of(text))
        if pair not in text:
            raise InputError(f"--reference {pair}: evaluated are {', '.join(text)}")
        lines, wanted = read_lines(Path(name)), len(text[pair][1])
        if len(lines) != wanted:
            raise InputError(
                f"{name} has {len(lines)} lines, the {a.split} text of {pair} {wanted} without "
                "its empty ones"
            )
        found[pair].append(lines[: a.limit])
    return found


def _translations(a: argparse.Namespace, model: Model, text: Pairs) -> dict[str, list[str]]:
    requests = [(pair, line) for pair, (source, _) in text.items() for line in source]
    note = functools.partial(print, file=sys.stderr)
    model, where = spread(a, model)
    with bar("translating", "sentences", enabled=sys.stderr.isatty()) as progress:
        found = iter(translate(model, requests, decoding(a, model), progress, note, spread=where))
    return {pair: [next(found) for _ in source] for pair, (source, _) in text.items()}


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    add_data(p)
    p.add_argument("--split", choices=("valid", "test", "train"), default="valid")
    p.add_argument("--limit", type=int, help="first sentences of each direction only")
    p.add_argument(
        "--against",
        type=Path,
        metavar="MODEL",
        help="a second model, compared with the first by paired bootstrap",
    )
    p.add_argument(
        "--high-resource",
        type=int,
        default=1_000_000,
        metavar="N",
        help="directions trained on so many sentence pairs are high-resource",
    )
    p.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="PAIR=FILE",
        help="a further reference of a direction, a line a sentence; may be given again",
    )
    add_tokenize(p)
    add_decoding(p)
    add_expert_parallel(p)
    p.add_argument("--out", type=Path, metavar="FOLDER", help="write the translations here")
    p.add_argument("--json", type=Path, help="write the scores here too")
