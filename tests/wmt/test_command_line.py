"""The commands from end to end on a small folder, and one line for each kind of wrong input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.commands.shared import load
from taskmoe.wmt.model.saved import load_model, save_model
from taskmoe.wmt.model.subnetwork import extract

TINY = [
    "--set", "d_model=16", "--set", "d_ff=16", "--set", "num_heads=2", "--set", "num_experts=4",
    "--set", "vocab_size=330", "--set", "buckets=[16]", "--set", "batch_tokens=512",
    "--set", "learning_rate=0.01", "--set", "warmup_steps=20", "--set", "checkpoint_every=20",
]  # fmt: skip
PAIRS = "en-de,de-en,en-fr"


def train_arguments(data: Path, workdir: Path, *more: str) -> list[str]:
    given = ["--data", str(data), "--pairs", PAIRS, "--workdir", str(workdir)]
    return ["train", *given, *TINY, "--steps", "40", *more]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    return give


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr; nothing may stand on stdout that was not there before."""
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "error: " in lines[0]
    return lines[0]


def test_train_evaluate_extract_translate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], stdin: Callable[[bytes], None]
) -> None:
    data, work, small = support.write_folder(tmp_path / "data"), tmp_path / "w", tmp_path / "de"
    assert main(train_arguments(data, work)) == 0
    printed = capfd.readouterr().out
    losses = [float(line.split()[3]) for line in printed.splitlines() if line.startswith("step ")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert "tokens/s" in printed

    limits = ["--data", str(data), "--limit", "3", "--beam", "1"]
    scores = tmp_path / "scores.json"
    assert main(["evaluate", "--model", str(work), *limits, "--json", str(scores)]) == 0
    printed = capfd.readouterr().out
    assert ": nrefs:1|case:mixed|eff:no|tok:intl|smooth:exp|version:" in printed
    found = json.loads(scores.read_text())
    assert list(found["scores"]) == PAIRS.split(",")
    assert all(0 <= s["bleu"] <= 100 and s["sentences"] == 3 for s in found["scores"].values())

    assert main(["extract", "--model", str(work), "--task", "de", "--out", str(small)]) == 0
    capfd.readouterr()
    stdin(b"one two three\n\nfour five\n")
    assert main(["translate", "--model", str(small)]) == 0
    ours = capfd.readouterr()
    assert ours.err == ""
    assert len(ours.out.splitlines()) == 3
    assert ours.out.splitlines()[1] == ""
    stdin("\ufeffone two three \r\n\r\nfour five".encode())
    assert main(["translate", "--model", str(small)]) == 0
    assert capfd.readouterr().out == ours.out
    stdin(b"one two three\n\nfour five six one two three\n")
    assert main(["translate", "--model", str(small), "--max-source", "5"]) == 0
    cut = capfd.readouterr()
    assert re.fullmatch(r"en-de, line 3: cut to 5 of \d+ tokens\n", cut.err)
    assert cut.out.splitlines()[0] == ours.out.splitlines()[0]
    lines = tmp_path / "lines.txt"
    lines.write_text("one two three\n\nfour five\n", encoding="utf-8")
    full = ["translate", "--model", str(work), "--pair", "en-de", "--input", str(lines)]
    assert main(full) == 0
    assert capfd.readouterr().out == ours.out

    # The same work directory with another configuration, or with a file cut short.
    before = sorted(work.rglob("*"))
    assert main(train_arguments(data, work, "--set", "vocab_size=340")) == 2
    assert "another configuration: model.vocab_size is 330 there and 340" in one_line(capfd)
    assert main([*train_arguments(data, work), "--pairs", "fr-en"]) == 2
    assert "another configuration: model.pairs" in one_line(capfd)
    assert sorted(work.rglob("*")) == before
    cut = max((work / "checkpoints" / "40").rglob("*"), key=lambda p: p.stat().st_size)
    cut.write_bytes(cut.read_bytes()[:-1])
    assert main(train_arguments(data, work)) == 0
    printed = capfd.readouterr().out
    assert "40 is damaged" in printed
    assert "using the one of step 20" in printed
    (work / "spm.model").write_bytes(b"")
    assert main(train_arguments(data, work)) == 2
    assert "spm.model is no SentencePiece model" in one_line(capfd)


def no_folder(data: Path) -> list[str]:
    shutil.rmtree(data)
    return []


def unequal(data: Path) -> list[str]:
    with (data / "train.de").open("a") as file:
        file.write("eins\n")
    return []


def invalid(data: Path) -> list[str]:
    with (data / "train.fr").open("ab") as file:
        file.write(b"\xff\n")
    with (data / "train.en").open("ab") as file:
        file.write(b"one\n")
    with (data / "train.de").open("ab") as file:
        file.write(b"eins\n")
    return []


WRONG: list[tuple[Any, str]] = [
    (no_folder, "data folder .* is not there"),
    (unequal, r"train\.en has 200 lines but .*train\.de has 201"),
    (invalid, r"train\.fr, line 201: not valid UTF-8"),
    (lambda _: ["--pairs", "en-xx"], "no train text for pair en-xx"),
    (lambda _: ["--pairs", "ende"], "pair must be two different language codes"),
    (lambda _: ["--pairs", "en-de,en-de"], "names a direction twice"),
    (lambda _: ["--config", "huge"], "invalid choice: 'huge'"),
    (lambda _: ["--steps", "-3"], "steps must be at least 0, got -3"),
    (lambda _: ["--set", "width=3"], "no field 'width' of ModelConfig or TrainConfig"),
    (lambda _: ["--set", "d_model"], "--set wants FIELD=VALUE, got 'd_model'"),
    (lambda _: ["--set", "d_model=wide"], "d_model must be int, got 'wide'"),
    (lambda _: ["--set", "vocab_size=20"], "vocab_size=20 does not fit this text"),
    (lambda _: ["--set", "buckets=[2]"], "every sentence is longer than the longest bucket"),
    (lambda _: ["--encoder", "word"], "invalid choice: 'word'"),
    (lambda _: ["--patience", "2"], "--patience needs --validate-every"),
    (lambda _: ["--tokenize", "13a"], "--tokenize needs --validate-every"),
    (lambda _: ["--validate-sentences", "9"], "--validate-sentences needs --validate-every"),
    (lambda _: ["--init-task", "de=fr"], "--init-task needs --init"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: Any, message: str
) -> None:
    data, work = support.write_folder(tmp_path / "data"), tmp_path / "w"
    arguments = [*train_arguments(data, work), *spoil(data)]
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = int(str(stop.code))
    assert code == 2
    line = one_line(capfd)
    assert re.search(message, line), line
    assert not work.exists()


def test_a_model_that_does_not_fit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], stdin: Callable[[bytes], None]
) -> None:
    model = support.model()
    save_model(model, tmp_path / "full")
    save_model(extract(model, "de"), tmp_path / "de")
    data = support.write_folder(tmp_path / "data")
    full, small = str(tmp_path / "full"), str(tmp_path / "de")
    cases = [
        (["translate", "--model", full], "--pair must say which of en-de, de-en, en-fr"),
        (["translate", "--model", full, "--pair", "en-xx"], "the model knows only en-de, de-en"),
        (["translate", "--model", small, "--pair", "de-en"], "the model knows only en-de"),
        (["translate", "--model", small, "--beam", "0"], "beam must be at least 1, got 0"),
        (
            ["translate", "--model", small, "--alpha", "nan"],
            "alpha must be in [0, 10], got alpha=n",
        ),
        (["translate", "--model", small, "--alpha", "11"], "alpha must be in [0, 10]"),
        (["translate", "--model", small, "--max-source", "2"], "--max-source must be at least 3"),
        (["evaluate", "--model", full, "--data", str(data), "--limit", "0"], "--limit must be at"),
        (
            ["evaluate", "--model", full, "--data", str(data), "--against", small],
            "pair de-en: the model knows only en-de",
        ),
        (["extract", "--model", full, "--task", "zz-de", "--out", f"{tmp_path}/x"], "knows only"),
        (
            ["extract", "--model", full, "--task", "fr", "--task", "de", "--out", str(tmp_path)],
            "de already holds something",
        ),
        (["export", "--model", small, "--out", full], "full already holds something"),
        (["translate", "--model", small], "standard input, line 2: not valid UTF-8"),
        (["translate", "--model", small, "--input", f"{tmp_path}/no"], "/no: No such file"),
        (["translate", "--model", f"{tmp_path}/no"], "/no is no model folder: it has no config"),
        (["evaluate", "--model", full, "--data", f"{tmp_path}/no"], "data folder"),
        (["evaluate", "--model", full, "--data", str(data), "--split", "test"], "no test text"),
        (["extract", "--model", full, "--task", "xx", "--out", f"{tmp_path}/x"], "not the model's"),
        (["extract", "--model", full, "--task", "de", "--out", small], "already holds something"),
    ]
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    cases.append(
        (["translate", "--model", f"{tmp_path}/begun"], "begun/checkpoints has no whole checkpoint")
    )
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        stdin(b"one\n\xff\n" if message.startswith("standard") else b"one\ntwo\n")
        assert main(arguments) == 2
        assert message in one_line(capfd)
        assert sorted(tmp_path.rglob("*")) == before
    assert load_model(tmp_path / "de").config.pairs == ("en-de",)


def test_as_a_command_of_the_shell(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(support.ROOT / ".types")}
    command = [sys.executable, "-m", "taskmoe.wmt"]
    arguments = train_arguments(tmp_path / "nowhere", tmp_path / "w")
    run = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("python -m taskmoe.wmt train: error: data folder")


def test_extract_several_prune_distill_export(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, full = support.write_folder(tmp_path / "data"), tmp_path / "full"
    save_model(support.model(), full)
    several = ["extract", "--model", str(full), "--task", "de", "--task", "fr", "--out"]
    assert main([*several, str(tmp_path / "cut")]) == 0
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["de", "fr"]
    exported = ["export", "--model", str(tmp_path / "cut" / "de"), "--length", "16"]
    assert main([*exported, "--beam", "1", "--out", str(tmp_path / "served")]) == 0
    assert (tmp_path / "served" / "translate.stablehlo").is_file()
    for path in (tmp_path / "served").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path

    token = tmp_path / "token"
    save_model(support.model(encoder="token", decoder="token"), token)
    given = ["--data", str(data), "--pairs", "en-de"]
    pruned = ["prune", "--model", str(token), *given, "--limit", "20", "--keep"]
    assert main([*pruned, "3", "--out", str(tmp_path / "pruned")]) == 0
    assert (
        "3 of 4 experts, which took these shares of all assignments: encoder"
        in capfd.readouterr().out
    )
    assert main([*pruned, "3", "--by", "reap", "--out", str(tmp_path / "reaped")]) == 0
    assert "whose scores add up to these shares of all: encoder" in capfd.readouterr().out
    assert load_model(tmp_path / "reaped").config.num_experts == 3
    assert load_model(tmp_path / "pruned").config.pairs == ("en-de",)

    student = ["distill", "--teacher", str(token), *given, *TINY[10:], "--steps", "3"]
    student += [
        "--beam",
        "1",
        "--set",
        "max_sentences=20",
        "--set",
        "buckets=[200]",
        "--workdir",
        str(tmp_path / "student"),
    ]
    kept = tmp_path / "gain.json"
    more = ["--baseline", str(tmp_path / "cut" / "de"), "--limit", "4", "--json", str(kept)]
    assert main([*student, *more]) == 0
    printed = capfd.readouterr().out
    assert "of them from the teacher's" in printed
    gains = json.loads(kept.read_text())
    assert gains["task_moe"] is None
    nothing = gains["teacher"] <= gains["dense"]
    assert ("the teacher gains nothing over the baseline" in printed) == nothing
    assert ("of the teacher's gain over the baseline" in printed) == (not nothing)
    assert (gains["of_teacher"] is None) == nothing
    assert load_model(tmp_path / "student" / "model").config.encoder == "dense"
    shutil.rmtree(tmp_path / "student" / "model")  # as of a run that was stopped
    assert load(tmp_path / "student").config.encoder == "dense"
    assert "is not trained to its end: the model of step 3" in capfd.readouterr().err
    taught = json.loads((tmp_path / "student" / "sizes.json").read_text())
    assert 0 < taught["en-de"] <= 20
    # What is made from a model knows what that was trained on.
    (full / "sizes.json").write_text(json.dumps({"en-de": 7, "en-fr": 2_000_000}))
    assert main([*several, str(tmp_path / "cut2")]) == 0
    assert json.loads((tmp_path / "cut2" / "fr" / "sizes.json").read_text())["en-de"] == 7
    score = ["evaluate", "--model", str(full), "--data", str(data), "--limit", "2", "--beam", "1"]
    scores = tmp_path / "scores.json"
    assert main([*score, "--against", str(full), "--json", str(scores)]) == 0
    found = json.loads(scores.read_text())
    assert found["averages"] == found["averages_against"]
    assert set(found["averages_chrf"]) == set(found["averages"]) >= {"low resource", "all"}
    chrf = [s["chrf"] for s in found["scores"].values()]
    assert abs(found["averages_chrf"]["all"] - sum(chrf) / len(chrf)) < 1e-9
    (line,) = (x for x in capfd.readouterr().out.splitlines() if "average all" in x)
    means = (found[f"averages{name}"]["all"] for name in ("", "_chrf", "_against"))
    assert re.findall(r"\d+\.\d\d", line) == [f"{mean:.2f}" for mean in means]

    for wrong, message in (
        ([*several[:-1], "--task", "de", "--out", str(tmp_path / "x")], "names a task twice"),
        ([*pruned, "9", "--out", str(tmp_path / "x")], "keep must be in [2, 4], got 9"),
        ([*exported[:2], str(full), "--out", str(tmp_path / "x")], "extract a task first"),
        ([*student, "--task-model", str(full)], "--task-model needs --baseline"),
        ([*student, "--split", "test"], "--split needs --baseline"),
        ([*student, "--limit", "3"], "--limit needs --baseline"),
        ([*student, "--json", str(kept)], "--json needs --baseline"),
        ([*student, "--seed", "1"], "train.seed is 0 there and 1 here; name another --workdir"),
        (
            [*student, "--set", "d_model=32"],
            "no field 'd_model' of TrainConfig (the student has its teacher's sizes, but for "
            "encoder_wide_d_ff and decoder_wide_d_ff)",
        ),
        ([*student, *more[:2], "--limit", "-1"], "--limit must be at least 1, got -1"),
    ):
        assert main(wrong) == 2
        assert message in one_line(capfd)
        assert not (tmp_path / "x").exists()
