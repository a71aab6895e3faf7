"""Where a training step's time goes, in a table and sentences."""

from __future__ import annotations

from taskmoe.bench.harness.view import Columns, Table, View
from taskmoe.bench.training.measure import TORCH, Row, Trained

COLUMNS: Columns[Row] = {
    "size": lambda r: r.size,
    "system": lambda r: r.system,
    "tokens/s": lambda r: f"{r.tokens_per_s:,.0f}",
    "forward ms": lambda r: f"{r.forward:.1f}",
    "backward ms": lambda r: f"{r.backward:.1f}",
    "optimiser ms": lambda r: f"{r.optimiser:.1f}",
    "step ms (p10 to p90)": lambda r: r.step.words(".1f"),
    "time over dense": lambda r: r.ratio.words(".2f"),
    "parameters": lambda r: f"{r.parameters:,}",
}


def view(result: Trained) -> View:
    """A row a system and size, and how the systems compare."""
    table = Table.of("A training step (measured)", result.rows, COLUMNS)
    by = {(r.size, r.system): r.ratio.median for r in result.rows}
    sizes = list(dict.fromkeys(r.size for r in result.rows))
    said = []
    theirs = [f"{by[size, TORCH]:.2f} ({size})" for size in sizes if (size, TORCH) in by]
    if theirs:
        said.append(f"The dense model trains {', '.join(theirs)} times as fast as PyTorch's.")
    for system in ("token-routed", "task-routed"):
        times = [f"{by[size, system]:.2f} ({size})" for size in sizes if (size, system) in by]
        if times:
            said.append(f"A {system} step takes {', '.join(times)} times as long as a dense one.")
    torch = result.machine.get("torch")
    notes = [] if torch else ["PyTorch is not installed, so nothing was compared with it."]
    about = (
        f"float32, AdamW, clipping, label smoothing, {result.rounds} rounds in turns"
        + (f", PyTorch {torch}, eager, with its fused AdamW" if torch else "")
        + ". Backward is the time of a gradient less that of the forward pass. The optimiser is "
        "timed alone: clipping, AdamW and, of ours, leaving out what is not finite."
    )
    columns = "size", "system", "tokens/s", "step ms (p10 to p90)", "time over dense"
    short = table.only(columns, lambda row: row[1] in (TORCH, "task-routed"))
    return View(" ".join(said), about, [table], findings=notes, short=short)
