"""What routing by task costs, in a table and a sentence."""

from __future__ import annotations

from taskmoe.bench.harness.view import Columns, Table, View
from taskmoe.bench.serving.task.measure import LAYER, Row, Tasks

TOLERANCE = 1e-5
COLUMNS: Columns[Row] = {
    "direction": lambda r: r.direction,
    "system": lambda r: r.system,
    "ms": lambda r: f"{r.ms:.1f}",
    "p10 to p90": lambda r: f"{r.ms_p10:.1f} to {r.ms_p90:.1f}",
    "time over dense": lambda r: f"{r.ratio:.3f} ({r.ratio_p10:.3f} to {r.ratio_p90:.3f})",
    "collectives": lambda r: str(r.collectives),
}


def view(result: Tasks) -> View:
    """Every system in both directions; the exit code is 1 where results differ."""
    sizes = (
        f"{result.tokens:,} tokens, {result.experts} experts, d_model {result.d_model}, d_ff "
        f"{result.d_ff}, float32"
    )
    table = Table.of(f"{sizes} (measured)", result.rows, COLUMNS)
    if result.error > TOLERANCE:
        answer = f"The layer differs from the dense FFN by {result.error:.2g}."
    else:
        times = [f"{r.ratio:.2f} times as long {r.direction}" for r in result.rows
                 if r.system == LAYER]  # fmt: skip
        answer = (
            f"A batch of one task takes {' and '.join(times)}, compared with a dense layer of the "
            "same width."
        )
    why = (
        "The layer runs such a batch as one dense layer. Backward, the whole layer also fills a "
        "gradient for every expert; an extracted sub-network has no such experts."
    )
    short = table.only(("direction", "system", "ms", "time over dense", "collectives"))
    code = int(result.error > TOLERANCE)
    return View(answer, f"One layer, {sizes}.", [table], findings=[why], short=short, code=code)
