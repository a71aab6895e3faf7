"""The translate command: pipes, files, lists, closed streams, and runs that have not ended."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.model.saved import Model, save_model

LINES = ["one two three", "", "four five", "six", "two two", "three one two four"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = support.model_config()
    # Of this seed translations are words, and one of "two" has a second.
    made = Model(support.params(config, 1), config, support.tokenizer())
    save_model(made, tmp_path / "model")
    return tmp_path / "model"


def start(model: Path, *more: str, **streams: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "taskmoe.wmt", "translate", "--model", str(model)]
    env = os.environ | {"PYTHONPATH": str(support.ROOT / ".types"), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [*command, "--pair", "en-de", "--beam", "1", *more], text=True, env=env, **(pipes | streams)
    )


def translated(model: Path, capfd: pytest.CaptureFixture[str], *more: str) -> str:
    capfd.readouterr()
    words = ["translate", "--model", str(model), "--pair", "en-de", "--beam", "2", *more]
    assert main(words) == 0
    return capfd.readouterr().out


def test_each_line_is_answered_before_the_next_is_there(model: Path) -> None:
    with start(model, "--batch", "1") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        answers = []
        for line in LINES[:3]:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            answers.append(process.stdout.readline())
        process.kill()
    assert answers[1] == "\n"
    assert all(answer.strip() for answer in answers[::2])


def test_files_of_any_form_and_batches_of_any_size_give_the_same(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, packed = tmp_path / "x.txt", tmp_path / "x.txt.gz"
    text = "".join(f"{line}\n" for line in LINES)
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    want = translated(model, capfd, "--input", str(plain))
    assert len(want.splitlines()) == len(LINES)
    assert translated(model, capfd, "--input", str(packed)) == want
    assert translated(model, capfd, "--input", str(plain), "--batch", "1") == want
    packed.write_bytes(packed.read_bytes()[:-9])
    words = ["translate", "--model", str(model), "--pair", "en-de", "--input", str(packed)]
    assert main(words) == 2
    assert "is no whole gzip file" in capfd.readouterr().err


def test_a_list_has_a_line_for_an_empty_sentence(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text("two\n\ntwo\n")
    words = ["--input", str(tmp_path / "x.txt"), "--n-best", "2"]
    rows = [line.split(" ||| ") for line in translated(model, capfd, *words).splitlines()]
    assert [row[0] for row in rows] == ["0", "0", "1", "2", "2"]
    assert rows[2] == ["1", "", "0.0000"]
    assert translated(model, capfd, *words, "--batch", "1").split("|")[0] == "0 "


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("stdin", "standard input is closed; name a file with --input"),
        ("stdout", "standard output is closed"),
    ],
)
def test_a_closed_stream_is_one_line(model: Path, stream: str, message: str) -> None:
    close = {"stdin": "<&-", "stdout": ">&-"}[stream]
    command = f"{sys.executable} -m taskmoe.wmt translate --model {model} --pair en-de {close}"
    env = os.environ | {"PYTHONPATH": str(support.ROOT / ".types"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, shell=True, input="one\n" if stream == "stdout" else None,
        stderr=subprocess.PIPE, text=True, env=env, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith(message)


def test_a_reader_that_goes_away_is_one_line(model: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = start(model, stdout=writing)
    os.close(writing)
    _, errors = process.communicate("one\n", timeout=100)
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert line.endswith("standard output was closed before all was translated")


def test_a_run_that_was_stopped_is_translated_from(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, work = support.write_folder(tmp_path / "data"), tmp_path / "w"
    words = ["train", "--data", str(data), "--workdir", str(work), "--pairs", "en-de"]
    words += ["--cache", str(tmp_path / "cache"), "--steps", "8"]
    for item in ("d_model=16", "d_ff=16", "num_heads=2", "num_experts=4", "vocab_size=330",
                 "batch_tokens=512", "buckets=[16]", "checkpoint_every=8"):  # fmt: skip
        words += ["--set", item]
    assert main(words) == 0
    (tmp_path / "x.txt").write_text("one two\nthree\n")
    asked = ["translate", "--model", str(work), "--input", str(tmp_path / "x.txt")]
    capfd.readouterr()
    assert main(asked) == 0
    want = capfd.readouterr().out
    (work / "model").rename(tmp_path / "aside")
    before = sorted(work.rglob("*"))
    assert main(asked) == 0
    found = capfd.readouterr()
    assert found.out == want
    assert found.err == f"{work} is not trained to its end: the model of step 8\n"
    assert sorted(work.rglob("*")) == before
    (work / "checkpoints" / "8.crc").unlink()
    assert main(asked) == 2
    assert "checkpoints has no whole checkpoint" in capfd.readouterr().err
