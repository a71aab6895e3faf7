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
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taskmoe.bench.harness import machine
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu import expert_bytes
from taskmoe.bench.tpu import published as tpu_published
from taskmoe.bench.tpu.cases import CHIPS, DTYPES, OPS, SHAPES
from taskmoe.bench.tpu.compiler import chosen, compile_all, need_libtpu
from taskmoe.bench.tpu.model import measure as tpu_model
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError

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
    if arguments.ops or arguments.dtypes or arguments.shapes or arguments.chips:
        raise InputError("--chips, --ops, --dtypes and --shapes do not go with --published")
    need_libtpu()
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
