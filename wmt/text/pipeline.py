"""Batches one after the other, made ahead in the background by grain, with a state to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Self, TypeVar

import grain
import numpy as np

from taskmoe.cli.errors import InputError

_AHEAD = 4  # batches that wait for the training step
Batch = TypeVar("Batch")


class _Steps(Generic[Batch]):
    """The batches of a run as grain's random-access source: element i is the batch of step i."""

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make

    def __len__(self) -> int:
        return 1 << 62  # a run has no end of its own

    def __getitem__(self, step: int) -> Batch:
        return self._make(step)


class BatchIterator(Iterator[Batch], Generic[Batch]):
    """The batches of steps `start_step`, `start_step + 1`, ...; a thread makes a few ahead.

    `get_state` goes into a checkpoint and `set_state` brings the iterator back to it; batches that
    were made ahead but not handed out are not lost. Close it, or use it in a with-statement.
    """

    def __init__(
        self, make: Callable[[int], Batch], start_step: int = 0, fingerprint: str = ""
    ) -> None:
        """make: step -> batch, a pure function. fingerprint: of its text, hexadecimal."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        self._grain: Any = iter(grain.MapDataset.source(_Steps(make)).to_iter_dataset(options))
        self._fingerprint = fingerprint
        self._grain.set_state({"next_index": start_step})

    def __next__(self) -> Batch:
        batch: Batch = next(self._grain)
        return batch

    @property
    def step(self) -> int:
        """The step whose batch comes next."""
        return int(self._grain.get_state()["next_index"])

    def get_state(self) -> dict[str, np.ndarray]:
        """grain's state and the text's fingerprint: arrays, as a checkpoint holds them.

        next_index: [] i64, the step whose batch comes next. text: [16] u8.
        """
        text = np.frombuffer(bytes.fromhex(self._fingerprint), np.uint8)
        return {"next_index": np.array(self.step, np.int64), "text": text}

    def set_state(self, state: Mapping[str, Any], *, any_text: bool = False, way: str = "") -> None:
        """Go on where a `get_state` was; raises InputError for another text, unless any may be.

        way: what else a person may do, for that error.
        """
        if not any_text and not np.array_equal(state["text"], self.get_state()["text"]):
            raise InputError(
                "the training text is another than when the checkpoint was written; "
                f"bring the text back, {way}or begin in another work directory"
            )
        self._grain.set_state({"next_index": int(state["next_index"])})

    def close(self) -> None:
        """Stop the thread."""
        self._grain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
