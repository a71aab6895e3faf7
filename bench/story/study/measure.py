"""Scores gathered, sub-networks compared, and decoding timed, systems in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import each
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.story.study import bootstrap
from taskmoe.bench.story.study.bootstrap import Bootstrap, Interval
from taskmoe.bench.story.study.runs import System, finished_seeds, gather, same_training, spent
from taskmoe.bench.story.study.spec import SYSTEMS, WHOLE, Spec
from taskmoe.cli.errors import InputError
from taskmoe.wmt.commands.shared import load, sizes_of
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.transformer import Params, encode, param_count
from taskmoe.wmt.model.translation import Decoding, translate
from taskmoe.wmt.text.folders import Columns, Pairs
from taskmoe.wmt.text.scoring import averages
from taskmoe.wmt.text.sources import open_sources, read_split
from taskmoe.wmt.text.tokenizer import BOS, PAD

ROWS = 256  # sentences of one direction that are decoded in a round


@dataclasses.dataclass(frozen=True)
class Row:
    """A system: its scores as in `System`, parameters in all and to serve one direction, speed.

    translations, identical: of extracted sub-networks, those compared and those that are the same.
    averages: test BLEU of groups of directions, as `scoring.averages` has them. over_dense,
    over_narrow: 95% intervals of the difference in mean test BLEU to these; None where translations
    were not kept. spent: of the first seed, as `runs.spent` has it.
    """

    system: str
    seeds: list[int]
    valid: list[float]
    test: list[float]
    directions: dict[str, float]
    parameters: int
    served: int
    translations: int
    identical: int
    tokens_per_s: Spread
    averages: dict[str, float] = dataclasses.field(default_factory=dict)
    over_dense: Interval | None = None
    over_narrow: Interval | None = None
    spent: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Studied(Result):
    """A row a system; training and model as their configurations have them.

    taught: sentences a direction that students learn from. left_out: seeds that not all systems
    have finished. high_resource: sentence pairs from which on a direction is. bootstrap: None where
    dense's translations were not kept.
    """

    machine: dict[str, str]
    rounds: int
    sentences: int
    training: dict[str, Any]
    model: dict[str, Any]
    rows: list[Row]
    taught: int | None = None
    left_out: list[int] = dataclasses.field(default_factory=list)
    high_resource: int | None = None
    bootstrap: Bootstrap | None = None
    command: str = "study"


def measure(spec: Spec) -> Studied:
    """Gather, check and time."""
    finished = {name: finished_seeds(spec.workdir, name) for name in spec.systems}
    seeds = sorted(set.intersection(*map(set, finished.values())))
    if not seeds:
        raise InputError(f"{spec.workdir} has no seed that every system has a test.json of")
    left_out = sorted({seed for found in finished.values() for seed in found} - set(seeds))
    dense = spec.workdir / f"dense-{seeds[0]}"
    pairs = load(dense).config.pairs
    systems = [gather(spec.workdir, name, seeds, pairs) for name in SYSTEMS if name in finished]
    settings = same_training(spec.workdir, systems)
    models = {s.name: _model_of(s, pairs[0]) for s in systems}
    text = read_split(open_sources(spec.data), "valid", pairs)
    text = {pair: (x[: spec.sentences], y[: spec.sentences]) for pair, (x, y) in text.items()}
    served = {name: _served(model, pairs[0]) for name, model in models.items()}
    levels = _resampled(systems, pairs, spec)
    compared = {name: alike(name, model, text) for name, model in models.items()}
    programs = {n: _decoding(model, pairs[0], text[pairs[0]]) for n, model in served.items()}
    seconds = alternate(programs, rounds=spec.rounds)
    sizes = sizes_of(dense) if spec.high_resource else None
    groups: Any = {"trained": pairs, "sizes": sizes, "high_resource": spec.high_resource or 0}
    rows = [
        Row(
            s.name,
            s.seeds,
            s.valid,
            s.test,
            s.directions,
            param_count(models[WHOLE.get(s.name, s.name)].params),
            param_count(served[s.name].params),
            **compared[s.name],
            tokens_per_s=Spread.of(ROWS * serving.POSITIONS / seconds[s.name]),
            averages=averages(s.directions, **groups),
            over_dense=bootstrap.difference(levels, s.name, "dense"),
            over_narrow=bootstrap.difference(levels, s.name, "narrow"),
            spent=spent(spec.workdir, s.name, seeds[0]),
        )
        for s in systems
    ]
    return Studied(
        machine.describe(),
        spec.rounds,
        systems[0].sentences,
        rows=rows,
        left_out=left_out,
        high_resource=spec.high_resource,
        bootstrap=bootstrap.shares(levels),
        **settings,
    )


def _resampled(systems: list[System], pairs: tuple[str, ...], spec: Spec) -> dict[str, np.ndarray]:
    """System -> its mean test BLEU in each sample; {} where dense's translations are not kept."""
    dense = next(system for system in systems if system.name == "dense")
    if not dense.translations:
        return {}
    wanted = [pair for pair in pairs if pair in dense.directions]
    return bootstrap.levels(systems, read_split(open_sources(spec.data), "test", wanted))


def _model_of(system: System, pair: str) -> Model:
    """The model of a system's first seed; of several that which was made for a direction."""
    models = map(load, system.folders)
    return next(m for m in models if len(system.folders) == 1 or pair in m.config.pairs)


def _served(model: Model, pair: str) -> Model:
    """What serves one direction: the sub-network where there is one, else the whole model."""
    return extract(model, pair) if _has_tasks(model) else model


def _has_tasks(model: Model) -> bool:
    return any(model.config.tasks(side) for side in ("encoder", "decoder"))


def alike(name: str, model: Model, text: Pairs) -> dict[str, int]:
    """Translations of the validation text that sub-networks and the whole model have in common.

    Both translate one direction after the other, in the same batches: another number of rows rounds
    otherwise, and a model then differs from itself where two words are equally likely.
    """
    if not _has_tasks(model):
        return {"translations": 0, "identical": 0}
    whole: list[str] = []
    found: list[str] = []
    for pair in each(f"{name}, whole and sub-networks", "directions", list(text)):
        own = [(pair, line) for line in text[pair][0]]
        whole += translate(model, own, Decoding(mixed_tasks=True))
        found += translate(extract(model, pair), own, Decoding())
    same = sum(mine == theirs for mine, theirs in zip(found, whole, strict=True))
    return {"translations": len(whole), "identical": same}


def _decoding(model: Model, pair: str, text: Columns) -> Callable[[], jax.Array]:
    """A compiled decoding of `ROWS` sentences of one direction, the encoder's output given.

    Of each reference the first positions are given, so that every system takes equally many steps.
    """
    config = dataclasses.replace(model.config, pairs=(pair,))
    take = np.resize(np.arange(len(text[0])), ROWS)
    source = model.tokenizer.encode_source([text[0][i] for i in take], split_pair(pair)[1])
    target = model.tokenizer.encode_target([text[1][i] for i in take])
    sources = serving.padded(source, serving.SOURCE_LENGTH)
    given = serving.padded([[BOS, *ids] for ids in target], serving.POSITIONS)
    memory, _ = jax.jit(encode, static_argnums=1)(
        model.params, config, sources, sources != PAD, None
    )

    def program(params: Params, memory: jax.Array, given: jax.Array) -> jax.Array:
        return serving.decode(params, config, memory, given, serving.POSITIONS)[0]

    compiled = jax.jit(program).lower(model.params, memory, given).compile()
    return lambda: compiled(model.params, memory, given)
