"""The losses in a table, every curve in a chart, and which changes count."""

from __future__ import annotations

import functools
import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from taskmoe.bench.harness.view import Chart, Table, View
from taskmoe.bench.story.ablation.measure import Ablated, Run
from taskmoe.bench.story.ablation.spec import DENSE, TOKEN


def view(*results: Ablated) -> View:
    """A table and a chart a corpus."""
    tables, charts, said, answers, about = [], [], [], [], []
    for number, result in enumerate(results):
        tables.append(_table(result))
        name = "ablation" + (f"-{number + 1}" if number else "")
        draw = functools.partial(_chart, result)
        charts.append(Chart(name, f"Training losses, {result.text}", draw))
        answers.append(_answer(result))
        said.append(_counting(result))
        about.append(_about(result))
    return View(" ".join(answers), " ".join(about), tables, charts, said, _few(tables[0]))


def _losses(result: Ablated) -> dict[str, float]:
    return {run.name: run.unseen for run in result.runs}


def _table(result: Ablated) -> Table:
    loss = _losses(result)

    def over(run: Run, base: str) -> str:
        return "" if run.name == base else f"{run.unseen - loss[base]:+.3f}"

    return Table.of(
        f"{result.text}, {result.steps:,} steps (measured)",
        result.runs,
        {
            "change": lambda run: run.what,
            "loss on unseen text": lambda run: f"{run.unseen:.3f}",
            "over token-routed": lambda run: over(run, TOKEN),
            "over dense": lambda run: over(run, DENSE),
            "busiest expert": lambda run: "" if run.busiest is None else f"{run.busiest:.1f}x",
        },
    )


def _few(table: Table) -> Table:
    """The two models that all are held against, and the changes that count most."""
    rows = table.rows[2:]
    most = sorted(rows, key=lambda row: -abs(float(row[2])))[:6]
    return Table(table.title, table.headings, [*table.rows[:2], *(r for r in rows if r in most)])


def _answer(result: Ablated) -> str:
    loss = _losses(result)
    apart = loss[TOKEN] - loss[DENSE]
    way = "below" if apart < 0 else "above"
    noise = _noise(loss)
    seeds = "" if noise is None else f"; another seed changes a loss by up to {noise:.3f}"
    return (
        f"On {result.text} the token-routed model's loss on unseen text, {loss[TOKEN]:.3f}, is "
        f"{abs(apart):.3f} {way} that of the dense model of equal compute after {result.steps:,} "
        f"steps{seeds}."
    )


def _noise(loss: dict[str, float]) -> float | None:
    """How far the losses of two seeds lie apart at most; None where each run has one."""
    seeds = [abs(loss[f"{x}-seed"] - loss[x]) for x in (TOKEN, DENSE) if f"{x}-seed" in loss]
    return max(seeds, default=None)


def _counting(result: Ablated) -> str:
    """The changes that do more than another seed does."""
    loss = _losses(result)
    noise = _noise(loss)
    if noise is None:
        return "No run has another seed, so nothing says which differences count."
    others = [r for r in result.runs if not r.name.startswith(DENSE) and r.name != TOKEN]
    better = [r for r in others if r.unseen < loss[TOKEN] - noise]
    worse = [r for r in others if r.unseen > loss[TOKEN] + noise]

    def listed(runs: list[Run]) -> str:
        ordered = sorted(runs, key=lambda r: r.unseen)
        return ", ".join(f"{r.what} ({r.unseen - loss[TOKEN]:+.3f})" for r in ordered) or "none"

    return (
        f"On {result.text} another seed changes a loss by up to {noise:.3f}. Changes of the "
        f"token-routed model that lower it by more: {listed(better)}. That raise it by more: "
        f"{listed(worse)}."
    )


def _about(result: Ablated) -> str:
    model, training = result.model, result.training
    return (
        f"{result.text}: {result.steps:,} steps of at most {training['batch_tokens']:,} tokens, "
        f"{model['encoder_layers']} + {model['decoder_layers']} layers, d_model "
        f"{model['d_model']}, {model['num_experts']} experts of width {model['d_ff']}, two for a "
        f"token, {model['vocab_size']:,} words. Losses are nats a target token, without smoothing."
    )


def _chart(result: Ablated) -> Figure:
    """A panel a change: its training loss less the token-routed model's, dense in grey.

    Where nothing is changed, one panel has the dense model alone.
    """
    curves = {run.name: np.array(run.curve) for run in result.runs}
    changed = [run for run in result.runs if run.name not in (DENSE, TOKEN)]
    shown = changed or [run for run in result.runs if run.name == DENSE]
    across = min(6, len(shown))
    down = math.ceil(len(shown) / across)
    figure, panels = plt.subplots(
        down, across, figsize=(max(2.2 * across, 4), max(1.7 * down, 3)), sharex=True, sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    steps = np.linspace(result.steps / len(curves[TOKEN]), result.steps, len(curves[TOKEN]))
    for axes, run in zip(panels.flat, shown, strict=False):
        axes.axhline(0, color="black", linewidth=0.6)
        axes.plot(steps, curves[DENSE] - curves[TOKEN], color="0.7", label="dense")
        if changed:
            axes.plot(steps, curves[run.name] - curves[TOKEN], color="C0", label="changed")
        axes.set_title(textwrap.fill(run.what, 30), fontsize=7)
        axes.tick_params(labelsize=6)
    panels[0][0].set_ylim(-0.5, 0.5)
    panels[0][0].legend(fontsize=6)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("steps", fontsize=8)
    figure.supylabel("loss less the token-routed model's", fontsize=8)
    return figure
