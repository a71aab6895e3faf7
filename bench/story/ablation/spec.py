"""What `ablation` changes, and for how long it trains."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskmoe.bench.harness.options import chosen, need_at_least_one

DENSE, TOKEN = "dense", "token"
QUICK = (DENSE, TOKEN, "gate/10")


@dataclasses.dataclass(frozen=True)
class Change:
    """What one run has otherwise than the token-routed model.

    what: in words. model, layer, train: fields of ModelConfig, of its mixtures' MoEConfig, and of
    TrainConfig. gate: its first values times this. gate_rate: its learning rate times this. alike:
    whether all experts of a mixture begin as the same.
    """

    what: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gate: float = 1.0
    gate_rate: float = 1.0
    alike: bool = False


_DENSE: dict[str, Any] = {"encoder": "dense", "decoder": "dense"}
#: Name -> change. The two first are what all others are held against.
CHANGES = {
    DENSE: Change("dense, of equal compute", model=_DENSE),
    TOKEN: Change("token-routed, as it is"),
    "dense-seed": Change("dense, another seed", model=_DENSE, train={"seed": 1}),
    "token-seed": Change("another seed", train={"seed": 1}),
    "gate/10": Change("the gate begins ten times as small", gate=0.1),
    "gate*10": Change("the gate begins ten times as large", gate=10.0),
    "rate/10": Change("the gate learns ten times as slowly", gate_rate=0.1),
    "rate*3": Change("the gate learns three times as fast", gate_rate=3.0),
    "norm": Change("the gate sees tokens divided by their norm", layer={"gate_norm": 1e-6}),
    "alike": Change("all experts begin alike", alike=True),
    "balance=0": Change("no load balancing", layer={"load_balance_weight": 0.0}),
    "balance*10": Change("ten times the load balancing", layer={"load_balance_weight": 0.1}),
    "balance-all": Change("load balancing counts all choices", layer={"balance": "all"}),
    "z=0": Change("no z-loss", layer={"z_loss_weight": 0.0}),
    "before": Change("weights are not normalised after choosing", layer={"router": "qwen2_moe"}),
    "top-1": Change("one routed and one shared expert",
                    layer={"top_k": 1, "router": "switch", "shared": 256}),
    "capacity": Change("capacity factor 1.25", layer={"capacity_factor": 1.25}),
    "4": Change("4 experts", model={"num_experts": 4}),
    "8": Change("8 experts", model={"num_experts": 8}),
    "decoder": Change("dense encoder", model={"encoder": "dense"}),
    "encoder": Change("dense decoder", model={"decoder": "dense"}),
    "dropout": Change("dropout 0.1", model={"dropout": 0.1}),
    "epsilon": Change("Adam's epsilon 1e-6", train={"epsilon": 1e-6}),
    "beta2": Change("Adam's second beta 0.999", train={"beta2": 0.999}),
    "warm-up": Change("three times the warm-up", train={"warmup_steps": 300}),
    "warm-up-seed": Change("three times the warm-up, another seed",
                           train={"warmup_steps": 300, "seed": 1}),
    "slow": Change("a third of the learning rate", train={"learning_rate": 1e-3}),
    "fast": Change("twice the learning rate", train={"learning_rate": 6e-3}),
    "batch": Change("twice the batch", train={"batch_tokens": 4096}),
    "dense-warm-up": Change("dense, three times the warm-up", model=_DENSE,
                            train={"warmup_steps": 300}),
    "dense-slow": Change("dense, a third of the learning rate", model=_DENSE,
                         train={"learning_rate": 1e-3}),
    "dense-fast": Change("dense, twice the learning rate", model=_DENSE,
                         train={"learning_rate": 6e-3}),
    "dense-batch": Change("dense, twice the batch", model=_DENSE, train={"batch_tokens": 4096}),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spec:
    """Changes by name, steps of each run, and the training set; None is the demo's corpus.

    work: folder that keeps each run as it ends; None keeps none.
    """

    changes: tuple[str, ...]
    steps: int
    data: Path | None
    work: Path | None = None


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--changes", help=f"comma-separated, of {', '.join(CHANGES)} (all)")
    p.add_argument("--steps", type=int, default=600, help="training steps of each run")
    p.add_argument("--data", type=Path, help="a training set of `prepare` (the demo's corpus)")
    p.add_argument(
        "--work", type=Path, help="keep each run in this folder, and take those that it holds"
    )
    p.add_argument("--quick", action="store_true", help="20 steps, three runs: a look")
    p.add_argument("--png", type=Path, help="draw the curves here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a change is unknown or a number does not fit."""
    need_at_least_one(a, "steps")
    changes = chosen("--changes", a.changes, CHANGES, QUICK if a.quick else CHANGES)
    steps = min(a.steps, 20) if a.quick else a.steps
    return Spec(tuple(dict.fromkeys([DENSE, TOKEN, *changes])), steps, a.data, a.work)
