"""Block sizes by their modelled time, in a table and a sentence."""

from __future__ import annotations

from taskmoe.bench.harness.view import Table, View
from taskmoe.bench.tune.measure import Tuned


def view(result: Tuned) -> View:
    """The fastest first."""
    rows = sorted(result.rows, key=lambda row: (row.modelled_us is None, row.modelled_us or 0.0))
    least = result.best.modelled_us or 1.0
    table = Table.of(
        f"{result.op} at {result.shape} on {result.chip}, {result.dtype} (modelled)",
        rows,
        {
            "blocks m, k, n": lambda r: ", ".join(map(str, r.blocks)),
            "bundles": lambda r: "" if r.bundles is None else f"{r.bundles:,}",
            "modelled µs": lambda r: (
                f"{r.modelled_us:,.1f}" if r.modelled_us else str(r.error)[:60]
            ),
            "over the best": lambda r: f"{r.modelled_us / least:.2f}" if r.modelled_us else "",
            "by": lambda r: "the rule" if r is result.rows[0] else "",
        },
        f"Roofline: {result.roofline_us or 0.0:,.1f} µs.",
    )
    best = ", ".join(map(str, result.best.blocks))
    answer = f"The rule's choice misses the best of {len(rows)}, {best}, by {result.missed:.1%}."
    return View(answer, "Compiled for a TPU that was not there; times are modelled.", [table])
