"""`extract`: a task's sub-network as a model of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskmoe.cli.command_line import check_new
from taskmoe.cli.errors import InputError
from taskmoe.wmt.commands.shared import load, out, sizes_file
from taskmoe.wmt.model.saved import save_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.transformer import param_count
from taskmoe.wmt.text.languages import spelled


def run(a: argparse.Namespace) -> None:
    """Cut tasks' sub-networks out of a model, each into a model folder of its own."""
    model = load(a.model)
    sides = ("encoder", "decoder")
    names = {*model.config.pairs, *(task for side in sides for task in model.config.tasks(side))}
    a.task = [spelled(task, names) for task in a.task]
    if len(set(a.task)) != len(a.task):
        raise InputError(f"--task names a task twice: {', '.join(a.task)}")
    # All are cut before any is written: a wrong name or folder leaves nothing behind.
    small = {task: extract(model, task) for task in a.task}
    folders = {task: a.out if len(small) == 1 else a.out / task for task in small}
    for folder in folders.values():
        check_new(folder)
    before = param_count(model.params)
    for task, network in small.items():
        folder = folders[task]
        save_model(network, folder, more=sizes_file(a.model))
        out.print(
            f"{folder}: task {task}, directions {', '.join(network.config.pairs)}; "
            f"{param_count(network.params):,} of {before:,} parameters"
        )


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument(
        "--task",
        required=True,
        action="append",
        help="a task of the model such as de, or en-de; may be given again",
    )
    p.add_argument(
        "--out", type=Path, required=True, help="new model folder; of several tasks a folder each"
    )
