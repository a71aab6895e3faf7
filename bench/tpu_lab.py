"""Compile the kernels for TPU without a TPU: schedules, VMEM, modelled bytes and times.

Each kernel is compiled by libtpu for each chip. Bundles of the main loop, the share of MXU slots
that it fills and its spills are read from the compiler's dumps, bytes are counted by walking the
grid, and times are modelled from both: nothing is measured, and every such figure is headed so.
jax's megablox kernels, and tokamax's where installed, stand beside ours at the same shapes.
With --model wmt, the paper's models instead: parameters, HBM, largest batches, exchange. With
--published, how far the model's times are from measurements that others published.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import jax
from rich.console import Console
from rich.table import Table

from taskmoe.bench import expert_bytes, kernel_cases, machine, schedule
from taskmoe.bench.kernel_cases import CHIPS, DTYPES, OPS, SHAPES, Case
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

#: Compilers at once: each keeps one core busy.
WORKERS = 2
#: libtpu ends a process that loads it where this file is missing.
CPUS_FILE = Path("/sys/devices/system/cpu/possible")
QUICK_CHIPS, QUICK_DTYPES = ("v5e", "v6e"), ("bf16",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tpu`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kernels", action="store_true", help="compile the kernels")
    what.add_argument("--model", help="compile decoding steps of the paper's models: wmt")
    what.add_argument(
        "--published", action="store_true", help="the model beside published measurements"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="kernels: v5e and v6e in bf16 only, in under three minutes; model: v3 only",
    )
    parser.add_argument("--chips", help=f"comma-separated: {','.join(CHIPS)}")
    parser.add_argument("--ops", help=f"comma-separated: {','.join(OPS)}")
    parser.add_argument("--dtypes", help=f"comma-separated: {','.join(DTYPES)}")
    parser.add_argument("--shapes", help=f"comma-separated, wmt if not given: {','.join(SHAPES)}")
    parser.add_argument("--json", type=Path, help="write everything to this file as well")


def run(arguments: argparse.Namespace) -> int:
    """Compile, count, print, and write JSON. Exit code 1 where one of our kernels did not compile.

    Raises InputError where an option names what is not there, or libtpu is not installed.
    """
    if arguments.model is not None:
        from taskmoe.bench import tpu_model  # which builds on this module

        if arguments.ops or arguments.dtypes or arguments.shapes:
            raise InputError("--ops, --dtypes and --shapes go with --kernels, not with --model")
        return tpu_model.run(arguments)
    if arguments.published:
        return _published(arguments)
    if not arguments.kernels:
        raise InputError("say what to compile: --kernels, --model wmt or --published")
    quick = arguments.quick
    chips = chosen("chip", arguments.chips, CHIPS, QUICK_CHIPS if quick else CHIPS)
    ops = chosen("op", arguments.ops, OPS, OPS)
    dtypes = chosen("dtype", arguments.dtypes, DTYPES, QUICK_DTYPES if quick else DTYPES)
    shapes = chosen("shape", arguments.shapes, SHAPES, ("wmt",))
    need_libtpu()
    jax.config.update("jax_platforms", "cpu")  # the lab needs no TPU, and must not hold one
    cases = kernel_cases.cases(chips, ops, dtypes, shapes)
    if not cases:
        raise InputError("nothing to compile: v3 takes kernels in f32 only")
    results = compile_all(cases)
    rows = [dataclasses.asdict(case) | result for case, result in zip(cases, results, strict=True)]
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(kernel_table(rows, several_shapes=len(shapes) > 1))
    experts = []
    if "expert_ffn" in ops:
        experts = [row for chip in chips for row in expert_bytes.table(chip)]
        console.print(bytes_table(experts))
    if arguments.json:
        found = {
            "command": "tpu --kernels",
            "note": "schedules as compiled; bytes and times are modelled, nothing is measured",
            "machine": machine.describe(),
            "kernels": rows,
            "expert_bytes": experts,
        }
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    return int(any("error" in row for row in rows if row["by"] == "taskmoe"))


def _published(arguments: argparse.Namespace) -> int:
    from taskmoe.bench import tpu_published  # which builds on this module

    if arguments.ops or arguments.dtypes or arguments.shapes or arguments.chips:
        raise InputError("--chips, --ops, --dtypes and --shapes do not go with --published")
    need_libtpu()
    jax.config.update("jax_platforms", "cpu")
    rows = tpu_published.compare()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(tpu_published.table(rows))
    if arguments.json:
        found = {
            "command": "tpu --published",
            "note": "modelled beside published, nothing is measured here",
            "source": tpu_published.SOURCE,
            "machine": machine.describe(),
            "rows": rows,
        }
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    return int(all("error" in row for row in rows))


def chosen(what: str, given: str | None, known: Any, default: Any) -> list[str]:
    """The comma-separated names, if all are known; the default if none are given."""
    names = list(default) if given is None else [name.strip() for name in given.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}")
    return list(dict.fromkeys(names))


def need_libtpu() -> None:
    """Raise InputError where the TPU compiler is not installed, or could not be loaded."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, the TPU compiler, is not installed: pip install 'jax[tpu]'")
    if not CPUS_FILE.exists():
        raise InputError(f"libtpu, the TPU compiler, needs {CPUS_FILE}: mount /sys")


def compile_all(cases: list[Case]) -> list[dict[str, Any]]:
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
    with tempfile.TemporaryDirectory(prefix="taskmoe-tpu-") as folder:
        dumps, log = Path(folder, "dumps"), Path(folder, "log")
        dumps.mkdir()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_TRACEBACK_FILTERING": "off",  # so that the last line is the error
            "LIBTPU_INIT_ARGS": schedule.dump_flags(dumps),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        worker: list[subprocess.Popen[str]] = []

        def start(errors: IO[str]) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-m", "taskmoe.bench.tpu_compile_worker", str(dumps)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

        def compile_one(case: Case) -> dict[str, Any]:
            if not worker:
                with log.open("w") as errors:
                    worker.append(start(errors))
            answer = ask(worker[0], json.dumps(dataclasses.asdict(case)))
            if answer is not None:
                return dict(json.loads(answer))
            return {"error": death_note(worker.pop().wait(), log.read_text(errors="replace"))}

        try:
            yield compile_one
        finally:
            for process in worker:
                process.kill()
                process.communicate()


def ask(worker: subprocess.Popen[str], question: str) -> str | None:
    """The worker's answer, or None if it died over the question."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(question + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    return worker.stdout.readline() or None


def death_note(code: int, log: str) -> str:
    """How a worker ended: its exit code, and the last line that it said.

    Raises InputError with that line where the reason is that dumps cannot be read: no case will
    fare better.
    """
    said = [line.strip() for line in log.splitlines() if line.strip()]
    last = said[-1] if said else "it said nothing"
    if "ScheduleError" in last:
        raise InputError(last.split("ScheduleError: ", 1)[-1])
    return f"the compiler ended with exit code {code}: {last[:300]}"


def kernel_table(rows: list[dict[str, Any]], several_shapes: bool) -> Table:
    """Op x direction x chip x dtype, ours above others' at the same shape."""
    table = Table(
        title="Kernels compiled ahead of time",
        caption="Bundles, MXU slots and spills (vector spills and fills) are of the main loops of "
        "the case's kernels, added up; VMEM is the largest. Bytes and times are modelled: bytes "
        "by walking the grid (copies made by hand as declared), time as the larger of bytes at "
        "the HBM's rate and FLOPs at the bf16 peak times the share of MXU slots filled. Floor: "
        "arguments and results once, untouched experts left out; roofline: floor and full peak. "
        "tokamax is compiled with the tiling that it takes untuned, and cannot be walked.",
    )
    for heading in ("op", "direction", "by", "chip", "dtype", *(["shape"] * several_shapes)):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "compiled", "VMEM MiB", "bundles", "MXU filled", "spills", "modelled MB", "of floor",
        "modelled us", "roofline us",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=_beside):
        name = [row[key] for key in ("op", "direction", "by", "chip", "dtype")]
        name += [row["shape"]] * several_shapes
        table.add_row(*name, *_figures(row))
    return table


def _beside(row: dict[str, Any]) -> tuple[Any, ...]:
    chips, dtypes, shapes = list(CHIPS), list(DTYPES), list(SHAPES)
    return (
        OPS.index(row["op"]),
        kernel_cases.DIRECTIONS.index(row["direction"]),
        chips.index(row["chip"]),
        dtypes.index(row["dtype"]),
        shapes.index(row["shape"]),
        row["by"] != "taskmoe",
        row["by"],
    )


def _figures(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"]]
    kernels = row["kernels"]
    bundles = sum(kernel["main_bundles"] for kernel in kernels)
    filled = sum(kernel["filled"]["MXU"] * kernel["main_bundles"] for kernel in kernels) / bundles
    vmem = max(kernel["vmem_bytes"] for kernel in kernels)
    figures = [
        f"{row['compile_s']:.1f} s",
        f"{vmem / 2**20:.1f}" if vmem else "",  # not told of every kernel
        f"{bundles:,}",
        f"{filled:.1%}",
        f"{sum(kernel['spills'] for kernel in kernels):,}",
    ]
    if "modelled_us" not in row:  # tokamax's grid cannot be walked off TPU
        return figures
    return [
        *figures,
        f"{row['moved_bytes'] / 1e6:,.1f}",
        f"{row['moved_bytes'] / row['floor_bytes']:.2f}",
        f"{row['modelled_us']:,.1f}",
        f"{row['roofline_us']:,.1f}",
    ]


def bytes_table(rows: list[dict[str, Any]]) -> Table:
    """Whole experts at decode-sized inputs: bytes against the floor."""
    table = Table(
        title=f"HBM bytes of {expert_bytes.EXPERTS} experts, d_model {expert_bytes.D_MODEL}, "
        f"d_ff {expert_bytes.D_FF}, bf16, random top-{expert_bytes.TOP_K} (modelled)",
        caption="Counted by walking the grid; floor: touched experts' weights once, rows in and "
        "rows out. megablox: the block of rows that moves least, whole matrices.",
    )
    for heading in ("chip", "rows", "way", "modelled MB", "floor MB", "of floor"):
        table.add_column(heading, justify="left" if heading in ("chip", "way") else "right")
    for row in rows:
        sizes = [f"{row[key] / 1e6:,.2f}" for key in ("moved_bytes", "floor_bytes")]
        table.add_row(row["chip"], str(row["rows"]), row["way"], *sizes, f"{row['ratio']:.3f}")
    return table
