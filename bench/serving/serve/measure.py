"""Translations of the same batches by every engine: compared first, then timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import each
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.serving.beam.measure import sub_network_config
from taskmoe.bench.serving.serve import engines
from taskmoe.bench.serving.serve.engines import OURS, THEIRS, Batch, Ids
from taskmoe.bench.serving.serve.spec import Spec
from taskmoe.bench.serving.serve.worker import Engine, Workload, write_workload
from taskmoe.cli.errors import InputError
from taskmoe.wmt.model import transformer
from taskmoe.wmt.model.decoding import MULTIPLE, length_limit
from taskmoe.wmt.model.saved import load_model
from taskmoe.wmt.model.transformer import param_count
from taskmoe.wmt.model.translation import task_ids
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD, UNK

SOURCE, TARGET = 32, 32  # positions of random sentences, and of their translations
QUIET_S = 0.3  # before each is timed: threads of the one before may still wait busily
LATENCIES = 8  # random sentences that are translated one by one
BATCHES_A_ROUND = 4  # at most, of a text
#: Translations that CTranslate2 must share with ours: the rest are ties, and ended hypotheses of
#: ranks that it does not look at.
ALIKE = 0.9


@dataclasses.dataclass(frozen=True)
class Row:
    """An engine at a beam and batch.

    sentences_per_s, tokens_per_s: of translations, over rounds. latency_ms: p50 and p95 of a call
    with one sentence, None at larger batches. over: speed over CTranslate2's with the same numbers,
    float32 or int8, round by round. identical: share of translations that are our float32's.
    memory_bytes: of the engine's process at most, beyond what its libraries take.
    """

    system: str
    beam: int
    batch: int
    sentences_per_s: Spread
    tokens_per_s: Spread
    identical: float
    latency_ms: tuple[float, float] | None = None
    over: Spread | None = None
    memory_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Served(Result):
    """A row a beam, batch and engine. source: where sentences and weights are from."""

    machine: dict[str, str]
    source: str
    parameters: int
    rounds: int
    rows: list[Row]
    command: str = "serve"


def measure(spec: Spec) -> Served:
    """Every engine; InputError where CTranslate2's float32 does not translate as we do."""
    work = random_workload(spec) if spec.model is None else text_workload(spec)
    about = machine.describe()
    version = engines.ctranslate2_version()
    if version is not None:
        about["ctranslate2"] = version
    cases = [(batch, beam) for beam in spec.beams for batch in spec.batches]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        longest = max(length_limit(max(map(len, work.sentences))), TARGET) + MULTIPLE
        write_workload(Path(folder), work, None if version is None else 2 * longest)
        names = [*OURS, *([] if version is None else THEIRS)]
        systems = {name: Engine(name, Path(folder)) for name in names}
        for system in systems.values():
            stack.enter_context(system)
        for batch, beam in each("serving", "cases", cases):
            rows += one_case(systems, batches(work, batch), beam, spec.rounds, work.ends)
    return Served(about, work.source, param_count(work.params), spec.rounds, rows)


def random_workload(spec: Spec) -> Workload:
    """Random weights and sentences; translations go on to their last position."""
    config = sub_network_config(spec.config)
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), config)
    # A translation that ends early would look fast: `</s>` is made as likely as the average word.
    softmax, row = ("embedding", EOS) if config.tie_embeddings else ("softmax", (slice(None), EOS))
    params = params | {softmax: params[softmax].at[row].set(0)}
    special = {PAD: "<pad>", UNK: "<unk>", BOS: "<s>", EOS: "</s>"}
    pieces = [special.get(i, f"word{i}") for i in range(config.vocab_size)]
    rows = max(*spec.batches, LATENCIES)
    ids = np.random.default_rng(0).integers(len(special), config.vocab_size, (rows, SOURCE))
    source = f"random weights of the {spec.config} model's sub-network, {SOURCE} random tokens"
    words = None
    if spec.words is not None:
        if not len(special) < spec.words <= config.vocab_size:
            raise InputError(
                f"--words must be above {len(special)}, which are special, and at most "
                f"{config.vocab_size:,}, got {spec.words:,}"
            )
        every = np.random.default_rng(1).permutation(np.arange(len(special), config.vocab_size))
        words = sorted([*special, *every[: spec.words - len(special)].tolist()])
        source += f", {spec.words:,} of {config.vocab_size:,} words"
    return Workload(params, config, pieces, ids.tolist(), source, ends=False, words=words)


def text_workload(spec: Spec) -> Workload:
    """A model folder and the sentences of a file."""
    assert spec.model is not None
    assert spec.text is not None
    model = load_model(spec.model)
    pair = spec.pair or model.config.pairs[0]
    if spec.pair is None and len(model.config.pairs) > 1:
        raise InputError(f"--pair must say which of {', '.join(model.config.pairs)}")
    task_ids(model.config, pair)
    if {model.config.encoder, model.config.decoder} != {"dense"}:
        raise InputError(f"--model {spec.model} is routed: extract a task first")
    lines = spec.text.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.strip()][: spec.sentences]
    if not lines:
        raise InputError(f"--text {spec.text} has no sentence")
    sentences = model.tokenizer.encode_source(lines, pair.split("-")[1])
    source = f"{spec.model.name}, {pair}, {len(lines)} sentences of {spec.text.name}"
    pieces = model.tokenizer.pieces()
    return Workload(model.params, model.config, pieces, sentences, source, ends=True)


def batches(work: Workload, batch: int) -> list[Batch]:
    """Sentences by length, as `translate` groups them; of a text every so-many-th batch."""
    ordered = sorted(work.sentences, key=len)
    most = BATCHES_A_ROUND if batch > 1 else LATENCIES
    found = []
    for at in range(0, len(ordered), batch):
        rows = ordered[at : at + batch]
        found.append(Batch(rows, batch, length_limit(len(rows[-1])) if work.ends else TARGET))
    return found[:: -(-len(found) // most)]


def one_case(
    systems: Mapping[str, Engine], work: list[Batch], beam: int, rounds: int, ends: bool
) -> list[Row]:
    """Translate with every engine, compare, and time rounds over all batches in turns."""
    answers = {name: system.translate(work, beam) for name, system in systems.items()}
    found: dict[str, Ids] = {name: answer["found"] for name, answer in answers.items()}
    first = next(iter(OURS))
    if not ends and any(len(row) != TARGET for row in found[first]):
        raise RuntimeError("a random translation ended early: its steps cannot be counted")
    same = {
        name: float(np.mean([a == b for a, b in zip(rows, found[first], strict=True)]))
        for name, rows in found.items()
    }
    reference = next(iter(THEIRS))
    if same.get(reference, 1.0) < ALIKE:
        raise InputError(
            f"{reference} translates {same[reference]:.0%} of the sentences as we do with beam "
            f"{beam}: nothing is timed below {ALIKE:.0%}"
        )
    seconds: dict[str, list[list[float]]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            time.sleep(QUIET_S)
            seconds[name].append(system.time(work, beam))
    totals = {name: np.sum(times, axis=1) for name, times in seconds.items()}
    size = work[0].rows
    rivals = {kind: name for name, kind in THEIRS.items()}
    rows = []
    for name, total in totals.items():
        rival = rivals[(OURS | THEIRS)[name]]
        tokens = sum(map(len, found[name])) + (len(found[name]) if ends else 0)  # and `</s>`
        p50, p95 = 1e3 * np.quantile(np.concatenate(seconds[name]), (0.5, 0.95))
        rows.append(
            Row(
                name,
                beam,
                size,
                Spread.of(len(found[name]) / total),
                Spread.of(tokens / total),
                same[name],
                (float(p50), float(p95)) if size == 1 else None,
                Spread.of(totals[rival] / total) if rival in totals else None,
                answers[name]["memory_bytes"],
            )
        )
    return rows
