"""Layers of models equal transformers' own modules: stored arrays always, live ones where it is."""

import dataclasses
import importlib.util
from typing import Any

import jax
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.kernels import ROUTERS
from taskmoe.moe import convert
from taskmoe.tests.moe import parity

CASES = list(parity.FIELDS)
MOST = 1e-6
live = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="torch and transformers are not installed",
)


def test_every_model_has_a_case_and_a_layout() -> None:
    models = {parity.model_of(name) for name in CASES}
    assert models == set(convert.LAYOUTS) == {*ROUTERS, "phimoe"}
    assert {path.stem for path in parity.GOLDEN.glob("*.npz")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_the_models(name: str) -> None:
    arrays = parity.golden(name)
    assert "transformers" in str(arrays["versions"])
    found = parity.errors(name, arrays)
    assert max(found) <= MOST, found
    config, params, _ = parity.layer(name, arrays)
    eager = parity.run(config, params, arrays, jitted=False)
    for have, want in zip(eager[:2], (arrays["out"], arrays["dx"]), strict=True):
        assert parity.relative(have, want) <= MOST


@pytest.mark.parametrize("name", CASES)
def test_a_fault_in_one_expert_is_caught(name: str) -> None:
    arrays = parity.golden(name)
    _, params, grads = parity.layer(name, arrays)
    expert = int(np.argmax(np.abs(grads["w_out"]).max((1, 2))))
    wrong = params["w_out"].at[expert].multiply(1.0001)
    found = parity.errors(name, arrays, w_out=wrong)
    assert found.forward > MOST
    assert found.dx > MOST


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen3_moe_unnormalised", "router", "qwen3_moe"),
        ("deepseek_v2", "router", "qwen2_moe"),
        ("deepseek_v3", "router", "kimi_k2"),
        ("gpt_oss", "activation", "silu"),
        ("deepseek_v4_hash", "router", "kimi_k2"),
        ("nllb_moe_normalised_last", "renormalise", False),
        ("switch_dropping", "capacity_factor", 2.0),
        ("phimoe_wider", "router", "phimoe"),
        ("gemma4", "gate_norm", 0.1),
    ],
)
def test_a_wrong_configuration_is_caught(
    name: str, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.FIELDS, name, parity.FIELDS[name] | {field: value})
    assert parity.errors(name, parity.golden(name)).forward > 1e-3


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_load_balance_loss_is_the_models(name: str) -> None:
    arrays = parity.golden(name)
    config, params, _ = parity.layer(name, arrays)
    for balance, same in (("all", True), ("first", False)):
        ours = dataclasses.replace(config, balance=balance)
        report = moe.apply(params, ours, arrays["x"])[1]
        error = parity.relative(report.load_balance_loss, arrays["balance"])
        assert (error <= MOST) == same


@live
@pytest.mark.filterwarnings("ignore")  # of torch and transformers, which are others'
@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_the_live_models(name: str) -> None:
    from taskmoe.tests.moe.golden import make

    found = parity.errors(name, make.run(name))
    assert max(found) <= MOST, found


@pytest.mark.parametrize("name", ["switch", "deepseek_v3", "qwen2_moe", "gemma4"])
def test_the_gates_gradient_is_that_of_finite_differences(name: str) -> None:
    arrays = parity.golden(name)
    config, params, _ = parity.layer(name, arrays)
    with jax.enable_x64(True):
        wide = {n: np.asarray(w, np.float64) for n, w in params.items()}
        x, upstream = (arrays[part].astype(np.float64) for part in ("x", "upstream"))

        def loss(gate: Any) -> Any:
            return (moe.apply(wide | {"gate": gate}, config, x)[0] * upstream).sum()

        slope, step = jax.jit(jax.grad(loss))(wide["gate"]), 1e-5
        assert np.abs(slope).max() > 0.01
        run = jax.jit(loss)
        for place in np.argwhere(np.abs(slope) > np.abs(slope).max() / 3)[:3]:
            shift = np.zeros_like(wide["gate"])
            shift[tuple(place)] = step
            found = (run(wide["gate"] + shift) - run(wide["gate"] - shift)) / (2 * step)
            np.testing.assert_allclose(found, slope[tuple(place)], rtol=1e-6)


def test_the_page_shows_these_configurations() -> None:
    page = parity.PAGE.read_text("utf-8")
    assert [line.split("`")[1] for line in parity.table_lines(page)] == [
        parity.line(name) for name in CASES
    ]
