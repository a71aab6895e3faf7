"""The ops benchmark: every case agrees with its definition, a fault stops it, spreads of rows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.ops import cases as op_cases
from taskmoe.bench.ops import measure as ops
from taskmoe.bench.ops import spec
from taskmoe.bench.ops.cases import DIRECTIONS, OPS, OURS, OpCase, build

SMALL = {"tokens": 48, "experts": 8, "d_model": 16, "d_ff": 24}


def small(op: str, direction: str, groups: str = "zipf") -> OpCase:
    return OpCase(op, direction, groups=groups, **SMALL)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_ours_is_the_plain_definition_and_a_fault_is_caught(op: str, direction: str) -> None:
    built = build(small(op, direction))
    ours = jax.jit(built.ways[OURS])(*built.arguments)
    plain = jax.jit(built.plain)(*built.arguments)
    ops.check(op, ours, plain)
    faulty = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-2 * jnp.linalg.norm(x)), ours)
    with pytest.raises(ops.Disagreement, match=f"{op}: result.* differs from the plain"):
        ops.check(op, faulty, plain)


@pytest.mark.parametrize("groups", op_cases.GROUPS)
def test_baselines_do_the_same_work(groups: str) -> None:
    for op, way in (("gmm", "lax.ragged_dot"), ("expert_ffn", "by lax.ragged_dot")):
        built = build(small(op, "forward+backward", groups))
        run = jax.jit(built.ways[way])
        ops.check(op, run(*built.arguments), jax.jit(built.plain)(*built.arguments))


def test_gshard_with_room_for_all_is_the_layer() -> None:
    built = build(small("moe_layer", "forward"))
    roomy = op_cases.baselines.gshard_layer(2, 8.0, 24, *built.arguments)
    np.testing.assert_allclose(roomy, built.plain(*built.arguments), rtol=1e-4, atol=1e-5)
    tight = op_cases.baselines.gshard_layer(2, 0.1, 24, *built.arguments)
    assert np.abs(tight - roomy).max() > 0.01


@pytest.mark.parametrize("groups", op_cases.GROUPS)
def test_rows_are_spread_whole(groups: str) -> None:
    sizes = op_cases.group_sizes(2048, 32, groups)
    assert sum(sizes) == 2048
    held = {"balanced": 32, "zipf": 32, "one-hot": 1, "empty-heavy": 4}[groups]
    assert np.count_nonzero(sizes) == held


def test_lines_and_json(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(spec, "all_cases", lambda: [small("gmm", "forward")])
    monkeypatch.setattr(ops, "measure_ceilings", lambda dtype: ops.Ceilings(1e11, 1e10))
    assert main(["ops", "--json", str(tmp_path / "ops.json")]) == 0
    assert "lax.ragged_dot" in capsys.readouterr().out
    found = json.loads((tmp_path / "ops.json").read_text())
    ours, *baselines = found["lines"]
    assert ours["way"] == OURS
    assert "ours_times_as_fast" not in ours
    assert all(line["ours_times_as_fast"]["median"] > 0 for line in baselines)
    flops = 2 * SMALL["tokens"] * SMALL["d_model"] * SMALL["d_ff"]
    assert ours["gflop_per_s"] == pytest.approx(flops / ours["median_us"] / 1e3)


def test_no_timing_while_numerics_disagree(monkeypatch: Any, capsys: Any) -> None:
    case = small("gmm", "forward")
    built = build(case)
    wrong = {**built.ways, OURS: lambda *args: built.ways[OURS](*args) * 1.001}
    monkeypatch.setattr(spec, "all_cases", lambda: [case])
    monkeypatch.setattr(ops, "build", lambda *a: dataclasses.replace(built, ways=wrong))
    monkeypatch.setattr(ops, "measure_ceilings", lambda dtype: ops.Ceilings(1e11, 1e10))
    assert main(["ops"]) == 1
    printed = capsys.readouterr()
    assert "not timed: Disagreement: gmm" in printed.out
    assert "these agree with it: lax.ragged_dot" in printed.out
    assert "µs" not in printed.out


def test_an_unknown_op_is_one_line(capsys: Any) -> None:
    assert main(["ops", "--ops", "gmm,fft"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--ops must be of gmm, " in error
    assert "got 'fft'" in error
