"""Checkpoints of a training run: orbax writes them whole or not at all, checksums prove them.

`folder/STEP/` is orbax's; `folder/STEP.crc` lists each of its files with size and CRC-32 and is
written last, so a checkpoint without it never finished. Writing goes on in the background while
training does. Restoring takes the newest one that is intact and says which it passed over and why;
those are renamed, not deleted. With several processes all call everything, and process 0 alone
looks after the folder's other files.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from taskmoe.wmt.model.saved import flatten
from taskmoe.wmt.training.parallel import agree, is_writer, wait_for_all


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of which are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder.resolve(), keep
        if is_writer():
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob("*orbax-checkpoint-tmp*"):  # of a run that died
                shutil.rmtree(unfinished)
        wait_for_all("checkpoints")
        self._checkpointer = ocp.StandardCheckpointer()
        self._background = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps that a checkpoint claims to hold, oldest first."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit())

    def save(self, step: int, state: Any) -> None:
        """Begin to write a checkpoint of a pytree of arrays; `wait` says when it is there.

        The state is copied before this returns. An earlier checkpoint that is still being written
        is waited for.
        """
        self.wait()
        path = self.folder / str(step)
        if is_writer() and path.exists():
            self._set_aside(step)
        wait_for_all(f"checkpoint {step}")
        self._checkpointer.save(path, flatten(state))
        self._writing = self._background.submit(self._finish, step)

    def wait(self) -> None:
        """Wait until what `save` began is there; raises what went wrong."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def restore(self, template: Any) -> tuple[int, Any, list[str]]:
        """The newest intact checkpoint.

        template: a pytree with the shapes, dtypes and shardings that are wanted; a checkpoint can
        be restored onto other devices than it came from.
        Returns its step, the state, and a line for each damaged checkpoint that was passed over;
        step 0 and the template itself where there is none.
        """
        self.wait()
        notes: list[str] = []
        found = agree(self._newest(notes) if is_writer() else 0)
        if not found:
            return 0, template, notes
        flat = flatten(template)
        target = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
            for name, x in flat.items()
        }
        arrays = self._checkpointer.restore(self.folder / str(found), target)
        leaves = [arrays[name] for name in flat]
        return found, jax.tree.unflatten(jax.tree.structure(template), leaves), notes

    def close(self) -> None:
        """Finish writing and release the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._checkpointer.close()

    def _finish(self, step: int) -> None:
        self._checkpointer.wait_until_finished()
        if not is_writer():
            return
        beside = self.folder / f".{step}.crc"
        beside.write_text(json.dumps(_checksums(self.folder / str(step))), encoding="utf-8")
        os.replace(beside, self._crc(step))
        for old in self.steps()[: -self.keep]:
            self._crc(old).unlink(missing_ok=True)
            _remove(self.folder / str(old))

    def _newest(self, notes: list[str]) -> int:
        for step in reversed(self.steps()):
            problem = self._problem(step)
            if problem is None:
                return step
            notes.append(f"checkpoint {self.folder / str(step)} is damaged ({problem})")
            self._set_aside(step)
        return 0

    def _crc(self, step: int) -> Path:
        return self.folder / f"{step}.crc"

    def _problem(self, step: int) -> str | None:
        """Why a checkpoint cannot be used; None where it is intact."""
        if not self._crc(step).is_file():
            return "its writing was interrupted"
        found = _checksums(self.folder / str(step))
        try:
            wanted = json.loads(self._crc(step).read_text(encoding="utf-8"))
            for name, (size, crc) in wanted.items():
                if name not in found:
                    return f"{name} is missing"
                if found[name][0] != size:
                    return f"{name} has {found[name][0]} bytes, should have {size}"
                if found[name][1] != crc:
                    return f"{name} has changed since it was written"
        except (ValueError, TypeError, AttributeError):
            return f"{self._crc(step).name} is unreadable"
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
