"""The paper's story on one machine: train, extract, score, serve, and report, in ten minutes.

Trains a dense model, a token-routed and a task-routed mixture of equal compute per token on the 30
directions of the embedded corpus, cuts every task's sub-network out and checks it against the full
model, scores all of them, serves the token-routed model expert-parallel and the sub-networks on the
same eight host devices, and writes a report with charts and a JSON file. Started again it goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import out
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.story import demo_report
from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
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

DEVICES = 8
#: Model -> routing of its encoder and decoder. The dense one is as wide as two experts.
ROUTING = {"dense": "dense", "token": "token", "task": "target"}
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
    "warmup_steps": 100,
    "label_smoothing": 0.0,
    "checkpoint_every": 200,
    "keep_checkpoints": 1,
}
BATCHES = (8, 32, 128, 512)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--out", type=Path, default=Path("demo-report"), help="folder of the report")
    p.add_argument("--steps", type=int, default=600, help="training steps of each model")
    p.add_argument("--sentences", type=int, default=50, help="test sentences of each direction")
    p.add_argument("--quick", action="store_true", help="at most 60 steps and 5 sentences: a look")
    p.add_argument("--json", type=Path, help="write the results here too")


def run(a: argparse.Namespace) -> int:
    """Run all stages; 0, or 1 where a sub-network translates otherwise than the whole model."""
    for name, most in (("steps", math.inf), ("sentences", cldr.CldrConfig().test)):
        if not 1 <= getattr(a, name) <= most:
            raise InputError(f"--{name} must be from 1 to {most}, got {getattr(a, name)}")
    if a.quick:
        a.steps, a.sentences = min(a.steps, 60), min(a.sentences, 5)
    serving.use_host_devices(DEVICES)
    began = time.perf_counter()
    work = a.out / "work"

    _stage("1/5", "the corpus: 30 directions from Unicode CLDR")
    text, test, tokenizer = _corpus(work, a.sentences)
    train_config = TrainConfig(steps=a.steps, **TRAIN)
    data = TrainingData(text, tokenizer, train_config)
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "corpus": {"train": data.sizes, "test": {p: len(s) for p, (s, _) in test.items()}},
        "model": MODEL | {"vocab_size": tokenizer.vocab_size},
        "training": dataclasses.asdict(train_config),
        "models": {},
    }

    _stage("2/5", "training three models of equal compute per token")
    models: dict[str, Model] = {}
    for name in ROUTING:
        models[name], result["models"][name] = _train(name, work, train_config, data, tokenizer)

    _stage("3/5", "translating the test set, whole models and extracted sub-networks")
    for name, model in models.items():
        found = _translate(f"{name}, whole", model, test, mixed_tasks=True)
        result["models"][name] |= {"bleu": _scores(found, test), "translations": found}
    result["extraction"] = _extract_all(models["task"], test, result, work)
    for facts in result["models"].values():
        del facts["translations"]

    _stage("4/5", f"decoding on {DEVICES} devices, expert-parallel against sub-networks")
    result["serving"] = _serve(models, BATCHES[:2] if a.quick else BATCHES)

    _stage("5/5", "the report")
    result["seconds"] = round(time.perf_counter() - began, 1)
    write_text(a.out / "demo.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if a.json is not None:
        write_text(a.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    demo_report.write(result, a.out)
    out.print(demo_report.claims_table(result))
    out.print(f"{result['seconds']:.0f} s; the report is {a.out / 'report.md'}")
    same = result["extraction"]["identical"] == result["extraction"]["translations"]
    return 0 if same else 1


def _stage(number: str, title: str) -> None:
    out.print(f"[bold]{number}[/bold]  {title}")


def _corpus(work: Path, sentences: int) -> tuple[Pairs, Pairs, Tokenizer]:
    folder = work / "corpus"
    try:
        with bar("writing", "sentences") as progress:
            cldr.write_corpus(folder, cldr.CldrConfig(), progress=progress)
    except ValueError as error:
        raise InputError(str(error)) from None
    text = read_pairs(folder, "train", cldr.PAIRS)
    test = read_pairs(folder, "test", cldr.PAIRS)
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
) -> tuple[Model, dict[str, Any]]:
    """The trained model and what is to be told of it: parameters, losses and seconds."""
    side: Any = ROUTING[name]
    model_config = ModelConfig(
        pairs=cldr.PAIRS,
        vocab_size=tokenizer.vocab_size,
        encoder=side,
        decoder=side,
        **MODEL,
    )
    began, log = time.perf_counter(), []
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
            source="taskmoe.wmt.text.cldr",
            report=report,
            note=lambda line: out.print(f"  {line}"),
        )
    facts: dict[str, Any] = {
        "parameters": param_count(model.params),
        "decoder_parameters": param_count(model.params["decoder"]),
        "seconds": round(time.perf_counter() - began, 1),
    }
    if log:  # empty where an earlier run had trained it
        facts |= {
            "loss": log[-1].loss,
            "tokens_per_s": float(np.median([p.tokens_per_s for p in log])),
            "busiest_expert": log[-1].busiest,
        }
    return model, facts


def _translate(title: str, model: Model, test: Pairs, *, mixed_tasks: bool) -> dict[str, list[str]]:
    requests = [(pair, line) for pair, (source, _) in test.items() for line in source]
    with bar(title, "sentences") as progress:
        found = iter(translate(model, requests, Decoding(mixed_tasks=mixed_tasks), progress))
    return {pair: [next(found) for _ in source] for pair, (source, _) in test.items()}


def _scores(found: dict[str, list[str]], test: Pairs) -> dict[str, Any]:
    scores = {pair: score(pair, found[pair], references) for pair, (_, references) in test.items()}
    return {
        "averages": averages({pair: s.bleu for pair, s in scores.items()}),
        "directions": {pair: s.bleu for pair, s in scores.items()},
        "signatures": sorted({s.signature for s in scores.values()}),
    }


def _extract_all(model: Model, test: Pairs, result: dict[str, Any], work: Path) -> dict[str, Any]:
    """Cut every task out, translate with it, and compare with what the whole model said."""
    tasks = model.config.tasks("decoder")
    whole = result["models"]["task"]["translations"]
    found: dict[str, list[str]] = {}
    largest, small = 0.0, model
    with bar("sub-networks", "tasks") as progress:
        for number, task in enumerate(tasks):
            small = extract(model, task)
            folder = work / "subnetworks" / task
            save_model(small, folder, replace=folder.exists())
            own = {pair: test[pair] for pair in small.config.pairs}
            requests = [(pair, line) for pair, (source, _) in own.items() for line in source]
            lines = iter(translate(small, requests, Decoding()))
            found |= {pair: [next(lines) for _ in source] for pair, (source, _) in own.items()}
            largest = max(largest, *(_logit_difference(model, small, p, own[p]) for p in own))
            progress(number + 1, len(tasks))
    pairs_of_lines = [
        (mine, theirs)
        for pair in test
        for mine, theirs in zip(found[pair], whole[pair], strict=True)
    ]
    return {
        "tasks": list(tasks),
        "translations": len(pairs_of_lines),
        "identical": sum(mine == theirs for mine, theirs in pairs_of_lines),
        "largest_logit_difference": largest,
        "bleu": _scores(found, test),
        "parameters": param_count(small.params),
        "decoder_parameters": param_count(small.params["decoder"]),
    }


def _logit_difference(
    model: Model, small: Model, pair: str, lines: tuple[list[str], list[str]]
) -> float:
    """Largest absolute difference of logits, whole model and sub-network, on the references."""
    limit = 64
    ids = model.tokenizer.encode_source(lines[0], split_pair(pair)[1])
    wanted = model.tokenizer.encode_target(lines[1])
    source, target = _padded(ids, limit), _padded([[BOS, *w[:-1]] for w in wanted], limit)
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


def _padded(ids: list[list[int]], width: int) -> np.ndarray:
    rows = np.full((len(ids), width), PAD, np.int32)
    for row, line in zip(rows, ids, strict=True):
        row[: min(len(line), width)] = line[:width]
    return rows


def _serve(models: dict[str, Model], batches: Sequence[int]) -> dict[str, Any]:
    token, task = models["token"], models["task"]
    tight = dataclasses.replace(token.config, capacity_factor=2.0)
    subs = [extract(task, name) for name in task.config.tasks("decoder")[:DEVICES]]
    mesh = serving.device_mesh(DEVICES)
    systems = {
        "token-MoE, dropless": serving.expert_parallel(token.params, token.config, mesh),
        "token-MoE, capacity 2": serving.expert_parallel(token.params, tight, mesh),
        "task-MoE sub-networks": serving.sub_networks(
            [s.params for s in subs], subs[0].config, mesh
        ),
    }
    with bar("decoding", "batch sizes") as progress:
        points = []
        for number, batch in enumerate(batches):
            points += serving.measure(systems, batch)
            progress(number + 1, len(batches))
    return {"devices": DEVICES, "positions": serving.POSITIONS, "points": points}
