"""The paper's models on TPU: parameters, batches and modelled steps, beside what it measured."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from taskmoe.bench.harness import paper
from taskmoe.bench.harness.view import Chart, Row, Table, View
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.model.measure import (
    BLOG,
    BLOG_BATCH,
    BLOG_COMMUNICATION_SHARE,
    EQUAL,
    HOP_S,
    LARGEST,
    LINKS,
    PARTS,
    Chip,
    Modelled,
    Models,
    communication_s,
    needed,
)
from taskmoe.bench.tpu.model.step import CACHE_LENGTH, CAPACITY_FACTOR, CORES, EXPERT, SOURCE_LENGTH

TIMES = {"compiler": "the compiler's estimate", "roofline": "the roofline"}
#: Millions of parameters of `PARTS` as the paper and its blog post have them; None: not told.
PAPER_MILLIONS: dict[str, tuple[float | None, ...]] = {
    "dense": (98, 19, 25, 142),
    "token-MoE": (98, 214, 221, 533),
    "sub-network": (98, None, 31.5, 155),
}


def view(result: Models) -> View:
    """Tables of every chip; the exit code is 1 where a system fits no batch."""
    tables = [_parameters(result)]
    findings = []
    for chip in result.chips:
        tables += [_batches(chip), *(_times(chip, by) for by in chip.times)]
        tables += [_served(chip)] if chip.served else []
        findings += [f"{chip.chip}: {line}" for line in _assumptions(chip)]
    findings = [
        f"The paper measured {paper.COMMUNICATION_SHARE['token']:.1%} in communication and a ratio "
        f"of {paper.THROUGHPUT_RATIO} on 32 cores of TPU v3 (whole decoding), its blog "
        f"{BLOG_COMMUNICATION_SHARE:.0%}.",
        *findings,
    ]
    scenarios = [(chip.chip, row) for chip in result.chips for row in chip.scenarios]
    first = result.chips[0].chip
    short = Table.of(
        "Modelled steps",
        [(chip, s) for chip, s in scenarios if s.batches == BLOG or chip == first][:8],
        {
            "chip": lambda of: of[0],
            "batches": lambda of: of[1].batches,
            "compute by": lambda of: TIMES[of[1].compute_by],
            "token-MoE in communication": lambda of: f"{of[1].token.communication_share:.1%}",
            "throughput ratio": lambda of: f"{of[1].throughput_ratio:.2f}",
        },
    )
    about = (
        "Parameters, memory, batches and bytes as compiled, times modelled. One step on "
        f"{CORES['token-MoE']} cores: the token-MoE expert-parallel against a sub-network a core."
    )
    chart = Chart("tpu-model", "Share in communication over bandwidth", lambda: _chart(result))
    failed = any(step.error for chip in result.chips for step in chip.largest.values())
    return View(_answer(result), about, tables, [chart], findings, short, int(failed))


def _answer(result: Models) -> str:
    """Where the modelled gain comes from, on the first chip."""
    first = result.chips[0]
    ratio = {row.batches: row.throughput_ratio for row in first.scenarios[:3]}
    if not ratio:
        return f"{first.chip}: not every system fits, so nothing was compared."
    return (
        f"With equal batches on each core, sub-networks decode {ratio[EQUAL]:.2f} times as fast as "
        f"token-MoE on {first.chip}; with the largest batches that fit {ratio[LARGEST]:.2f} times; "
        f"with those of the paper's blog post {ratio[BLOG]:.2f} times (modelled). Most of the gain "
        "comes from more sequences that share one reading of the weights, less from time on "
        "the wire."
    )


def _parameters(result: Models) -> Table:
    table = result.parameters_millions
    ratio = table["token-MoE"]["decoder"] / table["sub-network"]["decoder"]

    def both(system: str, part: str) -> str:
        told = PAPER_MILLIONS[system][PARTS.index(part)]
        return f"{table[system][part]:.1f} ({'-' if told is None else f'{told:g}'})"

    rows = [(system, *(both(system, part) for part in PARTS)) for system in table]
    return Table(
        "Parameters in millions (the paper's in brackets), from shapes",
        ("system", *PARTS),
        rows,
        f"Decoder stack of the token-MoE over that of the sub-network: {ratio:.2f} (the paper: "
        f"{paper.DECODER_RATIO:.1f}).",
    )


def _batches(chip: Chip) -> Table:
    rows: list[Row] = []
    for system, step in chip.largest.items():
        cores = CORES[system]
        if step.error is not None:
            rows.append((system, str(cores), "", "", "", "", step.error))
            continue
        power = cores << math.floor(math.log2(step.batch // cores))
        batches = (f"{step.batch:,}", f"{power:,}", f"{BLOG_BATCH[system]:,}")
        memory = f"{step.hbm_bytes / 2**30:.2f}"
        rows.append((system, str(cores), *batches, memory, step.limit or ""))
    return Table(
        f"{chip.chip}: largest batch of one decoding step that compiles, float32",
        ("system", "cores", "batch", "power of two", "blog (v3)", "HBM GiB", "next up"),
        rows,
        "To within 25%, by the compiler's own word. HBM: arguments, results and temporaries of the "
        "step, per core. Next up: why the next batch up does not compile.",
    )


def _times(chip: Chip, by: str) -> Table:
    rows: list[Row] = []
    for row in (s for s in chip.scenarios if s.compute_by == by):
        other = [
            f"{end.token.communication_share:.1%}, {end.throughput_ratio:.2f}"
            for end in row.sensitivity.values()
        ]
        many, ratio = f"{CORES['token-MoE']} x {row.sub.batch:,}", f"{row.throughput_ratio:.2f}"
        token = (f"{row.token.batch:,}", *_figures(row.token))
        rows.append((row.batches, "token-MoE", *token, "", *other))
        rows.append(("", "sub-networks", many, *_figures(row.sub), ratio, "", ""))
    return Table(
        f"{chip.chip}: modelled decoding step, {CORES['token-MoE']} cores: token-MoE "
        f"expert-parallel against one sub-network a core; compute by {TIMES[by]}",
        (
            *("batches", "system", "batch", "HBM GiB a core", "collectives", "sent MB a core"),
            *("step ms", "M tokens/s", "communication", "ratio"),
            *("share, ratio at half bandwidth", "at twice"),
        ),
        rows,
        "Ratio: tokens/s of the sub-networks over the token-MoE's.",
    )


def _served(chip: Chip) -> Table:
    """One core with the sub-network in float32, bf16 and int8."""
    first = {row.batch: row.tokens_per_s for row in chip.served if row.system == "sub-network"}
    return Table.of(
        f"{chip.chip}, one core that serves a sub-network (compiled; times by the roofline)",
        chip.served,
        {
            "system": lambda r: r.system + " in float32" * (r.system == "sub-network"),
            "batch": lambda r: str(r.batch),
            "MB held": lambda r: f"{r.hbm_bytes / 1e6:,.0f}",
            "MB read a step": lambda r: f"{r.read_bytes / 1e6:,.0f}",
            "modelled µs": lambda r: f"{1e6 * r.step_s:,.0f}",
            "tokens/s": lambda r: f"{r.tokens_per_s:,.0f}",
            "over float32": lambda r: f"{r.tokens_per_s / first[r.batch]:.2f}",
        },
        "The cache is bf16 with bf16 and float32 with int8, which many sentences show. Work counts "
        "at the bf16 peak, that of int8 too, whose peak is higher on some chips.",
    )


def _figures(step: Modelled) -> Row:
    return (
        f"{step.hbm_bytes / 2**30:.2f}",
        str(sum(step.collectives.values())),
        f"{step.exchange_bytes / 1e6:.2f}",
        f"{1e3 * step.step_s:.3f}",
        f"{step.tokens_per_s / 1e6:.2f}",
        f"{step.communication_share:.1%}",
    )


def _assumptions(found: Chip) -> list[str]:
    """Every assumption behind one chip's tables, a line each."""
    chip = found.chip
    info, link = kernel_cases.chip_info(chip), LINKS[chip]
    lines = [
        "Assumed:",
        f"- one greedy step, {SOURCE_LENGTH} source positions, a cache of {CACHE_LENGTH}, float32 "
        "(matmuls at default precision: one bf16 pass); decoder only, but the encoder's "
        "parameters lie in HBM too; the cache is written in place",
        f"- token-MoE: GShard's capacity with factor {CAPACITY_FACTOR:g} (room for that many times "
        "an expert's even share, counted on each core; Algorithm 1 has factor 1, which sends half "
        f"as much), strategy all_to_all, {EXPERT} experts one a core, twice",
        f"- link {link.bytes_per_s / 1e9:g} GB/s one way: {link.source}; no wrap-around links; "
        f"{1e6 * HOP_S:g} us a hop a collective, assumed; no overlap of exchange and compute",
        f"- HBM {info.mem_bw_bytes_per_second / 1e9:g} GB/s and {info.bf16_ops_per_second / 1e12:g}"
        " TFLOP/s a core (jax's table of TPUs)",
    ]
    if found.scenarios:
        token = found.scenarios[0].token
        meetings = sum(token.collectives.values())
        latency_s = communication_s(token, math.inf)
        lines += [
            "- roofline: decoder, softmax and cache read once, nothing else: the least time of "
            "compute, by which the share of communication comes out high"
            + ("" if "compiler" in found.times else "; the compiler gives no estimate of time"),
            f"- ops by the platform's rule: {token.kernels} calls of Pallas kernels in the "
            f"token-MoE's step; busiest link: {token.busiest_link:.2f} bytes for each that a "
            f"core sends; {meetings} collectives of {token.hops} hops: {1e6 * latency_s:.0f} us "
            "a step that do not shrink with the batch",
            *(
                f"- by {TIMES[row.compute_by]}, {BLOG_COMMUNICATION_SHARE:.0%} in communication "
                f"at the largest batches would take links of {needed(chip, row) / 1e9:.0f} GB/s"
                for row in found.scenarios
                if row.batches == LARGEST
            ),
        ]
    return [
        *lines,
        "- the blog does not say what limited its batches; here it is HBM, of one step alone "
        "(no beam, no encoding, rows moved without GShard's one-hot dispatch tensors)",
    ]


def _chart(result: Models) -> Figure:
    """Token-MoE's share of a step in communication over the link's bandwidth, a line a scenario."""
    figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
    colours = {"v3": "#c44e52", "v5e": "#4c72b0", "v6e": "#55a868"}
    styles = {BLOG: "o-", EQUAL: "s:", LARGEST: "^--"}
    for one in result.chips:
        by = one.times[0] if one.times else ""
        for row in one.scenarios:
            if row.compute_by != by or row.batches == EQUAL:  # as the blog's
                continue
            link = (one.link_bytes_per_s or 0.0) / 1e9
            ends = row.sensitivity["half"].token, row.token, row.sensitivity["twice"].token
            axis.plot(
                [link / 2, link, 2 * link],
                [100 * end.communication_share for end in ends],
                styles[row.batches],
                color=colours.get(one.chip, "#8c8c8c"),
                label=f"{one.chip}, batch {row.token.batch:,}, by {TIMES[by]}",
            )
    axis.axhline(100 * BLOG_COMMUNICATION_SHARE, color="#8c8c8c", linewidth=1)
    at = (0.01, 100 * BLOG_COMMUNICATION_SHARE - 0.5)
    small = {"xycoords": ("axes fraction", "data"), "va": "top", "fontsize": 8, "color": "#5c5c5c"}
    axis.annotate("the blog: 25%, TPU v3", at, **small)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("GB/s of a link, one way: half, as published, twice")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylabel("% of the token-MoE's step in communication (modelled)")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
