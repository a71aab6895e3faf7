"""Checkpoints of a training run: orbax writes them whole or not at all, checksums prove them.

`folder/STEP/` is orbax's; `folder/STEP.crc` lists each of its files with size and CRC-32 and is
written last, so a checkpoint without it never finished. Restoring takes the newest one that is
intact and says which it passed over and why; those are renamed, not deleted.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from taskmoe.wmt.model import flatten


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of which are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.keep = folder.resolve(), keep
        for unfinished in self.folder.glob("*orbax-checkpoint-tmp*"):  # of a run that was killed
            shutil.rmtree(unfinished)
        self._checkpointer = ocp.StandardCheckpointer()

    def steps(self) -> list[int]:
        """Steps that a checkpoint claims to hold, oldest first."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit())

    def save(self, step: int, state: Any) -> None:
        """Write a checkpoint of a pytree of arrays, then drop those beyond `keep`."""
        path = self.folder / str(step)
        if path.exists():
            self._set_aside(step)
        self._checkpointer.save(path, flatten(state))
        self._checkpointer.wait_until_finished()
        beside = self.folder / f".{step}.crc"
        beside.write_text(json.dumps(_checksums(path)), encoding="utf-8")
        os.replace(beside, self._crc(step))
        for old in self.steps()[: -self.keep]:
            self._crc(old).unlink(missing_ok=True)
            _remove(self.folder / str(old))

    def restore(self, template: Any) -> tuple[int, Any, list[str]]:
        """The newest intact checkpoint.

        template: a pytree with the shapes and dtypes that were saved.
        Returns its step, the state, and a line for each damaged checkpoint that was passed over;
        step 0 and the template itself where there is none.
        """
        notes: list[str] = []
        flat = flatten(template)
        abstract = jax.tree.map(jax.typeof, flat)
        target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in abstract.items()}
        for step in reversed(self.steps()):
            if problem := self._problem(step):
                notes.append(f"checkpoint {self.folder / str(step)} is damaged ({problem})")
                self._set_aside(step)
                continue
            found = self._checkpointer.restore(self.folder / str(step), target)
            leaves = [found[name] for name in flat]
            return step, jax.tree.unflatten(jax.tree.structure(template), leaves), notes
        return 0, template, notes

    def close(self) -> None:
        """Release orbax's threads."""
        self._checkpointer.close()

    def _crc(self, step: int) -> Path:
        return self.folder / f"{step}.crc"

    def _problem(self, step: int) -> str | None:
        """Why a checkpoint cannot be used; None where it is intact."""
        if not self._crc(step).is_file():
            return "its writing was interrupted"
        try:
            wanted = json.loads(self._crc(step).read_text(encoding="utf-8"))
        except ValueError:
            return f"{self._crc(step).name} is unreadable"
        found = _checksums(self.folder / str(step))
        for name, (size, crc) in wanted.items():
            if name not in found:
                return f"{name} is missing"
            if found[name][0] != size:
                return f"{name} has {found[name][0]} bytes, should have {size}"
            if found[name][1] != crc:
                return f"{name} has changed since it was written"
        return None

    def _set_aside(self, step: int) -> None:
        target = self.folder / f"{step}.damaged"
        _remove(target)
        os.replace(self.folder / str(step), target)
        self._crc(step).unlink(missing_ok=True)


def _checksums(folder: Path) -> dict[str, list[int]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in files
    }


def _remove(folder: Path) -> None:
    """Delete a folder; renamed first, so that a half-deleted one is no checkpoint."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)
