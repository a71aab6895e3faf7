"""A work directory: what it was begun with, and whether a run may go on in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.saved import Model, with_arrays
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.training.checkpoints import intact_steps, read_arrays
from taskmoe.wmt.training.parallel import agree, is_writer

#: Sentence pairs that each direction was trained on, in a work directory.
SIZES = "sizes.json"
# Fields that a run may change when it goes on: they do not change what a step computes.
_FREE = ("steps", "checkpoint_every", "keep_checkpoints", "max_skipped")
# What is written down but may differ: where the text lies (a checkpoint knows whether it is the
# same text), and recomputing, which changes what a step needs and not what it gives.
_NOTED = {"data", "train.remat"}
#: What a checkpoint is made of.
_FIXED = {"optimizer"}
#: Stands for the training text among the fields that are allowed to differ.
TEXT = "text"
#: Begins the names of a checkpoint's parameters: those of the first of (state, place in the text).
_PARAMS = "0/params/"


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Keep other runs out of a work directory, which is made if need be; all processes call this.

    Raises InputError where another run is in it. The lock goes with the process, however that ends.
    """
    with contextlib.ExitStack() as stack:
        free = True
        if is_writer():
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / ".lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        if not agree(int(free)):
            raise InputError(f"another run is at work in {workdir}; wait for it or end it")
        yield


def claim_workdir(
    workdir: Path,
    model_config: ModelConfig,
    config: TrainConfig,
    source: str,
    allowed: Collection[str] | None = None,
) -> None:
    """Write the configuration into a new work directory, or check that it is the same.

    What is allowed to differ is written too. Raises InputError as `check_workdir` does.
    """
    if check_workdir(workdir, model_config, config, source, allowed) and not allowed:
        return
    write_text(
        workdir / "config.json",
        json.dumps(_description(model_config, config, source), indent=2) + "\n",
    )


def check_workdir(
    workdir: Path,
    model_config: ModelConfig,
    config: TrainConfig,
    source: str,
    allowed: Collection[str] | None = None,
    flag: str = "--workdir",
) -> bool:
    """Whether a run of this configuration has begun in a work directory; False where none has.

    A run has begun when it has written a checkpoint: one that ended before leaves nothing to go on
    from, and another may take its place. Raises InputError that names the first field that differs.
    How checkpoints are kept may change, `steps` under a schedule that does not look at them, and
    fields of TrainConfig that are allowed to by name, but for the optimizer, whose state is kept.
    allowed: None where a command has no --allow. flag: its argument that names another folder.
    """
    for name in allowed or ():
        if name != TEXT and (name not in TrainConfig.__dataclass_fields__ or name in _FIXED):
            known = sorted({TEXT, *TrainConfig.__dataclass_fields__} - _FIXED)
            raise InputError(f"--allow {name}: a run can go on with another {', '.join(known)}")
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"work directory {workdir} is a file")
    saved = [p for p in workdir.glob("checkpoints/[0-9]*") if "tmp" not in p.name]
    if not saved and not (workdir / "model").exists():
        return False
    path = workdir / "config.json"
    if path.is_file():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            a = _flat(theirs)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error}") from None
        b = _flat(_description(model_config, config, source))
        # What they do not have is newer than they are.
        for name in sorted(a.keys() - _NOTED):
            field = name.removeprefix("train.")
            if name == "train.steps" and name not in b:
                continue  # nothing here depends on them
            if a[name] != b.get(name) and field not in (allowed or ()):
                free = allowed is not None and name.startswith("train.") and field not in _FIXED
                way = f"--allow {field} goes on with it, or " if free else ""
                raise InputError(
                    f"work directory {workdir} belongs to another configuration: {name} is "
                    f"{a[name]!r} there and {b.get(name)!r} here; {way}name another {flag}"
                )
        return True
    what = "checkpoints" if saved else "a model"
    raise InputError(f"{workdir} has {what} but no config.json; name another {flag}")


def interrupted_model(workdir: Path) -> tuple[int, Model]:
    """(step, model) of a run's newest whole checkpoint, as it would be if the run ended there.

    Raises InputError as `averaged_model` does.
    """
    (step,), model = averaged_model(workdir, 1)
    return step, model


def averaged_model(workdir: Path, last: int) -> tuple[list[int], Model]:
    """(steps, the mean of the parameters) of a run's newest whole checkpoints.

    Raises InputError where there are not so many, or a file of the work directory is missing or
    damaged.
    """
    folder = workdir / "checkpoints"
    steps = intact_steps(folder, last)
    if len(steps) < last:
        there = f"only {len(steps)} whole checkpoints" if steps else "no whole checkpoint"
        more = f"; `train --set keep_checkpoints={last}` keeps so many" if last > 1 else ""
        raise InputError(f"{folder} has {there}{more}")
    total = read_arrays(folder, steps[0], _PARAMS)
    for step in steps[1:]:
        for name, array in read_arrays(folder, step, _PARAMS).items():
            total[name] = total[name] + array
    path = workdir / "config.json"
    try:
        config = ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"{path} is missing or damaged: {error}") from None
    tokenizer = Tokenizer.load(workdir / "spm.model")
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    mean = {name: array / np.float32(last) for name, array in total.items()}
    return steps, with_arrays(mean, config, tokenizer, f"checkpoint {steps[-1]} of {workdir}")


def _description(model_config: ModelConfig, config: TrainConfig, source: str) -> dict[str, Any]:
    """What a work directory's config.json holds."""
    free = _FREE if config.schedule == "inverse_sqrt" else _FREE[1:]  # cosine looks at steps
    fields = dataclasses.asdict(config)
    whole = {
        "data": source,
        "model": dataclasses.asdict(model_config),
        "train": {name: value for name, value in fields.items() if name not in free},
    }
    described: dict[str, Any] = json.loads(json.dumps(whole))  # lists for tuples, as in the file
    return described


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
