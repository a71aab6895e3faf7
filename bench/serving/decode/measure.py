"""Every system checked against one device, then timed over batch sizes."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import each
from taskmoe.bench.harness.results import Result
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.serving.decode.spec import Spec
from taskmoe.bench.serving.points import Point
from taskmoe.bench.serving.systems import Agreement, System
from taskmoe.cli.errors import InputError
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
#: Sequences that numerics are checked on, and the largest relative difference of logits.
CHECKED, TOLERANCE = 64, 1e-4


@dataclasses.dataclass(frozen=True)
class Decoded(Result):
    """A point a batch and system; none where a system decodes otherwise than on one device."""

    command: str
    machine: dict[str, str]
    model: ModelConfig
    trained: bool
    devices: int
    positions: int
    source_length: int
    rounds: int
    checks: dict[str, Agreement]
    points: list[Point]
    ram_bytes: int

    @property
    def wrong(self) -> str | None:
        """A system that decodes otherwise than its model on one device."""
        return next((n for n, check in self.checks.items() if not check.error <= TOLERANCE), None)


def measure(spec: Spec) -> Decoded:
    """Check, and measure where every system agrees."""
    serving.use_host_devices(spec.devices)
    random = spec.models is None
    models = random_models() if spec.models is None else _trained(spec.models)
    config = models["token"][1]
    if config.num_experts % spec.devices:
        raise InputError(f"--devices must divide {config.num_experts} experts, got {spec.devices}")
    systems, checks = build(models, spec.devices, given=random)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = Decoded(
        "decode", machine.describe(), config, not random, spec.devices, serving.POSITIONS,
        serving.SOURCE_LENGTH, spec.rounds, checks, [], memory,
    )  # fmt: skip
    if found.wrong:
        return found
    for batch in each("decoding", "batch sizes", spec.batches):
        found.points.extend(serving.measure(systems, batch, rounds=spec.rounds, given=random))
    return found


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
    served = np.arange(devices) % len(task_config.tasks("decoder"))  # the task of each device
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
    agreement = functools.partial(serving.agreement, batch=rows, given=given)
    checks = {
        DENSE: agreement(systems[DENSE], dense, dense_config),
        DROPLESS: agreement(systems[DROPLESS], token, token_config),
        TASK: agreement(systems[TASK], task, task_config, task=tasks),
    }
    roomy = serving.with_room(tight)
    checks[CAPACITY] = agreement(serving.expert_parallel(token, roomy, mesh), token, roomy)
    return systems, checks
