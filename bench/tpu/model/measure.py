"""The paper's WMT models on TPU, compiled ahead of time and modelled: nothing here is measured.

What the compiler decides is a fact: HBM needed, the largest batch that compiles, the collectives of
a step and the bytes they carry. Times are modelled from these facts:

    compute        the compiler's own estimate where it gives one, and the roofline: the larger of
                   FLOPs at the bf16 peak and the bytes that a step must read at the HBM's rate
    communication  bytes over the busiest link / its bandwidth + `HOP_S` a hop a collective
    step           compute + communication: no overlap
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from taskmoe.bench.harness import machine
from taskmoe.bench.story import paper
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.compiler import chosen, need_libtpu
from taskmoe.bench.tpu.model.search import Ask, compiler, largest_batch
from taskmoe.bench.tpu.model.worker import (
    CACHE_LENGTH,
    CAPACITY_FACTOR,
    CORES,
    EXPERT,
    SLICES,
    SOURCE_LENGTH,
    SYSTEMS,
    shapes,
)
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.model.transformer import param_count

MODELS = ("wmt",)
QUICK_CHIPS = ("v3",)  # the blog's
#: Seconds that a message takes a hop, assumed.
HOP_S = 1e-6
#: Searches and single compilations a chip, of `look_at`.
STEPS = len(SYSTEMS) + 3


@dataclasses.dataclass(frozen=True)
class Link:
    """Bandwidth of one link between chips, one way, and where that is published."""

    bytes_per_s: float
    source: str


LINKS = {
    "v3": Link(656e9 / 8, "4 links of 656 Gbit/s a chip (Jouppi et al. 2020, CACM 63(7))"),
    "v5e": Link(50e9, "400 GB/s a chip both ways, 4 ports (Cloud TPU documentation, TPU v5e)"),
    "v6e": Link(100e9, "800 GB/s a chip both ways, 4 ports (Cloud TPU documentation, TPU v6e)"),
}
TIMES = {"compiler": "the compiler's estimate", "roofline": "the roofline"}
PARTS = ("embeddings and softmax", "encoder", "decoder", "all")
#: Millions of parameters of `PARTS` as the paper and its blog post have them; None: not told.
PAPER_MILLIONS: dict[str, tuple[float | None, ...]] = {
    "dense": (98, 19, 25, 142),
    "token-MoE": (98, 214, 221, 533),
    "sub-network": (98, None, 31.5, 155),
}
#: Largest batches of the blog: on 64 cores of TPU v3, and on one.
BLOG_BATCH = {"dense": 4096, "token-MoE": 1024, "sub-network": 4096}
BLOG_COMMUNICATION_SHARE = 0.25


def run(arguments: argparse.Namespace) -> int:
    """Compile, model, print, and write JSON. Exit code 1 where a system fits no batch.

    Raises InputError where an option names what is not there, or libtpu is not installed.
    """
    chosen("model", arguments.model, MODELS, MODELS)
    default = QUICK_CHIPS if arguments.quick else SLICES
    chips = chosen("chip", arguments.chips, SLICES, default)
    need_libtpu()
    table = parameters()
    with compiler() as ask, bar("compiling", "system") as move:
        total, steps = len(chips) * STEPS, itertools.count()
        move(next(steps), total)
        found = [look_at(chip, ask, lambda: move(next(steps), total)) for chip in chips]
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=180)
    console.print(parameter_table(table))
    for one in found:
        console.print(batch_table(one))
        for times in one["times"]:
            console.print(time_table(one, times))
        console.print(*assumptions(one), sep="\n", highlight=False, soft_wrap=True)
        console.print()
    if arguments.json:
        everything = {
            "command": "tpu --model wmt",
            "note": "HBM, batches and bytes as compiled; times are modelled, nothing is measured",
            "machine": machine.describe(),
            "parameters_millions": table,
            "chips": found,
        }
        write_text(arguments.json, json.dumps(everything, indent=1) + "\n")
    return int(any("error" in row for one in found for row in one["largest"].values()))


def parameters() -> dict[str, dict[str, float]]:
    """System -> part -> millions of parameters, counted from the models' shapes."""
    table = {}
    for system in SYSTEMS:
        params = shapes(system)[0]
        names = {
            "encoder": ["encoder", "encoder_norm"],
            "decoder": ["decoder", "decoder_norm"],
            "all": list(params),
        }
        names[PARTS[0]] = [n for n in params if n not in names["encoder"] + names["decoder"]]
        table[system] = {
            part: sum(param_count(params[name]) for name in names[part]) / 1e6 for part in PARTS
        }
    return table


def look_at(chip: str, ask: Ask, one_more: Callable[[], None]) -> dict[str, Any]:
    """Everything about one chip: the largest batches, and the modelled scenarios.

    one_more: called `STEPS` times, as systems get compiled. `times`: the estimates of compute that
    scenarios are modelled by; the compiler's only where it gives one for all of them.
    """
    largest = {}
    for system in SYSTEMS:
        largest[system] = largest_batch(system, chip, ask)
        one_more()
    if any("error" in row for row in largest.values()):
        return {"chip": chip, "largest": largest, "scenarios": [], "times": []}

    def compiled(system: str, batch: int) -> dict[str, Any]:
        facts = ask(system, chip, batch)
        one_more()
        if "error" in facts:
            why = facts["error"]
            raise InputError(f"{system} of batch {batch} does not compile for {chip}: {why}")
        return facts

    token, sub = largest["token-MoE"], largest["sub-network"]
    blog = compiled("token-MoE", BLOG_BATCH["token-MoE"])
    few = compiled("sub-network", BLOG_BATCH["token-MoE"] // CORES["token-MoE"])
    many = compiled("sub-network", BLOG_BATCH["sub-network"])
    pairs = {"the blog's": (blog, many), "equal a core": (blog, few), "largest": (token, sub)}
    told = all(facts["optimal_s"] > 0 for pair in pairs.values() for facts in pair)
    times = ["compiler", "roofline"] if told else ["roofline"]
    return {
        "chip": chip,
        "largest": largest,
        "times": times,
        "link_bytes_per_s": LINKS[chip].bytes_per_s,
        "scenarios": [
            {"batches": name, "compute_by": by, **compare(chip, *pair, by)}
            for by in times
            for name, pair in pairs.items()
        ],
    }


def compare(chip: str, token: dict[str, Any], sub: dict[str, Any], by: str) -> dict[str, Any]:
    """Modelled times of the token-MoE and of sub-networks on as many cores, at these batches.

    by: whose estimate of compute, "compiler" or "roofline". `sensitivity` has the same at half and
    twice the link's bandwidth.
    """

    def at(factor: float) -> dict[str, Any]:
        steps = []
        for facts, copies in ((token, 1), (sub, CORES["token-MoE"])):
            wire_s = communication_s(facts, factor * LINKS[chip].bytes_per_s)
            step_s = compute_s(chip, facts, by) + wire_s
            tokens_per_s = copies * facts["batch"] / step_s
            share = wire_s / step_s
            steps.append(
                {"step_s": step_s, "tokens_per_s": tokens_per_s, "communication_share": share}
            )
        ratio = steps[1]["tokens_per_s"] / steps[0]["tokens_per_s"]
        return {"token": steps[0], "sub": steps[1], "throughput_ratio": ratio}

    found = at(1)
    return {
        "token": token | found["token"],
        "sub": sub | found["sub"],
        "throughput_ratio": found["throughput_ratio"],
        "sensitivity": {"half": at(0.5), "twice": at(2)},
    }


def compute_s(chip: str, facts: dict[str, Any], by: str) -> float:
    """Modelled seconds of a step without its time on the wire."""
    if by == "compiler":
        return float(facts["optimal_s"])
    info = kernel_cases.chip_info(chip)
    return max(
        facts["flops"] / info.bf16_ops_per_second,
        facts["read_bytes"] / info.mem_bw_bytes_per_second,
    )


def communication_s(facts: dict[str, Any], bytes_per_s: float) -> float:
    """Modelled seconds of a step's collectives over links of this bandwidth."""
    meetings = sum(facts["collectives"].values())
    wire_s = facts["exchange_bytes"] * facts["busiest_link"] / bytes_per_s
    return float(wire_s + meetings * facts["hops"] * HOP_S)


def needed(chip: str, scenario: dict[str, Any]) -> float:
    """Bytes/s of a link at which the token-MoE's step has the blog's share of communication."""
    token, share = scenario["token"], BLOG_COMMUNICATION_SHARE
    wire_s = compute_s(chip, token, scenario["compute_by"]) * share / (1 - share)
    rest_s = wire_s - communication_s(token, math.inf)  # without latency
    crossing = token["exchange_bytes"] * token["busiest_link"]
    return float(crossing / rest_s) if rest_s > 0 else math.inf


def parameter_table(table: dict[str, dict[str, float]]) -> Table:
    """Parameters by part, ours beside the paper's."""
    ratio = table["token-MoE"]["decoder"] / table["sub-network"]["decoder"]
    found = Table(
        title="Parameters in millions (the paper's in brackets), from shapes",
        caption=f"Decoder stack of the token-MoE over that of the sub-network: {ratio:.2f} "
        f"(the paper: {paper.DECODER_RATIO:.1f}).",
    )
    found.add_column("system", no_wrap=True)
    for part in PARTS:
        found.add_column(part, justify="right")
    for system, row in table.items():
        said = zip(PARTS, PAPER_MILLIONS[system], strict=True)
        cells = [f"{row[part]:.1f} ({'-' if told is None else f'{told:g}'})" for part, told in said]
        found.add_row(system, *cells)
    return found


def batch_table(found: dict[str, Any]) -> Table:
    """The largest batch of each system that compiles, and what it needs."""
    table = Table(
        title=f"{found['chip']}: largest batch of one decoding step that compiles, float32",
        caption="To within 25%, by the compiler's own word. HBM: arguments, results and "
        "temporaries of the step, per core. Next up: why the next batch up does not compile.",
    )
    for heading in ("system", "cores", "batch", "power of two", "blog (v3)", "HBM GiB", "next up"):
        table.add_column(heading, justify="left" if heading in ("system", "next up") else "right")
    for system, row in found["largest"].items():
        cores = CORES[system]
        if "error" in row:
            table.add_row(system, str(cores), "", "", "", "", row["error"])
            continue
        power = cores << math.floor(math.log2(row["batch"] // cores))
        table.add_row(
            system, str(cores), f"{row['batch']:,}", f"{power:,}", f"{BLOG_BATCH[system]:,}",
            f"{row['hbm_bytes'] / 2**30:.2f}", row["limit"],
        )  # fmt: skip
    return table


def time_table(found: dict[str, Any], times: str) -> Table:
    """Modelled times, shares and ratios of each scenario, compute by one estimate."""
    table = Table(
        title=f"{found['chip']}: modelled decoding step, {CORES['token-MoE']} cores: token-MoE "
        f"expert-parallel against one sub-network a core; compute by {TIMES[times]}",
        caption="Ratio: tokens/s of the sub-networks over the token-MoE's. The paper measured "
        f"{paper.THROUGHPUT_RATIO} and {paper.COMMUNICATION_SHARE['token']:.1%} in communication "
        f"(its blog: {BLOG_COMMUNICATION_SHARE:.0%}), whole decoding, 32 cores of TPU v3.",
    )
    for heading in ("batches", "system"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "batch", "HBM GiB\na core", "collectives", "sent MB\na core", "step ms", "M tokens/s",
        "communi-\ncation", "ratio", "share, ratio at\nhalf bandwidth", "at twice",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found["scenarios"]:
        if row["compute_by"] != times:
            continue
        other = [
            f"{end['token']['communication_share']:.1%}, {end['throughput_ratio']:.2f}"
            for end in row["sensitivity"].values()
        ]
        token, sub, ratio = row["token"], row["sub"], f"{row['throughput_ratio']:.2f}"
        many = f"{CORES['token-MoE']} x {sub['batch']:,}"
        name = row["batches"]
        table.add_row(name, "token-MoE", f"{token['batch']:,}", *_figures(token), "", *other)
        table.add_row("", "sub-networks", many, *_figures(sub), ratio, end_section=True)
    return table


def _figures(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['hbm_bytes'] / 2**30:.2f}",
        str(sum(facts["collectives"].values())),
        f"{facts['exchange_bytes'] / 1e6:.2f}",
        f"{1e3 * facts['step_s']:.3f}",
        f"{facts['tokens_per_s'] / 1e6:.2f}",
        f"{facts['communication_share']:.1%}",
    ]


def assumptions(found: dict[str, Any]) -> list[str]:
    """Every assumption behind one chip's tables, a line each."""
    chip = found["chip"]
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
    if found["scenarios"]:
        token = found["scenarios"][0]["token"]
        meetings = sum(token["collectives"].values())
        latency_s = communication_s(token, math.inf)
        lines += [
            "- roofline: decoder, softmax and cache read once, nothing else: the least time of "
            "compute, by which the share of communication comes out high"
            + ("" if "compiler" in found["times"] else "; the compiler gives no estimate of time"),
            f"- ops by the platform's rule: {token['kernels']} calls of Pallas kernels in the "
            f"token-MoE's step; busiest link: {token['busiest_link']:.2f} bytes for each that a "
            f"core sends; {meetings} collectives of {token['hops']} hops: {1e6 * latency_s:.0f} us "
            "a step that do not shrink with the batch",
            *(
                f"- by {TIMES[row['compute_by']]}, {BLOG_COMMUNICATION_SHARE:.0%} in communication "
                f"at the largest batches would take links of {needed(chip, row) / 1e9:.0f} GB/s"
                for row in found["scenarios"]
                if row["batches"] == "largest"
            ),
        ]
    return [
        *lines,
        "- the blog does not say what limited its batches; here it is HBM, of one step alone "
        "(no beam, no encoding, rows moved without GShard's one-hot dispatch tensors)",
    ]
