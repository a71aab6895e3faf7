"""What a run measured, as JSON lines and as TensorBoard events."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any, Self

from taskmoe.cli.command_line import write_bytes
from taskmoe.cli.errors import InputError
from taskmoe.wmt.training.parallel import is_writer


class Logs:
    """Process 0 appends to `workdir/log.jsonl`, and to `workdir/tensorboard` if asked."""

    def __init__(self, workdir: Path, tensorboard: bool, step: int) -> None:
        """step: of the checkpoint that the run goes on from, 0 where it begins.

        Lines of later steps go: their checkpoints were lost, and the run writes those steps again.
        Raises InputError where TensorBoard is asked for and tensorboardX is not installed, OSError
        that names the file where it cannot be written.
        """
        self._path = workdir / "log.jsonl"
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
        _keep(self._path, step)
        self._file = self._path.open("ab", buffering=0)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log numbers, and lists of loads by layer, of a step; what is not finite is null.

        Raises OSError that names the file where it cannot be written.
        """
        if self._file is None:
            return
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        line = (json.dumps({"step": step, **plain}) + "\n").encode()
        try:
            while line:  # a disk that is almost full takes a part
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
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


def _keep(path: Path, step: int) -> None:
    """Leave the lines up to a step in a log, and not what was half written at its end."""
    if not path.exists():
        return
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1].splitlines(keepends=True)
    after = b"".join(line for line in whole if not _is_later(line, step))
    if after != before:
        write_bytes(path, after)


def _is_later(line: bytes, step: int) -> bool:
    """Whether a line is of a later step; one that is unreadable is not, and stays."""
    try:
        return int(json.loads(line)["step"]) > step
    except (ValueError, TypeError, LookupError):
        return False
