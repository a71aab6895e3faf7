"""One training run a change, with its losses."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result, load
from taskmoe.bench.story.ablation.spec import CHANGES, Change, Spec
from taskmoe.bench.story.demo.measure import MODEL, PAIRS, TRAIN, corpus
from taskmoe.cli.command_line import write_text
from taskmoe.cli.devices import use_present_devices
from taskmoe.cli.progress import bar
from taskmoe.moe import MoEConfig
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.transformer import Params, init
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.rows import encode
from taskmoe.wmt.text.sources import open_source, read_split
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.text.training_set import TrainingSet
from taskmoe.wmt.training.step import State, init_state, make_objective, make_train_step

SENTENCES = 50  # of each direction that the demo's models are scored on
BATCHES = 60  # of unseen text
CURVE = 30  # points of each curve


@dataclasses.dataclass(frozen=True)
class Run:
    """A change. Losses in nats a target token: of unseen text, and of training along the way.

    busiest: load of the busiest expert of all layers over the even one, in the last step.
    """

    name: str
    what: str
    unseen: float
    curve: list[float]
    busiest: float | None


@dataclasses.dataclass(frozen=True)
class Ablated(Result):
    """A run a change; text: the corpus in words."""

    machine: dict[str, str]
    text: str
    steps: int
    model: dict[str, Any]
    training: dict[str, Any]
    runs: list[Run]
    command: str = "ablation"


class _Text(NamedTuple):
    """title: in words. identity: differs where the text does.

    data, unseen: what a run learns from and is scored on, by its config.
    """

    title: str
    identity: str
    pairs: tuple[str, ...]
    buckets: tuple[int, ...]
    tokenizer: Tokenizer
    data: Callable[[TrainConfig], TrainingData]
    unseen: Callable[[TrainConfig], TrainingData]


def measure(spec: Spec) -> Ablated:
    """Train every change."""
    use_present_devices()
    text = _demo() if spec.data is None else _prepared(spec.data)
    config = TrainConfig(steps=spec.steps, **(TRAIN | {"buckets": text.buckets}))
    runs = []
    with bar("training", "runs") as progress:
        for number, name in enumerate(spec.changes):
            progress(number, len(spec.changes), name)
            runs.append(_run(name, config, text, spec.work))
            progress(number + 1, len(spec.changes), name)
    model = MODEL | {"vocab_size": text.tokenizer.vocab_size}
    fields = dataclasses.asdict(config)
    return Ablated(machine.describe(), text.title, spec.steps, model, fields, runs)


def _run(name: str, config: TrainConfig, text: _Text, work: Path | None) -> Run:
    """The run that the folder holds of these settings, or else trained and kept there."""
    change = CHANGES[name]
    if work is None:
        return _train(name, change, config, text)
    about = [text.identity, MODEL, dataclasses.asdict(config), dataclasses.asdict(change)]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    path = work / f"{name.replace('/', '-over-')}-{digest}.json"
    if path.is_file():
        return load(Run, path, f"ablation --changes {name}, once the file is gone")
    found = _train(name, change, config, text)
    write_text(path, json.dumps(dataclasses.asdict(found)) + "\n")
    return found


def _demo() -> _Text:
    with TemporaryDirectory() as folder:
        train, test, tokenizer = corpus(Path(folder), SENTENCES)

    def encoded(text: Any) -> Callable[[TrainConfig], TrainingData]:
        return functools.cache(lambda config: TrainingData.encoded(text, tokenizer, config))

    title = "the demo's corpus"
    return _Text(title, title, PAIRS, TRAIN["buckets"], tokenizer, encoded(train), encoded(test))


def _prepared(folder: Path) -> _Text:
    opened = TrainingSet(folder)
    pairs = tuple(opened.manifest.directions)
    valid = read_split([open_source(str(folder))], "valid", pairs)
    longest = opened.manifest.longest
    rows = {pair: encode(pair, lines, opened.tokenizer, longest) for pair, lines in valid.items()}
    hashes = [opened.manifest.vocabulary_sha256]
    hashes += [opened.manifest.directions[pair].sha256 for pair in pairs]
    return _Text(
        opened.manifest.title,
        json.dumps([pairs, hashes, valid]),  # wherever the folder lies
        pairs,
        (*(length for length in TRAIN["buckets"] if length < longest), longest),
        opened.tokenizer,
        lambda config: opened.data(pairs, config),
        lambda config: TrainingData(rows, config),
    )


@dataclasses.dataclass(frozen=True)
class _Changed(ModelConfig):
    """layer: fields of its mixtures that ModelConfig has no names for."""

    layer: tuple[tuple[str, Any], ...] = ()

    def moe(self, side: str) -> MoEConfig | None:
        """As ModelConfig has it, with the fields changed."""
        found = super().moe(side)
        return None if found is None else dataclasses.replace(found, **dict(self.layer))

    def check_types(self) -> None:
        """MoEConfig checks what `layer` holds."""


def _train(name: str, change: Change, base: TrainConfig, text: _Text) -> Run:
    config = dataclasses.replace(base, **change.train)
    sizes = {"encoder": "token", "decoder": "token"} | MODEL | dict(change.model)
    sizes |= {"vocab_size": text.tokenizer.vocab_size, "layer": tuple(change.layer.items())}
    model = _Changed(pairs=text.pairs, **sizes)
    step = make_train_step(model, config)
    state = init_state(model, config, None, _first(model, config, change))
    data, losses = text.data(config), []
    sums: dict[str, jax.Array] = {}
    for number in range(config.steps):
        before = None if change.gate_rate == 1 else jax.tree.map(jnp.copy, state.params)
        state, sums = step(state, data.batch(number))
        if before is not None:
            state = _slowed(before, state, change.gate_rate)
        losses.append((float(sums["loss"]), float(sums["tokens"])))
    return Run(
        name,
        change.what,
        _unseen(model, base, state.params, text.unseen(base)),  # the same text for all
        [float(x / n) for x, n in (part.sum(0) for part in np.array_split(losses, CURVE)) if n],
        float(sums["busiest"]) or None,
    )


def _first(model: ModelConfig, config: TrainConfig, change: Change) -> Params:
    """Fresh parameters, as the change has them."""

    def changed(path: Any, leaf: jax.Array) -> jax.Array:
        if _is_gate(path):
            return leaf * change.gate
        if change.alike and getattr(path[-1], "key", None) in ("w_in", "w_out") and leaf.ndim == 3:
            return jnp.broadcast_to(leaf[:1], leaf.shape)
        return leaf

    params = init(jax.random.key(config.seed), model)
    found: Params = jax.tree_util.tree_map_with_path(changed, params)
    return found


def _slowed(before: Params, state: State, rate: float) -> State:
    """The state whose gates have gone this share of their way."""

    def part(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
        return old + rate * (new - old) if _is_gate(path) else new

    return state._replace(params=jax.tree_util.tree_map_with_path(part, before, state.params))


def _is_gate(path: Any) -> bool:
    return getattr(path[-1], "key", None) == "gate"


def _unseen(model: ModelConfig, config: TrainConfig, params: Params, data: TrainingData) -> float:
    """Mean loss of batches of unseen text, without dropout."""
    objective = make_objective(dataclasses.replace(model, dropout=0.0), config)
    sums = jax.jit(lambda p, batch: objective(p, batch, jnp.float32(1), jax.random.key(0))[1])
    found = [sums(params, data.batch(number)) for number in range(BATCHES)]
    return float(sum(one["loss"] for one in found) / sum(one["tokens"] for one in found))
