"""`train`: a model from parallel text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from taskmoe.wmt.cleaning import account_table
from taskmoe.wmt.command_line import write_bytes
from taskmoe.wmt.commands.shared import build, out, override
from taskmoe.wmt.commands.text import add_data, make_vocabulary, training_text
from taskmoe.wmt.config import PRESETS, ModelConfig, SideRouting, TrainConfig
from taskmoe.wmt.data import TrainingData
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.progress import bar
from taskmoe.wmt.tokenizer import Tokenizer
from taskmoe.wmt.training import Progress, check_workdir, train
from taskmoe.wmt.transformer import param_count


def run(a: argparse.Namespace) -> None:
    """Train a model up to --steps in all; a run that was stopped goes on where it was."""
    model_fields, train_fields = (dict(fields) for fields in PRESETS[a.config])
    for name, value in map(override, a.set):
        homes = ((ModelConfig, model_fields), (TrainConfig, train_fields))
        home = next((f for cls, f in homes if name in cls.__dataclass_fields__), None)
        if home is None or name == "pairs":
            raise InputError(f"--set: no field {name!r} of ModelConfig or TrainConfig to set")
        home[name] = value
    for name in ("encoder", "decoder"):
        if getattr(a, name) is not None:
            model_fields[name] = getattr(a, name)
    for name in ("steps", "seed"):
        if getattr(a, name) is not None:
            train_fields[name] = getattr(a, name)
    train_config = build(TrainConfig, train_fields)
    source = training_text(a, train_config)
    model_config = build(ModelConfig, {"pairs": source.pairs, **model_fields})

    begun = check_workdir(a.workdir, model_config, train_config, source.identity)
    vocabulary = a.workdir / "spm.model"
    if begun:
        tokenizer = Tokenizer.load(vocabulary)
    else:
        size = model_config.vocab_size
        tokenizer = make_vocabulary(source.text, size, train_config, a.cache, train_config.seed)
    data = TrainingData(source.text, tokenizer, train_config)
    if not begun:  # all input is read and fits: only now is anything written
        write_bytes(vocabulary, tokenizer.model)
    out.print(account_table(source.title, source.accounts, {"no bucket": data.too_long}))

    with bar("training", "steps", enabled=sys.stderr.isatty()) as progress:

        def report(p: Progress) -> None:
            progress(p.step, p.steps)
            router = f"  busiest expert {p.busiest:.2f}x" if p.busiest else ""
            speed = f"{p.tokens_per_s:,.0f} tokens/s"
            out.print(f"step {p.step}/{p.steps}  loss {p.loss:.3f}  {speed}{router}")

        model = train(
            a.workdir,
            model_config,
            train_config,
            data,
            tokenizer,
            source=source.identity,
            report=report,
            note=out.print,
        )
    out.print(f"{param_count(model.params):,} parameters in {a.workdir / 'model'}")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command\'s arguments."""
    add_data(p)
    p.add_argument("--config", choices=list(PRESETS), default="tiny")
    p.add_argument("--workdir", type=Path, required=True, help="checkpoints, log and model")
    p.add_argument("--steps", type=int, help="optimiser steps in all, resumed ones included")
    p.add_argument("--seed", type=int)
    for side in ("encoder", "decoder"):
        p.add_argument(
            f"--{side}", choices=get_args(SideRouting), help="routing; target by default"
        )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of ModelConfig or TrainConfig; may be given again",
    )
