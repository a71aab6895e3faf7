"""`extract`: a task's sub-network as a model of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskmoe.wmt.commands.shared import load, out
from taskmoe.wmt.model import save_model
from taskmoe.wmt.subnetwork import extract
from taskmoe.wmt.transformer import param_count


def run(a: argparse.Namespace) -> None:
    """Cut one task's sub-network out of a model into a model folder of its own."""
    model = load(a.model)
    small = extract(model, a.task)
    save_model(small, a.out)
    before, after = param_count(model.params), param_count(small.params)
    out.print(
        f"{a.out}: task {a.task}, directions {', '.join(small.config.pairs)}; "
        f"{after:,} of {before:,} parameters"
    )


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command\'s arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--task", required=True, help="a task of the model such as de, or en-de")
    p.add_argument("--out", type=Path, required=True, help="new model folder")
