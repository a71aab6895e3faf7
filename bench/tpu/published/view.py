"""The model's error beside published measurements, in a table and a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from taskmoe.bench.harness.view import Columns, Table, View
from taskmoe.bench.tpu.published.measure import Published, Row


def _size(r: Row) -> str:
    return f"{r.tokens * r.top_k}x{r.d_model} by {r.experts}x{r.d_model}x{r.d_ff}"


def _speed(r: Row) -> str:
    if r.modelled_tflop_per_s is None:
        return (r.error or "")[:60]
    return f"{r.modelled_tflop_per_s:.0f}"


COLUMNS: Columns[Row] = {
    "chip": lambda r: r.chip,
    "rows x depth by groups x depth x width": _size,
    "blocks": lambda r: r.blocks,
    "modelled TFLOP/s": _speed,
    "published TFLOP/s": lambda r: f"{r.published_tflop_per_s:.0f}",
    "error": lambda r: "" if r.relative_error is None else f"{r.relative_error:+.0%}",
    "of peak, modelled": lambda r: "" if r.share_of_peak is None else f"{r.share_of_peak:.0%}",
}


def view(result: Published) -> View:
    """Every measurement; the exit code is 1 where nothing compiled."""
    table = Table.of(
        "gmm, bf16: our model beside published measurements of tokamax's ragged_dot",
        result.rows,
        COLUMNS,
        f"Published: {result.source}. Group sizes here are random, about equal.",
    )
    firmer = (
        "Ratios of modelled times between kernels on one chip are more reliable than the times, "
        "since most of what is left out is left out of both."
    )
    short = table.only(("chip", "blocks", "modelled TFLOP/s", "published TFLOP/s", "error"))
    code = int(all(row.error is not None for row in result.rows))
    return View(verdict(result.rows), "", [table], findings=[firmer], short=short, code=code)


def verdict(rows: Sequence[Row]) -> str:
    """The model's error in one sentence."""
    errors = [r.relative_error for r in rows if r.relative_error is not None]
    if not errors:
        return "Nothing compiled, so nothing was compared."
    return (
        f"The model is off by {min(errors):+.0%} to {max(errors):+.0%}: it leaves out what "
        "copies wait for and what a call takes to start."
    )
