"""What text costs, as a table, carried over to the paper's text."""

from __future__ import annotations

from taskmoe.bench.harness.view import Table, View
from taskmoe.bench.text.measure import Prepared

PAPER = 431_000_000
LARGEST = 0.14  # share of the paper's pairs in its largest direction, as it is taken to be
LINE_BYTES = 20  # that judging holds of each line of a direction
CORES = 64
GB = 1e9


def view(result: Prepared) -> View:
    """A column for what was measured, and for what follows from it."""
    pairs, seconds = result.pairs, {stage.name: stage.seconds for stage in result.stages}
    larger = PAPER / pairs
    fixed = seconds.get("vocabulary", 0.0)
    rest = sum(seconds.values()) - fixed
    own = max(0.0, seconds["reading"] * result.workers - result.reading)
    own += seconds["encoding"] * result.workers
    single = result.reading + seconds.get("judging", 0.0) + seconds.get("merging", 0.0)
    many = max(own / CORES, result.reading) + (single - result.reading)
    rows = [
        ("sentence pairs read", f"{pairs:,}", f"{PAPER:,}", f"{PAPER:,}"),
        ("sentence pairs kept", f"{result.kept:,}", f"{result.kept * larger:,.0f}", "the same"),
        (
            "hours",
            f"{(rest + fixed) / 3600:.2f}",
            f"{(rest * larger + fixed) / 3600:.1f}",
            f"{(many * larger + fixed) / 3600:.1f}",
        ),
        ("text, GB", *_sizes(result.text_bytes, larger), "the same"),
        ("on the way, at most, GB", *_sizes(result.part_bytes, larger), "the same"),
        ("the set, GB", *_sizes(result.set_bytes, larger), "the same"),
        (
            "memory, the generator's included, GB",
            f"{result.memory_bytes / GB:.2f}",
            f"{(result.memory_bytes + LINE_BYTES * LARGEST * (PAPER - pairs)) / GB:.2f}",
            "not known: each worker adds its own",
        ),
        ("seconds to the first batch", f"{result.open_s:.2f}", "the same", "the same"),
    ]
    here = f"{result.workers} workers"
    wmt = f"WMT's text, {here} (extrapolated)", f"{CORES} workers (extrapolated)"
    table = Table("Text made ready for training", ("what", f"measured, {here}", *wmt), rows)
    stages = Table.of(
        "Stages (measured)",
        result.stages,
        {
            "stage": lambda s: s.name,
            "seconds": lambda s: f"{s.seconds:.1f}",
            "pairs/s": lambda s: f"{pairs / s.seconds:,.0f}" if s.seconds else "-",
        },
    )
    right = result.planted_left == result.lost == 0
    said = (
        f"Preparing {pairs:,} pairs takes {(rest + fixed) / 60:.1f} minutes and "
        f"{result.memory_bytes / GB:.1f} GB with the text's generator; WMT's "
        f"{PAPER / 1e6:.0f} million would take {(rest * larger + fixed) / 3600:.1f} hours on the "
        "same cores. Training then starts in "
        f"{result.open_s:.2f} s, and one thread makes {result.batches_per_s:,.0f} batches, "
        f"{result.tokens_per_s:,.0f} tokens, a second."
    )
    findings = [
        "Exactly the planted duplicates and held-out lines are left out."
        if right
        else f"{result.planted_left:,} planted lines were kept, and {result.lost:,} others lost.",
        f"Padding fills {result.padding:.0%} of the batches.",
    ]
    about = (
        "Generated lines, 16 directions of sizes 1 to 400, 10% duplicates, 1% held out. "
        "Extrapolated: by the number of pairs, and with the looking and encoding shared by "
        f"{CORES} workers, no faster than one process reads. Memory grows by {LINE_BYTES} bytes a "
        f"line of the largest direction, which is taken to have {LARGEST:.0%} of all."
    )
    return View(said, about, [table, stages], findings=findings, code=int(not right))


def _sizes(size: int, larger: float) -> tuple[str, str]:
    return f"{size / GB:.2f}", f"{size * larger / GB:.2f}"
