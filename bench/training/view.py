"""Where a training step's time goes, in a table and sentences."""

from __future__ import annotations

from taskmoe.bench.harness.view import Table, View
from taskmoe.bench.training.measure import TORCH, Trained

HEADINGS = (
    *("size", "system", "tokens/s", "forward ms", "backward ms", "optimiser ms"),
    *("step ms (p10 to p90)", "time over dense", "parameters"),
)


def view(result: Trained) -> View:
    """A row a system and size, and how the systems compare."""
    rows = [
        (
            r.size,
            r.system,
            f"{r.tokens_per_s:,.0f}",
            f"{r.forward:.1f}",
            f"{r.backward:.1f}",
            f"{r.optimiser:.1f}",
            r.step.words(".1f"),
            r.ratio.words(".2f"),
            f"{r.parameters:,}",
        )
        for r in result.rows
    ]
    table = Table("A training step (measured)", HEADINGS, rows)
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
    short = table.only(("size", "system", "tokens/s", "step ms (p10 to p90)", "time over dense"))
    return View(" ".join(said), about, [table], findings=notes, short=short)
