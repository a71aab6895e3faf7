"""Translations of the same batches by every engine: compared first, then timed in turns."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.serving.beam.measure import sub_network_config
from taskmoe.bench.serving.serve import engines
from taskmoe.bench.serving.serve.engines import OURS, THEIRS, Batch, Ids, Translate
from taskmoe.bench.serving.serve.spec import Spec
from taskmoe.cli.devices import use_present_devices
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import transformer
from taskmoe.wmt.model.ctranslate2_export import specification
from taskmoe.wmt.model.decoding import MULTIPLE, length_limit
from taskmoe.wmt.model.saved import load_model
from taskmoe.wmt.model.transformer import Params, param_count
from taskmoe.wmt.model.translation import task_ids
from taskmoe.wmt.text.tokenizer import BOS, EOS, PAD, UNK

SOURCE, TARGET = 32, 32  # positions of random sentences, and of their translations
LATENCIES = 8  # random sentences that are translated one by one
BATCHES_A_ROUND = 4  # at most, of a text
#: Translations that CTranslate2 must share with ours: the rest are ties, and ended hypotheses of
#: ranks that it does not look at.
ALIKE = 0.9


@dataclasses.dataclass(frozen=True)
class Row:
    """An engine at a beam and batch.

    sentences_per_s, tokens_per_s: of translations, over rounds. latency_ms: p50 and p95 of a call
    with one sentence, None at larger batches. over_float32: speed over CTranslate2's in float32,
    round by round. identical: share of translations that are ours.
    """

    system: str
    beam: int
    batch: int
    sentences_per_s: Spread
    tokens_per_s: Spread
    identical: float
    latency_ms: tuple[float, float] | None = None
    over_float32: Spread | None = None


@dataclasses.dataclass(frozen=True)
class Served(Result):
    """A row a beam, batch and engine. source: where sentences and weights are from."""

    machine: dict[str, str]
    source: str
    parameters: int
    rounds: int
    rows: list[Row]
    command: str = "serve"


RESULT = Served


@dataclasses.dataclass(frozen=True)
class Workload:
    """A dense network, its vocabulary, and what it translates. ends: translations end by `</s>`."""

    params: Params
    config: ModelConfig
    pieces: list[str]
    sentences: Ids
    source: str
    ends: bool


def measure(spec: Spec) -> Served:
    """Every engine; InputError where CTranslate2's float32 does not translate as we do."""
    use_present_devices()
    work = random_workload(spec) if spec.model is None else text_workload(spec)
    about = machine.describe()
    version = engines.ctranslate2_version()
    if version is not None:
        about["ctranslate2"] = version
    cases = [(batch, beam) for beam in spec.beams for batch in spec.batches]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, bar("serving", "cases") as progress:
        systems = _start(work, Path(folder), version is not None)
        for done, (batch, beam) in enumerate(cases):
            progress(done, len(cases))
            rows += one_case(systems, batches(work, batch), beam, spec.rounds, work.ends)
        progress(len(cases), len(cases))
    return Served(about, work.source, param_count(work.params), spec.rounds, rows)


def random_workload(spec: Spec) -> Workload:
    """Random weights and sentences; translations go on to their last position."""
    config = sub_network_config(spec.config)
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(0), config)
    params = transformer.with_softmax(params)
    # A translation that ends early would look fast: `</s>` is made as likely as the average word.
    params = params | {"softmax": params["softmax"].at[:, EOS].set(0)}
    special = {PAD: "<pad>", UNK: "<unk>", BOS: "<s>", EOS: "</s>"}
    pieces = [special.get(i, f"word{i}") for i in range(config.vocab_size)]
    rows = max(*spec.batches, LATENCIES)
    ids = np.random.default_rng(0).integers(len(special), config.vocab_size, (rows, SOURCE))
    source = f"random weights of the {spec.config} model's sub-network, {SOURCE} random tokens"
    return Workload(params, config, pieces, ids.tolist(), source, ends=False)


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
        width = -(-len(rows[-1]) // MULTIPLE) * MULTIPLE
        source = np.full((batch, width), PAD, np.int32)
        for row, ids in zip(source, rows, strict=False):
            row[: len(ids)] = ids
        found.append(Batch(source, len(rows), length_limit(width) if work.ends else TARGET))
    return found[:: -(-len(found) // most)]


def _start(work: Workload, folder: Path, compare: bool) -> dict[str, Translate]:
    """The engines by name; compare: CTranslate2's too, exported into a folder."""
    systems = {OURS: engines.ours(work.params, work.config)}
    if compare:
        longest = max(length_limit(max(map(len, work.sentences))), TARGET) + MULTIPLE
        spec = specification(work.params, work.config, work.pieces, 2 * longest)
        spec.save(str(folder))
        for name, compute_type in THEIRS.items():
            systems[name] = engines.theirs(folder, compute_type, work.pieces)
    return systems


def one_case(
    systems: dict[str, Translate], work: Sequence[Batch], beam: int, rounds: int, ends: bool
) -> list[Row]:
    """Translate with every engine, compare, and time rounds over all batches in turns."""
    found = {name: [row for b in work for row in run(b, beam)] for name, run in systems.items()}
    if not ends and any(len(row) != TARGET for row in found[OURS]):
        raise RuntimeError("a random translation ended early: its steps cannot be counted")
    same = {
        name: float(np.mean([a == b for a, b in zip(rows, found[OURS], strict=True)]))
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
        for name, run in systems.items():
            seconds[name].append([_timed(run, b, beam) for b in work])
    totals = {name: np.sum(times, axis=1) for name, times in seconds.items()}
    size = work[0].source.shape[0]
    rows = []
    for name, total in totals.items():
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
                Spread.of(totals[reference] / total) if reference in totals else None,
            )
        )
    return rows


def _timed(run: Translate, batch: Batch, beam: int) -> float:
    began = time.perf_counter()
    run(batch, beam)
    return time.perf_counter() - began
