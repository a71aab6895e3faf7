"""Training runs with one thing changed at a time, and what is said of them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.harness.results import from_json
from taskmoe.bench.story.ablation import measure, spec
from taskmoe.bench.story.ablation.measure import Ablated, Run
from taskmoe.bench.story.ablation.view import view
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main as wmt


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"d_model": 16, "d_ff": 16, "num_heads": 2, "num_experts": 4}
    monkeypatch.setattr(measure, "MODEL", measure.MODEL | sizes)
    batches = {"batch_tokens": 512, "learning_rate": 0.01, "warmup_steps": 5}
    monkeypatch.setattr(measure, "TRAIN", measure.TRAIN | batches)
    monkeypatch.setattr(measure, "BATCHES", 2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    support.write_folder(folder / "text")
    words = ["--set", "buckets=16", "--set", "vocab_size=330", "--set", "drop_held_out=false"]
    words += ["--workers", "1", "--out", str(folder / "set")]
    assert wmt(["prepare", "--data", str(folder / "text"), *words]) == 0
    return folder / "set"


def ablated(prepared: Path, to: Path, changes: str, steps: int = 6) -> Ablated:
    words = ["ablation", "--data", str(prepared), "--changes", changes, "--steps", str(steps)]
    assert main([*words, "--json", str(to)]) == 0
    return from_json(Ablated, json.loads(to.read_text()))


def test_each_change_trains_another_model_from_the_same_start(
    prepared: Path, tmp_path: Path
) -> None:
    names = "token-seed,gate*10,rate/10,norm,alike,top-1,8,decoder,epsilon"
    picture = tmp_path / "curves.png"
    words = ["ablation", "--data", str(prepared), "--changes", names, "--steps", "6"]
    assert main([*words, "--json", str(tmp_path / "a.json"), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = from_json(Ablated, json.loads((tmp_path / "a.json").read_text()))
    assert [run.name for run in found.runs] == ["dense", "token", *names.split(",")]
    losses = [run.unseen for run in found.runs]
    assert len(set(losses)) == len(losses)
    assert np.isfinite(losses).all()
    assert found.runs[0].busiest is None
    assert all(run.curve[0] > run.curve[-1] for run in found.runs)


def test_a_change_that_changes_nothing_gives_the_same_losses(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = dataclasses.replace(spec.CHANGES["token"], what="nothing", layer={"jitter": 0.0})
    monkeypatch.setitem(spec.CHANGES, "nothing", same)
    # A gate that goes all of its way, by the road of one that does not.
    whole = dataclasses.replace(same, gate_rate=np.nextafter(1, 2))
    monkeypatch.setitem(spec.CHANGES, "whole", whole)
    runs = {r.name: r for r in ablated(prepared, tmp_path / "a.json", "nothing,whole").runs}
    assert runs["nothing"].unseen == runs["token"].unseen
    assert runs["nothing"].curve == runs["token"].curve
    np.testing.assert_allclose(runs["whole"].unseen, runs["token"].unseen, rtol=1e-5)


def test_a_gate_that_does_not_learn_stays_as_it_was(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    unseen = measure._unseen

    def keep(model: Any, config: Any, params: Any, data: Any) -> float:
        seen.append(params)
        return unseen(model, config, params, data)

    monkeypatch.setattr(measure, "_unseen", keep)
    text = measure._prepared(prepared)
    config = measure.TrainConfig(steps=4, **(measure.TRAIN | {"buckets": text.buckets}))
    for rate in (0.0, 1.0):
        change = spec.Change("", gate_rate=rate)
        measure._train("", change, config, text)
    gates = [p["encoder"][1]["feed_forward"]["moe"]["gate"] for p in seen]
    model = measure._Changed(
        pairs=text.pairs,
        vocab_size=text.tokenizer.vocab_size,
        **(measure.MODEL | {"encoder": "token", "decoder": "token"}),
    )
    first = measure._first(model, config, spec.Change(""))
    np.testing.assert_array_equal(gates[0], first["encoder"][1]["feed_forward"]["moe"]["gate"])
    assert (np.asarray(gates[1]) != np.asarray(gates[0])).any()


def test_runs_that_a_folder_holds_are_taken_and_others_trained(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    work, to = tmp_path / "work", tmp_path / "a.json"
    words = ["ablation", "--data", str(prepared), "--work", str(work), "--json", str(to)]
    trained: list[str] = []
    train = measure._train

    def noted(name: str, *rest: Any) -> Run:
        if name == "rate/10" and "z=0" not in trained:
            raise KeyboardInterrupt
        trained.append(name)
        return train(name, *rest)

    monkeypatch.setattr(measure, "_train", noted)
    assert main([*words, "--steps", "3", "--changes", "rate/10"]) == 130  # stopped in its third run
    assert trained == ["dense", "token"]
    assert not to.exists()
    assert main([*words, "--steps", "3", "--changes", "z=0,rate/10"]) == 0
    assert trained == ["dense", "token", "z=0", "rate/10"]
    first = to.read_text()
    assert main([*words, "--steps", "3", "--changes", "z=0,rate/10"]) == 0
    assert len(trained) == 4
    assert to.read_text() == first
    # The same text, prepared elsewhere.
    moved = Path(shutil.copytree(prepared, tmp_path / "moved"))
    manifest = json.loads((moved / "manifest.json").read_text()) | {"title": "x", "identity": "/x"}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert main([*words, "--data", str(moved), "--steps", "3", "--changes", "z=0,rate/10"]) == 0
    assert len(trained) == 4
    # Other text to score on.
    for path in moved.glob("valid.*"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert main([*words, "--data", str(moved), "--steps", "3", "--changes", "token"]) == 0
    assert trained[4:] == ["dense", "token"]
    del trained[4:]
    assert main([*words, "--steps", "4", "--changes", "z=0"]) == 0
    assert trained[4:] == ["dense", "token", "z=0"]
    for kept in work.glob("z=0-*.json"):
        kept.write_text("{")
    assert main([*words, "--steps", "3", "--changes", "z=0"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_quick_look_is_three_runs(prepared: Path, tmp_path: Path) -> None:
    words = ["ablation", "--data", str(prepared), "--quick", "--json", str(tmp_path / "a.json")]
    assert main([*words, "--steps", "2"]) == 0
    found = from_json(Ablated, json.loads((tmp_path / "a.json").read_text()))
    assert [run.name for run in found.runs] == list(spec.QUICK)
    assert found.steps == 2


def made(**losses: float) -> Ablated:
    runs = [
        Run(name.replace("_", "-"), spec.CHANGES[name.replace("_", "-")].what, loss, [3.0, loss],
            None if name.startswith("dense") else 2.0)
        for name, loss in losses.items()
    ]  # fmt: skip
    model = measure.MODEL | {"vocab_size": 300}
    return Ablated({}, "a corpus", 10, model, dict(measure.TRAIN), runs)


def test_what_counts_is_what_does_more_than_another_seed() -> None:
    told = view(made(dense=2.0, token=1.9, token_seed=1.93, norm=1.8, alike=1.88, top_1=2.1))
    assert "1.900, is 0.100 below that of the dense model" in told.answer
    (said,) = told.findings
    assert "by up to 0.030" in said
    lower, higher = said.split("That raise it")
    assert "divided by their norm (-0.100)" in lower
    assert "alike" not in said
    assert "one shared expert (+0.200)" in higher
    assert "above that of the dense" in view(made(dense=1.8, token=1.9)).answer
    assert "No run has another seed" in view(made(dense=1.8, token=1.9)).findings[0]


@pytest.mark.parametrize(
    ("losses", "titles", "lines"),
    [
        ({"dense": 2.0, "token": 1.9}, ["dense, of equal compute"], {"dense"}),
        ({"dense": 2.0, "token": 1.9, "alike": 1.8}, ["all experts begin alike"],
         {"dense", "changed"}),
    ],
)  # fmt: skip
def test_the_chart_has_a_panel_a_change_or_dense_alone(
    losses: dict[str, float], titles: list[str], lines: set[str]
) -> None:
    figure = view(made(**losses)).charts[0].draw()
    assert [axes.get_title() for axes in figure.axes] == titles
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--changes", "gat"], "'gat'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--data", "nowhere"], "nowhere is no training set"),
    ],
)
def test_wrong_input_is_named(words: list[str], message: str, capsys: Any) -> None:
    assert main(["ablation", *words]) == 2
    assert message in capsys.readouterr().err
