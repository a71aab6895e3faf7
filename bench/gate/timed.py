"""What `check` knows by the clock: how long workloads take, in units of their calibration.

Worker processes follow one another, each giving a few blocks of rounds of every workload that is
not decided yet, until all are, or the limit of processes is reached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from taskmoe.bench.gate.verdicts import Interval, interval
from taskmoe.bench.harness.worker import Died, Worker
from taskmoe.cli.errors import InputError

Ask = Callable[[str, int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """Worker processes, at least and at most, and blocks of each workload in each of them."""

    least: int
    most: int
    blocks: int


#: Of a check, of one with --quick, and of a new baseline.
CHECK, QUICK, BASELINE = Effort(2, 14, 5), Effort(1, 4, 3), Effort(12, 12, 6)


@dataclasses.dataclass
class Timed:
    """What was timed of one workload so far."""

    blocks: list[np.ndarray] = dataclasses.field(default_factory=list)
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def interval(self) -> Interval:
        """Median ratio and its interval."""
        return interval(self.blocks)

    def facts(self) -> dict[str, Any]:
        """JSON-ready: what a baseline keeps."""
        return {
            **dataclasses.asdict(self.interval),
            "rounds": sum(map(len, self.blocks)),
            "processes": len(self.tokens_per_s),
            "tokens_per_s": float(np.median(self.tokens_per_s)),
        }


def collect(
    workloads: list[str],
    effort: Effort,
    decided: Callable[[str, Interval], bool],
    moved: Callable[[int, int], None] = lambda done, total: None,
    start: Callable[[int, Path], contextlib.AbstractContextManager[Ask]] | None = None,
) -> dict[str, Timed]:
    """Time workloads until `decided` says so of each, within the effort.

    moved: called with processes done and at most. start: begins a worker on a core; tests have
    their own.
    """
    found = {name: Timed() for name in workloads}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    with tempfile.TemporaryDirectory(prefix="taskmoe-check-") as folder:
        for process in range(effort.most):
            open_ones = [
                name
                for name, timed in found.items()
                if process < effort.least or not decided(name, timed.interval)
            ]
            if not open_ones:
                break
            moved(process, effort.most)
            with (start or worker)(cores[process % len(cores)], Path(folder)) as ask:
                for name in open_ones:
                    told = ask(name, effort.blocks)
                    found[name].blocks += [np.asarray(block) for block in told["blocks"]]
                    found[name].tokens_per_s.append(told["tokens_per_s"])
        moved(effort.most, effort.most)
    return found


@contextlib.contextmanager
def worker(core: int, folder: Path) -> Iterator[Ask]:
    """A function of (workload, blocks) that measures in a new process on that core."""
    # Without flags: one device, optimised as usual.
    settings: dict[str, str | None] = {"XLA_FLAGS": None}
    with Worker("taskmoe.bench.gate.worker", [str(core), str(folder)], settings) as process:

        def ask(workload: str, blocks: int) -> dict[str, Any]:
            try:
                return dict(process.ask({"workload": workload, "blocks": blocks}))
            except Died as death:
                raise InputError(f"the process that times {workload} {death}") from None

        yield ask
