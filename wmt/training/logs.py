"""What a run measured, as JSON lines and as TensorBoard events."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any, Self

from taskmoe.cli.errors import InputError
from taskmoe.wmt.training.parallel import is_writer


class Logs:
    """Appends to `workdir/log.jsonl`, and to `workdir/tensorboard` if asked; process 0 alone does.

    A run that goes on from a checkpoint writes the steps after it again: the last line of a step
    counts.
    """

    def __init__(self, workdir: Path, tensorboard: bool) -> None:
        """Raises InputError where TensorBoard is asked for and tensorboardX is not installed."""
        self._file = self._events = None
        if not is_writer():
            return
        if tensorboard:
            try:
                module = importlib.import_module("tensorboardX")
            except ModuleNotFoundError:
                raise InputError(
                    "TensorBoard logs need tensorboardX: pip install 'taskmoe[tensorboard]'"
                ) from None
            self._events = module.SummaryWriter(str(workdir / "tensorboard"))
        self._file = (workdir / "log.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log numbers, and lists of loads by layer, of a step; what is not finite is null."""
        if self._file is None:
            return
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        if self._events is None:
            return
        for name, value in plain.items():
            if isinstance(value, list):
                for layer, shares in enumerate(value):
                    for expert, share in enumerate(shares):
                        self._events.add_scalar(f"{name}/layer{layer}/expert{expert}", share, step)
            elif value is not None and name not in ("step", "steps"):
                self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for part in (self._file, self._events):
            if part is not None:
                part.close()
