"""SIGTERM and Ctrl-C: the step is finished and kept, and the run ends with its own exit code.

SIGTERM is what SLURM, Kubernetes and a shell's `kill` send. A second signal ends the process at
once, even where it waits in compiled code for other processes.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

#: What is asked of a run after each step: the signal by which it is to stop, 0 while there is none.
Stop = Callable[[], int]
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAG = 2  # steps until an answer is read: it is there by then, and nobody waits for it


class Stopped(BaseException):
    """The run was told to stop; the message says what is safe. code: of the process's exit."""

    def __init__(self, number: int, done: str) -> None:
        name = "interrupted" if number == signal.SIGINT else f"{signal.Signals(number).name}"
        self.code = 128 + number
        super().__init__(f"{name}: {done}")


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """What says whether to stop, for the block that takes the steps; all processes must ask.

    All of them get the same answer after the same step, whichever of them was told to stop. Outside
    the main thread signals cannot be had, and nothing stops the run.
    """
    told = 0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal told
        told = number

    def here() -> int:
        return told

    with _handled(note):
        yield here if jax.process_count() == 1 else _agreed(here)


@contextlib.contextmanager
def ending_at_once(goes_on: str) -> Iterator[None]:
    """For a block that takes no steps: a signal raises Stopped in it. goes_on: what is safe."""
    told, over, rings = 0, False, False
    others, alarm = sys.unraisablehook, signal.getsignal(signal.SIGALRM) or signal.SIG_DFL

    def end(number: int, _: FrameType | None) -> None:
        nonlocal told
        told = number
        if not over:
            raise Stopped(number, goes_on)

    def end_soon(lost: Any) -> None:
        nonlocal rings
        if lost.exc_type is not Stopped:
            others(lost)
            return
        rings = True
        signal.signal(signal.SIGALRM, lambda _, frame: end(told, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    # What a handler raises is lost where the signal came in a finaliser or a garbage collector's
    # callback, as JAX has one: Python hands it to this hook, and nobody would be told.
    sys.unraisablehook = end_soon
    try:
        with _handled(end):
            try:
                yield
            finally:
                over = True  # from here on nothing is raised before all is as it was
    finally:
        if rings:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        sys.unraisablehook = others
    if told:  # it was lost, and the alarm had not rung yet
        raise Stopped(told, goes_on)


def _agreed(here: Stop) -> Stop:
    """The largest signal of any process, as it was a few steps ago."""
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), P("all"))
    most = jax.jit(lambda told: told.max(), out_shardings=NamedSharding(rows.mesh, P()))
    asked: collections.deque[Any] = collections.deque()

    def ask() -> int:
        mine = np.full(jax.local_device_count(), here(), np.int32)
        asked.append(most(jax.make_array_from_process_local_data(rows, mine)))
        return int(asked.popleft()) if len(asked) > _LAG else 0

    return ask


@contextlib.contextmanager
def _handled(first: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `first` on a signal; a second one ends the process, by a thread that reads of it.

    Python calls handlers between its own instructions only, never while it waits in compiled code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    old = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_end_at_second, args=(reading,), daemon=True)
    watcher.start()
    for number in _SIGNALS:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(old)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _end_at_second(reading: int) -> None:
    count = 0
    while told := os.read(reading, 1):
        if told[0] in _SIGNALS:
            count += 1
        if count > 1:
            print("told twice: ended at once", file=sys.stderr, flush=True)
            os._exit(128 + told[0])
