"""The TPU compiler in processes beside this one, and what a command checks before it asks it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

import taskmoe.bench.tpu
import taskmoe.kernels
import taskmoe.moe
from taskmoe.bench.harness.results import from_json, load
from taskmoe.bench.harness.worker import Died, Worker
from taskmoe.bench.tpu import schedule
from taskmoe.bench.tpu.cases import Case
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

#: Compilers at once: each keeps one core busy.
WORKERS = 2
#: How the error of a case begins whose arguments and results exceed the chip's HBM.
TOO_LARGE = "does not fit one chip"
#: The error of a case that has no kernel on its chip: nothing is there to count.
NO_KERNEL = "no kernel on this chip: XLA's own operations"
#: libtpu ends a process that loads it where this file is missing.
CPUS_FILE = Path("/sys/devices/system/cpu/possible")
#: The compiler asks no server about a TPU, and several may be loaded at once.
SETTINGS = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Kernel(schedule.Schedule):
    """A kernel of a case as compiled. vmem_bytes: 0 where not told."""

    vmem_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiler and model say of a case: why it does not compile, or its kernels.

    Bytes and times are modelled, and there where the grid can be walked; see `kernels.worker`.
    temporary_bytes: HBM that the program takes beside its arguments and results
    outside_cycles: of what XLA runs around the kernels, by the compiler's estimate
    """

    error: str | None = None
    compile_s: float | None = None
    temporary_bytes: int | None = None
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    bundles_run: int | None = None
    moved_bytes: int | None = None
    floor_bytes: int | None = None
    flops: int | None = None
    outside_cycles: int | None = None
    modelled_us: float | None = None
    roofline_us: float | None = None

    @property
    def is_left_out(self) -> bool:
        """Whether its error is no failure: one chip cannot hold it, or it has no kernel there."""
        return self.error is not None and self.error.startswith((TOO_LARGE, NO_KERNEL))

    @property
    def main_bundles(self) -> int:
        """Bundles of the main loops, added up."""
        return sum(kernel.main_bundles for kernel in self.kernels)

    @property
    def filled(self) -> float:
        """Share of the MXU's slots that the main loops fill."""
        whole = sum(kernel.filled["MXU"] * kernel.main_bundles for kernel in self.kernels)
        return whole / self.main_bundles

    @property
    def spills(self) -> int:
        """Vector spills and fills of the main loops."""
        return sum(kernel.spills for kernel in self.kernels)

    @property
    def vmem_bytes(self) -> int:
        """VMEM of the kernel that takes most."""
        return max(kernel.vmem_bytes for kernel in self.kernels)


def need_libtpu() -> None:
    """Make ready to compile; InputError where libtpu is not installed, or could not be loaded."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'")
    if not CPUS_FILE.exists():
        raise InputError(f"libtpu, the TPU compiler, needs {CPUS_FILE}: mount /sys")
    jax.config.update("jax_platforms", "cpu")  # the lab needs no TPU, and must not hold one


def compile_all(cases: Sequence[Case], work: Path | None = None) -> list[Compiled]:
    """What the compiler and the model say of each case, in their order, with a bar on stderr.

    work: folder that keeps each result as it comes but refusals, and has those of an earlier run of
    the same sources and versions; None keeps none.

    Raises InputError where libtpu is not installed, or could not be loaded.
    """
    need_libtpu()
    kept = {} if work is None else {case: _place(work, case) for case in cases}
    results = {
        case: load(Compiled, path, "tpu --kernels, once the file is gone")
        for case, path in kept.items()
        if path.is_file()
    }
    chips = list(dict.fromkeys(case.chip for case in cases))
    stopping = threading.Event()
    with bar("compiling", "kernel") as move, ThreadPoolExecutor(WORKERS) as pool:
        move(len(results), len(cases))

        def compile_for(chip: str) -> None:
            with compiler() as compile_one:
                for case in cases:
                    if case.chip == chip and case not in results and not stopping.is_set():
                        found = compile_one(case)
                        if case in kept and found.error is None:
                            write_text(kept[case], json.dumps(dataclasses.asdict(found)) + "\n")
                        results[case] = found
                        move(len(results), len(cases))

        futures = [pool.submit(compile_for, chip) for chip in chips]
        try:
            for future in futures:
                future.result()
        finally:
            stopping.set()
    return [results[case] for case in cases]


def _place(work: Path, case: Case) -> Path:
    """Where the result of a case is kept: by the case, the sources that it comes from, versions."""
    words = [value for value in dataclasses.astuple(case) if isinstance(value, str)]
    about = [dataclasses.asdict(case), _sources()]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    return work / f"{'-'.join(words)}-{digest}.json"


@functools.cache
def _sources() -> str:
    """A digest of the kernels, the layer, the lab, and of the versions of what compiles them."""
    digest = hashlib.sha256()
    for package in (taskmoe.kernels, taskmoe.moe, taskmoe.bench.tpu):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    for name in ("jax", "jaxlib", "libtpu"):
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def compiler() -> Iterator[Callable[[Case], Compiled]]:
    """A function that compiles cases in a process beside this one, and a new one after a crash."""
    temporary = tempfile.TemporaryDirectory(prefix="taskmoe-tpu-")
    with temporary as dumps, contextlib.ExitStack() as stack:
        settings = SETTINGS | {"LIBTPU_INIT_ARGS": schedule.dump_flags(Path(dumps))}
        running: list[Worker] = []

        def compile_one(case: Case) -> Compiled:
            if not running:
                module = "taskmoe.bench.tpu.kernels.worker"
                running.append(stack.enter_context(Worker(module, [dumps], settings)))
            try:
                return from_json(Compiled, running[0].ask(dataclasses.asdict(case)))
            except Died as death:
                running.clear()
                return Compiled(error=death_note(death))

        yield compile_one


def death_note(death: Died) -> str:
    """How a compiler ended, as a result.

    Raises InputError where the reason is that dumps cannot be read: no case will fare better.
    """
    if "ScheduleError" in death.last:
        raise InputError(death.last.split("ScheduleError: ", 1)[-1])
    return f"the compiler {death}"
