"""Training learns, goes on bit for bit where it was killed, and stops when it has gone wrong."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.commands.shared import load
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.saved import load_model
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.training import loop as training
from taskmoe.wmt.training.loop import Progress, train
from taskmoe.wmt.training.step import cross_entropy, make_train_step
from taskmoe.wmt.training.stopping import Stopped
from taskmoe.wmt.training.validation import Validation
from taskmoe.wmt.training.workdir import alone_in, check_workdir, claim_workdir

MODEL = support.model_config(encoder="token", decoder="target", dropout=0.1)


CONFIG = support.train_config(steps=60, checkpoint_every=20)


def run(
    workdir: Path, config: TrainConfig = CONFIG, model: ModelConfig = MODEL, **options: Any
) -> Any:
    drawn = options.pop("drawn", config)
    data = TrainingData.encoded(support.text(), support.tokenizer(), drawn)
    return train(workdir, model, config, data, support.tokenizer(), source="numbers", **options)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from taskmoe.tests.wmt.test_training import run

def report(progress):
    if progress.step == 33:
        while not Path(sys.argv[1], "checkpoints", "20.crc").exists():  # written beside the steps
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), report=report, report_every=1)
"""


def differs(a: Any, b: Any) -> bool:
    return any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_training_learns_and_goes_on_bit_for_bit_where_it_was_killed(tmp_path: Path) -> None:
    reports: list[Progress] = []
    whole = run(tmp_path / "whole", report=reports.append)
    assert [p.step for p in reports] == [20, 40, 60]
    losses = [p.loss for p in reports]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.6 * np.log(MODEL.vocab_size)
    assert all(p.tokens_per_s > 0 and p.dropped == 0 and 1 <= p.busiest <= 4 for p in reports)
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in log] == losses
    data = TrainingData.encoded(support.text(), support.tokenizer(), CONFIG)
    batches = [data.batch(step) for step in range(60)]
    assert sum(p.sentences for p in reports) == sum(len(b.pair) for b in batches)
    real = sum((b.source > 0).sum() + (b.target_out > 0).sum() for b in batches)
    assert sum(p.tokens for p in reports) == real
    assert all(p.tokens_per_s == p.tokens / p.seconds for p in reports)

    environment = os.environ | {"PYTHONPATH": str(support.ROOT / ".types")}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "misled")
    notes: list[str] = []
    killed = run(tmp_path / "killed", note=notes.append)
    assert notes == ["resuming at step 20 of 60", "compiling the step for sentences of 16 tokens"]
    assert not differs(killed.params, whole.params)
    models = [tmp_path / name / "model" / "params.safetensors" for name in ("killed", "whole")]
    assert models[0].read_bytes() == models[1].read_bytes()

    # Other batches after the restart are noticed.
    misled = run(tmp_path / "misled", drawn=dataclasses.replace(CONFIG, seed=1))
    assert differs(misled.params, whole.params)

    # A damaged checkpoint: the one before it is used, that is said, and the result is the same.
    newest = (tmp_path / "killed" / "checkpoints" / "60").rglob("*")
    largest = max((p for p in newest if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    again = run(tmp_path / "killed", note=notes.append)
    assert "60 is damaged" in notes[2]
    assert notes[2].endswith("; using the one of step 40")
    assert notes[3] == "resuming at step 40 of 60"
    assert not differs(again.params, whole.params)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (20, "at step 20 19 steps in a row had a loss or gradients that are not finite; there is"),
        (1, "at step 1 a parameter is not finite"),
    ],
)
def test_a_run_that_is_not_finite_stops(tmp_path: Path, every: int, message: str) -> None:
    """The first step's loss is finite, its update is not."""
    plain = support.model_config(encoder="dense", decoder="dense")
    config = support.train_config(
        steps=40, learning_rate=3e38, warmup_steps=1, checkpoint_every=every, weight_decay=10.0
    )
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, config, plain)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "model").exists()


def test_scores_keep_the_best_model_and_end_the_run(tmp_path: Path) -> None:
    config = support.train_config(steps=40, checkpoint_every=4)
    seen = iter([1.0, 3.0, 2.0, 3.0, 9.0])
    notes: list[str] = []
    validation = Validation(lambda _: next(seen), every=4, patience=2)
    run(tmp_path, config, validation=validation, note=notes.append)
    assert "ended at step 16: no gain in 2 scores; the best, 3.00, was at step 8" in notes[-1]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == {"text": "", "scores": {"4": 1.0, "8": 3.0, "12": 2.0, "16": 3.0}}
    best, last = (load_model(tmp_path / name) for name in ("best", "model"))
    assert differs(best.params, last.params)
    # It stays over, and with more patience it goes on.
    run(tmp_path, config, validation=validation, note=notes.append)
    assert "ended at step 16" in notes[-1]
    longer = dataclasses.replace(config, steps=20)
    with pytest.raises(InputError, match=r"scores\.json are of other valid text"):
        run(tmp_path, longer, validation=Validation(lambda _: 9.0, 4, 3, "other"))
    run(tmp_path, longer, validation=Validation(lambda _: 9.0, 4, 3))
    assert not differs(load_model(tmp_path / "best").params, load_model(tmp_path / "model").params)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    config = support.train_config(steps=4)
    run(tmp_path, config, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    for name in (b"loss", b"tokens_per_s", b"entropy", b"dropped", b"load/layer1/expert3"):
        assert name in data


def test_a_work_directory_serves_one_configuration(tmp_path: Path) -> None:
    config = support.train_config()
    assert not check_workdir(tmp_path / "w", MODEL, config, "numbers")
    assert not (tmp_path / "w").exists()
    # Before the first checkpoint there is nothing to go on from, and another may take its place.
    claim_workdir(tmp_path / "w", MODEL, dataclasses.replace(config, seed=7), "numbers")
    claim_workdir(tmp_path / "w", MODEL, config, "numbers")
    assert not check_workdir(tmp_path / "w", MODEL, config, "numbers")
    (tmp_path / "w" / "checkpoints" / "4").mkdir(parents=True)
    assert check_workdir(tmp_path / "w", MODEL, config, "numbers")
    longer = dataclasses.replace(config, steps=99, checkpoint_every=7, keep_checkpoints=1)
    assert check_workdir(tmp_path / "w", MODEL, longer, "numbers")
    # The same text may have been moved, and less memory may be at hand.
    less = dataclasses.replace(config, remat=True)
    assert check_workdir(tmp_path / "w", MODEL, less, "numbers elsewhere")
    others = [
        (dataclasses.replace(MODEL, d_ff=32), config, "numbers", "model.d_ff is 16 there and 32"),
        (dataclasses.replace(MODEL, pairs=("en-de",)), config, "numbers", "model.pairs is"),
        (MODEL, dataclasses.replace(config, seed=3), "numbers", "train.seed is 0 there and 3 here"),
    ]
    for model, other, source, message in others:
        with pytest.raises(InputError, match=f"belongs to another configuration: {message}"):
            claim_workdir(tmp_path / "w", model, other, source)


def test_a_schedule_that_looks_at_steps_fixes_them(tmp_path: Path) -> None:
    config = support.train_config(schedule="cosine")
    claim_workdir(tmp_path, MODEL, config, "numbers")
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(InputError, match=r"train\.steps is 12 there and 24 here"):
        check_workdir(tmp_path, MODEL, dataclasses.replace(config, steps=24), "numbers")


def test_a_work_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        claim_workdir(tmp_path / "file", MODEL, support.train_config(), "numbers")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match=r"has checkpoints but no config\.json"):
        claim_workdir(tmp_path, MODEL, support.train_config(), "numbers")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        claim_workdir(tmp_path, MODEL, support.train_config(), "numbers")


def test_a_work_directory_has_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "w"),
        pytest.raises(InputError, match=r"another run is at work in .*w; wait"),
    ):
        run(tmp_path / "w", support.train_config(steps=1))
    assert [p.name for p in (tmp_path / "w").iterdir()] == [".lock"]
    run(tmp_path / "w", support.train_config(steps=1))


def test_steps_are_the_total(tmp_path: Path) -> None:
    notes: list[str] = []
    whole = run(tmp_path, support.train_config(steps=4))
    again = run(tmp_path, support.train_config(steps=3), note=notes.append)
    assert notes == ["nothing to train: step 4 is done, and steps=3 is the total"]
    assert not differs(again.params, whole.params)


def test_a_run_that_goes_on_has_no_model_until_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spm.model").write_bytes(support.tokenizer().model)  # as the commands do
    run(tmp_path, support.train_config(steps=4))
    longer, asked = support.train_config(steps=12), iter([0, signal.SIGTERM])
    with pytest.raises(Stopped, match="step 6 of 12 is kept"):
        run(tmp_path, longer, stop=lambda: next(asked))
    assert not (tmp_path / "model").exists()
    stopped = load(tmp_path)
    assert f"{tmp_path} is not trained to its end: the model of step 6" in capsys.readouterr().err
    whole = run(tmp_path, longer)
    assert differs(stopped.params, whole.params)
    assert not differs(load(tmp_path).params, whole.params)
    assert capsys.readouterr().err == ""


def log_of(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def test_a_log_has_each_step_once_wherever_a_run_goes_on(tmp_path: Path) -> None:
    config = support.train_config(steps=8)
    run(tmp_path / "w", config, report_every=3)
    assert [line["step"] for line in log_of(tmp_path / "w")] == [3, 4, 7, 8]
    # The last checkpoint is lost, after a report at another step and half of one.
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "8")
    with (tmp_path / "w" / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "score": 3.0}\n{"step": 9, "loss": 1')
    longer = dataclasses.replace(config, steps=14)
    run(tmp_path / "w", longer, report_every=5)
    run(tmp_path / "whole", longer)
    log, whole = log_of(tmp_path / "w"), log_of(tmp_path / "whole")
    assert [line["step"] for line in log] == [3, 4, 8, 12, 14]
    for field in ("sentences", "tokens"):
        assert sum(line[field] for line in log) == sum(line[field] for line in whole)
    # Nothing is left of a run that reached no checkpoint.
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    run(tmp_path / "w", support.train_config(steps=2))
    assert [line["step"] for line in log_of(tmp_path / "w")] == [2]


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may become larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_log_that_cannot_be_written_names_the_checkpoint_that_is_whole(tmp_path: Path) -> None:
    run(tmp_path, support.train_config(steps=4))
    log = tmp_path / "log.jsonl"
    long = json.dumps({"step": 1, "note": "x" * (1 << 22)}) + "\n"  # than all other files
    log.write_text(long + log.read_text())
    longer = support.train_config(steps=8)
    words = r"log\.jsonl: File too large; the checkpoint of step 4 is whole\. With that mended"
    with files_up_to(log.stat().st_size + 10), pytest.raises(InputError, match=words):
        run(tmp_path, longer, report_every=1)
    assert not log.read_text().endswith("\n")
    run(tmp_path, longer, report_every=1)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 4, 5, 6, 7, 8]


def test_a_model_that_cannot_be_written_is_told_of_in_a_line(tmp_path: Path) -> None:
    run(tmp_path, support.train_config(steps=4))
    model = tmp_path / "model" / "params.safetensors"
    with (
        files_up_to(model.stat().st_size - 1),
        pytest.raises(InputError, match=r"model: .*File too large.*step 4 is whole"),
    ):
        run(tmp_path, support.train_config(steps=4))
    assert not differs(load_model(model.parent).params, load(tmp_path).params)


def test_steps_that_fail_between_two_reports_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any) -> Any:
        step, in_row = make_train_step(*given), iter([0, 1, 2, 3, 0, 0])

        def changed(state: Any, batch: Any) -> Any:
            state, sums = step(state, batch)
            return state, sums | {"skipped_in_row": next(in_row)}

        return changed

    config = support.train_config(steps=6, checkpoint_every=6)
    monkeypatch.setattr(training, "make_train_step", failing)
    run(tmp_path / "enough", dataclasses.replace(config, max_skipped=3))
    with pytest.raises(FloatingPointError, match="at step 6 3 steps in a row"):
        run(tmp_path / "few", dataclasses.replace(config, max_skipped=2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_formula_and_leaves_padding_out(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3, 5))
    target = np.array([[1, 4, 0], [2, 0, 0]])
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = [(0, 0), (0, 1), (1, 0)]
    plain = -np.mean([log_probs[b, s, target[b, s]] for b, s in at])
    uniform = -np.mean([log_probs[b, s].mean() for b, s in at])
    want = (1 - smoothing) * plain + smoothing * uniform, plain
    have = cross_entropy(jax.numpy.asarray(logits, np.float32), target, smoothing)
    np.testing.assert_allclose(have, want, rtol=1e-6)
    moved = np.where(target == 4, 3, target)
    assert abs(cross_entropy(jax.numpy.asarray(logits), moved, smoothing)[0] - want[0]) > 1e-3
