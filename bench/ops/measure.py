"""Time each op against its baselines on this machine, after checking its numerics.

Ours and the baselines run in turns in one process; a line shows median and 10th to 90th percentile,
and how many times as fast as the baseline ours is, over the same rounds. Shares are of ceilings
measured here: a large matrix product, and a copy of arrays beyond the caches. Before an op is timed
it is compared with its plain definition; where they disagree it is not timed, a line says which
baselines agree with the definition, and the exit code is 1. A baseline that fails or is wrong gets
a line that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.timing import Timing, alternate, ratio
from taskmoe.bench.ops import op_torch
from taskmoe.bench.ops.cases import (
    OPS,
    OURS,
    SHAPES,
    Built,
    OpCase,
    all_cases,
    build,
    quick_cases,
    shape_cases,
)
from taskmoe.cli.command_line import write_text
from taskmoe.cli.devices import use_present_devices
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar

#: Largest error, as a share of the result's norm. Both sides sum in float32, in another order.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}


class Disagreement(Exception):
    """An op's result is not its plain definition's."""


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine was seen to reach: FLOP/s of a large product, bytes/s of a copy."""

    flops_per_s: float
    bytes_per_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ops`."""
    parser.add_argument("--quick", action="store_true", help="fewer spreads of rows, fewer rounds")
    parser.add_argument("--ops", help=f"comma-separated: {','.join(OPS)}")
    parser.add_argument(
        "--shapes", help=f"sizes of models instead, comma-separated: {','.join(SHAPES)} (for a GPU)"
    )
    parser.add_argument("--json", type=Path, help="write everything to this file as well")


def run(arguments: argparse.Namespace) -> int:
    """Check, time, print, and write JSON; 1 where an op disagrees with its plain definition.

    Raises InputError where an op or a shape is not known.
    """
    names = _chosen("op", arguments.ops, OPS)
    if arguments.shapes is None:
        cases = quick_cases() if arguments.quick else all_cases()
    else:
        cases = shape_cases(_chosen("shape", arguments.shapes, tuple(SHAPES)))
    cases = [case for case in cases if case.op in names]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some
    use_present_devices()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    rounds = 5 if arguments.quick else 9
    options = [
        f"--{name} {value}"
        for name, value in (("ops", arguments.ops), ("shapes", arguments.shapes))
        if value is not None
    ]
    found: dict[str, Any] = {
        "command": " ".join(["ops", *(["--quick"] if arguments.quick else []), *options]),
        "machine": machine.describe() | {"backend": jax.default_backend()},
        "dtype": jnp.dtype(dtype).name,
        "rounds": rounds,
    }
    rows: list[dict[str, Any]] = []
    wrong = []
    with bar("compiling", "case") as move:
        move(0, len(cases))
        compiled = compile_all(cases, dtype, move)
    with bar("timing ops", "case") as move:
        move(0, len(cases))
        ceilings = measure_ceilings(dtype)
        for i, case in enumerate(cases):
            try:
                rows += time_case(case, build(case, dtype), compiled.pop(case), rounds, ceilings)
            except Disagreement as error:
                wrong.append(str(error))
            move(i + 1, len(cases))
            if arguments.json:  # as it goes: an interrupted run leaves what it has measured
                found |= {"ceilings": dataclasses.asdict(ceilings), "lines": rows, "wrong": wrong}
                write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    if rows:
        console = Console() if sys.stdout.isatty() else Console(width=180)
        console.print(table(rows, ceilings, jnp.dtype(dtype).name))
        for sentence in summary(rows):
            console.print(sentence)
    for reason in wrong:
        print(f"not timed: {reason}", file=sys.stderr)
    return 1 if wrong else 0


def _chosen(what: str, text: str | None, known: Sequence[str]) -> Sequence[str]:
    names = known if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; known: {', '.join(known)}")
    return names


def measure_ceilings(dtype: Any) -> Ceilings:
    """A product of large matrices and a copy of an array beyond the caches, the best of rounds."""
    on_gpu = jax.default_backend() == "gpu"
    side, copied = (8192, 2 << 30) if on_gpu else (2048, 256 << 20)
    a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    long = jnp.ones(copied // a.dtype.itemsize, dtype)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(jnp.copy)
    times = alternate({"product": lambda: product(a), "copy": lambda: copy(long)}, rounds=5)
    fastest = {name: min(timing.seconds) for name, timing in times.items()}
    return Ceilings(2 * side**3 / fastest["product"], 2 * long.nbytes / fastest["copy"])


#: The ways of a case, compiled; what a baseline raised where it could not be.
Compiled = dict[str, Callable[..., Any] | Exception]
PLAIN = "plain definition"


def compile_all(
    cases: Sequence[OpCase], dtype: Any, move: Callable[[int, int], None]
) -> dict[OpCase, Compiled]:
    """Compile every way of every case on all cores, so that nothing compiles while one is timed."""
    waiting: dict[OpCase, dict[str, Future[Any]]] = {}
    shared: dict[tuple[OpCase, str], Future[Any]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case in cases:
            built = build(case, dtype)
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in built.arguments]
            waiting[case] = {PLAIN: pool.submit(_compile, built.plain, shapes)}
            for name, way in built.ways.items():  # group sizes are an argument
                key = dataclasses.replace(case, groups=""), name
                if key not in shared:
                    shared[key] = pool.submit(_compile, way, shapes)
                waiting[case][name] = shared[key]
        found: dict[OpCase, Compiled] = {}
        for i, case in enumerate(cases):
            found[case] = {name: future.result() for name, future in waiting[case].items()}
            move(i + 1, len(cases))
    return found


def _compile(way: Callable[..., Any], shapes: Sequence[Any]) -> Callable[..., Any] | Exception:
    try:
        return jax.jit(way).lower(*shapes).compile()
    except Exception as error:  # of whatever kind a baseline raises
        return error


def time_case(
    case: OpCase, built: Built, compiled: Compiled, rounds: int, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """A line for ours and for each baseline; Disagreement if ours is not the definition."""
    arguments = built.arguments
    for name, way in {**built.ways, PLAIN: built.plain}.items():
        if isinstance(compiled[name], Exception):  # others may have held the GPU's memory
            compiled[name] = _compile(way, arguments)
    want = _ready(compiled[PLAIN])(*arguments)
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name in [*built.ways, *built.outside]:
        try:
            if name in built.ways:
                calls[name] = functools.partial(_ready(compiled[name]), *arguments)
                have = calls[name]()
            else:
                calls[name] = built.outside[name](*arguments)
                have = calls[name]().arrays()
            if "dense" not in name and "GShard" not in name:
                check(f"{case.name}: {name}", have, want)
        except Exception as error:  # of whatever kind a baseline raises
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            if not isinstance(error, Disagreement):  # what is wrong is timed, and said to be wrong
                calls.pop(name, None)
    del want
    if OURS in failed:
        agreeing = [name for name in calls if name not in failed and "dense" not in name]
        raise Disagreement(f"{failed[OURS]}; these agree with it: {', '.join(agreeing) or 'none'}")
    times = alternate(calls, rounds=rounds)
    op_torch.release()
    lines = [line(case, built, name, times, ceilings) for name in calls]
    for row in lines:
        if row["way"] in failed:
            row["failed"] = failed.pop(row["way"])
    return lines + [
        dataclasses.asdict(case) | {"way": name, "failed": why} for name, why in failed.items()
    ]


def _ready(compiled: Callable[..., Any] | Exception) -> Callable[..., Any]:
    if isinstance(compiled, Exception):
        raise compiled
    return compiled


def check(name: str, have: Any, plain: Any) -> None:
    """Raise Disagreement unless every array is the plain one but for rounding."""
    found = dict(jax.tree_util.tree_leaves_with_path(have))
    for path, want in jax.tree_util.tree_leaves_with_path(plain):
        error, tolerance = float(_distance(found[path], want)), TOLERANCES[want.dtype.name]
        if not error <= tolerance:
            raise Disagreement(
                f"{name}: result{jax.tree_util.keystr(path)} differs from the plain definition "
                f"by {error:.2g} of its norm, more than {tolerance:g}"
            )


@jax.jit
def _distance(have: jax.Array, want: jax.Array) -> jax.Array:
    """Norm of the difference over that of what is wanted, on the device: arrays are large."""
    have, want = have.astype(jnp.float32), want.astype(jnp.float32)
    norm = jnp.linalg.norm(want.reshape(-1))
    return jnp.linalg.norm((have - want).reshape(-1)) / jnp.where(norm > 0, norm, 1.0)


def line(
    case: OpCase, built: Built, way: str, times: dict[str, Timing], ceilings: Ceilings
) -> dict[str, Any]:
    """One way's figures, and how many times as fast as it ours is."""
    timing = times[way]
    low, high = timing.spread
    flops, moved = built.flops / timing.median, built.least_bytes / timing.median
    found = dataclasses.asdict(case) | {
        "way": way,
        "median_us": 1e6 * timing.median,
        "p10_us": 1e6 * low,
        "p90_us": 1e6 * high,
        "gflop_per_s": flops / 1e9,
        "gb_per_s": moved / 1e9,
        "share_of_matmul": flops / ceilings.flops_per_s,
        "share_of_copy": moved / ceilings.bytes_per_s,
    }
    if way != OURS:
        middle, least, most = ratio(timing, times[OURS])
        found["ours_times_as_fast"] = {"median": middle, "p10": least, "p90": most}
    return found


def table(rows: list[dict[str, Any]], ceilings: Ceilings, dtype: str) -> Table:
    """All lines, ours above the baselines of the same case."""
    table = Table(
        title=f"Ops on {jax.devices()[0].device_kind}, {dtype}; ceilings measured here: "
        f"{ceilings.flops_per_s / 1e9:,.0f} GFLOP/s, {ceilings.bytes_per_s / 1e9:,.1f} GB/s",
        caption="Median and 10th to 90th percentile over rounds that alternate. GFLOP/s and GB/s "
        "count what the op must do, the same for all ways. Last: times as fast as this baseline "
        "ours is.",
    )
    for heading in ("op", "direction", "T", "E", "groups", "way"):
        table.add_column(heading, justify="right" if heading in "TE" else "left")
    for heading in ("us", "p10-p90", "GFLOP/s", "of matmul", "GB/s", "of copy", "ours is"):
        table.add_column(heading, justify="right", no_wrap=True)
    last: tuple[Any, ...] = ()
    for row in rows:
        op = row["op"] if row["shape"] is None else f"{row['shape']} {row['op']}"
        case = op, *(str(row[key]) for key in ("direction", "tokens", "experts", "groups"))
        table.add_row(*(case if case != last else [""] * len(case)), row["way"], *_figures(row))
        last = case
    return table


def _figures(row: dict[str, Any]) -> list[str]:
    if "median_us" not in row:
        return [f"fails: {row['failed'][:60]}"]
    faster = row.get("ours_times_as_fast")
    mark = " (wrong)" if "failed" in row else ""
    return [
        f"{row['median_us']:,.0f}{mark}",
        f"{row['p10_us']:,.0f}-{row['p90_us']:,.0f}",
        f"{row['gflop_per_s']:,.1f}" if row["gflop_per_s"] else "",
        f"{row['share_of_matmul']:.0%}" if row["gflop_per_s"] else "",
        f"{row['gb_per_s']:,.1f}",
        f"{row['share_of_copy']:.0%}",
        "" if faster is None else "{median:.2f}x ({p10:.2f}-{p90:.2f})".format(**faster),
    ]


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence an op: how ours compares with the fastest baseline that does the same work."""
    best: dict[str, dict[str, tuple[float, str]]] = {}
    for row in rows:
        same_work = "ours_times_as_fast" in row and "failed" not in row
        if same_work and "dense" not in row["way"] and "GShard" not in row["way"]:
            case = " ".join(str(row[key]) for key in ("shape", "direction", "groups", "experts"))
            found = row["ours_times_as_fast"]["median"], row["way"]
            cases = best.setdefault(row["op"], {})
            cases[case] = min(cases.get(case, found), found)
    sentences = []
    for op, cases in best.items():
        mean = math.exp(sum(math.log(ratio) for ratio, _ in cases.values()) / len(cases))
        worst = min(cases, key=lambda case: cases[case][0])
        least, way = cases[worst]
        sentences.append(
            f"{op}: against the fastest that does the same, ours is {mean:.2f} times as fast in "
            f"the geometric mean of {len(cases)}, least {least:.2f} ({worst}, {way})."
        )
    return sentences
