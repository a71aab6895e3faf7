"""The model's error beside published measurements, in a table and a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from taskmoe.bench.harness.view import Table, View
from taskmoe.bench.tpu.published.measure import Published, Row

HEADINGS = (
    *("chip", "rows x depth by groups x depth x width", "blocks"),
    *("modelled TFLOP/s", "published TFLOP/s", "error", "of peak, modelled"),
)


def view(result: Published) -> View:
    """Every measurement; the exit code is 1 where nothing compiled."""
    table = Table(
        "gmm, bf16: our model beside published measurements of tokamax's ragged_dot",
        HEADINGS,
        [cells(row) for row in result.rows],
        f"Published: {result.source}. Group sizes here are random, about equal.",
    )
    firmer = (
        "Ratios of modelled times between kernels on one chip are more reliable than the times, "
        "since most of what is left out is left out of both."
    )
    short = table.only(("chip", "blocks", "modelled TFLOP/s", "published TFLOP/s", "error"))
    code = int(all(row.error is not None for row in result.rows))
    return View(verdict(result.rows), "", [table], findings=[firmer], short=short, code=code)


def cells(r: Row) -> tuple[str, ...]:
    """A row as words under `HEADINGS`."""
    size = f"{r.tokens * r.top_k}x{r.d_model} by {r.experts}x{r.d_model}x{r.d_ff}"
    published = f"{r.published_tflop_per_s:.0f}"
    if r.relative_error is None:
        return (r.chip, size, r.blocks, (r.error or "")[:60], published, "", "")
    return (
        *(r.chip, size, r.blocks, f"{r.modelled_tflop_per_s:.0f}", published),
        *(f"{r.relative_error:+.0%}", f"{r.share_of_peak:.0%}"),
    )


def verdict(rows: Sequence[Row]) -> str:
    """The model's error in one sentence."""
    errors = [r.relative_error for r in rows if r.relative_error is not None]
    if not errors:
        return "Nothing compiled, so nothing was compared."
    return (
        f"The model is off by {min(errors):+.0%} to {max(errors):+.0%}: it leaves out what "
        "copies wait for and what a call takes to start."
    )
