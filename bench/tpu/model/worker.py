"""A process that compiles decoding steps; see `step`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from taskmoe.bench.harness.worker import serve
from taskmoe.bench.tpu.model.step import compile_step


def answer(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The facts of one step: system, chip and batch in."""
    yield dataclasses.asdict(compile_step(**question))


if __name__ == "__main__":
    sys.exit(serve(answer))
