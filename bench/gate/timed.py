"""What `check` knows by the clock: how long workloads take, in units of their calibration.

Worker processes follow one another, each giving a few blocks of rounds of every workload that is
not decided yet, until all are, or the limit of processes is reached. Where two revisions are
compared, a process of each is there at a time, and blocks of the two alternate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from taskmoe.bench.gate.verdicts import Interval, interval
from taskmoe.bench.harness.worker import Died, Worker
from taskmoe.cli.errors import InputError


class Told(TypedDict):
    """A worker's answer: ratios by block, and the median speed."""

    blocks: list[list[float]]
    tokens_per_s: float


Ask = Callable[[str, int], Told]
#: Starts a worker on a core, with a folder for compiled programs.
Start = Callable[[int, Path], contextlib.AbstractContextManager[Ask]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """Worker processes, at least and at most, and blocks of each workload in each of them."""

    least: int
    most: int
    blocks: int


#: Of a check, of one with --quick, and of a new baseline.
CHECK, QUICK, BASELINE = Effort(2, 14, 5), Effort(1, 4, 3), Effort(12, 12, 6)


@dataclasses.dataclass(frozen=True)
class Speed(Interval):
    """What a baseline keeps of a workload: its interval in calibrations, and what it rests on."""

    rounds: int
    processes: int
    tokens_per_s: float


@dataclasses.dataclass
class Timed:
    """What was timed of one workload so far."""

    blocks: list[np.ndarray] = dataclasses.field(default_factory=list)
    tokens_per_s: list[float] = dataclasses.field(default_factory=list)
    processes: int = 0

    @property
    def interval(self) -> Interval:
        """Median ratio and its interval."""
        return interval(self.blocks)

    def add(self, told: Told) -> None:
        """Count a worker's answer."""
        self.blocks += [np.asarray(block) for block in told["blocks"]]
        self.tokens_per_s.append(told["tokens_per_s"])

    def speed(self) -> Speed:
        """All of it in six numbers."""
        return Speed(
            **dataclasses.asdict(self.interval),
            rounds=sum(map(len, self.blocks)),
            processes=self.processes,
            tokens_per_s=float(np.median(self.tokens_per_s)),
        )


def collect(
    sides: Mapping[str, Start],
    workloads: list[str],
    effort: Effort,
    decided: Callable[[str, Mapping[str, Interval]], bool],
    moved: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Timed]]:
    """Time workloads on each side until `decided` says so of each, within the effort.

    sides: name -> what starts a worker. decided: asked with a workload and its interval on each
    side. moved: called with processes done and at most. Returns side -> workload -> what was timed.
    """
    found = {side: {name: Timed() for name in workloads} for side in sides}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    turns = 1 if len(sides) == 1 else effort.blocks

    def is_open(name: str) -> bool:
        return not decided(name, {side: timed[name].interval for side, timed in found.items()})

    with tempfile.TemporaryDirectory(prefix="taskmoe-check-") as folder:
        for process in range(effort.most):
            names = [name for name in workloads if process < effort.least or is_open(name)]
            if not names:
                break
            moved(process, effort.most)
            with contextlib.ExitStack() as stack:
                core = cores[process % len(cores)]
                asks = {
                    side: stack.enter_context(start(core, Path(folder)))
                    for side, start in sides.items()
                }
                for name in names:
                    for turn in range(turns):
                        # Who goes first changes, so that a machine that gets faster favours none.
                        for side in list(asks)[:: -1 if turn % 2 else 1]:
                            found[side][name].add(asks[side](name, effort.blocks // turns))
                    for timed in found.values():
                        timed[name].processes += 1
        moved(effort.most, effort.most)
    return found


@contextlib.contextmanager
def worker(
    core: int, folder: Path, module: str = "taskmoe.bench.gate.worker", tree: Path | None = None
) -> Iterator[Ask]:
    """A function of (workload, blocks) that measures in a new process on that core.

    tree, module: another checkout, and what to run there.
    """
    # Without flags: one device, optimised as usual.
    settings: dict[str, str | None] = {"XLA_FLAGS": None}
    with Worker(module, [str(core), str(folder)], settings, tree) as process:

        def ask(workload: str, blocks: int) -> Told:
            try:
                told: Told = process.ask({"workload": workload, "blocks": blocks})
            except Died as death:
                where = "" if tree is None else " in the other revision"
                raise InputError(f"the process that times {workload}{where} {death}") from None
            return told

        yield ask


def of_revision(tree: Path, module: str) -> Start:
    """What starts workers of another checkout."""
    return functools.partial(worker, module=module, tree=tree)
