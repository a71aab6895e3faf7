"""The processes of an exchange, from their specification to what the first one found."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

from taskmoe.bench.exchange.spec import Spec
from taskmoe.bench.harness.results import Result, from_json
from taskmoe.bench.harness.worker import Died, Worker
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

#: A process that hears nothing from another for so long ends with an error.
HEARTBEAT_S = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """A system at one size; times and shares are there where it agrees with one device.

    error: None where results are wrong by design. us, with percentiles: of a layer or a step.
    copy_share: of the time, what the same program saves when it keeps what it would send. alone_us:
    of a layer's all-to-alls by themselves.
    """

    system: str
    error: float | None
    agrees: bool
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_sent: float = 0.0
    us: float = 0.0
    us_p10: float = 0.0
    us_p90: float = 0.0
    rounds_us: list[float] = dataclasses.field(default_factory=list)
    transfer_share: float = 0.0
    waiting_share: float = 0.0
    copy_share: float | None = None
    copy_share_p10: float | None = None
    copy_share_p90: float | None = None
    alone_us: float | None = None

    @property
    def share(self) -> float:
        """Share of the time in collectives, by the profiler."""
        return self.transfer_share + self.waiting_share


@dataclasses.dataclass(frozen=True)
class Size:
    """All systems at one size: of a layer with tokens, or of a decoding step with a batch."""

    experts: int
    d_model: int
    rows: list[Row]
    tokens: int | None = None
    batch: int | None = None


@dataclasses.dataclass(frozen=True)
class Exchanged(Result):
    """Layers and whole decoding steps."""

    spec: Spec
    machine: dict[str, str]
    shapes: list[Size]
    steps: list[Size]

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [row for size in (*self.shapes, *self.steps) for row in size.rows]


@dataclasses.dataclass(frozen=True)
class Worked(Result):
    """What one of the processes is asked: which it is, and the port where they meet."""

    spec: Spec
    port: int
    process: int


def measure(spec: Spec) -> Exchanged:
    """Run the worker processes of a specification and return what the first one found.

    Raises InputError where a process dies; the others are given time to notice and then ended.
    """
    sizes = len(spec.experts) * len(spec.d_model)
    shapes = sizes * (len(spec.batches) + len(spec.step_batches))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        workers: list[Worker] = []
        for number in range(spec.processes):
            workers.append(stack.enter_context(Worker("taskmoe.bench.exchange.worker")))
            workers[-1].say(Worked(spec, port, number).to_json())
        progress = stack.enter_context(bar("exchange", "shapes"))
        progress(0, shapes)
        with contextlib.suppress(Died):  # who died first is told below
            while "machine" not in found:
                found = workers[0].hear()
                progress(found.get("done", shapes), shapes)
        _all_ended(workers, "machine" in found)
    return from_json(Exchanged, found)


def _all_ended(workers: Sequence[Worker], whole: bool) -> None:
    """Wait until all processes have ended; InputError that names the one to blame where one died.

    A killed process has a negative code; those that notice it end by themselves. whole: what they
    found is there already, so that it does not matter how they end.
    """
    for worker in workers:  # before any is waited for: they end together
        worker.finish()
    codes = []
    for number, worker in enumerate(workers):
        try:
            codes.append(worker.end(4 * HEARTBEAT_S))
        except subprocess.TimeoutExpired:
            raise InputError(f"process {number} did not end within {4 * HEARTBEAT_S} s") from None
    if any(codes) and not whole:
        first = min(range(len(codes)), key=lambda i: (codes[i] >= 0, codes[i] == 0))
        raise InputError(f"process {first} of {len(codes)} {workers[first].death()}")
