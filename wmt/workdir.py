"""A work directory: what it was begun with, and whether a run may go on in it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from taskmoe.wmt.command_line import write_text
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.errors import InputError

#: Sentence pairs that each direction was trained on, in a work directory.
SIZES = "sizes.json"
# Fields that a run may change when it goes on: they do not change what a step computes.
_FREE = ("steps", "checkpoint_every", "keep_checkpoints", "max_skipped")


def claim_workdir(
    workdir: Path, model_config: ModelConfig, config: TrainConfig, source: str
) -> None:
    """Write the configuration into a new work directory, or check that it is the same.

    Raises InputError as `check_workdir` does.
    """
    if check_workdir(workdir, model_config, config, source):
        return
    write_text(
        workdir / "config.json",
        json.dumps(_description(model_config, config, source), indent=2) + "\n",
    )


def check_workdir(
    workdir: Path, model_config: ModelConfig, config: TrainConfig, source: str
) -> bool:
    """Whether a work directory is there and belongs to this configuration; False where it is new.

    Raises InputError that names the first field that differs. How checkpoints are kept may change,
    and `steps` under a schedule that does not look at them.
    """
    path = workdir / "config.json"
    if path.is_file():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            a = _flat(theirs)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error}") from None
        b = _flat(_description(model_config, config, source))
        for name in sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                raise InputError(
                    f"work directory {workdir} belongs to another configuration: {name} is "
                    f"{a.get(name)!r} there and {b.get(name)!r} here; name another --workdir"
                )
        return True
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"work directory {workdir} is a file")
    if workdir.is_dir() and any(workdir.glob("checkpoints/*")):
        raise InputError(f"{workdir} has checkpoints but no config.json; name another --workdir")
    return False


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
