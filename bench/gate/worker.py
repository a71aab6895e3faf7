"""A process that times the frozen workloads in turns with their calibration: JSON lines in and out.

A process of its own, on one core and with one thread, so that a busy neighbour slows both of a pair
alike; and several one after another, because how a process happens to lie in memory changes its
speed by a percent or two for as long as it lives. Started with the core and a folder for compiled
programs, which the next such process reuses. A question is {"workload": name, "blocks": number}.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from taskmoe.bench.gate.workloads import WORKLOADS, Workload
from taskmoe.bench.harness.worker import serve

#: A block is rounds of about so many seconds.
BLOCK_S = 1.0


def measure(workload: Workload, blocks: int) -> dict[str, Any]:
    """Blocks of ratios (seconds of a run over seconds of a calibration), and median tokens/s."""
    for run in (workload.run, workload.calibration):  # what was just compiled, or paused
        for _ in range(3):
            seconds(run)
    found, speeds = [], []
    for _ in range(blocks):
        ratios: list[float] = []
        end = time.perf_counter() + BLOCK_S
        while time.perf_counter() < end or len(ratios) < 2:
            # Who goes first changes, so that a machine that gets faster favours neither.
            if len(ratios) % 2:
                own, beside = seconds(workload.run), seconds(workload.calibration)
            else:
                beside, own = seconds(workload.calibration), seconds(workload.run)
            ratios.append(own / beside)
            speeds.append(workload.tokens / own)
        found.append(ratios)
    return {"blocks": found, "tokens_per_s": float(np.median(speeds))}


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


@functools.cache
def made(workload: str) -> Workload:
    """A workload, compiled once."""
    return WORKLOADS[workload]()


def answer(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Blocks of rounds of a workload."""
    yield measure(made(question["workload"]), question["blocks"])


def main() -> int:
    """Settle on a core, and answer."""
    core, folder = int(sys.argv[1]), sys.argv[2]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})  # before JAX counts its threads
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return serve(answer)


if __name__ == "__main__":
    sys.exit(main())
