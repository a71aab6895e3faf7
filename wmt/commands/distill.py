"""`distill`: a dense student that learns what a teacher would write."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from taskmoe.cli.command_line import write_bytes, write_text
from taskmoe.cli.progress import bar
from taskmoe.wmt.commands.settings import read_set, settable
from taskmoe.wmt.commands.shared import (
    add_decoding,
    build,
    check_limit,
    check_needed,
    decoding,
    load,
    out,
    own_words,
)
from taskmoe.wmt.commands.text import add_data, text_to_score, training_text
from taskmoe.wmt.commands.train import add_configuration, configure_training, report_to
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.transformer import param_count
from taskmoe.wmt.model.translation import translate
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.scoring import score
from taskmoe.wmt.text.training_set import VOCABULARY
from taskmoe.wmt.training.distillation import (
    STUDENT_FIELDS,
    gain_kept,
    student_config,
    student_params,
    teacher_text,
)
from taskmoe.wmt.training.loop import train
from taskmoe.wmt.training.stopping import ending_at_once, stopping
from taskmoe.wmt.training.workdir import SIZES, check_workdir

_SETTABLE = [*settable(TrainConfig), *STUDENT_FIELDS]
_SIZES = f"the student has its teacher's sizes, but for {' and '.join(STUDENT_FIELDS)}"


def run(a: argparse.Namespace) -> None:
    """Train a dense student on a teacher's translations, from the teacher's non-expert weights."""
    check_needed(a, "baseline", "task_model", "json", "split", "limit")
    check_limit(a.limit)
    teacher = load(a.teacher)
    how = decoding(a, teacher)
    references = {"--baseline": a.baseline, "--task-model": a.task_model}
    beside = {name: load(path) for name, path in references.items() if path is not None}
    for other in beside.values():
        decoding(a, other)  # what does not fit is said before hours of work
    fields = read_set(a.set, _SETTABLE, f"TrainConfig ({_SIZES})")
    widths = {name: fields[name] for name in STUDENT_FIELDS if name in fields}
    train_fields = configure_training(a, fields)
    train_config = build(TrainConfig, train_fields)
    named, train_text, _ = training_text(a, train_config)
    config: ModelConfig = own_words(student_config, teacher.config, named.pairs, widths)
    identity = f"{named.identity} translated by {a.teacher.resolve()}"
    check_workdir(a.workdir, config, train_config, identity)

    kept = ending_at_once("what was translated is kept")
    with kept, bar("translating", "sentences", enabled=sys.stderr.isatty()) as progress:
        text = teacher_text(
            a.workdir / "translations",
            teacher,
            {pair: lines for pair, (lines, _) in train_text.items()},
            how,
            progress,
        )
    params, taken = student_params(teacher.params, config, train_config.seed)
    out.print(
        f"student: {param_count(params):,} parameters, {taken:,} of them from the teacher's "
        f"{param_count(teacher.params):,}"
    )
    data = TrainingData.encoded(text, teacher.tokenizer, train_config)
    write_text(a.workdir / SIZES, json.dumps(data.sizes, indent=2) + "\n")
    write_bytes(a.workdir / VOCABULARY, teacher.tokenizer.model)
    with report_to("training", train_config.steps) as (report, say), stopping() as stop:
        student = train(
            a.workdir,
            config,
            train_config,
            data,
            teacher.tokenizer,
            source=identity,
            params=params,
            report=report,
            note=say,
            stop=stop,
        )
    if "--baseline" not in beside:
        return
    models = {"student": student, "teacher": teacher, **beside}
    means = {name: _bleu(a, model, named.pairs) for name, model in models.items()}
    gain = gain_kept(
        means["--baseline"], means["teacher"], means["student"], means.get("--task-model")
    )
    out.print(
        f"BLEU on {a.split or 'valid'}: "
        + ", ".join(f"{name} {x:.2f}" for name, x in means.items())
    )
    for name, best, share in (
        ("teacher", gain.teacher, gain.of_teacher),
        ("task-routed model", gain.task_moe, gain.of_task_moe),
    ):
        if share is not None:
            out.print(f"the student keeps {share:.0f}% of the {name}'s gain over the baseline")
        elif best is not None:
            out.print(f"the {name} gains nothing over the baseline: there is no share to keep")
    if a.json is not None:
        write_text(a.json, json.dumps(gain._asdict(), indent=2) + "\n")


def _bleu(a: argparse.Namespace, model: Model, pairs: tuple[str, ...]) -> float:
    """Mean BLEU over the directions."""
    asked = argparse.Namespace(**{**vars(a), "pairs": list(pairs)})
    text, _ = text_to_score(asked, a.split or "valid", model)
    text = {pair: (x[: a.limit], y[: a.limit]) for pair, (x, y) in text.items()}
    requests = [(pair, line) for pair, (lines, _) in text.items() for line in lines]
    found = iter(translate(model, requests, decoding(a, model)))
    scores = [score(p, [next(found) for _ in y], y).bleu for p, (_, y) in text.items()]
    return float(np.mean(scores))


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    p.add_argument("--teacher", type=Path, required=True, help="model folder or work directory")
    add_data(p)
    p.add_argument("--workdir", type=Path, required=True, help="translations, checkpoints, student")
    add_configuration(p, _SETTABLE, f"TrainConfig; {_SIZES}", routing=False)
    add_decoding(p)
    p.add_argument(
        "--baseline", type=Path, metavar="MODEL", help="a dense model: prints what gain is kept"
    )
    p.add_argument(
        "--task-model", type=Path, metavar="MODEL", help="a task-routed model: its gain too"
    )
    p.add_argument(
        "--split", choices=("valid", "test"), help="with --baseline: what is scored (default valid)"
    )
    p.add_argument("--limit", type=int, help="first sentences of each direction that are scored")
    p.add_argument("--json", type=Path, help="write the gains here too")
