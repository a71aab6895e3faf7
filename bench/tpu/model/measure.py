"""Parameters, largest batches, and the modelled steps of the paper's systems."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.model.search import Ask, compiler, largest_batch
from taskmoe.bench.tpu.model.step import CORES, SMALLER, SYSTEMS, Step, shapes
from taskmoe.bench.tpu.spec import ModelSpec
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.model.transformer import param_count

#: Seconds that a message takes a hop, assumed.
HOP_S = 1e-6
#: Searches and single compilations a chip, of `look_at`.
STEPS = len(SYSTEMS) + 4
#: Of one core that serves a sub-network in other numbers.
SERVED = ("sub-network", *SMALLER)
SERVED_BATCHES = (8, 64, 256)


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
PARTS = ("embeddings and softmax", "encoder", "decoder", "all")
#: Largest batches of the blog: on 64 cores of TPU v3, and on one.
BLOG_BATCH = {"dense": 4096, "token-MoE": 1024, "sub-network": 4096}
BLOG_COMMUNICATION_SHARE = 0.25
#: Scenarios: both sides take the blog's batches, equal batches a core, or the largest that fit.
BLOG, EQUAL, LARGEST = "the blog's", "equal a core", "largest"


@dataclasses.dataclass(frozen=True)
class Times:
    """Modelled seconds of a step, its speed, and its share in communication."""

    step_s: float = 0.0
    tokens_per_s: float = 0.0
    communication_share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Modelled(Step, Times):
    """A step as compiled, with its modelled times."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Times at another bandwidth. throughput_ratio: sub-networks over the token-MoE."""

    token: Times
    sub: Times
    throughput_ratio: float


@dataclasses.dataclass(frozen=True)
class Scenario:
    """The token-MoE and sub-networks on as many cores, at these batches.

    compute_by: whose estimate of compute, "compiler" or "roofline". sensitivity: the same at half
    and at twice the link's bandwidth.
    """

    batches: str
    compute_by: str
    token: Modelled
    sub: Modelled
    throughput_ratio: float
    sensitivity: dict[str, Pair]


@dataclasses.dataclass(frozen=True)
class Served:
    """A sub-network on one core: its numbers, as compiled, and modelled by the roofline.

    read_bytes: decoder, softmax and cache, once a step. Work counts at the bf16 peak, int8's too.
    """

    system: str
    batch: int
    hbm_bytes: int
    read_bytes: int
    step_s: float
    tokens_per_s: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip: the largest batch of each system, and scenarios by each estimate of compute."""

    chip: str
    largest: dict[str, Step]
    scenarios: list[Scenario]
    times: list[str]
    link_bytes_per_s: float | None = None
    served: list[Served] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Models(Result):
    """System -> part -> millions of parameters, and everything about each chip."""

    machine: dict[str, str]
    parameters_millions: dict[str, dict[str, float]]
    chips: list[Chip]
    command: str = "tpu --model wmt"
    note: str = "HBM, batches and bytes as compiled; times are modelled, nothing is measured"


def measure(spec: ModelSpec) -> Models:
    """Compile and model for every chip."""
    with compiler() as ask, bar("compiling", "system") as move:
        table = parameters()
        total, steps = len(spec.chips) * STEPS, itertools.count()
        move(next(steps), total)
        found = [look_at(chip, ask, lambda: move(next(steps), total)) for chip in spec.chips]
    return Models(machine.describe(), table, found)


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


def look_at(chip: str, ask: Ask, one_more: Callable[[], None]) -> Chip:
    """Everything about one chip.

    one_more: called `STEPS` times, as systems get compiled. The compiler's own estimate of compute
    is used only where it gives one for all scenarios.
    """
    largest = {}
    for system in SYSTEMS:
        largest[system] = largest_batch(system, chip, ask)
        one_more()
    if any(step.error is not None for step in largest.values()):
        return Chip(chip, largest, [], [])

    def compiled(system: str, batch: int) -> Step:
        step = needed_step(chip, system, batch, ask)
        one_more()
        return step

    blog = compiled("token-MoE", BLOG_BATCH["token-MoE"])
    few = compiled("sub-network", BLOG_BATCH["token-MoE"] // CORES["token-MoE"])
    many = compiled("sub-network", BLOG_BATCH["sub-network"])
    pairs = {
        BLOG: (blog, many),
        EQUAL: (blog, few),
        LARGEST: (largest["token-MoE"], largest["sub-network"]),
    }
    told = all(step.optimal_s > 0 for pair in pairs.values() for step in pair)
    times = ["compiler", "roofline"] if told else ["roofline"]
    scenarios = [
        compare(chip, *pair, by, batches=name) for by in times for name, pair in pairs.items()
    ]
    served = [served_at(chip, name, n, ask) for name in SERVED for n in SERVED_BATCHES]
    one_more()
    return Chip(chip, largest, scenarios, times, LINKS[chip].bytes_per_s, served)


def needed_step(chip: str, system: str, batch: int, ask: Ask) -> Step:
    """A step as compiled; InputError where it does not compile."""
    step = ask(system, chip, batch)
    if step.error is not None:
        raise InputError(f"{system} of batch {batch} does not compile for {chip}: {step.error}")
    return step


def served_at(chip: str, system: str, batch: int, ask: Ask) -> Served:
    """A sub-network on one core of a chip; InputError where it does not compile."""
    step = needed_step(chip, system, batch, ask)
    seconds = compute_s(chip, step, "roofline")
    return Served(system, batch, step.hbm_bytes, step.read_bytes, seconds, batch / seconds)


def compare(chip: str, token: Step, sub: Step, by: str, *, batches: str = "") -> Scenario:
    """Modelled times of the token-MoE and of sub-networks on as many cores, at these batches."""

    def times(step: Step, copies: int, factor: float) -> Times:
        wire_s = communication_s(step, factor * LINKS[chip].bytes_per_s)
        step_s = compute_s(chip, step, by) + wire_s
        return Times(step_s, copies * step.batch / step_s, wire_s / step_s)

    def at(factor: float) -> Pair:
        one, many = times(token, 1, factor), times(sub, CORES["token-MoE"], factor)
        return Pair(one, many, many.tokens_per_s / one.tokens_per_s)

    found = at(1)
    return Scenario(
        batches,
        by,
        Modelled(**vars(token) | vars(found.token)),
        Modelled(**vars(sub) | vars(found.sub)),
        found.throughput_ratio,
        {"half": at(0.5), "twice": at(2)},
    )


def compute_s(chip: str, step: Step, by: str) -> float:
    """Modelled seconds of a step without its time on the wire."""
    if by == "compiler":
        return step.optimal_s
    info = kernel_cases.chip_info(chip)
    return max(
        step.flops / info.bf16_ops_per_second, step.read_bytes / info.mem_bw_bytes_per_second
    )


def communication_s(step: Step, bytes_per_s: float) -> float:
    """Modelled seconds of a step's collectives over links of this bandwidth."""
    wire_s = step.exchange_bytes * step.busiest_link / bytes_per_s
    return wire_s + sum(step.collectives.values()) * step.hops * HOP_S


def needed(chip: str, scenario: Scenario) -> float:
    """Bytes/s of a link at which the token-MoE's step has the blog's share of communication."""
    token, share = scenario.token, BLOG_COMMUNICATION_SHARE
    wire_s = compute_s(chip, token, scenario.compute_by) * share / (1 - share)
    rest_s = wire_s - communication_s(token, math.inf)  # without latency
    crossing = token.exchange_bytes * token.busiest_link
    return crossing / rest_s if rest_s > 0 else math.inf
