"""Training sets: the text that memory would hold, whole after any stop, refused if damaged."""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.text import blocks
from taskmoe.wmt.text.cleaning import clean
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.preparing import Plan, prepare
from taskmoe.wmt.text.rows import Rows
from taskmoe.wmt.text.sources import open_sources, read_all, read_held_out
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.text.training_set import MANIFEST, TrainingSet, rows_file

PAIRS = ("en-de", "de-en")
CONFIG = support.train_config(buckets=(4, 8, 16), vocab_sentences=150)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LINES", 64)


def folder_of_text(folder: Path) -> Path:
    """200 good lines, and of every kind that is left out some."""
    support.write_folder(folder)
    lines = {x: support.sentences(x, 200) for x in ("en", "de")}
    held = {x: support.sentences(x, 12, 1)[3] for x in ("en", "de")}
    for i, language in enumerate(("en", "de")):
        own = lines[language]
        extra = [
            *own[20:50],  # again
            *["", "kept"][i : i + 1],  # a side is empty
            "x" * 1001,
            "the same four words",
            ["a", "a b c d e f g h i j k l m n o p q r s t u v w x y z"][i],
            held[language].upper(),
            *own[:40],
        ]
        content = "".join(f"{line}\n" for line in own + extra)
        (folder / f"train.{language}").write_text(content, encoding="utf-8")
    (folder / "train.fr").unlink()
    return folder


def plan(folder: Path, **fields: Any) -> Plan:
    sources = open_sources([str(folder)])
    chosen: dict[str, Any] = {
        "sources": sources,
        "pairs": PAIRS,
        "held_out": read_held_out(sources, {"en", "de"}),
        "splits": {"valid": read_all(sources, "valid", PAIRS)},
        "config": CONFIG,
        "vocabulary": support.tokenizer(),
        "title": "text",
        "identity": "text",
    }
    return Plan(**(chosen | fields))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_memory(wanted: Plan, tokenizer: Tokenizer) -> TrainingData:
    text = read_all(wanted.sources, "train", wanted.pairs)
    cleaned, _ = clean(text, wanted.config, wanted.held_out)
    return TrainingData.encoded(cleaned, tokenizer, wanted.config)


def test_a_set_is_the_text_that_memory_would_hold(tmp_path: Path) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    made = prepare(tmp_path / "set", wanted)
    read = read_all(wanted.sources, "train", PAIRS)
    _, accounts = clean(read, CONFIG, wanted.held_out)
    there = made.manifest.directions
    assert {pair: one.account for pair, one in there.items()} == accounts
    for reason in ("empty", "long", "copied", "ratio", "duplicate", "held_out"):
        assert getattr(accounts["en-de"], reason) > 0, reason
    # Planted: 70 lines that came before; sentences that the generator repeats are more of them.
    assert accounts["en-de"].duplicate >= 70
    mapped, held = made.data(PAIRS, CONFIG), in_memory(wanted, made.tokenizer)
    assert mapped.fingerprint == held.fingerprint
    for step in range(20):
        for a, b in zip(mapped.batch(step), held.batch(step), strict=True):
            np.testing.assert_array_equal(a, b)
    assert read_all(open_sources([str(made.folder)]), "valid", PAIRS) == wanted.splits["valid"]
    assert not (tmp_path / "set.part").exists()
    with pytest.raises(InputError, match="already holds something"):
        prepare(tmp_path / "set", wanted)


def test_workers_write_the_same_bytes(tmp_path: Path) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"), vocabulary=330)
    one, two = prepare(tmp_path / "one", wanted), prepare(tmp_path / "two", wanted, 2)
    assert content(one.folder) == content(two.folder)
    other = prepare(tmp_path / "other", plan(tmp_path / "text"))
    assert content(one.folder) != content(other.folder)


def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"), vocabulary=330)
    renames = []
    replace = os.replace

    def counted(source: Any, target: Any) -> None:
        renames.append(target)
        if len(renames) == stop_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    stop_at = 0
    whole = content(prepare(tmp_path / "whole", wanted).folder)
    count = len(renames)
    assert count > 25  # two directions of five blocks, each written twice, and the rest
    for stop_at in range(1, count):  # the last one puts the part away
        renames.clear()
        out = tmp_path / f"out{stop_at}"
        with pytest.raises(InputError, match=r"No space left .* is kept in .*\.part, .* goes on"):
            prepare(out, wanted)
        assert not out.exists()
        done, stop_at = renames.copy(), 0
        renames.clear()
        assert content(prepare(out, wanted).folder) == whole
        # Only a block's text, what could not be renamed, and the small files of text to score.
        assert len(renames) <= count - len(done) + 4
        shutil.rmtree(out)


@pytest.mark.parametrize("stop_at", [3, 12, 17, 30])
def test_several_sources_go_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    folder, more = folder_of_text(tmp_path / "text"), tmp_path / "more.en-de.tsv"
    sides = zip(support.sentences("en", 90, 5), support.sentences("de", 90, 5), strict=True)
    more.write_text("".join(f"{a}\t{b}\n" for a, b in sides), encoding="utf-8")
    wanted = plan(folder, sources=open_sources([str(more), str(folder)]))
    whole = content(prepare(tmp_path / "whole", wanted).folder)
    replace, count = os.replace, itertools.count(1)

    def stopped(source: Any, target: Any) -> None:
        if next(count) == stop_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", wanted)
    monkeypatch.setattr(os, "replace", replace)
    assert content(prepare(tmp_path / "out", wanted).folder) == whole


@pytest.mark.parametrize("at", ["rename", "remove"])
def test_what_a_run_left_that_was_killed_at_its_end_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    more = folder_of_text(tmp_path / "more")
    for side in more.glob("train.*"):
        side.write_text(f"one\n{side.read_text()}")
    other = plan(more, identity="more")
    out, part, replace = tmp_path / "out", tmp_path / "out.part", os.replace

    def killed(source: Path, target: Path) -> None:
        if source == part:
            raise KeyboardInterrupt
        replace(source, target)

    def killed_later(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (folder / "plan.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "rename":
            patch.setattr(os, "replace", killed)
        else:
            patch.setattr(shutil, "rmtree", killed_later)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, wanted)
    whole = content(out)
    shutil.rmtree(out)
    if part.exists():
        copy = shutil.copytree(part, tmp_path / "same.part").with_suffix("")
        assert content(prepare(copy, wanted).folder) == whole
    assert content(prepare(out, other).folder) == content(prepare(tmp_path / "x", other).folder)
    assert not part.exists()


def test_a_disk_without_room_for_the_tokens_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    whole = content(prepare(tmp_path / "whole", wanted).folder)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(InputError, match=r"out\.part: No space left .* goes on"):
            prepare(tmp_path / "out", wanted)
    assert content(prepare(tmp_path / "out", wanted).folder) == whole


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    folder = folder_of_text(tmp_path / "text")
    environment = os.environ | {"PYTHONPATH": str(support.ROOT / ".types")}
    command = [sys.executable, "-m", "taskmoe.wmt", "prepare", "--data", str(folder)]
    command += ["--pairs", "en-de,de-en", "--workers", "2", "--set", "vocab_size=330", "--out"]
    parts = tmp_path / "killed.part"
    begun = subprocess.Popen(
        [*command, str(tmp_path / "killed")], stderr=subprocess.DEVNULL, env=environment
    )
    while begun.poll() is None and len(list(parts.glob("**/*.*"))) < 9:
        time.sleep(0.002)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    if parts.exists():
        (parts / "set").mkdir(exist_ok=True)
        (parts / "set" / ".spm.model-half").write_bytes(b"half")
    for out in ("killed", "whole"):
        if not (tmp_path / out).exists():
            subprocess.run(
                [*command, str(tmp_path / out)], check=True, capture_output=True, env=environment
            )
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_what_was_begun_with_other_text_or_settings_is_refused(tmp_path: Path) -> None:
    folder = folder_of_text(tmp_path / "text")
    wanted, out = plan(folder), tmp_path / "set"
    (tmp_path / "set.part" / "set").mkdir(parents=True)
    (tmp_path / "set.part" / "plan.json").write_text(json.dumps(wanted.description()))
    other = support.train_config(buckets=(4, 8, 16), vocab_sentences=150, max_ratio=2.0)
    with pytest.raises(InputError, match=r"begun with other max_ratio \(3.0 there, 2.0 here\)"):
        prepare(out, plan(folder, config=other))
    with (folder / "train.en").open("a") as file:
        file.write("one more\n")
    with (folder / "train.de").open("a") as file:
        file.write("eins mehr\n")
    with pytest.raises(InputError, match=r"begun with other files .*; delete it to begin anew"):
        prepare(out, plan(folder))


def test_a_damaged_set_is_refused(tmp_path: Path) -> None:
    made = prepare(tmp_path / "set", plan(folder_of_text(tmp_path / "text")))
    file = rows_file(made.folder, "en-de")
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=r"train\.en-de\.npy is damaged"):
        made.data(PAIRS, CONFIG)
    file.write_bytes(whole)
    made.data(PAIRS, CONFIG)
    with pytest.raises(InputError, match="has no training text of en-fr; it has en-de, de-en"):
        made.data(("en-fr",), CONFIG)
    (made.folder / "spm.model").write_bytes(made.tokenizer.with_languages(["xx"]).model)
    with pytest.raises(InputError, match="is another vocabulary than the set's"):
        TrainingSet(made.folder)
    manifest = (made.folder / MANIFEST).read_text()
    (made.folder / MANIFEST).write_text(manifest.replace('"version": 1', '"version": 9'))
    with pytest.raises(InputError, match="of version 9, this is 1"):
        TrainingSet(made.folder)
    (made.folder / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="cannot be used"):
        TrainingSet(made.folder)
    with pytest.raises(InputError, match="is no training set"):
        TrainingSet(tmp_path / "text")


def test_longer_buckets_than_the_set_keeps_are_an_error(tmp_path: Path) -> None:
    short = support.train_config(buckets=(4, 5), vocab_sentences=150)
    made = prepare(tmp_path / "set", plan(folder_of_text(tmp_path / "text"), config=short))
    assert made.manifest.directions["en-de"].beyond > 0
    assert made.data(PAIRS, short).too_long["en-de"] == made.manifest.directions["en-de"].beyond
    with pytest.raises(InputError, match="sentences of up to 5 tokens, and there are longer ones"):
        made.data(PAIRS, CONFIG)
    shorter = made.data(PAIRS, support.train_config(buckets=(4,)))
    assert shorter.too_long["en-de"] > made.manifest.directions["en-de"].beyond


def test_each_process_reads_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(tmp_path / "set", plan(folder_of_text(tmp_path / "text")))
    data = made.data(PAIRS, CONFIG)
    count: list[int] = []
    read = Rows.read
    monkeypatch.setattr(
        Rows, "read", lambda self, row, width: count.append(len(row)) or read(self, row, width)
    )
    whole = data.batch(5)
    rows = sum(count)
    halves = []
    for process in (0, 1):
        count.clear()
        halves.append(data.batch(5, (process, 2)))
        assert sum(count) == rows // 2
    for a, b, c in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(a, np.concatenate([b, c]))


def test_a_set_is_text_again_in_a_random_order(tmp_path: Path) -> None:
    wanted = plan(folder_of_text(tmp_path / "text"))
    made = prepare(tmp_path / "set", wanted)
    cleaned, _ = clean(read_all(wanted.sources, "train", PAIRS), CONFIG, wanted.held_out)
    (source,) = open_sources([str(made.folder)])
    for pair in PAIRS:
        found = list(zip(*source.read("train", pair), strict=True))
        said = list(zip(*cleaned[pair], strict=True))
        assert found != said
        assert sorted(found) == sorted(said)
        assert source.count("train", pair) == len(found)
        assert list(source.stream("train", pair, 7)) == found[7:]
        lengths = [len(a) for a, _ in found]
        assert abs(np.mean(lengths[:50]) - np.mean(lengths)) < 0.2 * np.mean(lengths)
    again = prepare(tmp_path / "again", plan(made.folder))
    assert again.data(PAIRS, CONFIG).sizes == made.data(PAIRS, CONFIG).sizes


# Commands


def fails(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capfd.readouterr().err


def test_training_from_a_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, out = folder_of_text(tmp_path / "text"), tmp_path / "set"
    pairs = ["--pairs", "en-de,de-en"]
    sizes = ["--set", "vocab_size=330", "--set", "buckets=8,16"]
    table = tmp_path / "sizes.json"
    asked = ["prepare", "--data", str(folder), *pairs, *sizes, "--out", str(out)]
    assert main([*asked, "--json", str(table), "--workers", "1"]) == 0
    assert json.loads(table.read_text())["train"]["en-de"]["held_out"] > 0
    assert "longer" in capfd.readouterr().out
    work = tmp_path / "work"
    small = ["--set", "d_model=16", "--set", "d_ff=16", "--set", "num_heads=2"]
    train = ["train", "--data", str(out), "--workdir", str(work), *small, "--set", "buckets=8,16"]
    assert main([*train, "--steps", "2", "--validate-every", "2"]) == 0
    assert "padding" in capfd.readouterr().out
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert 0 < log[0]["padding"] < 1
    assert 0 <= log[0]["waits"] <= 1
    assert main([*train, "--steps", "3", "--validate-every", "2"]) == 0  # resumed
    assert "resuming at step 2" in capfd.readouterr().out
    assert main(["evaluate", "--model", str(work), "--data", str(out), "--split", "valid"]) == 0
    capfd.readouterr()
    one = tmp_path / "one"
    only = [*train[:3], "--workdir", str(one), *small, "--set", "buckets=8,16", "--steps", "1"]
    assert main([*only, "--pairs", "de-en"]) == 0
    # A model's vocabulary makes a set to go on from it.
    again = [*asked[:-1], str(tmp_path / "again"), "--vocabulary", str(work)]
    assert main(again) == 0
    further = ["train", "--data", str(tmp_path / "again"), "--init", str(work), "--steps", "1"]
    assert main([*further, "--workdir", str(tmp_path / "on"), "--set", "buckets=8,16"]) == 0
    capfd.readouterr()

    new = ["--workdir", str(tmp_path / "new")]
    at = ["train", "--data", str(out), *new]
    assert "was prepared with 330" in fails(capfd, *at, "--set", "vocab_size=300")
    assert "was prepared with 3.0" in fails(capfd, *at, "--set", "max_ratio=2")
    assert "is all the text of a run" in fails(capfd, *at, "--data", str(folder))
    assert "no training text of en-fr" in fails(capfd, *at, "--pairs", "en-fr")
    other = ["train", "--data", str(out), "--init", str(tmp_path / "on"), *new, "--steps", "1"]
    shutil.copytree(tmp_path / "again", tmp_path / "same")
    big = tmp_path / "big"
    assert main([*asked[:-1], str(big), "--set", "vocab_size=290"]) == 0
    other[2] = str(big)
    assert "encoded by another vocabulary" in fails(capfd, *other)
    assert not (tmp_path / "new" / "model").exists()
