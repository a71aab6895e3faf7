"""`average`: the mean of a run's last checkpoints as a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from taskmoe.cli.command_line import check_new
from taskmoe.cli.errors import InputError
from taskmoe.wmt.commands.shared import out, sizes_file
from taskmoe.wmt.config import TrainConfig
from taskmoe.wmt.model.saved import save_model
from taskmoe.wmt.training.workdir import averaged_model


def run(a: argparse.Namespace) -> None:
    """Write the mean of the last checkpoints' parameters as a model (Vaswani et al. 2017, 6.1)."""
    if a.last < 1:
        raise InputError(f"--last must be at least 1, got {a.last}")
    check_new(a.out)
    steps, model = averaged_model(a.workdir, a.last)
    save_model(model, a.out, more=sizes_file(a.workdir))
    out.print(f"{a.out}: mean of the checkpoints of steps {', '.join(map(str, steps))}")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--workdir", type=Path, required=True, help="a run's folder")
    p.add_argument(
        "--last",
        type=int,
        default=TrainConfig.keep_checkpoints,
        metavar="N",
        help="checkpoints to average; `train --set keep_checkpoints=N` keeps more",
    )
    p.add_argument("--out", type=Path, required=True, help="new model folder")
