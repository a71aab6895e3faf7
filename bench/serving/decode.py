"""Tokens decoded a second over batch size: dense, token-routed, task-routed, on the same devices.

Eight host devices serve each system: one dense replica a device; one task's sub-network a device;
or one token-routed model over all of them, expert-parallel, dropless and with GShard's capacity.
Parameters are random unless --models names trained ones; random ones get their tokens given, drawn
at random, so that their routers spread them. Before anything is timed, what each system finds
likely is compared with the whole model on one device.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.table import Table

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import out
from taskmoe.bench.harness.results import keep
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.serving.systems import System
from taskmoe.bench.story import paper
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.saved import load_model
from taskmoe.wmt.model.subnetwork import one_task
from taskmoe.wmt.model.transformer import Params, Tasks

DENSE, TASK = "dense replicas", "task-MoE sub-networks"
DROPLESS, CAPACITY = "token-MoE, dropless", "token-MoE, capacity 2"
#: Of random models: the decoder that is timed; the encoder is not, and is the smallest there is.
MODEL: dict[str, Any] = {
    "vocab_size": 2000,
    "d_model": 128,
    "d_ff": 256,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "num_experts": 16,
    "tie_embeddings": True,
    "dropout": 0.0,
}
LANGUAGES = ("cs", "de", "es", "et", "fi", "fr", "gu", "hi")
BATCHES, QUICK_BATCHES = (64, 256, 1024, 4096), (64, 512)
#: Sequences that numerics are checked on, and the largest relative difference of logits.
CHECKED, TOLERANCE = 64, 1e-4
HEADINGS = (
    *("batch", "system", "tokens/s", "p10 to p90", "moving", "waiting", "collectives"),
    "MB a device",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--devices", type=int, default=8, help="host devices")
    p.add_argument("--batches", help=f"sequences in all: {','.join(map(str, BATCHES))}")
    p.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="two batches, three rounds: a minute or so")
    p.add_argument(
        "--models",
        type=Path,
        help="folder with dense/model, token/model and task/model, as the demo's work folder; or "
        "with dense-0 and so on, as a study's",
    )
    p.add_argument("--json", type=Path, help="write the results here")
    p.add_argument("--png", type=Path, help="draw throughput over batch here")


def run(a: argparse.Namespace) -> int:
    """Check, measure and print; 1 where a system decodes otherwise than its model on one device."""
    batches = _batches(a)
    if a.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {a.rounds}")
    serving.use_host_devices(a.devices)
    random = a.models is None
    models = random_models() if random else _trained(a.models)
    experts = models["token"][1].num_experts
    if experts % a.devices:
        raise InputError(f"--devices must divide {experts} experts, got {a.devices}")
    systems, checks = build(models, a.devices, given=random)
    for name, check in checks.items():
        if not check.error <= TOLERANCE:
            out.print(f"no timing: {name} differs from one device by {check.error:.2g}")
            return 1
    result = {
        "command": "decode",
        "machine": machine.describe(),
        "model": dataclasses.asdict(models["token"][1]),
        "trained": not random,
        "devices": a.devices,
        "positions": serving.POSITIONS,
        "source_length": serving.SOURCE_LENGTH,
        "rounds": 3 if a.quick else a.rounds,
        "checks": {name: check._asdict() for name, check in checks.items()},
        "points": measure(systems, batches, 3 if a.quick else a.rounds, given=random),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    keep(result, chart, a)
    out.print(_table(result))
    out.print(*verdict(result), sep="\n", soft_wrap=True)
    return 0


def _batches(a: argparse.Namespace) -> list[int]:
    if not 1 <= a.devices <= 64:
        raise InputError(f"--devices must be from 1 to 64 on one host, got {a.devices}")
    if a.batches is None:
        return [b for b in (QUICK_BATCHES if a.quick else BATCHES) if b % a.devices == 0]
    try:
        batches = sorted({int(n) for n in a.batches.split(",")})
    except ValueError:
        raise InputError(f"--batches must be numbers like 64,512, got {a.batches}") from None
    if bad := [n for n in batches if n < 1 or n % a.devices]:
        raise InputError(f"--batches must be multiples of {a.devices}, got {bad[0]}")
    return batches


Models = dict[str, tuple[Params, ModelConfig]]


def random_models() -> Models:
    """Dense, token-routed and task-routed models of equal compute a token."""
    pairs = tuple(f"en-{language}" for language in LANGUAGES)
    found = {}
    for name, side in (("dense", "dense"), ("token", "token"), ("task", "target")):
        sides: Any = {"encoder": "dense", "decoder": side}
        config = ModelConfig(pairs=pairs, **sides, **MODEL)
        found[name] = serving.random_model(config), config
    return found


def _trained(folder: Path) -> Models:
    found = {}
    for name, wanted, other in (
        ("dense", ("dense",), "dense"),
        ("token", ("token",), "token"),
        ("task", ("target", "source", "pair", "static"), "target"),
    ):
        of_study = sorted(folder.glob(f"{other}-[0-9]*/model"))
        path = of_study[0] if of_study else folder / name / "model"
        model = load_model(path)
        if model.config.decoder not in wanted:
            raise InputError(
                f"{path} must have a {' or '.join(wanted)} decoder, its is {model.config.decoder}"
            )
        found[name] = model.params, model.config
    return found


def build(
    models: Models, devices: int, *, given: bool
) -> tuple[dict[str, System], dict[str, serving.Agreement]]:
    """Every system in its place, and how each agrees with one device; given: as `inputs`."""
    mesh = serving.device_mesh(devices)
    (dense, dense_config), (token, token_config) = models["dense"], models["token"]
    task, task_config = models["task"]
    tight = dataclasses.replace(token_config, capacity_factor=2.0)
    number = len(task_config.tasks("decoder"))
    served = np.arange(devices) % number  # the task of each device
    small_config = task_config
    subs = []
    for one in served:
        # Only the decoder is timed: its task is what matters.
        params, small_config, _ = one_task(task, task_config, Tasks(None, np.int32(one)))
        subs.append(params)
    systems = {
        DENSE: serving.sub_networks([dense] * devices, dense_config, mesh),
        DROPLESS: serving.expert_parallel(token, token_config, mesh, "auto"),
        CAPACITY: serving.expert_parallel(token, tight, mesh),
        TASK: serving.sub_networks(subs, small_config, mesh),
    }
    rows = -(-CHECKED // devices) * devices
    tasks = np.repeat(served, rows // devices).astype(np.int32)
    # Capacity is counted on each device's own rows, so one device drops others: it cannot agree,
    # and stands on the dropless system's check of the same strategy and path.
    agreement = functools.partial(serving.agreement, batch=rows, given=given)
    checks = {
        DENSE: agreement(systems[DENSE], dense, dense_config),
        DROPLESS: agreement(systems[DROPLESS], token, token_config),
        TASK: agreement(systems[TASK], task, task_config, task=tasks),
    }
    roomy = dataclasses.replace(tight, capacity_factor=float(tight.num_experts))
    spread = serving.expert_parallel(token, roomy, mesh)
    checks[CAPACITY] = agreement(spread, token, roomy)
    return systems, checks


def measure(
    systems: dict[str, System], batches: list[int], rounds: int, *, given: bool
) -> list[dict[str, Any]]:
    """A row a system and batch, as `serving.measure`."""
    points = []
    with bar("decoding", "batch sizes") as progress:
        progress(0, len(batches))
        for number, batch in enumerate(batches):
            points += serving.measure(systems, batch, rounds=rounds, given=given)
            progress(number + 1, len(batches))
    return points


def cells(r: dict[str, Any]) -> tuple[str, ...]:
    """A row of results as words under `HEADINGS`."""
    return (
        f"{r['batch']:,}",
        r["system"],
        f"{r['tokens_per_s']:,.0f}",
        f"{r['tokens_per_s_p10']:,.0f} to {r['tokens_per_s_p90']:,.0f}",
        f"{r['transfer_share']:.1%}",
        f"{r['waiting_share']:.1%}",
        ", ".join(f"{n} {kind}" for kind, n in r["collectives"].items()) or "0",
        f"{r['bytes_per_device'] / 1e6:,.1f}",
    )


def _table(result: dict[str, Any]) -> Table:
    model = result["model"]
    table = Table(
        *HEADINGS,
        title=f"Decoding {result['positions']} positions, {result['devices']} devices, decoder of "
        f"{model['decoder_layers']} layers, d_model {model['d_model']}, {model['num_experts']} "
        "experts, float32 (measured)",
        caption="Moving and waiting: shares of the time in collectives, by the profiler. MB: "
        "parameters, caches and temporaries, as XLA counts them.",
    )
    for r in result["points"]:
        table.add_row(*cells(r))
    return table


def peaks(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """System -> its fastest row."""
    best: dict[str, dict[str, Any]] = {}
    for r in result["points"]:
        if r["system"] not in best or r["tokens_per_s"] > best[r["system"]]["tokens_per_s"]:
            best[r["system"]] = r
    return best


def largest(result: dict[str, Any]) -> dict[str, int]:
    """System -> largest batch of which memory by XLA's count fits in the RAM that devices share.

    A line through the memory of the smallest and the largest batch measured; nothing was run.
    """
    found = {}
    room = result["ram_bytes"] / result["devices"]
    for system in dict.fromkeys(r["system"] for r in result["points"]):
        rows = sorted((r["batch"], r["bytes_per_device"]) for r in result["points"]
                      if r["system"] == system)  # fmt: skip
        (low, few), (high, many) = rows[0], rows[-1]
        if high > low and many > few:
            each = (many - few) / (high - low)
            found[system] = int((room - few) / each + low)
    return found


def verdict(result: dict[str, Any]) -> list[str]:
    """What came out of it, a line a finding."""
    best = peaks(result)
    task = best[TASK]["tokens_per_s"]
    ratio = {name: task / r["tokens_per_s"] for name, r in best.items() if name != TASK}
    checked = result["checks"].values()
    tokens = ""
    if result["trained"]:
        same, of = (sum(c[name] for c in checked) for name in ("identical", "tokens"))
        tokens = f"{same:,} of {of:,} tokens as one device decodes them, "
    tried = max(r["batch"] for r in result["points"])
    fits = ", ".join(f"{name} {n:,}" for name, n in largest(result).items())
    return [
        "Peaks, sub-networks over "
        + ", ".join(f"{name}: {value:.2f}" for name, value in ratio.items())
        + f" (the paper, over token-MoE on 32 cores of TPU v3: {paper.THROUGHPUT_RATIO})",
        # Random parameters repeat one token whatever their experts do: only logits tell of them.
        f"Numerics, checked first: {tokens}logits within {max(c['error'] for c in checked):.1g} of "
        "one device's, relative to the largest",
        f"Largest batch: {tried:,} ran, as many as were asked for. All devices share this "
        f"machine's {result['ram_bytes'] / 2**30:.0f} GiB, by which there would fit (modelled): "
        f"{fits or 'one batch tells nothing'}. The blog, on TPU v3: token-MoE 1,024 over 64 cores, "
        "sub-network and dense 4,096 on one; `tpu --model wmt` compiles those.",
    ]


def chart(result: dict[str, Any]) -> Any:
    """Throughput and share in collectives over batch, a line a system."""
    colours = dict(
        zip((DENSE, DROPLESS, CAPACITY, TASK), ("#8c8c8c", "#c44e52", "#dd8452", "#4c72b0"),
            strict=True)
    )  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for system, colour in colours.items():
        rows = [r for r in result["points"] if r["system"] == system]
        batches = [r["batch"] for r in rows]
        middle = [r["tokens_per_s"] / 1e3 for r in rows]
        low = [r["tokens_per_s_p10"] / 1e3 for r in rows]
        high = [r["tokens_per_s_p90"] / 1e3 for r in rows]
        left.plot(batches, middle, "o-", label=system, color=colour)
        left.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
        share = [100 * (r["transfer_share"] + r["waiting_share"]) for r in rows]
        right.plot(batches, share, "o-", color=colour)
    left.set_ylabel("thousand tokens/s, median and p10 to p90")
    right.set_ylabel("% of time in collectives")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("sequences in a batch, all devices")
        axis.set_xticks(sorted({r["batch"] for r in result["points"]}))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    right.set_ylim(bottom=-2)
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Decoding on {result['devices']} host devices (measured)")
    return figure
