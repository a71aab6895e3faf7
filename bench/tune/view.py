"""Block sizes by their modelled time, in a table and a sentence."""

from __future__ import annotations

from taskmoe.bench.harness.view import Table, View
from taskmoe.bench.tune.measure import Tuned


def view(result: Tuned) -> View:
    """The fastest first."""
    rows = sorted(result.rows, key=lambda row: (row.modelled_us is None, row.modelled_us or 0.0))
    table = Table(
        f"{result.op} at {result.shape} on {result.chip}, {result.dtype} (modelled)",
        ("blocks m, k, n", "bundles", "modelled µs", "over the best", "by"),
        [
            (
                ", ".join(map(str, row.blocks)),
                "" if row.bundles is None else f"{row.bundles:,}",
                (row.error or "")[:60] if row.modelled_us is None else f"{row.modelled_us:,.1f}",
                ""
                if row.modelled_us is None
                else f"{row.modelled_us / (result.best.modelled_us or 1.0):.2f}",
                "the rule" if row is result.rows[0] else "",
            )
            for row in rows
        ],
        f"Roofline: {result.roofline_us or 0.0:,.1f} µs.",
    )
    best = ", ".join(map(str, result.best.blocks))
    answer = f"The rule's choice misses the best of {len(rows)}, {best}, by {result.missed:.1%}."
    return View(answer, "Compiled for a TPU that was not there; times are modelled.", [table])
