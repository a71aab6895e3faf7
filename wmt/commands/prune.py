"""`prune`: the experts of a token-routed model that matter most, as a model of its own."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from taskmoe.wmt.commands.shared import check_limit, load, out, sizes_file
from taskmoe.wmt.commands.text import add_data, text_to_score
from taskmoe.wmt.model.pruning import CRITERIA, check_prunable, prune
from taskmoe.wmt.model.saved import Model, save_model
from taskmoe.wmt.model.transformer import param_count


def run(a: argparse.Namespace) -> None:
    """Keep the experts of a token-routed model that matter most to a text, without training."""
    model = load(a.model)
    check_prunable(model.config)
    check_limit(a.limit)
    text, title = text_to_score(a, a.split, model)
    text = {pair: (x[: a.limit], y[: a.limit]) for pair, (x, y) in text.items()}
    with out.status(f"looking which experts {title} uses"):
        scores = CRITERIA[a.by](model, text)
    small = prune(model, scores, a.keep)
    small = Model(
        small.params, dataclasses.replace(small.config, pairs=tuple(text)), small.tokenizer
    )
    save_model(small, a.out, more=sizes_file(a.model))
    covered = [
        f"{side} {np.mean([np.sort(x)[::-1][: a.keep].sum() / x.sum() for x in layers]):.1%}"
        for side, layers in scores.items()
        if layers
    ]
    what = {
        "load": "which took these shares of all assignments",
        "reap": "whose scores add up to these shares of all",
    }[a.by]
    before, after = param_count(model.params), param_count(small.params)
    out.print(
        f"{a.out}: {a.keep} of {model.config.num_experts} experts, {what}: "
        f"{', '.join(covered)}; {after:,} of {before:,} parameters"
    )


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    add_data(p)
    p.add_argument("--split", choices=("train", "valid"), default="train")
    p.add_argument(
        "--limit",
        type=int,
        default=1000,
        metavar="N",
        help="first sentences of each direction that are looked at",
    )
    p.add_argument("--keep", type=int, required=True, metavar="N", help="experts of each mixture")
    p.add_argument(
        "--by",
        choices=tuple(CRITERIA),
        default="load",
        help="what experts are ranked by: load, the share of tokens that go to each (default), or "
        "reap, gate weight times the norm of the output, a mean over its tokens",
    )
    p.add_argument("--out", type=Path, required=True, help="new model folder")
