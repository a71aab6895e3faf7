"""A new run from a trained model, and a run that goes on with something else."""

import json
from pathlib import Path

import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.commands.settings import meanings
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.saved import flatten, load_model, save_model
from taskmoe.wmt.model.translation import translate
from taskmoe.wmt.training.checkpoints import read_arrays
from taskmoe.wmt.training.initial import initial_params, initial_vocabulary, new_parts

SIZES = ("d_model=16", "d_ff=16", "num_heads=2", "num_experts=4", "vocab_size=330",
         "batch_tokens=512", "buckets=[16]")  # fmt: skip


def train(tmp_path: Path, name: str, steps: int, *more: str, sizes: bool = True) -> list[str]:
    words = ["train", "--data", str(tmp_path / "data"), "--workdir", str(tmp_path / name)]
    words += ["--steps", str(steps), "--cache", str(tmp_path / "cache")]
    for item in SIZES if sizes else SIZES[-2:]:
        words += ["--set", item]
    return [*words, *more]


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = capfd.readouterr().err.splitlines()
    return line


def losses(workdir: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (workdir / "log.jsonl").read_text().splitlines()]


def test_a_run_begins_from_a_trained_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    support.write_folder(tmp_path / "data")
    first = ["--pairs", "en-de,de-en", "--decoder", "target", "--encoder", "dense"]
    assert main(train(tmp_path, "first", 60, *first)) == 0
    began = ["--init", str(tmp_path / "first"), "--set", "learning_rate=1e-4"]
    capfd.readouterr()
    assert main(train(tmp_path, "second", 2, *began, "--pairs", "en-de,en-fr", sizes=False)) == 0
    printed = capfd.readouterr().out
    assert f"new beside {tmp_path}/first: decoder task fr, language fr" in printed
    assert main(train(tmp_path, "fresh", 2, "--pairs", "en-de,en-fr", *first[2:])) == 0
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "fresh")[0] - 0.2
    old, new = (load_model(tmp_path / name / "model") for name in ("first", "second"))
    assert new.tokenizer.vocab_size == old.tokenizer.vocab_size + 1
    assert translate(new, [("en-fr", "one two")]) != [""]
    assert new.config.d_model == 16
    # It goes on by itself: what it began from counts no more.
    capfd.readouterr()
    assert main(train(tmp_path, "second", 4, *began, "--pairs", "en-de,en-fr", sizes=False)) == 0
    assert "resuming at step 2 of 4" in capfd.readouterr().out
    wrong = [*began, "--set", "d_ff=32"]
    assert main(train(tmp_path, "third", 2, *wrong, sizes=False)) == 2
    assert "should be [16, 32]; leave sizes and routing" in one_line(capfd)
    wrong = [*began, "--init-task", "fr=es", "--pairs", "en-de,en-fr"]
    assert main(train(tmp_path, "third", 2, *wrong, sizes=False)) == 2
    assert "--init-task fr=es: the new model has tasks de, fr" in one_line(capfd)


def test_new_tasks_and_languages_begin_from_the_old_ones() -> None:
    model = support.model(pairs=("en-de", "de-en"), encoder="dense", decoder="target")
    tokenizer = initial_vocabulary(model, ("en-es", "en-de", "de-en", "en-pt"))
    size = model.tokenizer.vocab_size
    fields = {"pairs": ("en-es", "de-en", "en-de", "en-pt"), "encoder": "dense"}
    config = support.model_config(**fields, decoder="target", vocab_size=tokenizer.vocab_size)
    made = flatten(initial_params(model, config, tokenizer, {"pt": "en"}))
    old = {name: np.asarray(leaf) for name, leaf in flatten(model.params).items()}
    tasks = [name for name in made if name.endswith("task_embedding")]
    assert tasks
    for name in tasks:
        de, en = old[name]
        np.testing.assert_allclose(np.asarray(made[name]), [(de + en) / 2, en, de, en], rtol=1e-6)
    tokens = [model.tokenizer.piece_id(f"<2{x}>") for x in ("de", "en")]
    # A vocabulary of three languages knows fr already; es and pt are new.
    assert tokenizer.vocab_size == size + 2
    added = np.asarray(made["embedding"])[size:]
    np.testing.assert_allclose(added, [old["embedding"][tokens].mean(0)] * 2, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(made["embedding"])[:size], old["embedding"])
    same = set(made) - {*tasks, "embedding"}
    assert all(np.array_equal(np.asarray(made[name]), old[name]) for name in same)
    assert new_parts(model, config) == [
        "decoder task es", "decoder task pt", "language es", "language pt",
    ]  # fmt: skip
    (es,) = tokenizer.encode_source(["one two"], "es")
    assert es[0] == size
    assert es[1:] == model.tokenizer.encode_source(["one two"], "de")[0][1:]
    assert tokenizer.decode([es]) == ["one two"]
    dense = support.model(pairs=("en-de",), encoder="dense", decoder="dense")
    with pytest.raises(InputError, match="is missing in that model"):
        initial_params(dense, config, tokenizer, {})


def test_a_run_goes_on_with_what_is_allowed_to_change(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = support.write_folder(tmp_path / "data")
    assert main(train(tmp_path, "w", 4, "--pairs", "en-de")) == 0
    other = ["--pairs", "en-de", "--set", "learning_rate=1e-4", "--set", "schedule=cosine"]
    assert main(train(tmp_path, "w", 8, *other)) == 2
    assert "train.learning_rate is 0.003 there and 0.0001 here; --allow learning_rate" in (
        one_line(capfd)
    )
    allowed = ["--allow", "learning_rate", "--allow", "schedule", "--allow", "steps"]
    assert main(train(tmp_path, "w", 8, *other, *allowed)) == 0
    assert "resuming at step 4 of 8" in capfd.readouterr().out
    assert main(train(tmp_path, "w", 8, *other)) == 0  # it is the run's own by now
    back = ["--pairs", "en-de", "--set", "learning_rate=1e-4", "--allow", "schedule"]
    assert main(train(tmp_path, "w", 8, *back)) == 0  # to a schedule that looks at no steps
    assert main(train(tmp_path, "w", 8, *other, "--allow", "schedule")) == 0
    for file in data.glob("train.*"):
        file.write_text(file.read_text() + "one more\n")
    assert main(train(tmp_path, "w", 8, *other)) == 2
    assert "go on with this one by --allow text" in one_line(capfd)
    capfd.readouterr()
    assert main(train(tmp_path, "w", 12, *other, "--allow", "text", "--allow", "steps")) == 0
    assert "resuming at step 8 of 12" in capfd.readouterr().out


@pytest.mark.parametrize("field", ["optimizer", "d_model", "words"])
def test_what_a_checkpoint_is_made_of_cannot_change(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], field: str
) -> None:
    support.write_folder(tmp_path / "data")
    assert main(train(tmp_path, "w", 0, "--allow", field)) == 2
    assert f"--allow {field}: a run can go on with another accumulate, batch_tokens," in (
        one_line(capfd)
    )


def test_the_mean_of_the_last_checkpoints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    support.write_folder(tmp_path / "data")
    often = ["--set", "checkpoint_every=2", "--pairs", "en-de"]
    assert main(train(tmp_path, "w", 6, *often)) == 0
    single = []
    for last in (1, 3):
        out = tmp_path / str(last)
        words = ["average", "--workdir", str(tmp_path / "w"), "--last", str(last)]
        assert main([*words, "--out", str(out)]) == 0
        single.append(flatten(load_model(out).params))
    assert "3: mean of the checkpoints of steps 2, 4, 6" in capfd.readouterr().out
    whole = flatten(load_model(tmp_path / "w" / "model").params)
    for name, leaf in whole.items():
        np.testing.assert_array_equal(np.asarray(single[0][name]), np.asarray(leaf))
    mean = [read_arrays(tmp_path / "w" / "checkpoints", s, "0/params/") for s in (2, 4, 6)]
    for name, leaf in single[1].items():
        want = np.mean([np.asarray(m[name], np.float64) for m in mean], axis=0)
        np.testing.assert_allclose(np.asarray(leaf), want, rtol=1e-5, atol=1e-7)
    assert main([*words[:-2], "--out", str(tmp_path / "plain")]) == 0  # as many as are kept
    assert "plain: mean of the checkpoints of steps 2, 4, 6" in capfd.readouterr().out
    assert main([*words[:-1], "4", "--out", str(tmp_path / "4")]) == 2
    assert (
        "checkpoints has only 3 whole checkpoints; `train --set keep_checkpoints=4` keeps so many"
        in one_line(capfd)
    )


def test_fields_are_listed_and_near_ones_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--set", "help"])  # alone, as --help
    assert ended.value.code == 0
    printed = " ".join(capfd.readouterr().out.split())
    for name, kind in [("d_model", ModelConfig), ("learning_rate", TrainConfig)]:
        assert f" {name} {kind.__dataclass_fields__[name].default} " in printed
    assert "its peak, after warm-up" in printed
    for kind in (ModelConfig, TrainConfig):
        assert {name for name, text in meanings(kind) if text} == set(kind.__dataclass_fields__)
    for command, more in (("prepare", "vocab_size"), ("distill", "encoder_wide_d_ff")):
        with pytest.raises(SystemExit):
            main([command, "--set", "help"])
        printed = capfd.readouterr().out
        assert f" {more} " in printed
        assert " d_model " not in printed
    support.write_folder(tmp_path / "data")
    assert main(train(tmp_path, "w", 1, "--set", "lerning_rate=1")) == 2
    assert "did you mean learning_rate?" in one_line(capfd)
    assert main(train(tmp_path, "w", 1, "--set", "buckets=16,oops")) == 2
    assert "--set buckets must be tuple" in one_line(capfd)
    assert main(train(tmp_path, "w", 0, "--set", "buckets=8, 16")) == 0
    assert '"buckets": [\n' in (tmp_path / "w" / "config.json").read_text()
    asked = ["translate", "--model", str(tmp_path / "w"), "--pair", "en-de", "--beam", "0"]
    assert main(asked) == 2
    assert "--beam must be at least 1, got 0" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main(["translate", "--help"])
    assert "(default" in capfd.readouterr().out


def test_translations_are_kept_and_several_references_count(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = support.write_folder(tmp_path / "data")
    save_model(support.model(), tmp_path / "model")
    words = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(data)]
    words += ["--pairs", "en-de", "--limit", "4", "--beam", "1"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "valid.en-de.de").read_text().splitlines()
    assert len(lines) == 4
    capfd.readouterr()
    more, scores = tmp_path / "second.txt", tmp_path / "scores.json"
    more.write_text("".join(f"{line or 'x'}\n" for line in [*lines, *[""] * 8]))
    asked = [*words, "--json", str(scores), "--reference"]
    assert main([*asked, f"en-de={more}"]) == 0
    assert "nrefs:2|" in capfd.readouterr().out
    more.write_text("one\n")
    assert main([*asked, f"en-de={more}"]) == 2
    assert "second.txt has 1 lines, the valid text of en-de 12" in one_line(capfd)
    assert main([*asked, f"de-en={more}"]) == 2
    assert "--reference de-en: evaluated are en-de" in one_line(capfd)
