"""`quantize`: a model in int8."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.cli.command_line import check_new
from taskmoe.kernels.quantized import nbytes
from taskmoe.wmt.commands.shared import load, out, sizes_file
from taskmoe.wmt.model.quantization import checked_quantized
from taskmoe.wmt.model.saved import save_model


def run(a: argparse.Namespace) -> None:
    """Write a dense model or a sub-network in int8, for serving: a quarter of its bytes."""
    model = load(a.model)
    check_new(a.out)
    small = dataclasses.replace(model, params=checked_quantized(model.params, model.config))
    save_model(small, a.out, more=sizes_file(a.model))
    out.print(f"{a.out}: {nbytes(small.params):,} of {nbytes(model.params):,} bytes, int8")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--model", type=Path, required=True, help="model folder or work directory")
    p.add_argument("--out", type=Path, required=True, help="new model folder")
