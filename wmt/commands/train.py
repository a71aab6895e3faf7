"""`train`: a model from parallel text."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import Mesh

from taskmoe.cli.command_line import write_bytes, write_text
from taskmoe.cli.errors import InputError
from taskmoe.cli.progress import bar
from taskmoe.kernels import __version__
from taskmoe.wmt.commands.settings import add_set, read_set, settable
from taskmoe.wmt.commands.shared import (
    add_expert_parallel,
    add_tokenize,
    build,
    check_needed,
    load,
    out,
    print_exchange,
)
from taskmoe.wmt.commands.text import Named, add_data, text_of_set, text_plan, training_set
from taskmoe.wmt.config import PRESETS, ModelConfig, SideRouting, TrainConfig
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.transformer import param_count
from taskmoe.wmt.model.translation import Decoding, translate
from taskmoe.wmt.text.cleaning import account_table
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.kept_sets import find_set, kept_set
from taskmoe.wmt.text.preparing import Plan
from taskmoe.wmt.text.scoring import averages, check_tokenizer, score
from taskmoe.wmt.text.sources import all_pairs, cache_folder, read_split
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.text.training_set import VOCABULARY, TrainingSet
from taskmoe.wmt.training import parallel
from taskmoe.wmt.training.initial import initial_params, initial_vocabulary, new_parts
from taskmoe.wmt.training.loop import Progress, train
from taskmoe.wmt.training.stopping import ending_at_once, stopping
from taskmoe.wmt.training.validation import Validation
from taskmoe.wmt.training.workdir import SIZES, alone_in, check_workdir


def run(a: argparse.Namespace) -> None:
    """Train a model up to --steps in all; a run that was stopped goes on where it was."""
    by_hand = (a.coordinator, a.num_processes, a.process_id)
    if a.distributed or any(part is not None for part in by_hand):
        parallel.join(*by_hand)
    with ending_at_once("what was done is kept"):
        _run(a)


def _run(a: argparse.Namespace) -> None:
    out.quiet = not parallel.is_writer()
    with parallel.failing_together():  # all input is read before anything is written
        check_needed(a, "validate_every", "validate_sentences", "patience", "tokenize")
        check_needed(a, "init", "init_task")
        mesh = parallel.make_mesh(a.data_parallel, a.expert_parallel)
        begin_from = None if a.init is None else load(a.init)
        model_fields, train_fields = configure(a, begin_from)
        opened = training_set(a)
        if opened is not None:
            given = read_set(a.set, settable(ModelConfig, TrainConfig), "")
            _take_from_set(opened, given, model_fields, train_fields, begin_from is not None)
        train_config = build(TrainConfig, train_fields)
        source: Plan | Named
        if opened is None:
            source = text_plan(a, train_config, model_fields["vocab_size"])
        else:
            source = text_of_set(a, opened)
        model_config = build(ModelConfig, {"pairs": source.pairs, **model_fields})
        validation = _validation(a, source)
        parallel.check_mesh(mesh, model_config, train_config)
        begun = check_workdir(a.workdir, model_config, train_config, source.identity, a.allow)
    parallel.agree_on(_settings(a, model_config, train_config, mesh, validation))
    with parallel.failing_together():
        made = _made(a, source, begun, begin_from)
        tokenizer, data = made.tokenizer, made.data(source.pairs, train_config)
    parallel.agree_on(_digests(data, tokenizer))
    if not begun:
        with alone_in(a.workdir):
            if parallel.is_writer():
                write_text(a.workdir / SIZES, json.dumps(data.sizes, indent=2) + "\n")
                write_bytes(a.workdir / VOCABULARY, tokenizer.model)
    params = None
    if begin_from is not None and not begun:
        whole = dataclasses.replace(model_config, vocab_size=tokenizer.vocab_size)
        params = initial_params(begin_from, whole, tokenizer, dict(a.init_task))
        if new := new_parts(begin_from, whole):
            out.print(f"new beside {a.init}: {', '.join(new)}")
    there = made.manifest.directions
    accounts = {pair: there[pair].account for pair in source.pairs}
    out.print(account_table(source.title, accounts, {"no bucket": data.too_long}))
    if mesh is not None:
        out.print(
            f"{mesh.size} devices in {jax.process_count()} processes: "
            f"data {mesh.shape['data']} x expert {mesh.shape['expert']}"
        )
        batches = {
            f"length {length}": (train_config.batch_rows(length), length)
            for length in train_config.buckets
        }
        print_exchange(model_config, mesh, a.exchange, batches)

    with report_to("training", train_config.steps) as (report, say), stopping() as stop:
        model = train(
            a.workdir,
            model_config,
            train_config,
            data,
            tokenizer,
            source=source.identity,
            mesh=mesh,
            strategy=a.exchange,
            params=params,
            allowed=a.allow,
            validation=validation,
            tensorboard=a.tensorboard,
            report=report,
            note=say,
            stop=stop,
        )
    out.print(f"{param_count(model.params):,} parameters in {a.workdir / 'model'}")


def _settings(
    a: argparse.Namespace,
    model_config: ModelConfig,
    train_config: TrainConfig,
    mesh: Mesh | None,
    validation: Validation | None,
) -> dict[str, Any]:
    """What all processes of a run must have been given alike, by name."""
    fields = {**dataclasses.asdict(train_config), **dataclasses.asdict(model_config)}
    return {
        "taskmoe": __version__,
        "jax": jax.__version__,
        "--workdir": str(a.workdir.resolve()),
        "mesh": None if mesh is None else [int(n) for n in mesh.shape.values()],
        **fields,
        "--validate-every": validation and [validation.every, validation.patience, validation.text],
        "--tensorboard": a.tensorboard,
        "--exchange": a.exchange,
    }


def _digests(data: TrainingData, tokenizer: Tokenizer) -> dict[str, str]:
    """The text and vocabulary that all processes must have found alike, by name."""
    found = {f"text of {pair}": digest[:16] for pair, digest in data.digests().items()}
    return {**found, "vocabulary": hashlib.sha256(tokenizer.model).hexdigest()[:16]}


def _made(
    a: argparse.Namespace, source: Plan | Named, begun: bool, begin_from: Model | None
) -> TrainingSet:
    """The run's training set, encoded by the vocabulary that it has or is to have."""
    own = None
    if begun:
        own = Tokenizer.load(a.workdir / VOCABULARY)
    elif begin_from is not None:
        own = initial_vocabulary(begin_from, source.pairs)
    if isinstance(source, Plan):
        return _kept(a, source, own)
    assert source.opened is not None
    if own is not None and own.model != source.opened.tokenizer.model:
        raise InputError(
            f"{source.opened.folder} was encoded by another vocabulary than this run's; "
            "prepare it anew with --vocabulary MODEL"
        )
    return source.opened


def _kept(a: argparse.Namespace, plan: Plan, own: Tokenizer | None) -> TrainingSet:
    """The set of a plan, prepared where the cache has none; own: the vocabulary that it must have.

    A run's own vocabulary is most often that of the set that it was begun with.
    """
    folders = (cache_folder(a.cache), a.workdir)
    if own is not None:
        found = find_set(plan, folders)
        if found is None or found.tokenizer.model != own.model:
            plan = dataclasses.replace(plan, vocabulary=own)
    # Whichever process of a host comes first prepares the set, and shows how far it is.
    with bar("preparing", "sentences", enabled=sys.stderr.isatty()) as progress:

        def note(line: str) -> None:
            if not out.quiet:
                progress.print(line)

        return kept_set(plan, folders, progress.stage, note)


def _take_from_set(
    opened: TrainingSet,
    given: Mapping[str, Any],
    model_fields: dict[str, Any],
    train_fields: dict[str, Any],
    begun: bool,
) -> None:
    """What a training set has settled stands in the configuration; begun: from a trained model.

    Raises InputError where --set says otherwise.
    """
    settled = dict(opened.manifest.cleaning)
    if not begun:
        settled["vocab_size"] = opened.manifest.vocab_size
    for name, value in settled.items():
        if given.get(name, value) != value:
            raise InputError(
                f"--set {name}={given[name]}: {opened.folder} was prepared with {value}; "
                "prepare it anew to change it"
            )
    train_fields |= opened.manifest.cleaning
    model_fields |= {x: value for x, value in settled.items() if x == "vocab_size"}


@contextlib.contextmanager
def report_to(
    title: str, steps: int
) -> Iterator[tuple[Callable[[Progress], None], Callable[[str], None]]]:
    """A bar, and lines, for what training reports; and lines for what it notes."""
    enabled = sys.stderr.isatty() and not out.quiet
    with bar(title, "steps", total=steps, enabled=enabled) as progress:

        def say(line: str) -> None:
            if not out.quiet:
                progress.print(line)

        def report(p: Progress) -> None:
            gist = f"loss {p.loss:.3f}  {p.tokens_per_s:,.0f} tokens/s"
            progress(p.step, p.steps, gist)
            router = f"  busiest expert {p.busiest:.2f}x" if p.busiest else ""
            router += f"  {p.skipped} steps left out" if p.skipped else ""
            text = f"  padding {p.padding:.0%}" + f"  waits {p.waits:.0%}" * (p.waits >= 0.005)
            say(f"step {p.step}/{p.steps}  {gist}{text}{router}")

        yield report, say


def configure(
    a: argparse.Namespace, begin_from: Model | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of ModelConfig and TrainConfig that the arguments of `add_configuration` say.

    begin_from: a model whose sizes stand in the preset's stead.
    """
    model_fields = dict(PRESETS[a.config][0])
    if begin_from is not None:
        model_fields = {**dataclasses.asdict(begin_from.config)}
        del model_fields["pairs"]
    known = settable(ModelConfig, TrainConfig)
    given = read_set(a.set, known, "ModelConfig or TrainConfig")
    model_fields |= {x: value for x, value in given.items() if x in settable(ModelConfig)}
    for name in ("encoder", "decoder"):
        if getattr(a, name) is not None:
            model_fields[name] = getattr(a, name)
    return model_fields, configure_training(a, given)


def configure_training(a: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """As `configure`, of TrainConfig; given: the fields that --set names."""
    fields = dict(PRESETS[a.config][1])
    fields |= {name: x for name, x in given.items() if name in settable(TrainConfig)}
    for name in ("steps", "seed"):
        if getattr(a, name) is not None:
            fields[name] = getattr(a, name)
    return fields


def _validation(a: argparse.Namespace, source: Plan | Named) -> Validation | None:
    """How --validate-every says that the run is scored: greedy BLEU on the sources' valid text."""
    if a.validate_every is None:
        return None
    for name in ("validate_every", "validate_sentences", "patience"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    there = set(all_pairs(source.sources, "valid"))
    if unscored := [pair for pair in source.pairs if pair not in there]:
        if len(unscored) == len(source.pairs):
            raise InputError(f"--validate-every: {source.title} has no valid text of any direction")
        out.print(f"no valid text, so not scored on the way: {', '.join(unscored)}")
    for pair in set(source.pairs) & there:
        check_tokenizer(pair, a.tokenize)
    text = read_split(source.sources, "valid", [p for p in source.pairs if p in there])
    n = a.validate_sentences or 100
    text = {pair: (lines[:n], references[:n]) for pair, (lines, references) in text.items()}
    requests = [(pair, line) for pair, (lines, _) in text.items() for line in lines]

    def bleu(model: Model) -> float:
        found = iter(translate(model, requests, Decoding()))
        scores = {
            pair: score(pair, [next(found) for _ in references], references, a.tokenize).bleu
            for pair, (_, references) in text.items()
        }
        return averages(scores)["all"]

    scored = hashlib.sha256(
        json.dumps([text, a.tokenize] if a.tokenize else text).encode()
    ).hexdigest()[:32]
    return Validation(bleu, a.validate_every, a.patience, scored)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_data(p)
    p.add_argument("--workdir", type=Path, required=True, help="checkpoints, log and model")
    add_configuration(p, settable(ModelConfig, TrainConfig), "ModelConfig or TrainConfig")
    p.add_argument(
        "--init",
        type=Path,
        metavar="MODEL",
        help="begin from a trained model: its sizes, weights and vocabulary; text, directions and "
        "hyperparameters are this run's",
    )
    p.add_argument(
        "--init-task",
        type=_task_like,
        action="append",
        default=[],
        metavar="NEW=OLD",
        help="with --init: a new task begins from that one, not from the mean of all",
    )
    p.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this field of TrainConfig, or text, is another than when the run "
        "began; may be given again",
    )
    p.add_argument(
        "--validate-every",
        type=int,
        metavar="STEPS",
        help="score the model by greedy BLEU on the valid text; the best one is kept in best/",
    )
    p.add_argument(
        "--validate-sentences",
        type=int,
        metavar="N",
        help="first sentences of each direction that are scored (default 100)",
    )
    p.add_argument(
        "--patience", type=int, metavar="N", help="end after N scores in a row without a new best"
    )
    add_tokenize(p)
    p.add_argument("--tensorboard", action="store_true", help="write event files too")
    p.add_argument(
        "--data-parallel",
        type=int,
        metavar="N",
        help="devices along the mesh's data axis (default: all there are)",
    )
    add_expert_parallel(p)
    p.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a SLURM, Kubernetes, TPU pod or Open MPI job",
    )
    p.add_argument("--coordinator", metavar="HOST:PORT", help="by hand: where process 0 listens")
    p.add_argument("--num-processes", type=int, metavar="N", help="by hand: how many there are")
    p.add_argument("--process-id", type=int, metavar="I", help="by hand: which one this is")


def _task_like(word: str) -> tuple[str, str]:
    new, equals, old = word.partition("=")
    if not (new and equals and old):
        raise argparse.ArgumentTypeError(f"wants NEW=OLD, got {word!r}")
    return new, old


def add_configuration(
    p: argparse.ArgumentParser, fields: Sequence[str], what: str, *, routing: bool = True
) -> None:
    """Arguments that say what is trained and how; fields, what: of --set, as of `add_set`."""
    p.add_argument("--config", choices=list(PRESETS), default="tiny")
    p.add_argument("--steps", type=int, help="optimiser steps in all, resumed ones included")
    p.add_argument("--seed", type=int)
    for side in ("encoder", "decoder") if routing else ():
        p.add_argument(
            f"--{side}", choices=get_args(SideRouting), help="routing; target by default"
        )
    add_set(p, fields, what)
