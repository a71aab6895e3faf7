"""Checkpoints of a training run: orbax writes them whole or not at all, checksums prove them.

`folder/STEP/` is orbax's; `folder/STEP.crc` lists each of its files with size and CRC-32 and is
written last, so a checkpoint without it never finished. Writing goes on in the background while
training does. Restoring takes the newest one that is intact and says which it passed over and why;
those are renamed, not deleted. With several processes all call everything, and process 0 alone
looks after the folder's other files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from taskmoe.cli.command_line import remove_folder, write_text
from taskmoe.cli.errors import InputError
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
        for library in ("asyncio", "absl"):
            logging.getLogger(library).addFilter(_is_news)

    def steps(self) -> list[int]:
        """Steps that a checkpoint claims to hold, oldest first."""
        return _steps(self.folder)

    def save(self, step: int, state: Any) -> None:
        """Begin to write a checkpoint of a pytree of arrays; `wait` says when it is there.

        The state is copied before this returns. An earlier checkpoint that is still being written
        is waited for. Raises InputError as `wait` does.
        """
        self.wait()
        path = self._path(step)
        if is_writer() and path.exists():
            self._set_aside(step)
        wait_for_all(f"checkpoint {step}")
        flat = flatten(state)
        with self._whole_or_gone(step):
            self._need_room(flat)
            self._checkpointer.save(path, flat)
        self._writing = self._background.submit(self._finish, step)

    def wait(self) -> None:
        """Wait until what `save` began is there; raises InputError where it cannot be written."""
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
        with self._whole_or_gone(step):
            self._checkpointer.wait_until_finished()
            if is_writer():
                sums = json.dumps(_checksums(self._path(step)))
                write_text(self._crc(step), sums)
        if not is_writer():
            return
        for old in self.steps()[: -self.keep]:
            self._crc(old).unlink(missing_ok=True)
            remove_folder(self.folder / str(old))

    def _need_room(self, flat: Mapping[str, Any]) -> None:
        """Raise OSError where the disk has no room, before orbax's threads each say so."""
        size = sum(leaf.nbytes for leaf in flat.values())
        if is_writer() and shutil.disk_usage(self.folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _whole_or_gone(self, step: int) -> Iterator[None]:
        """Where a checkpoint cannot be written, what there is of it goes, and InputError says so.

        Of a full disk, or one that may not be written, orbax and TensorStore tell by many classes.
        """
        try:
            yield
        except Exception as error:
            if is_writer():
                for left in (*self.folder.glob(f"{step}.orbax-checkpoint-tmp*"), self._path(step)):
                    shutil.rmtree(left, ignore_errors=True)
            good = [at for at in self.steps() if at != step and _problem(self._path(at)) is None]
            safe = f"that of step {good[-1]} is whole" if good else "there is none before it"
            raise InputError(
                f"the checkpoint of step {step} cannot be written into {self.folder}: "
                f"{_reason(error)}; {safe}. With that mended the same command goes on"
            ) from None

    def _newest(self, notes: list[str]) -> int:
        for step in reversed(self.steps()):
            problem = _problem(self._path(step))
            if problem is None:
                return step
            notes.append(f"checkpoint {self._path(step)} is damaged ({problem})")
            self._set_aside(step)
        return 0

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def _crc(self, step: int) -> Path:
        return _crc(self._path(step))

    def _set_aside(self, step: int) -> None:
        target = self.folder / f"{step}.damaged"
        remove_folder(target)
        os.replace(self._path(step), target)
        self._crc(step).unlink(missing_ok=True)


def intact_steps(folder: Path, most: int) -> list[int]:
    """Steps of the newest whole checkpoints, at most so many, oldest first; nothing is changed."""
    steps = reversed(_steps(folder) if folder.is_dir() else [])
    whole = (step for step in steps if _problem(folder / str(step)) is None)
    return list(itertools.islice(whole, most))[::-1]


def read_arrays(folder: Path, step: int, prefix: str) -> dict[str, np.ndarray]:
    """A checkpoint's arrays whose names begin so, by the rest of their names."""
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder.resolve() / str(step))
    return {
        name.removeprefix(prefix): np.asarray(array)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def _crc(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.crc")


def _problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used; None where it is intact."""
    if not _crc(checkpoint).is_file():
        return "its writing was interrupted"
    found = _checksums(checkpoint)
    try:
        wanted = json.loads(_crc(checkpoint).read_text(encoding="utf-8"))
        for name, (size, crc) in wanted.items():
            if name not in found:
                return f"{name} is missing"
            if found[name][0] != size:
                return f"{name} has {found[name][0]} bytes, should have {size}"
            if found[name][1] != crc:
                return f"{name} has changed since it was written"
    except (ValueError, TypeError, AttributeError):
        return f"{_crc(checkpoint).name} is unreadable"
    return None


def _is_news(record: logging.LogRecord) -> bool:
    """Errors of a checkpoint's parts are not: orbax raises one of them, and then all are logged."""
    of_part = "exception was never retrieved" in record.getMessage()
    return not (of_part or (record.levelno >= logging.ERROR and "orbax" in record.pathname))


def _reason(error: Exception) -> str:
    """The system's own words where they are in an error, else its first line."""
    words = str(error) or type(error).__name__
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO):
        if os.strerror(number) in words:
            return os.strerror(number)
    return words.splitlines()[0][:200]


def _checksums(folder: Path) -> dict[str, list[int]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): [p.stat().st_size, zlib.crc32(p.read_bytes())] for p in files
    }
