"""Scores gathered, sub-networks compared, and decoding timed, systems in turns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.story.study.spec import SYSTEMS, Spec
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.shared import load
from taskmoe.wmt.config import split_pair
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.transformer import Params, encode, param_count
from taskmoe.wmt.model.translation import Decoding, translate
from taskmoe.wmt.text.folders import Columns, Pairs
from taskmoe.wmt.text.sources import open_sources, read_split
from taskmoe.wmt.text.tokenizer import BOS, PAD

#: System that is cut out of another -> that one, whose parameters are the whole.
WHOLE = {"pruned": "token", "reaped": "token"}
MIXTURES = ("token", "sentence", "target", "token-target", "static")
ROWS = 256  # sentences of one direction that are decoded in a round


@dataclasses.dataclass(frozen=True)
class Row:
    """A system: its scores as in `System`, parameters in all and to serve one direction, speed.

    translations, identical: of extracted sub-networks, those compared and those that are the same.
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


@dataclasses.dataclass(frozen=True)
class Studied(Result):
    """A row a system; training and model as their configurations have them.

    taught: sentences a direction that students learn from. left_out: seeds that not all systems
    have finished.
    """

    machine: dict[str, str]
    rounds: int
    sentences: int
    training: dict[str, Any]
    model: dict[str, Any]
    rows: list[Row]
    taught: int | None = None
    left_out: list[int] = dataclasses.field(default_factory=list)
    command: str = "study"


RESULT = Studied


def measure(spec: Spec) -> Studied:
    """Gather, check and time."""
    finished = {name: finished_seeds(spec.workdir, name) for name in spec.systems}
    seeds = sorted(set.intersection(*map(set, finished.values())))
    if not seeds:
        raise InputError(f"{spec.workdir} has no seed that every system has a test.json of")
    left_out = sorted({seed for found in finished.values() for seed in found} - set(seeds))
    systems = [gather(spec.workdir, name, seeds) for name in SYSTEMS if name in finished]
    settings = same_training(spec.workdir, systems)
    pairs = load(systems[0].folders[0]).config.pairs
    models = {s.name: _model_of(s, pairs[0]) for s in systems}
    text = read_split(open_sources(spec.data), "valid", pairs)
    text = {pair: (x[: spec.sentences], y[: spec.sentences]) for pair, (x, y) in text.items()}
    served = {name: _served(model, pairs[0]) for name, model in models.items()}
    compared = {name: alike(name, model, text) for name, model in models.items()}
    speeds = _speeds(served, pairs[0], text, spec.rounds)
    rows = [
        Row(
            system.name,
            system.seeds,
            system.valid,
            system.test,
            system.directions,
            param_count(models[WHOLE.get(system.name, system.name)].params),
            param_count(served[system.name].params),
            **compared[system.name],
            tokens_per_s=speed,
        )
        for system, speed in zip(systems, speeds, strict=True)
    ]
    sentences = systems[0].sentences
    return Studied(
        machine.describe(), spec.rounds, sentences, rows=rows, left_out=left_out, **settings
    )


class System(NamedTuple):
    """A system's runs.

    folders: of its models of the first seed: one, of a pruned system one a target language. valid, test:
    mean BLEU over the directions, a number a seed. directions: test BLEU of each, mean over seeds.
    sentences: test sentences of all directions.
    """

    name: str
    folders: list[Path]
    seeds: list[int]
    valid: list[float]
    test: list[float]
    directions: dict[str, float]
    sentences: int


def finished_seeds(workdir: Path, name: str) -> list[int]:
    """Seeds of a system whose models all have a test.json; InputError where there is none."""
    numbers = (path.name[len(name) + 1 :] for path in workdir.glob(f"{name}-*"))
    runs = {int(n): _folders(workdir, name, int(n)) for n in numbers if n.isdigit()}
    done = [s for s, p in runs.items() if p and all((x / "test.json").is_file() for x in p)]
    if not done:
        raise InputError(f"{workdir} has no {name}-SEED with a test.json: runs/study-*.sh first")
    return sorted(done)


def _folders(workdir: Path, name: str, seed: int) -> list[Path]:
    path = workdir / f"{name}-{seed}"
    return sorted(path.glob("*/")) if name in WHOLE else [path]


def gather(workdir: Path, name: str, seeds: list[int]) -> System:
    """Scores of one system's runs. Raises InputError where a file is damaged."""
    done = {seed: _folders(workdir, name, seed) for seed in seeds}
    means: dict[str, list[float]] = {"valid": [], "test": []}
    directions: dict[str, list[float]] = {}
    sentences = 0
    for folders in done.values():
        for split, level in means.items():
            scores = {p: s for folder in folders for p, s in _scores(folder / f"{split}.json")}
            level.append(float(np.mean([s["bleu"] for s in scores.values()])))
        for pair, found in scores.items():  # of the test text, the last of the splits
            directions.setdefault(pair, []).append(found["bleu"])
        sentences = sum(s["sentences"] for s in scores.values())
    models = done[seeds[0]]
    each = {pair: float(np.mean(bleu)) for pair, bleu in directions.items()}
    return System(name, models, list(done), means["valid"], means["test"], each, sentences)


def same_training(workdir: Path, systems: list[System]) -> dict[str, Any]:
    """What all systems were trained with. Raises InputError where one differs in more than it must.

    Returns "training" (TrainConfig's fields), "model" (ModelConfig's, of the first mixture, or of
    the dense one), and "taught".
    """
    found = {
        run: _read(workdir / run / "config.json", "train", "model")
        for system in systems
        if system.name not in WHOLE
        for run in (f"{system.name}-{seed}" for seed in system.seeds)
    }
    first = {run.rpartition("-")[0]: config for run, config in reversed(found.items())}
    dense, student = first["dense"], first.get("distilled")
    mixture = next((first[name] for name in MIXTURES if name in first), dense)
    taught = None if student is None else student["train"].get("max_sentences")
    for run, config in found.items():
        # A student's text is its teacher's, of as much as the students of the other seeds had.
        own = {"max_sentences": taught} if run.startswith("distilled-") else {}
        for field, value in (dense["train"] | own).items():
            if field != "seed" and config["train"].get(field) != value:
                raise InputError(
                    f"{workdir / run}: {field} is {config['train'].get(field)!r}, not {value!r} as "
                    "in the other runs: not the same training"
                )
    return {"training": dense["train"], "model": mixture["model"], "taught": taught}


def _scores(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return list(_read(path, "scores")["scores"].items())


def _read(path: Path, *wanted: str) -> dict[str, Any]:
    """A JSON object that has these objects in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(found[name], dict) for name in wanted):
            raise ValueError(f"no object {' or '.join(wanted)}")
        return dict(found)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _model_of(system: System, pair: str) -> Model:
    """The model of a system's first seed; of several that which was made for a direction."""
    models = map(load, system.folders)
    return next(m for m in models if len(system.folders) == 1 or pair in m.config.pairs)


def _served(model: Model, pair: str) -> Model:
    """What serves one direction: the sub-network where there is one, else the whole model."""
    config = model.config
    tasks = [side for side in ("encoder", "decoder") if config.tasks(side)]
    return extract(model, pair) if tasks else model


def alike(name: str, model: Model, text: Pairs) -> dict[str, int]:
    """Translations of the validation text that sub-networks and the whole model have in common."""
    config = model.config
    if not any(config.tasks(side) for side in ("encoder", "decoder")):
        return {"translations": 0, "identical": 0}
    requests = [(pair, line) for pair, (lines, _) in text.items() for line in lines]
    with bar(f"{name}, whole", "sentences") as progress:
        whole = translate(model, requests, Decoding(mixed_tasks=True), progress)
    found: list[str] = []
    with bar(f"{name}, sub-networks", "directions") as progress:
        for number, (pair, (lines, _)) in enumerate(text.items()):
            found += translate(extract(model, pair), [(pair, line) for line in lines], Decoding())
            progress(number + 1, len(text))
    same = sum(mine == theirs for mine, theirs in zip(found, whole, strict=True))
    return {"translations": len(whole), "identical": same}


def _speeds(models: dict[str, Model], pair: str, text: Pairs, rounds: int) -> list[Spread]:
    """Tokens decoded a second by each system, in turns.

    Of each reference the first positions are given, so that every system takes equally many steps.
    """
    programs = {name: _decoding(model, pair, text[pair]) for name, model in models.items()}
    tokens = ROWS * serving.POSITIONS
    timings = alternate(programs, rounds=rounds).values()
    return [Spread.of(tokens / np.asarray(timing.seconds)) for timing in timings]


def _decoding(model: Model, pair: str, text: Columns) -> Callable[[], jax.Array]:
    """A compiled decoding of `ROWS` sentences of one direction, the encoder's output given."""
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
