"""All stages of the story, with a line of progress each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import each, out
from taskmoe.bench.harness.results import Result
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.serving.points import Point
from taskmoe.bench.story.demo.spec import Spec
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import Bar, bar
from taskmoe.wmt.config import ModelConfig, TrainConfig, split_pair
from taskmoe.wmt.model.saved import Model, save_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.transformer import Params, Tasks, decode, encode, param_count
from taskmoe.wmt.model.translation import Decoding, task_ids, translate
from taskmoe.wmt.text import cldr
from taskmoe.wmt.text.data import Pairs, TrainingData, read_pairs
from taskmoe.wmt.text.scoring import averages, score
from taskmoe.wmt.text.tokenizer import BOS, PAD, Tokenizer, train_tokenizer
from taskmoe.wmt.training.loop import Progress, train
from taskmoe.wmt.training.workdir import check_workdir

DEVICES = 8
#: Few, so that minutes of training take every model past its beginnings; see docs/tried.md.
LANGUAGES = ("cs", "de", "es", "fi", "fr")
PAIRS = tuple(pair for x in LANGUAGES for pair in (f"en-{x}", f"{x}-en"))
#: Model -> routing of its encoder and decoder. "dense" is as wide as the two experts that a token
#: goes to, so that all but "narrow" compute the same; "narrow" has the paper's baseline's width.
ROUTING = {"narrow": "dense", "dense": "dense", "token": "token", "task": "target"}
VOCABULARY = 3000
MODEL: dict[str, Any] = {
    "d_model": 128,
    "d_ff": 256,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_experts": 16,
    "tie_embeddings": True,
    "dropout": 0.0,
}
TRAIN: dict[str, Any] = {
    "batch_tokens": 2048,
    "buckets": (16, 32, 64),
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup_steps": 100,  # with 300 all models reach what the corpus allows: see docs/tried.md
    "label_smoothing": 0.0,
    "checkpoint_every": 200,
    "keep_checkpoints": 1,
}


@dataclasses.dataclass(frozen=True)
class Bleu:
    """Averages by kind of direction, each direction, and how sacreBLEU scored."""

    averages: dict[str, float]
    directions: dict[str, float]
    signatures: list[str]


@dataclasses.dataclass(frozen=True)
class Facts:
    """A trained model. loss, tokens_per_s, busiest_expert: where this run trained it.

    seconds: of its training in all runs, 0 where this one had nothing to train.
    """

    parameters: int
    decoder_parameters: int
    seconds: float
    loss: float | None = None
    tokens_per_s: float | None = None
    busiest_expert: float | None = None
    bleu: Bleu = dataclasses.field(default_factory=lambda: Bleu({}, {}, []))


@dataclasses.dataclass(frozen=True)
class Extraction:
    """Every task's sub-network beside the whole model."""

    tasks: list[str]
    translations: int
    identical: int
    largest_logit_difference: float
    bleu: Bleu
    parameters: int
    decoder_parameters: int


@dataclasses.dataclass(frozen=True)
class Serving:
    """Decoding of the systems over batch sizes."""

    devices: int
    positions: int
    points: list[Point]


@dataclasses.dataclass(frozen=True)
class Demo(Result):
    """The whole story. corpus: "train" or "test" -> direction -> sentences."""

    machine: dict[str, str]
    corpus: dict[str, dict[str, int]]
    model: dict[str, Any]
    training: dict[str, Any]
    models: dict[str, Facts]
    extraction: Extraction
    serving: Serving
    seconds: float

    @property
    def bleu(self) -> dict[str, float]:
        """Model -> its average over all directions."""
        return {name: model.bleu.averages["all"] for name, model in self.models.items()}


def measure(spec: Spec) -> Demo:
    """Run all stages; what an earlier run has finished is kept."""
    serving.use_host_devices(DEVICES)
    began = time.perf_counter()
    work = spec.out / "work"

    def stage(number: int, title: str) -> None:
        out.print(f"[bold]{number}/5[/bold]  {title}")

    stage(1, f"the corpus: {len(PAIRS)} directions from Unicode CLDR")
    text, test, tokenizer = corpus(work, spec.sentences)
    config = TrainConfig(steps=spec.steps, **TRAIN)
    data = TrainingData.encoded(text, tokenizer, config)

    stage(2, "training a small dense model, and three of equal compute per token")
    models, facts = {}, {}
    for name in ROUTING:
        models[name], facts[name] = _train(name, work, config, data, tokenizer)

    stage(3, "translating the test set, whole models and extracted sub-networks")
    said = {}
    for name, model in models.items():
        with bar(f"{name}, whole", "sentences") as progress:
            said[name] = _translate(model, test, Decoding(mixed_tasks=True), progress)
        facts[name] = dataclasses.replace(facts[name], bleu=_scores(said[name], test))
    extraction = _extract_all(models["task"], test, said["task"], work)

    stage(4, f"decoding on {DEVICES} devices, expert-parallel against sub-networks")
    served = _serve(models, spec.batches)

    stage(5, "the report")
    return Demo(
        machine.describe(),
        {"train": data.sizes, "test": {pair: len(s) for pair, (s, _) in test.items()}},
        MODEL | {"vocab_size": tokenizer.vocab_size},
        dataclasses.asdict(config),
        facts,
        extraction,
        served,
        round(time.perf_counter() - began, 1),
    )


def corpus(work: Path, sentences: int) -> tuple[Pairs, Pairs, Tokenizer]:
    """(training text, so many test sentences a direction, vocabulary); text is kept in `work`."""
    folder = work / "corpus"
    try:
        with bar("writing", "sentences") as progress:
            cldr.write_corpus(folder, cldr.CldrConfig(), progress=progress)
    except ValueError as error:
        raise InputError(str(error)) from None
    text, test = (read_pairs(folder, split, PAIRS) for split in ("train", "test"))
    test = {pair: (s[:sentences], t[:sentences]) for pair, (s, t) in test.items()}
    lines: dict[str, dict[str, None]] = {}
    for pair, sides in text.items():
        for language, side in zip(split_pair(pair), sides, strict=True):
            lines.setdefault(language, {}).update(dict.fromkeys(side))
    with out.status("training the vocabulary"):
        unique = {language: list(every) for language, every in lines.items()}
        tokenizer = train_tokenizer(unique, VOCABULARY, sentences=30_000)
    return text, test, tokenizer


def _train(
    name: str, work: Path, config: TrainConfig, data: TrainingData, tokenizer: Tokenizer
) -> tuple[Model, Facts]:
    """The trained model and what is to be told of it: parameters, losses and seconds."""
    side: Any = ROUTING[name]
    narrow = {f"{x}_wide_d_ff": MODEL["d_ff"] for x in ("encoder", "decoder")}
    model_config = ModelConfig(
        pairs=PAIRS,
        vocab_size=tokenizer.vocab_size,
        encoder=side,
        decoder=side,
        **MODEL,
        **(narrow if name == "narrow" else {}),
    )
    source = "taskmoe.wmt.text.cldr"
    check_workdir(work / name, model_config, config, source, flag="--out")
    log: list[Progress] = []
    with bar(f"{name:5}", "steps") as progress:

        def report(p: Progress) -> None:
            log.append(p)
            progress(p.step, p.steps)

        model = train(
            work / name,
            model_config,
            config,
            data,
            tokenizer,
            source=source,
            report=report,
            note=lambda line: out.print(f"  {line}"),
        )
    sizes = param_count(model.params), param_count(model.params["decoder"])
    if not log:  # an earlier run had trained it
        return model, Facts(*sizes, 0.0)
    lines = map(json.loads, (work / name / "log.jsonl").read_text().splitlines())
    seconds = round(sum(line.get("seconds", 0.0) for line in lines), 1)
    speed = float(np.median([p.tokens_per_s for p in log]))
    return model, Facts(*sizes, seconds, log[-1].loss, speed, log[-1].busiest)


def _translate(
    model: Model, test: Pairs, how: Decoding, progress: Bar | None = None
) -> dict[str, list[str]]:
    """Direction -> translations of the test text."""
    requests = [(pair, line) for pair, (source, _) in test.items() for line in source]
    found = iter(translate(model, requests, how, progress))
    return {pair: [next(found) for _ in source] for pair, (source, _) in test.items()}


def _scores(found: dict[str, list[str]], test: Pairs) -> Bleu:
    scores = {pair: score(pair, found[pair], references) for pair, (_, references) in test.items()}
    bleu = {pair: s.bleu for pair, s in scores.items()}
    return Bleu(averages(bleu), bleu, sorted({s.signature for s in scores.values()}))


def _extract_all(model: Model, test: Pairs, whole: dict[str, list[str]], work: Path) -> Extraction:
    """Cut every task out, translate with it, and compare with what the whole model said."""
    tasks = model.config.tasks("decoder")
    found: dict[str, list[str]] = {}
    largest, small = 0.0, model
    for task in each("sub-networks", "tasks", tasks):
        small = extract(model, task)
        folder = work / "subnetworks" / task
        save_model(small, folder, replace=folder.exists())
        own = {pair: test[pair] for pair in small.config.pairs}
        found |= _translate(small, own, Decoding())
        largest = max(largest, *(_logit_difference(model, small, p, own[p]) for p in own))
    same = [a == b for pair in test for a, b in zip(found[pair], whole[pair], strict=True)]
    return Extraction(
        list(tasks),
        len(same),
        sum(same),
        largest,
        _scores(found, test),
        param_count(small.params),
        param_count(small.params["decoder"]),
    )


def _logit_difference(
    model: Model, small: Model, pair: str, lines: tuple[list[str], list[str]]
) -> float:
    """Largest absolute difference of logits, whole model and sub-network, on the references."""
    limit = 64
    ids = model.tokenizer.encode_source(lines[0], split_pair(pair)[1])
    wanted = model.tokenizer.encode_target(lines[1])
    source = serving.padded(ids, limit)
    target = serving.padded([[BOS, *w[:-1]] for w in wanted], limit)
    rows = [np.full(len(ids), i, np.int32) for i in task_ids(model.config, pair) if i is not None]
    whole = _logits(model.params, model.config, source, target, Tasks(*rows))
    config = dataclasses.replace(small.config, pairs=("source-target",))  # one compilation for all
    own = _logits(small.params, config, source, target, Tasks(None, None))
    return float(jnp.max(jnp.abs(whole - own)))


@functools.partial(jax.jit, static_argnums=1)
def _logits(
    params: Params, config: ModelConfig, source: jax.Array, target: jax.Array, tasks: Tasks
) -> jax.Array:
    valid, seen = source != PAD, target != PAD
    memory, _ = encode(params, config, source, valid, tasks.encoder)
    logits, _ = decode(params, config, memory, valid, target, seen, tasks.decoder)
    return jnp.where(seen[..., None], logits, 0)


def _serve(models: dict[str, Model], batches: Sequence[int]) -> Serving:
    token, task = models["token"], models["task"]
    tight = dataclasses.replace(token.config, capacity_factor=2.0)
    cut = [extract(task, name) for name in task.config.tasks("decoder")]
    subs = list(itertools.islice(itertools.cycle(cut), DEVICES))  # some serve twice
    mesh = serving.device_mesh(DEVICES)
    systems = {
        "token-MoE, dropless": serving.expert_parallel(token.params, token.config, mesh),
        "token-MoE, capacity 2": serving.expert_parallel(token.params, tight, mesh),
        "task-MoE sub-networks": serving.sub_networks(
            [s.params for s in subs], subs[0].config, mesh
        ),
    }
    points: list[Point] = []
    for batch in each("decoding", "batch sizes", batches):
        points += serving.measure(systems, batch)
    return Serving(DEVICES, serving.POSITIONS, points)
