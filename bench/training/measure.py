"""A training step's parts, from their specification to milliseconds."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import each
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.training import pytorch
from taskmoe.bench.training.spec import SIZES, Spec
from taskmoe.cli.devices import use_present_devices
from taskmoe.cli.errors import InputError
from taskmoe.wmt.config import PRESETS, ModelConfig, TrainConfig
from taskmoe.wmt.model.transformer import param_count
from taskmoe.wmt.text.data import Batch
from taskmoe.wmt.training.step import apply_gradients, init_state, make_objective, make_train_step

#: System -> routing of encoder and decoder. The dense one is as wide as the experts of a token.
ROUTING = {"dense": "dense", "token-routed": "token", "task-routed": "target"}
TORCH = "dense, PyTorch"
LANGUAGES = 15
#: Largest difference of PyTorch's loss from ours, relative.
TOLERANCE = 1e-4
#: Sizes at which mixtures are too large for a small machine.
DENSE_ONLY = ("base",)


@dataclasses.dataclass(frozen=True)
class Row:
    """A system at a size. Times in ms; backward is the gradient's time less the forward pass's.

    optimiser: of clipping and AdamW alone, given gradients.
    ratio: rounds' steps over those of the dense model.
    """

    size: str
    system: str
    parameters: int
    forward: float
    backward: float
    optimiser: float
    step: Spread
    tokens_per_s: float
    ratio: Spread
    loss: float


@dataclasses.dataclass(frozen=True)
class Trained(Result):
    """A row a system and size."""

    machine: dict[str, str]
    rounds: int
    rows: list[Row]
    command: str = "training"


def measure(spec: Spec) -> Trained:
    """Every system of each size in turns; InputError where PyTorch's loss is another."""
    use_present_devices()
    about = machine.describe()
    if pytorch.is_present():
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(machine.cores())
        about["torch"] = str(torch.__version__)
    rows: list[Row] = []
    for size in each("training", "sizes", spec.sizes):
        rows += _measure_size(size, spec.rounds)
    return Trained(about, spec.rounds, rows)


def _measure_size(size: str, rounds: int) -> list[Row]:
    sentences, length = SIZES[size]
    fields: dict[str, Any] = dict(PRESETS["tiny" if size == "demo" else size][0])
    if size == "demo":
        fields |= {"num_experts": 16, "vocab_size": 3000}
    pairs = tuple(f"en-x{i}" for i in range(LANGUAGES))
    train = TrainConfig(steps=1000, batch_tokens=2 * sentences * length, buckets=(length,))
    rng = np.random.default_rng(0)
    ids = [rng.integers(8, fields["vocab_size"], (sentences, length), np.int32) for _ in range(3)]
    batch = Batch(ids[0], ids[1], ids[2], rng.integers(0, LANGUAGES, sentences).astype(np.int32))
    systems: dict[str, dict[str, Callable[[], Any]]] = {}
    losses, counts = {}, {}
    for name, routing in ROUTING.items():
        if size in DENSE_ONLY and name != "dense":
            continue
        sides: Any = {"encoder": routing, "decoder": routing, "dropout": 0.0}
        config = ModelConfig(pairs=pairs, **{**fields, **sides})
        params = init_state(config, train, None).params
        systems[name] = _parts(config, train, batch)
        losses[name] = float(systems[name]["forward"]()[1]["loss"]) / ids[2].size
        counts[name] = param_count(params)
        if name == "dense" and pytorch.is_present():
            theirs = pytorch.Training(params, config, train, batch)
            ours = float(systems[name]["forward"]()[0])
            losses[TORCH], counts[TORCH] = float(theirs.loss().detach()), counts[name]
            if abs(losses[TORCH] - ours) > TOLERANCE * abs(ours):
                raise InputError(f"{size}: PyTorch's loss is {losses[TORCH]:.6g}, ours {ours:.6g}")
            systems[TORCH] = theirs.parts()
    seconds = alternate(
        {f"{name}/{part}": run for name, parts in systems.items() for part, run in parts.items()},
        rounds=rounds,
        min_seconds=0,
    )
    rows = []
    for name, parts in systems.items():
        ms = {part: 1e3 * float(np.median(seconds[f"{name}/{part}"])) for part in parts}
        step = seconds[f"{name}/step"]
        rows.append(
            Row(
                size,
                name,
                counts[name],
                forward=ms["forward"],
                backward=ms["gradient"] - ms["forward"],
                optimiser=ms["optimiser"],
                step=Spread.of(1e3 * step),
                tokens_per_s=2e3 * sentences * length / ms["step"],
                ratio=Spread.of(step / seconds["dense/step"]),
                loss=losses[name],
            )
        )
    return rows


def _parts(config: ModelConfig, train: TrainConfig, batch: Batch) -> dict[str, Callable[[], Any]]:
    """The forward pass, that and the backward pass, the optimiser, and the whole step, compiled."""
    objective = make_objective(config, train)
    total, key = jnp.float32(batch.target_out.size), jax.random.key(0)
    state = [init_state(config, train, None)]
    params = init_state(config, train, None).params
    update = jax.jit(functools.partial(apply_gradients, train), donate_argnums=0)
    forward, gradient = jax.jit(objective), jax.jit(jax.value_and_grad(objective, has_aux=True))
    step = make_train_step(config, train)

    def whole() -> Any:
        state[0], sums = step(state[0], batch)
        return sums["loss"]

    inputs = params, batch, total, key
    (loss, _), grads = gradient(*inputs)

    def optimiser() -> Any:
        state[0] = update(state[0], grads, loss)
        return state[0].step

    return {
        "forward": functools.partial(forward, *inputs),
        "gradient": functools.partial(gradient, *inputs),
        "optimiser": optimiser,
        "step": whole,
    }
