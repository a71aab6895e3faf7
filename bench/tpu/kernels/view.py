"""Kernels as compiled, and the bytes of whole experts: tables, and the roofline as a chart."""

from __future__ import annotations

import functools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from taskmoe.bench.harness.view import Chart, Table, View
from taskmoe.bench.tpu.cases import CHIPS, DIRECTIONS, DTYPES, MODELS, OPS, SHAPES
from taskmoe.bench.tpu.kernels import expert_bytes
from taskmoe.bench.tpu.kernels.measure import Kernels, Row


def view(*results: Kernels) -> View:
    """Every case; the exit code is 1 where one of our kernels did not compile."""
    tables, charts, answers, findings, shares = [], [], [], [], []
    failed = False
    for result in results:
        rows = sorted(result.kernels, key=_beside)
        of, stem = _sizes(rows)
        tables.append(_compiled(rows, of if len(results) > 1 else ""))
        if result.expert_bytes:
            tables.append(_bytes_table(result))
            findings.append(
                "A whole expert in one kernel moves hardly a byte beyond its floor, which at "
                "decoding's sizes is the weights themselves."
            )
        reached: dict[str, list[float]] = {}
        for r in rows:
            if r.by == "taskmoe" and r.modelled_us:
                reached.setdefault(f"{r.op} {r.direction}", []).append(_reached(r))
        answers.append(_answer(reached, of))
        findings += _beside_tokamax(rows)
        charts.append(
            Chart(stem, f"Kernels against the roofline, {of}", functools.partial(_chart, result))
        )
        shares += [
            (of, name, f"{min(s):.0%}", f"{np.median(s):.0%}", f"{max(s):.0%}")
            for name, s in reached.items()
        ]
        failed |= any(r.error for r in rows if r.by == "taskmoe" and not r.is_left_out)
    about = (
        "Compiled for TPUs that were not there. Schedules are the compiler's; bytes and times are "
        "modelled."
    )
    short = Table(
        "Share of the roofline (modelled)", ("sizes", "kernel", "least", "median", "most"), shares
    )
    return View(" ".join(answers), about, tables, charts, findings, short, int(failed))


def _sizes(rows: list[Row]) -> tuple[str, str]:
    """Whose sizes these are, and the stem of their chart."""
    shapes = list(dict.fromkeys(r.shape for r in rows))
    if shapes == ["wmt"]:
        return "the WMT model's size", "kernels"
    if not set(shapes) <= set(MODELS):
        return f"the sizes {' and '.join(shapes)}", "kernels-small"
    several = len(shapes) > 1
    return f"{len(shapes)} models' sizes" if several else f"{shapes[0]}'s sizes", "kernels-models"


def _answer(reached: dict[str, list[float]], of: str) -> str:
    """reached: shares of the roofline by kernel."""
    if not reached:
        return "No kernel of ours was modelled."
    every = [share for shares in reached.values() for share in shares]
    least = min(reached, key=lambda name: min(reached[name]))
    return (
        f"By the model our kernels reach {min(every):.0%} to {max(every):.0%} of the roofline at "
        f"{of}, half of them {np.median(every):.0%} or more; {least} reaches the least."
    )


def _compiled(rows: list[Row], of: str) -> Table:
    """A row a case. of: what else the title says."""
    headings = (
        *("op", "direction", "by", "chip", "dtype", "shape", "compiled", "VMEM MiB"),
        *("temporaries MB", "bundles", "MXU filled", "spills", "run", "modelled MB", "over floor"),
        *("outside", "modelled µs", "roofline µs"),
    )
    return Table(
        f"Kernels compiled ahead of time{of and ', ' + of} (modelled)",
        headings,
        [
            (r.op, r.direction, r.by, r.chip, r.dtype, r.shape, *_figures(r), *[""] * 11)[:18]
            for r in rows
        ],
        "Temporaries: HBM that the compiled program takes beside arguments and results. Bundles, "
        "MXU slots and spills (vector spills and fills) are of the main loops of the case's "
        "kernels, added up; VMEM is the largest. Run: bundles of all regions, times how "
        "often each runs, without the kernel that finds the visits. Bytes and times are modelled: "
        "bytes by walking the grid (copies made by hand as declared), time as the larger of bytes "
        "at the HBM's rate and work, plus the cycles outside the kernels: XLA's, and those of the "
        "kernel that finds the visits. Work: the bundles of each region times how often it "
        "runs, partial blocks and copies of single rows included, or the FLOPs executed at the "
        "bf16 peak times the share of MXU slots filled, if that is more. Floor: arguments and "
        "results once, untouched experts left out; roofline: floor and full peak. tokamax is "
        "compiled with the tiling that it takes untuned; its bundles are counted by the same "
        "group sizes, its bytes are not.",
    )


def _reached(r: Row) -> float:
    """Share of the roofline by the model."""
    return (r.roofline_us or 0.0) / r.modelled_us if r.modelled_us else 0.0


def _beside_tokamax(rows: list[Row]) -> list[str]:
    """How many bundles ours run of those that tokamax's run, where both are known."""
    run = {(r.by, _beside(r)[:5]): r.bundles_run for r in rows if r.bundles_run}
    shares = [
        run["taskmoe", case] / n
        for (by, case), n in run.items()
        if by == "tokamax" and ("taskmoe", case) in run
    ]
    if not shares:
        return []
    fewer = sum(share < 1 for share in shares)
    return [
        f"Our kernels run {min(shares):.2f} to {max(shares):.2f} times as many bundles as "
        f"tokamax's in {len(shares)} cases, fewer in {fewer}."
    ]


def _beside(row: Row) -> tuple[Any, ...]:
    order = {"op": OPS, "direction": DIRECTIONS, "chip": CHIPS, "dtype": DTYPES, "shape": SHAPES}
    places = (list(known).index(getattr(row, name)) for name, known in order.items())
    return (*places, row.by != "taskmoe", row.by)


def _figures(r: Row) -> tuple[str, ...]:
    if r.error is not None:
        return (r.error,)
    figures = (
        f"{r.compile_s:.1f} s",
        f"{r.vmem_bytes / 2**20:.1f}" if r.vmem_bytes else "",  # not told of every kernel
        "" if r.temporary_bytes is None else f"{r.temporary_bytes / 1e6:,.1f}",
        f"{r.main_bundles:,}",
        f"{r.filled:.1%}",
        f"{r.spills:,}",
        "" if r.bundles_run is None else f"{r.bundles_run:,}",
    )
    if r.modelled_us is None:  # tokamax's grid cannot be walked off TPU
        return figures
    moved = r.moved_bytes or 0
    return (
        *figures,
        f"{moved / 1e6:,.1f}",
        f"{moved / (r.floor_bytes or 1):.2f}",
        "" if r.outside_cycles is None else f"{r.outside_cycles:,}",
        f"{r.modelled_us:,.1f}",
        f"{r.roofline_us:,.1f}",
    )


def _bytes_table(result: Kernels) -> Table:
    return Table.of(
        f"HBM bytes of {expert_bytes.EXPERTS} experts, d_model {expert_bytes.D_MODEL}, d_ff "
        f"{expert_bytes.D_FF}, rows in bf16, random top-{expert_bytes.TOP_K} (modelled)",
        result.expert_bytes,
        {
            "chip": lambda r: r.chip,
            "rows": lambda r: str(r.rows),
            "way": lambda r: r.way,
            "modelled MB": lambda r: f"{r.moved_bytes / 1e6:,.2f}",
            "floor MB": lambda r: f"{r.floor_bytes / 1e6:,.2f}",
            "over floor": lambda r: f"{r.ratio:.3f}",
        },
        "Counted by walking the grid; floor: touched experts' weights once, rows in and rows out. "
        "megablox: the block of rows that moves least, whole matrices.",
    )


def _chart(result: Kernels) -> Figure:
    """Share of the roofline that each kernel reaches by the model, ours and megablox's, by chip."""
    chips = list(dict.fromkeys(r.chip for r in result.kernels))
    figure, axes = plt.subplots(
        1, len(chips), figsize=(11, 4.6), layout="constrained", sharey=True, squeeze=False
    )
    modelled = (f"{r.op} {r.direction}" for r in result.kernels if r.modelled_us)
    names = list(dict.fromkeys(modelled))[::-1]
    styles = {"taskmoe": ("#4c72b0", "o"), "megablox": ("#c44e52", "D")}
    for axis, chip in zip(axes[0], chips, strict=True):
        for by, (colour, marker) in styles.items():
            own = (r for r in result.kernels if r.chip == chip and r.by == by)
            rows = [r for r in own if r.modelled_us]
            share = [_reached(r) * 100 for r in rows]
            place = [names.index(f"{r.op} {r.direction}") for r in rows]
            axis.plot(share, place, marker, color=colour, label=by, linestyle="none")
        axis.set_title(chip)
        axis.set_xlim(0, 105)
        axis.set_xlabel("% of the roofline (modelled)")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure
