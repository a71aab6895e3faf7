"""The comparison in a table, a chart, and what the scores say."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from taskmoe.bench.harness import paper
from taskmoe.bench.harness.view import Chart, Table, View
from taskmoe.bench.serving.systems import POSITIONS
from taskmoe.bench.story.study.bootstrap import Bootstrap, Interval
from taskmoe.bench.story.study.measure import ROWS, Row, Studied
from taskmoe.bench.story.study.spec import SYSTEMS
from taskmoe.wmt.training.distillation import gain_kept

HEADINGS = (
    *("system", "BLEU", "seeds", "over equal compute", "over the paper's dense", "paper"),
    "over its dense there",
    *("parameters", "to serve one direction", "tokens/s", "extracted alike"),
)
#: Groups of directions as `averages` names them -> heading; in the order of the table's columns.
GROUPS = {
    "all": "trained directions",
    **{name: name for name in ("xx→en", "en→xx", "xx→yy", "high resource", "low resource")},
    "zero-shot": "zero-shot",
    "all with zero-shot": "trained and zero-shot",
}
SHORT = ("system", "BLEU", *HEADINGS[3:5], "over its dense there", "to serve one direction")


def view(*results: Studied) -> View:
    """A table a study; the exit code is 1 where a sub-network translates otherwise."""
    tables, charts, said, about = [], [], [], []
    for result in results:
        name = "news" if len(result.model.get("pairs", ())) > 12 else "multi30k"
        size = result.model.get("d_model", "")
        steps = result.training.get("steps", 0)
        systems = f"{len(result.rows)} systems after {steps:,} steps"
        title = f"{systems}, {result.sentences:,} test sentences (measured)"
        tables.append(Table(title, HEADINGS, cells(result.rows)))
        tables += _apart(result) + _spent(result)
        draw = functools.partial(_chart, result)
        shown = f"Scores and sizes, {name}, d_model {size}, {steps:,} steps"
        charts.append(Chart(f"study-{name}-{size}-{steps}", shown, draw))
        said += findings(result.rows, result.bootstrap)
        about.append(_about(result))
        if result.left_out:
            seeds = ", ".join(map(str, result.left_out))
            said.append(f"left out, as not all systems have a test.json of it: seed {seeds}")
    wrong = any(r.translations != r.identical for result in results for r in result.rows)
    answer = " ".join(map(_answer, results))
    return View(answer, " ".join(about), tables, charts, said, tables[0].only(SHORT), int(wrong))


def _bleu(rows: Sequence[Row]) -> dict[str, float]:
    return {r.system: float(np.mean(r.test)) for r in rows}


def _answer(result: Studied) -> str:
    bleu = _bleu(result.rows)
    best = max(bleu, key=lambda name: bleu[name])
    where = ""
    if model := result.model:
        where = f" with d_model {model['d_model']} after {result.training['steps']:,} steps"
    said = f"The best system{where} is {SYSTEMS[best]}, with {bleu[best]:.2f} BLEU."
    for name, what in (("target", "by target"), ("token", "by token")):
        if name in bleu:
            over = f"{bleu[name] - bleu['dense']:+.2f} over the dense model of equal compute"
            if "narrow" in bleu:
                over += f", {bleu[name] - bleu['narrow']:+.2f} over the paper's"
            said += f" Routing {what} gains {over}."
    return said


def _about(result: Studied) -> str:
    model, training = result.model, result.training
    if not model:
        return ""
    seeds = max(len(r.seeds) for r in result.rows)
    taught = ""
    if result.taught is not None:
        taught = f"The student learns from {result.taught:,} translated sentences a direction. "
    return (
        f"{len(model['pairs'])} directions, {training['steps']:,} steps of at most "
        f"{training['batch_tokens']:,} tokens for every system, {model['encoder_layers']} + "
        f"{model['decoder_layers']} layers, d_model {model['d_model']}, {model['num_experts']} "
        f"experts of width {model['d_ff']}, {model['vocab_size']:,} words, beam 4; "
        + ("one seed. " if seeds == 1 else f"± is the standard deviation over {seeds} seeds. ")
        + taught
        + f"Tokens/s: the decoder, {ROWS} sentences of one direction, {POSITIONS} positions, "
        f"median of {result.rounds} rounds in turns, one device. Extracted alike: translations of "
        "the validation text that sub-networks and the whole model share."
    )


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line a system, as words under `HEADINGS`."""
    bleu = _bleu(rows)
    lines: list[tuple[str, ...]] = []
    for r in rows:
        name, mean = r.system, bleu[r.system]
        theirs, their_dense = paper.STUDY.get(name, (None, None))
        gain = f"{theirs - their_dense:+.2f}" if theirs and their_dense else ""
        lines.append(
            (
                SYSTEMS[name],
                f"{mean:.2f}" + (f" ± {np.std(r.test, ddof=1):.2f}" if len(r.test) > 1 else ""),
                str(len(r.seeds)),
                over(mean, bleu["dense"], r.over_dense) if name != "dense" else "",
                over(mean, bleu.get("narrow"), r.over_narrow) if name != "narrow" else "",
                f"{theirs:.2f}" if theirs else "",
                gain if name != "narrow" else "",
                f"{r.parameters:,}",
                f"{r.served:,}",
                r.tokens_per_s.words(",.0f"),
                f"{r.identical:,} of {r.translations:,}" if r.translations else "",
            )
        )
    return lines


def _apart(result: Studied) -> list[Table]:
    """Mean BLEU of groups of directions, where the result has them."""
    there = [name for name in GROUPS if any(name in r.averages for r in result.rows)]
    if not there:
        return []
    each = [
        (SYSTEMS[r.system], *(f"{r.averages[n]:.2f}" if n in r.averages else "" for n in there))
        for r in result.rows
    ]
    border = result.high_resource
    note = "" if border is None else f"High resource: trained on {border:,} sentence pairs or more."
    headings = ("system", *(GROUPS[name] for name in there))
    return [Table("Averages apart, BLEU (measured)", headings, each, note)]


def _spent(result: Studied) -> list[Table]:
    """What the trainings took, where their logs tell."""
    told = [r for r in result.rows if r.spent]
    if not told:
        return []
    each = [
        (
            SYSTEMS[r.system],
            f"{r.valid[0]:.2f}",
            f"{r.spent['steps']:,.0f}",
            f"{r.spent['epochs']:.1f}" if "epochs" in r.spent else "",
            f"{r.spent['tokens'] / 1e6:.1f}",
            f"{r.spent['seconds'] / 60:,.0f}",
        )
        for r in told
    ]
    headings = ("system", "validation BLEU", "steps", "epochs", "million tokens", "minutes")
    note = "Tokens of both sides, padding left out. Minutes on the machine that trained it."
    return [Table("Trainings of the first seed (measured)", headings, each, note)]


def over(mean: float, base: float | None, interval: Interval | None) -> str:
    """The difference to a baseline and its interval, where there are such."""
    if base is None:
        return ""
    return f"{mean - base:+.2f}" + (f" {interval.words('+.2f')}" if interval else "")


def findings(rows: Sequence[Row], drawn: Bootstrap | None = None) -> list[str]:
    """What the scores say, sentence by sentence; drawn: the result's `bootstrap`."""
    bleu = _bleu(rows)
    order = sorted(bleu, key=lambda name: -bleu[name])
    lines = ["Best first: " + ", ".join(f"{SYSTEMS[n]} {bleu[n]:.2f}" for n in order) + "."]
    base = "narrow" if "narrow" in bleu else "dense"
    otherwise = [
        SYSTEMS[n]
        for n, (theirs, dense) in paper.STUDY.items()
        if n in bleu and n != base and dense and (bleu[n] > bleu[base]) != (theirs > dense)
    ]
    lines.append(
        f"These compare with {SYSTEMS[base]} otherwise than in the paper: {', '.join(otherwise)}."
        if otherwise
        else f"Every system compares with {SYSTEMS[base]} as in the paper."
    )
    lines += _told_apart(rows, drawn) + _doubtful(rows)
    if not {"token", "target", "distilled"} <= set(bleu):
        return lines
    gain = gain_kept(bleu["dense"], bleu["token"], bleu["distilled"], bleu["target"])
    told = {r.system: r.over_dense for r in rows if r.system in ("token", "target", "distilled")}
    kept = (drawn.kept_of_teacher, drawn.kept_of_task_moe) if drawn else (None, None)
    theirs = paper.DISTILLATION_KEEPS
    for whose, share, keeps, interval in (
        ("the token-routed teacher's", gain.of_teacher, theirs["teacher"], kept[0]),
        ("the task-routed model's", gain.of_task_moe, theirs["task"], kept[1]),
    ):
        if share is None or not np.isfinite(share):
            said = f"There is nothing to keep of {whose} gain over dense: it gains nothing."
        elif share <= 0:
            said = (
                f"The student does not reach dense and keeps nothing of {whose} gain over it "
                f"(the paper: {keeps}%)."
            )
        else:
            said = f"The student keeps {share:.0f}% of {whose} gain (the paper: {keeps}%)."
        lines.append(said)
        if interval is not None:
            ends = f"{interval.low:.0f}% to {interval.high:.0f}%"
            lines.append(f"95% interval of that share: {ends}.")
        elif drawn is not None and share is not None and all(told.values()):
            lines.append(
                "That share has no interval: the gain may be nothing with other sentences."
            )
    return lines


def _told_apart(rows: Sequence[Row], drawn: Bootstrap | None) -> list[str]:
    """Which systems are better or worse than each dense model, and which cannot be told."""
    if drawn is None:
        return [
            "There are no intervals: the translations of the test text were not kept; "
            "runs/study.sh keeps them now."
        ]
    bleu, lines = _bleu(rows), []
    for base in (b for b in ("dense", "narrow") if b in bleu):
        ends = {r.system: r.over_dense if base == "dense" else r.over_narrow for r in rows}
        known = {name: interval for name, interval in ends.items() if interval is not None}
        for what, some in (
            ("With 95% confidence better than", [n for n, i in known.items() if i.low > 0]),
            ("With 95% confidence worse than", [n for n, i in known.items() if i.high < 0]),
            ("Not told apart from", [n for n, i in known.items() if i.low <= 0 <= i.high]),
        ):
            each = ", ".join(f"{SYSTEMS[n]} {over(bleu[n], bleu[base], known[n])}" for n in some)
            lines += [f"{what} {SYSTEMS[base]}: {each}."] * bool(each)
        if lacking := [SYSTEMS[n] for n, i in ends.items() if i is None and n != base]:
            lines.append(
                f"No interval over {SYSTEMS[base]}, as translations were not kept: "
                f"{', '.join(lacking)}."
            )
    lines.append(
        "In brackets: 95% intervals by paired bootstrap over the test sentences "
        f"({drawn.samples:,} samples), with the trained seeds as they are."
    )
    return lines


def _doubtful(rows: Sequence[Row]) -> list[str]:
    """Systems whose differences to dense, seed by seed, spread more than they come to."""
    tests = {r.system: np.array(r.test) for r in rows}
    if len(tests["dense"]) < 2:
        return []
    apart = {n: tests[n] - tests["dense"] for n in tests if n != "dense"}
    small = [
        f"{SYSTEMS[n]} {d.mean():+.2f} ± {d.std(ddof=1):.2f}"
        for n, d in apart.items()
        if abs(d.mean()) < d.std(ddof=1)
    ]
    said = "These differences to dense are no larger than their spread over seeds"
    return [f"{said}: {', '.join(small)}."] * bool(small)


def _chart(result: Studied) -> Figure:
    """Scores (a dot a seed) and parameters that serve one direction, a bar a system."""
    rows = result.rows[::-1]
    names = [SYSTEMS[r.system] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    at = np.arange(len(rows))
    left.barh(at, [np.mean(r.test) for r in rows], color="tab:blue", alpha=0.7)
    for y, r in enumerate(rows):
        left.plot(r.test, [y] * len(r.test), "k.", markersize=5)
    left.set_yticks(at, names)
    left.set_xlabel("test BLEU, mean over directions (a dot a seed)")
    right.barh(at, [r.parameters / 1e6 for r in rows], color="lightgray", label="whole model")
    served = [r.served / 1e6 for r in rows]
    right.barh(at, served, 0.5, color="tab:orange", label="serves one direction")
    right.set_xlabel("million parameters")
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return figure
