"""Time each op against its baselines on this machine, after checking its numerics.

Ours and the baselines run in turns in one process; a line shows median and 10th to 90th percentile,
and how many times as fast as the baseline ours is, over the same rounds. Shares are of ceilings
measured here: the largest matrix product, and a copy. Before an op is timed it is compared with its
plain definition; where they disagree nothing is timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from taskmoe.bench import machine
from taskmoe.bench.op_cases import OPS, OURS, Built, OpCase, all_cases, build, quick_cases
from taskmoe.bench.timing import Timing, alternate, ratio
from taskmoe.wmt.command_line import write_text
from taskmoe.wmt.devices import use_present_devices
from taskmoe.wmt.errors import InputError
from taskmoe.wmt.progress import bar

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
    parser.add_argument("--json", type=Path, help="write everything to this file as well")


def run(arguments: argparse.Namespace) -> int:
    """Check, time, print, and write JSON; 1 where an op disagrees with its plain definition.

    Raises InputError where an op is not known.
    """
    names = OPS if arguments.ops is None else [n.strip() for n in arguments.ops.split(",")]
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise InputError(f"unknown op {unknown[0]!r}; known: {', '.join(OPS)}")
    use_present_devices()
    cases = quick_cases() if arguments.quick else all_cases()
    cases = [case for case in cases if case.op in names]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    rounds = 5 if arguments.quick else 9
    rows: list[dict[str, Any]] = []
    try:
        with bar("timing ops", "case") as move:
            move(0, len(cases))
            ceilings = measure_ceilings(dtype)
            for i, case in enumerate(cases):
                rows += time_case(case, build(case, dtype), rounds, ceilings)
                move(i + 1, len(cases))
    except Disagreement as error:
        print(f"no timing: {error}", file=sys.stderr)
        return 1
    console = Console() if sys.stdout.isatty() else Console(width=180)
    console.print(table(rows, ceilings, jnp.dtype(dtype).name))
    if arguments.json:
        found = {
            "command": "ops --quick" if arguments.quick else "ops",
            "machine": machine.describe() | {"backend": jax.default_backend()},
            "dtype": jnp.dtype(dtype).name,
            "rounds": rounds,
            "ceilings": dataclasses.asdict(ceilings),
            "lines": rows,
        }
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")
    return 0


def measure_ceilings(dtype: Any) -> Ceilings:
    """A product of 2048 x 2048 matrices and a copy of 64 MiB, the best of five rounds each."""
    a = jnp.ones((2048, 2048), dtype)
    long = jnp.ones((64 << 20) // a.dtype.itemsize, dtype)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(jnp.copy)
    times = alternate({"product": lambda: product(a), "copy": lambda: copy(long)}, rounds=5)
    fastest = {name: min(timing.seconds) for name, timing in times.items()}
    return Ceilings(2 * 2048**3 / fastest["product"], 2 * long.nbytes / fastest["copy"])


def time_case(case: OpCase, built: Built, rounds: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    """A line for ours and for each baseline; Disagreement if ours is not the definition."""
    ways = {name: jax.jit(way) for name, way in built.ways.items()}
    check(case.name, ways[OURS](*built.arguments), jax.jit(built.plain)(*built.arguments))
    calls = {name: (lambda way=way: way(*built.arguments)) for name, way in ways.items()}
    times = alternate(calls, rounds=rounds)
    return [line(case, built, name, times, ceilings) for name in ways]


def check(name: str, ours: Any, plain: Any) -> None:
    """Raise Disagreement unless every array of ours is the plain one but for rounding."""
    for path, want in jax.tree_util.tree_leaves_with_path(plain):
        have = np.asarray(dict(jax.tree_util.tree_leaves_with_path(ours))[path], np.float64)
        tolerance = TOLERANCES[want.dtype.name]
        want = np.asarray(want, np.float64)
        norm = float(np.linalg.norm(want))
        error = float(np.linalg.norm(have - want)) / (norm or 1.0)
        if not error <= tolerance:
            raise Disagreement(
                f"{name}: result{jax.tree_util.keystr(path)} differs from the plain definition "
                f"by {error:.2g} of its norm, more than {tolerance:g}"
            )


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
        title=f"Ops on {jax.default_backend()}, {dtype}; ceilings measured here: "
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
        case = tuple(str(row[key]) for key in ("op", "direction", "tokens", "experts", "groups"))
        faster = row.get("ours_times_as_fast")
        table.add_row(
            *(case if case != last else [""] * len(case)),
            row["way"],
            f"{row['median_us']:,.0f}",
            f"{row['p10_us']:,.0f}-{row['p90_us']:,.0f}",
            f"{row['gflop_per_s']:,.1f}" if row["gflop_per_s"] else "",
            f"{row['share_of_matmul']:.0%}" if row["gflop_per_s"] else "",
            f"{row['gb_per_s']:,.1f}",
            f"{row['share_of_copy']:.0%}",
            "" if faster is None else "{median:.2f}x ({p10:.2f}-{p90:.2f})".format(**faster),
        )
        last = case
    return table
