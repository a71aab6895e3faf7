"""`bench training`: parts are timed, systems are compared, and wrong sizes are named."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.harness.results import from_json
from taskmoe.bench.training import measure, pytorch, spec
from taskmoe.bench.training.measure import TORCH, Trained
from taskmoe.bench.training.view import view
from taskmoe.cli.errors import InputError
from taskmoe.wmt.training.step import make_objective


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spec.SIZES, "demo", (4, 16))


def test_a_step_in_parts(small: None) -> None:
    result = measure.measure(spec.Spec(["demo"], 2))
    systems = [TORCH] * pytorch.is_present()
    assert [r.system for r in result.rows] == ["dense", *systems, "token-routed", "task-routed"]
    for row in result.rows:
        assert min(row.forward, row.optimiser, row.step.median) > 0
        assert row.tokens_per_s == pytest.approx(128e3 / row.step.median, rel=1e-6)
    dense, routed = result.rows[0], result.rows[-1]
    assert dense.ratio.median == 1
    assert routed.parameters > 2 * dense.parameters
    assert from_json(Trained, result.to_json()) == result
    told = view(result)
    assert "A task-routed step takes " in told.answer
    assert ("PyTorch is not installed" in " ".join(told.findings)) != pytorch.is_present()
    faster = dataclasses.replace(dense, system=TORCH, ratio=measure.Spread(1.5, 1.4, 1.6))
    beside = dataclasses.replace(result, rows=[dense, faster])
    assert "The dense model trains 1.50 (demo) times as fast as PyTorch's." in view(beside).answer


def test_what_the_times_of_parts_become(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"forward": 1.0, "gradient": 3.0, "optimiser": 0.5, "step": 4.0}

    def timed(functions: dict[str, Callable[[], object]], **_: object) -> dict[str, np.ndarray]:
        for run in functions.values():
            run()
        return {name: np.array([seconds[name.split("/")[1]]]) for name in functions}

    monkeypatch.setattr(measure, "alternate", timed)
    for row in measure.measure(spec.Spec(["demo"], 1)).rows:
        assert (row.forward, row.backward, row.optimiser) == (1000, 2000, 500)
        assert row.tokens_per_s == 128 / 4


def test_embeddings_may_be_three_matrices(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    fields, train = measure.PRESETS["tiny"]
    untied = fields | {"tie_embeddings": False}
    monkeypatch.setitem(measure.PRESETS, "tiny", (untied, train))  # else another loss is an error
    rows = measure.measure(spec.Spec(["demo"], 1)).rows
    assert [row.system for row in rows[:2]] == ["dense", TORCH]
    assert rows[1].parameters == rows[0].parameters


def test_another_loss_than_pytorchs_is_an_error(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert torch is not None

    def planted(*args: object, **options: object) -> object:
        inner = make_objective(*args, **options)  # type: ignore[arg-type]

        def objective(*inputs: object) -> object:
            loss, sums = inner(*inputs)  # type: ignore[arg-type]
            return loss * 1.001, sums

        return objective

    monkeypatch.setattr(measure, "make_objective", planted)
    with pytest.raises(InputError, match="demo: PyTorch's loss is "):
        measure.measure(spec.Spec(["demo"], 1))


def test_an_unknown_size_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["training", "--sizes", "demo,x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: --sizes must be of demo, tiny, small, base, got 'x'")
