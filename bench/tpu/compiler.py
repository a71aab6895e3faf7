"""The TPU compiler in processes beside this one, and what a command checks before it asks it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from taskmoe.bench.harness.worker import Died, Worker
from taskmoe.bench.tpu import schedule
from taskmoe.bench.tpu.cases import Case
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

#: Compilers at once: each keeps one core busy.
WORKERS = 2
#: libtpu ends a process that loads it where this file is missing.
CPUS_FILE = Path("/sys/devices/system/cpu/possible")
#: The compiler asks no server about a TPU, and several may be loaded at once.
SETTINGS = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def chosen(what: str, given: str | None, known: Any, default: Any) -> list[str]:
    """The comma-separated names, if all are known; the default if none are given."""
    names = list(default) if given is None else [name.strip() for name in given.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    return list(dict.fromkeys(names))


def need_libtpu() -> None:
    """Make ready to compile; InputError where libtpu is not installed, or could not be loaded."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'")
    if not CPUS_FILE.exists():
        raise InputError(f"libtpu, the TPU compiler, needs {CPUS_FILE}: mount /sys")
    jax.config.update("jax_platforms", "cpu")  # the lab needs no TPU, and must not hold one


def compile_all(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the compiler and the model say of each case, in their order, with a bar on stderr."""
    results: dict[Case, dict[str, Any]] = {}
    chips = list(dict.fromkeys(case.chip for case in cases))
    stopping = threading.Event()
    with bar("compiling", "kernel") as move, ThreadPoolExecutor(WORKERS) as pool:
        move(0, len(cases))

        def work(chip: str) -> None:
            with compiler() as compile_one:
                for case in cases:
                    if case.chip == chip and not stopping.is_set():
                        results[case] = compile_one(case)
                        move(len(results), len(cases))

        futures = [pool.submit(work, chip) for chip in chips]
        try:
            for future in futures:
                future.result()
        finally:
            stopping.set()
    return [results[case] for case in cases]


@contextlib.contextmanager
def compiler() -> Iterator[Callable[[Case], dict[str, Any]]]:
    """A function that compiles cases in a process beside this one, and a new one after a crash."""
    with (
        tempfile.TemporaryDirectory(prefix="taskmoe-tpu-") as dumps,
        contextlib.ExitStack() as stack,
    ):
        settings = SETTINGS | {"LIBTPU_INIT_ARGS": schedule.dump_flags(Path(dumps))}
        running: list[Worker] = []

        def compile_one(case: Case) -> dict[str, Any]:
            if not running:
                module = "taskmoe.bench.tpu.kernel_worker"
                running.append(stack.enter_context(Worker(module, [dumps], settings)))
            try:
                return dict(running[0].ask(dataclasses.asdict(case)))
            except Died as death:
                running.clear()
                return {"error": death_note(death)}

        yield compile_one


def death_note(death: Died) -> str:
    """How a compiler ended, as a result.

    Raises InputError where the reason is that dumps cannot be read: no case will fare better.
    """
    if "ScheduleError" in death.last:
        raise InputError(death.last.split("ScheduleError: ", 1)[-1])
    return f"the compiler {death}"
