"""The story's report: claims beside measurements, scores, speeds, models and charts."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from taskmoe.bench.harness import paper
from taskmoe.bench.harness.view import Chart, Row, Table, View
from taskmoe.bench.serving.points import SPEED, Point, fastest, speeds
from taskmoe.bench.story.demo.measure import Demo

NAMES = {
    "narrow": "dense, d_ff (the paper's)",
    "dense": "dense, 2 d_ff (equal compute)",
    "token": "token-MoE",
    "task": "task-MoE",
}
COLOURS = {"narrow": "#c7c7c7", "dense": "#7f7f7f", "token": "#c44e52", "task": "#4c72b0"}
TOKEN, TASK = "token-MoE, dropless", "task-MoE sub-networks"


def view(result: Demo) -> View:
    """Everything; the exit code is 1 where a sub-network translates otherwise than the model."""
    extraction, points = result.extraction, fastest(result.serving.points)
    claimed = Table("Claimed by the paper, measured here", HEADINGS, claims(result))
    ratio = points[TASK].tokens_per_s / points[TOKEN].tokens_per_s
    bleu = result.bleu
    gains = [f"{bleu['task'] - bleu[name]:+.2f}" for name in ("narrow", "dense")]
    answer = (
        f"The task-routed model scores {gains[0]} BLEU over the paper's dense baseline and "
        f"{gains[1]} over a dense model of equal compute, its extracted sub-networks translate "
        f"{extraction.identical} of {extraction.translations} sentences as it does, and decode "
        f"{ratio:.2f} times as fast as the token-routed model on the same devices."
    )
    train, test = result.corpus["train"], result.corpus["test"]
    about = (
        "A token-routed and a task-routed (by target language) Transformer, a dense one of equal "
        "compute per token, and the paper's dense baseline with half of its feed-forward width; "
        f"{result.training['steps']} steps each on {len(train)} directions of "
        f"the embedded CLDR corpus, {sum(train.values()):,} training and {sum(test.values()):,} "
        f"test sentences; {result.seconds:.0f} s in all. The paper is Kudugunta et al. 2021 (arXiv "
        "2110.03742) with its blog post."
    )
    findings = [
        f"Extraction: {extraction.identical} of {extraction.translations} translations by "
        f"{len(extraction.tasks)} sub-networks are identical to the whole model's; the largest "
        f"difference of any logit is {extraction.largest_logit_difference:.2g}.",
        *_caveats(result),
        f"BLEU is sacreBLEU's: {', '.join(extraction.bleu.signatures)}.",
    ]
    charts = [
        Chart("bleu", "BLEU by model", lambda: _bleu(result)),
        Chart("throughput", "Tokens per second over batch size", lambda: _throughput(result)),
        Chart("step_time", "Where the step's time goes", lambda: _step_time(result)),
    ]
    tables = [claimed, *_scores(result), _speeds(result), _models(result)]
    code = int(extraction.identical != extraction.translations)
    short = claimed.only(HEADINGS, lambda row: row[0] != "time in communication, sub-networks")
    return View(answer, about, tables, charts, findings, short, code)


HEADINGS = ("claim", "paper", "here", "remark")


def claims(result: Demo) -> list[tuple[str, str, str, str]]:
    """Rows of what the paper claims and what was measured: claim, paper, here, remark."""
    bleu, extraction, points = result.bleu, result.extraction, fastest(result.serving.points)
    token, task = (points[name] for name in (TOKEN, TASK))
    whole = result.models["task"].decoder_parameters
    ratio = whole / extraction.decoder_parameters
    lost = bleu["task"] - extraction.bleu.averages["all"]
    same = f"{extraction.identical} of {extraction.translations}"
    devices = result.serving.devices

    def gain(a: str, b: str) -> tuple[str, str, str]:
        here = bleu[a] - bleu[b]
        if b not in paper.BLEU:
            return "not there", f"{here:+.2f}", "the same compute a token"
        claimed = paper.BLEU[a] - paper.BLEU[b]
        agrees = (claimed > 0) == (here > 0)
        return f"{claimed:+.2f}", f"{here:+.2f}", "same order" if agrees else "opposite order"

    def share(point: Point) -> str:
        moved, waited = point.transfer_share, point.waiting_share
        return f"{point.share:.1%} ({moved:.1%} moving, {waited:.1%} waiting)"

    return [
        ("BLEU, token-MoE over the paper's dense", *gain("token", "narrow")),
        ("BLEU, task-MoE over the paper's dense", *gain("task", "narrow")),
        ("BLEU, task-MoE over token-MoE", *gain("task", "token")),
        ("BLEU, token-MoE over dense of equal compute", *gain("token", "dense")),
        ("BLEU, task-MoE over dense of equal compute", *gain("task", "dense")),
        ("BLEU lost by extraction", "none", f"{lost:.2f}", f"{same} translations identical"),
        (
            "decoder parameters, whole over sub-network",
            f"{paper.DECODER_RATIO:.1f}",
            f"{ratio:.1f}",
            f"32 experts there, {result.model['num_experts']} here",
        ),
        (
            "peak decoding throughput, task over token",
            f"{paper.THROUGHPUT_RATIO:.2f}",
            f"{task.tokens_per_s / token.tokens_per_s:.2f}",
            f"at batch {task.batch} and {token.batch}",
        ),
        (
            "time in communication, token-MoE",
            f"{paper.COMMUNICATION_SHARE['token']:.1%}",
            share(token),
            f"batch {token.batch}, from the profiler",
        ),
        (
            "time in communication, sub-networks",
            f"{paper.COMMUNICATION_SHARE['task']:.1%}",
            share(task),
            f"{sum(task.collectives.values())} collectives compiled, "
            f"{sum(token.collectives.values())} in the token-MoE",
        ),
        (
            "devices to serve one direction",
            f"{paper.DEVICES['token']} against {paper.DEVICES['task']}",
            f"{devices} against 1",
            f"{token.params_per_device:,} and {task.params_per_device:,} parameters each",
        ),
    ]


def _caveats(result: Demo) -> list[str]:
    """What to bear in mind where this comes out otherwise than the paper."""
    sizes = sorted(m.parameters / 1e6 for m in result.models.values())
    said = [
        f"These are models of {sizes[0]:.1f} to {sizes[-1]:.1f} million parameters after "
        f"{result.training['steps']} steps: the scores show how fast each learns, not how much it "
        "can learn in the end."
    ]
    if result.bleu["token"] < result.bleu["dense"]:
        said.append(
            "A likely reason for the order of the scores: task routing gives each expert its "
            "language from the first step on, while a token gate must first learn what to tell "
            "apart, and until then each of its experts sees only a part of the text."
        )
    said.append(
        f"The {result.serving.devices} devices here are threads that share "
        f"{result.machine['cores']} cores and one memory: an exchange is a copy and a wait for the "
        "other threads, not a network."
    )
    return said


def _scores(result: Demo) -> list[Table]:
    scores = {NAMES[name]: m.bleu for name, m in result.models.items()}
    scores["extracted"] = result.extraction.bleu
    kinds = ("all", "en→xx", "xx→en")
    averages = [(name, *(f"{b.averages[k]:.2f}" for k in kinds)) for name, b in scores.items()]
    each = [
        (pair, *(f"{b.directions[pair]:.1f}" for b in scores.values()))
        for pair in result.extraction.bleu.directions
    ]
    return [
        Table("Average BLEU", ("BLEU", *kinds), averages),
        Table("BLEU of each direction", ("direction", *scores), each),
    ]


def _speeds(result: Demo) -> Table:
    serving = result.serving
    return Table.of(
        f"Greedy decoding of {serving.positions} positions, {serving.devices} devices (measured)",
        serving.points,
        {
            "system": lambda p: p.system,
            "batch": lambda p: str(p.batch),
            **SPEED,
            "parameters a device": lambda p: f"{p.params_per_device:,}",
        },
        "Batch is all sequences together. Moving and waiting are shares of the step in "
        "collectives, by the profiler: waiting lasts until the last device has arrived. Each "
        "sub-network device serves another target language.",
    )


def _models(result: Demo) -> Table:
    rows: list[Row] = [
        (
            NAMES[name],
            f"{m.parameters:,}",
            f"{m.decoder_parameters:,}",
            f"{m.loss:.3f}" if m.loss is not None else "trained earlier",
            f"{m.tokens_per_s:,.0f}" if m.tokens_per_s is not None else "",
            f"{m.seconds:.0f}" if m.loss is not None else "",
        )
        for name, m in result.models.items()
    ]
    small = result.extraction
    sizes = (f"{small.parameters:,}", f"{small.decoder_parameters:,}")
    rows.append(("one sub-network", *sizes, "", "", ""))
    headings = ("model", "parameters", "in the decoder", "last loss", "training tokens/s")
    return Table("Models", (*headings, "seconds"), rows)


def _bleu(result: Demo) -> Figure:
    models = result.models
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.2), width_ratios=[1, 2.6], layout="constrained"
    )
    groups = ("all", "en→xx", "xx→en")
    directions = list(models["task"].bleu.directions)
    order = sorted(directions, key=lambda p: (p.startswith("en-"), p), reverse=True)
    each = {name: [m.bleu.directions[p] for p in order] for name, m in models.items()}
    for i, (name, model) in enumerate(models.items()):
        at = [g + 0.21 * (i - 1.5) for g in range(3)]
        values = [model.bleu.averages[g] for g in groups]
        bars = left.bar(at, values, 0.2, color=COLOURS[name], label=NAMES[name])
        left.bar_label(bars, fmt="%.1f", fontsize=7)
        dot = {"color": COLOURS[name], "markersize": 5 + (i == 3)}
        right.plot(each[name], "o", label=NAMES[name], **dot)
    low, high = np.min(list(each.values()), 0), np.max(list(each.values()), 0)
    right.vlines(range(len(order)), low, high, color="#dddddd", zorder=0)
    left.set_xticks(range(3), groups)
    left.set_ylabel("BLEU")
    left.set_title("average")
    left.margins(y=0.12)
    right.set_xticks(range(len(order)), order, rotation=90, fontsize=8)
    right.set_title("each direction")
    keys = right.get_legend_handles_labels()
    figure.legend(*keys, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _systems(result: Demo) -> list[str]:
    return list(dict.fromkeys(p.system for p in result.serving.points))


_SYSTEM_COLOURS = ("#c44e52", "#dd8452", "#4c72b0")


def _throughput(result: Demo) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for colour, system in zip(_SYSTEM_COLOURS, _systems(result), strict=True):
        points = [p for p in result.serving.points if p.system == system]
        speeds(axis, points, colour)
    axis.set_xscale("log", base=2)
    axis.set_xticks([p.batch for p in points], [str(p.batch) for p in points])
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("sequences decoded together, all devices")
    axis.set_ylabel("tokens per second")
    axis.set_title(f"decoding on {result.serving.devices} devices (median, p10 to p90)")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _step_time(result: Demo) -> Figure:
    systems = _systems(result)
    points = sorted(result.serving.points, key=lambda p: (p.batch, systems.index(p.system)))
    at = [i + i // len(systems) for i in range(len(points))]  # with a gap between batches
    figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
    left = np.zeros(len(points))
    for colour, label, shares in (
        ("#4c72b0", "computing", [1 - p.share for p in points]),
        ("#c44e52", "collectives: moving data", [p.transfer_share for p in points]),
        ("#e9b8ba", "collectives: waiting for other devices", [p.waiting_share for p in points]),
    ):
        axis.barh(at, 100 * np.array(shares), left=left, color=colour, label=label)
        left += 100 * np.array(shares)
    axis.set_yticks(at, [f"{p.system}, batch {p.batch}" for p in points], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of a decoding step, mean over devices, from the profiler")
    axis.legend(loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=3, frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
