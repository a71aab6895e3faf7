"""How near beam search comes to its floor: table, chart and what takes the rest."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from taskmoe.bench.harness.view import Chart, Columns, Table, View
from taskmoe.bench.serving.beam.measure import LONG, SOURCE, Row, Searched

COLUMNS: Columns[Row] = {
    "sentences": lambda r: str(r.batch),
    "ms a step": lambda r: f"{1e3 * r.step_s.median:.1f}",
    "p10 to p90": lambda r: f"{1e3 * r.step_s.p10:.1f} to {1e3 * r.step_s.p90:.1f}",
    "floor ms": lambda r: f"{1e3 * r.floor_s.median:.1f}",
    "over the floor": lambda r: r.over_floor.words(".2f"),
    "steps alone, ms": lambda r: f"{1e3 * r.alone_s.median:.1f}",
    "alone over the floor": lambda r: f"{r.alone_over_floor.median:.2f}",
    "arithmetic ms": lambda r: f"{1e3 * r.arithmetic_s.median:.1f}",
    "tokens/s": lambda r: f"{r.batch / r.step_s.median:.1f}",
}


def view(result: Searched) -> View:
    """A row a batch, and how many are near the floor."""
    title = f"{result.config}, {result.parameters:,} parameters, float32, beam {result.beam}"
    table = Table.of(f"{title} (measured)", result.rows, COLUMNS)
    first, near = result.rows[0], [str(r.batch) for r in result.rows if r.over_floor.median <= 1.5]
    about = (
        f"A sub-network of the {result.config} model's sizes, {result.parameters:,} random "
        f"parameters, float32, beam {result.beam}, {SOURCE} source positions, a cache of {LONG} "
        f"target positions, {result.rounds} rounds in turns. The floor reads "
        f"{first.bytes / 1e6:.0f} MB a step for {first.batch} sentence at "
        f"{first.bytes_per_s.median / 1e9:.1f} GB/s, as measured in the same rounds."
    )
    answer = (
        f"With a batch of {first.batch} a step takes {first.over_floor.median:.2f} times as long "
        "as reading its weights and cache once. Batches within 1.5 times: "
        f"{', '.join(near) or 'none'}."
    )
    search = ", ".join(f"{1e3 * (r.step_s.median - r.alone_s.median):.1f}" for r in result.rows)
    rest = (
        "The rest of a step is arithmetic, which grows with the rows, and the search itself "
        f"(ranking words, putting the cache in order), which takes {search} ms: the difference of "
        "a step with and without it."
    )
    short = table.only(("sentences", "ms a step", "floor ms", "over the floor", "tokens/s"))
    chart = Chart("beam", "Where a step's time goes", lambda: _chart(result))
    return View(answer, about, [table], [chart], [rest], short)


def _chart(result: Searched) -> Figure:
    """Milliseconds of a step, of the step alone, of its floor and of its arithmetic, over batch."""
    rows = result.rows
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    at = np.arange(len(rows))
    bars = (
        ("step_s", "a step of beam search"),
        ("alone_s", "the step without the search"),
        ("floor_s", "floor: bytes over bandwidth"),
        ("arithmetic_s", "arithmetic at the peak rate"),
    )
    for i, (key, label) in enumerate(bars):
        ms = [1e3 * getattr(r, key).median for r in rows]
        axes.bar(at + 0.2 * (i - 1.5), ms, 0.2, label=label)
    axes.set_xticks(at, [str(r.batch) for r in rows])
    axes.set_xlabel(f"sentences at once, beam {result.beam}")
    axes.set_ylabel("ms")
    axes.legend(fontsize=8)
    return figure
