"""Throughput over batch: tables, chart, peaks, and what memory would hold."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from taskmoe.bench.harness import paper
from taskmoe.bench.harness.view import Chart, Table, View
from taskmoe.bench.serving.decode.measure import CAPACITY, DENSE, DROPLESS, TASK, Decoded
from taskmoe.bench.serving.points import SPEED, fastest, speeds


def view(result: Decoded) -> View:
    """Every batch and system, and each system's peak; the exit code is 1 where one is wrong."""
    if result.wrong:
        error = result.checks[result.wrong].error
        answer = f"no timing: {result.wrong} differs from one device by {error:.2g}"
        return View(answer, "", [], code=1)
    model, best = result.model, fastest(result.points)
    sizes = (
        f"{result.devices} devices, decoder of {model.decoder_layers} layers, d_model "
        f"{model.d_model}, {model.num_experts} experts"
    )
    about = (
        f"{sizes} (every other layer is a mixture) of width {model.d_ff}, softmax over "
        f"{model.vocab_size:,} words, {result.source_length} source positions, "
        f"{result.positions} tokens a sequence, {result.rounds} rounds in turns, "
        f"{'trained' if result.trained else 'random'} parameters."
    )
    points = Table.of(
        f"Decoding {result.positions} positions, {sizes}, float32 (measured)",
        result.points,
        {
            "batch": lambda r: f"{r.batch:,}",
            "system": lambda r: r.system,
            **SPEED,
            "MB a device": lambda r: f"{r.bytes_per_device / 1e6:,.1f}",
        },
        "Moving and waiting: shares of the time spent in collectives, by the profiler. MB: "
        "parameters, caches and temporaries, as XLA counts them.",
    )
    task = best[TASK].tokens_per_s
    peaks = Table.of(
        "Peaks",
        best.values(),
        {
            "system": lambda r: r.system,
            "peak tokens/s": lambda r: f"{r.tokens_per_s:,.0f}",
            "at batch": lambda r: f"{r.batch:,}",
            "time in collectives": lambda r: f"{r.share:.1%}",
            "sub-networks over it": lambda r: f"{task / r.tokens_per_s:.2f}",
        },
    )
    answer = (
        f"At its best a sub-network on each device decodes {task / best[DROPLESS].tokens_per_s:.2f}"
        " times as fast as the dropless token-routed model on the same devices (the paper: "
        f"{paper.THROUGHPUT_RATIO}, on 32 cores of TPU v3)."
    )
    chart = Chart("decode", "Throughput over batch", lambda: _chart(result))
    return View(answer, about, [points, peaks], [chart], _findings(result), peaks)


def largest(result: Decoded) -> dict[str, int]:
    """System -> largest batch of which memory by XLA's count fits in the RAM that devices share.

    A line through the memory of the smallest and the largest batch measured; nothing was run.
    """
    found = {}
    room = result.ram_bytes / result.devices
    for system in dict.fromkeys(r.system for r in result.points):
        rows = sorted((r.batch, r.bytes_per_device) for r in result.points if r.system == system)
        (low, few), (high, many) = rows[0], rows[-1]
        if high > low and many > few:
            each = (many - few) / (high - low)
            found[system] = int((room - few) / each + low)
    return found


def _findings(result: Decoded) -> list[str]:
    checked = result.checks.values()
    tokens = ""
    if result.trained:
        same, of = sum(c.identical for c in checked), sum(c.tokens for c in checked)
        tokens = f"{same:,} of {of:,} tokens as one device decodes them, "
    tried = max(r.batch for r in result.points)
    fits = ", ".join(f"{name} {n:,}" for name, n in largest(result).items())
    return [
        # Random parameters repeat one token whatever their experts do: only logits differ.
        f"Numerics, checked first: {tokens}logits within {max(c.error for c in checked):.1g} of "
        "one device's, relative to the largest.",
        f"Largest batch that ran: {tried:,}, as many as were asked for. All devices share this "
        f"machine's {result.ram_bytes / 2**30:.0f} GiB, which would hold (modelled): "
        f"{fits or 'not known from one batch'}. The blog, on TPU v3: token-MoE 1,024 over 64 "
        "cores, sub-network and dense 4,096 on one; `tpu --model wmt` compiles those.",
        "Dense replicas do the same work as sub-networks. Devices here are threads that share "
        f"{result.machine['cores']} cores: an exchange costs waking and waiting, but no network.",
    ]


def _chart(result: Decoded) -> Figure:
    """Throughput and share in collectives over batch, a line a system."""
    colours = dict(
        zip((DENSE, DROPLESS, CAPACITY, TASK), ("#8c8c8c", "#c44e52", "#dd8452", "#4c72b0"),
            strict=True)
    )  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for system, colour in colours.items():
        rows = [r for r in result.points if r.system == system]
        speeds(left, rows, colour, unit=1e3, linewidth=0)
        right.plot([r.batch for r in rows], [100 * r.share for r in rows], "o-", color=colour)
    left.set_ylabel("thousand tokens/s, median and p10 to p90")
    right.set_ylabel("% of time in collectives")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("sequences in a batch, all devices")
        axis.set_xticks(sorted({r.batch for r in result.points}))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    right.set_ylim(bottom=-2)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Decoding on {result.devices} host devices (measured)")
    return figure
