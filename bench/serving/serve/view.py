"""Speeds of the engines: table, chart, and how far ours is ahead or behind."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from taskmoe.bench.harness.view import Chart, Columns, Table, View
from taskmoe.bench.serving.serve.engines import OURS, THEIRS
from taskmoe.bench.serving.serve.measure import Row, Served

COLUMNS: Columns[Row] = {
    "beam": lambda r: str(r.beam),
    "sentences": lambda r: str(r.batch),
    "engine": lambda r: r.system,
    "sentences/s": lambda r: f"{r.sentences_per_s.median:.2f}",
    "tokens/s (p10 to p90)": lambda r: r.tokens_per_s.words(".0f"),
    "over CTranslate2's": lambda r: r.over.words(".2f") if r.over else "",
    "one sentence, p50 and p95 ms": lambda r: ", ".join(f"{ms:.0f}" for ms in r.latency_ms or ()),
    "MB": lambda r: "" if r.memory_bytes is None else f"{r.memory_bytes / 2**20:.0f}",
    "as ours": lambda r: f"{r.identical:.1%}",
}


def view(result: Served) -> View:
    """A row a beam, batch and engine."""
    title = f"{result.source}, {result.parameters:,} parameters (measured)"
    table = Table.of(title, result.rows, COLUMNS)
    said = []
    engine = result.machine.get("ctranslate2")
    answer = (
        "CTranslate2 is not installed, so nothing was compared with it: "
        "pip install 'taskmoe[ctranslate2]'."
    )
    if engine is not None:
        times = {ours: _times(result.rows, ours, n) for ours, n in zip(OURS, THEIRS, strict=True)}
        answer = " ".join(
            f"In {OURS[ours]} taskmoe makes {min(of.values()):.2f} to {max(of.values()):.2f} times "
            "the tokens of CTranslate2."
            for ours, of in times.items()
        )
        said += [_beside(ours, n, times[ours]) for ours, n in zip(OURS, THEIRS, strict=True)]
        different = [r for r in result.rows if r.system in list(THEIRS)[:1] and r.identical < 1]
        if different:
            said.append(
                f"CTranslate2 in float32 translates at least "
                f"{min(r.identical for r in different):.1%} of the sentences as we do in every "
                "case: it looks at fewer ended hypotheses, and ties may fall otherwise."
            )
    about = (
        f"{result.source}; {result.parameters:,} parameters, all cores, no length penalty, "
        f"{result.rounds} rounds in turns"
        + (f", CTranslate2 {engine}" if engine else "")
        + ", each engine in a process of its own. Tokenization is not timed. MB are what a process "
        "holds at most beyond its libraries; the speed over CTranslate2's is in the same numbers, "
        "float32 or int8."
    )
    ours = [r for r in result.rows if r.beam == result.rows[-1].beam and r.system in OURS]
    short = Table.of(title, ours, COLUMNS).only(tuple(COLUMNS)[1:6])
    chart = Chart("serve", "Tokens a second by engine and batch", lambda: _chart(result))
    return View(answer, about, [table], [chart], said, short)


def _times(rows: list[Row], ours: str, name: str) -> dict[tuple[int, int], float]:
    """(beam, sentences) -> our speed over an engine's."""
    speed = {(r.system, r.beam, r.batch): r.tokens_per_s.median for r in rows}
    cases = [(r.beam, r.batch) for r in rows if r.system == ours]
    return {case: speed[ours, *case] / speed[name, *case] for case in cases}


def _beside(ours: str, name: str, times: dict[tuple[int, int], float]) -> str:
    """Our speed over an engine's at each beam and batch, in a sentence."""
    parts = []
    for beam in dict.fromkeys(beam for beam, _ in times):
        of = ", ".join(f"{time:.2f} at {n}" for (b, n), time in times.items() if b == beam)
        parts.append(f"{of} with beam {beam}")
    return f"{ours}, over {name}, by sentences at once: {'; '.join(parts)}."


def _chart(result: Served) -> Figure:
    """Tokens a second over the batch, a panel a beam."""
    beams = list(dict.fromkeys(r.beam for r in result.rows))
    figure, panels = plt.subplots(
        1, len(beams), figsize=(4 * len(beams), 3.6), layout="constrained", squeeze=False
    )
    for axes, beam in zip(panels[0], beams, strict=True):
        for system in dict.fromkeys(r.system for r in result.rows):
            rows = [r for r in result.rows if r.system == system and r.beam == beam]
            sizes = [r.batch for r in rows]
            axes.plot(sizes, [r.tokens_per_s.median for r in rows], marker="o", label=system)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_xlabel(f"sentences at once, beam {beam}")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
    panels[0][0].legend(fontsize=8)
    return figure
