"""Speeds of the engines: table, chart, and how far ours is ahead or behind."""

from __future__ import annotations

import functools
from collections.abc import Sequence

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


def view(*results: Served) -> View:
    """A row a beam, batch and engine; a table a result, the first one's in short."""
    tables, charts, said, answers = [], [], [], []
    for result in results:
        title = f"{result.source}, {result.parameters:,} parameters (measured)"
        tables.append(Table.of(title, result.rows, COLUMNS))
        draw = functools.partial(_chart, result)
        charts.append(Chart(_name(result), f"Tokens a second, {result.source}", draw))
        answers.append(_answer(result))
        said += _findings(result)
    first = results[0]
    ours = [r for r in first.rows if r.beam == first.rows[-1].beam and r.system in OURS]
    short = Table.of(tables[0].title, ours, COLUMNS).only(tuple(COLUMNS)[1:6])
    return View(" ".join(answers), _about(results), tables, charts, said, short)


def _name(result: Served) -> str:
    """Of its chart: random weights, fewer words of them, or a text."""
    if not result.source.startswith("random weights"):
        return "serve-text"
    return "serve-words" if result.source.endswith("words") else "serve"


def _answer(result: Served) -> str:
    if "ctranslate2" not in result.machine:
        return (
            "CTranslate2 is not installed, so nothing was compared with it: "
            "pip install 'taskmoe[ctranslate2]'."
        )
    said = [
        f"in {kind} {min(of):.2f} to {max(of):.2f}"
        for ours, kind in OURS.items()
        for of in [_beside(result.rows, ours).values()]
    ]
    return (
        f"With {result.source}, taskmoe makes {' and '.join(said)} times the tokens of CTranslate2."
    )


def _findings(result: Served) -> list[str]:
    """How each of ours stands at each case, and where translations differ."""
    if "ctranslate2" not in result.machine:
        return []
    said = []
    for ours, kind in OURS.items():
        times = _beside(result.rows, ours)
        parts = []
        for beam in dict.fromkeys(beam for beam, _ in times):
            of = ", ".join(f"{time:.2f} at {n}" for (b, n), time in times.items() if b == beam)
            parts.append(f"{of} with beam {beam}")
        said.append(
            f"With {result.source}, in {kind}, times CTranslate2's tokens, by sentences at once: "
            f"{'; '.join(parts)}."
        )
    different = [r for r in result.rows if r.system in list(THEIRS)[:1] and r.identical < 1]
    if different:
        said.append(
            f"With {result.source} CTranslate2 in float32 translates at least "
            f"{min(r.identical for r in different):.1%} of the sentences as we do in every "
            "case: it looks at fewer ended hypotheses, and ties may fall otherwise."
        )
    return said


def _about(results: Sequence[Served]) -> str:
    sources = "; ".join(
        f"{r.source}: {r.parameters:,} parameters, {r.rounds} rounds in turns"
        + (f", CTranslate2 {r.machine['ctranslate2']}" if "ctranslate2" in r.machine else "")
        for r in results
    )
    return (
        f"{sources}. All cores, no length penalty, each engine in a process of its own. "
        "Tokenization is not timed. MB are what a process holds at most beyond its libraries; the "
        "speed over CTranslate2's is in the same numbers, float32 or int8."
    )


def _beside(rows: list[Row], ours: str) -> dict[tuple[int, int], float]:
    """(beam, sentences) -> our speed over CTranslate2's in the same numbers."""
    name = dict(zip(OURS, THEIRS, strict=True))[ours]
    speed = {(r.system, r.beam, r.batch): r.tokens_per_s.median for r in rows}
    cases = [(r.beam, r.batch) for r in rows if r.system == ours]
    return {case: speed[ours, *case] / speed[name, *case] for case in cases}


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
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure
