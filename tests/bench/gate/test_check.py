"""The regression gate's facts: planted changes are caught, and bad input is one line."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.gate import measure, verdicts, view
from taskmoe.bench.gate import static as static_facts
from taskmoe.bench.gate.spec import BASELINE
from taskmoe.bench.gate.verdicts import Interval, compare, slower
from taskmoe.bench.harness import machine
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.tpu.cases import Case
from taskmoe.moe import exchange

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")


@needs_libtpu
def test_a_block_size_that_adds_bundles_is_caught_and_named() -> None:
    good = Case("gmm", "taskmoe", "forward", "v5e", "bf16", "decode")
    planted = Case("gmm", "taskmoe", "forward", "v5e", "bf16", "decode", (16, 512, 512))
    facts, again, worse = (static_facts.kernel_facts((c,)) for c in (good, good, planted))
    assert all(c.verdict == "same" for c in compare(facts, again))
    changes = compare(facts, worse)
    failed = [c for c in changes if c.fails]
    assert "bundles run" in {c.fact for c in failed}
    line = view.last_line(changes, failed)
    assert line.startswith("regression: gmm forward v5e bf16 decode: ")


def test_a_needless_all_gather_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = serving.device_mesh(8)
    layers = {"all_to_all": (None, "all_to_all")}
    monkeypatch.setattr(static_facts, "LAYERS", layers)
    monkeypatch.setattr(static_facts, "WITH_GRADIENTS", ())
    facts = static_facts.layer_facts(mesh)
    small = f"layer, sub-network, forward, {static_facts.DEVICES} devices"
    assert facts[small] == {"collectives: all": 0}
    real = exchange.STRATEGIES["all_to_all"]

    def wasteful(job: Any) -> Any:
        y, lost = real.run(job)
        return y + 0 * jnp.sum(jax.lax.all_gather(job.x, "expert", tiled=True)), lost

    jax.clear_caches()  # of the layer as it was traced before
    faulty = dataclasses.replace(real, run=wasteful)
    monkeypatch.setitem(exchange.STRATEGIES, "all_to_all", faulty)
    changes = compare(facts, static_facts.layer_facts(mesh))
    failed = [c for c in changes if c.fails]
    assert {c.fact for c in failed} == {
        "collectives: all", "collectives: all-gather", "collective bytes: all-gather",
    }  # fmt: skip
    jax.clear_caches()
    line = view.last_line(changes, failed)
    assert "layer, all_to_all, forward, 8 devices: collectives: all-gather" in line


def test_the_limit_of_a_fact() -> None:
    def verdict(old: Any, new: Any, fact: str = "spills") -> str:
        (change,) = compare({"gmm": {fact: old}}, {"gmm": {fact: new}})
        return change.verdict

    assert verdict(100, 102) == "worse"
    assert verdict(100, 103) == "REGRESSION"
    assert verdict(100, 50) == "better"
    assert verdict(100, 100) == "same"
    assert verdict(0, 1) == "REGRESSION"
    assert verdict(0.90, 0.80, "MXU slots filled") == "REGRESSION"
    assert verdict(0.80, 0.90, "MXU slots filled") == "better"
    facts = {"a": {"collectives: all-to-all": 3.0}}
    fewer = [c.verdict for c in compare(facts, {"a": {}})]
    more = [c.verdict for c in compare({"a": {}}, facts)]
    assert (fewer, more) == (["better"], ["REGRESSION"])
    assert [c.verdict for c in compare({}, facts)] == ["new"]
    assert [c.verdict for c in compare(facts, {})] == ["gone"]
    (broken,) = (c for c in compare({"a": {"spills": 1}}, {"a": {"error": "no"}}) if c.fails)
    assert view.last_line([broken], [broken]) == "regression: a does not compile: no"


def test_a_small_change_is_noise_of_a_model_and_told_of_an_exact_fact() -> None:
    def change(old: float, new: float, fact: str) -> tuple[str, str]:
        (found,) = compare({"gmm": {fact: old}}, {"gmm": {fact: new}})
        return found.verdict, view.change_words(found)

    modelled = "us, all regions (modelled)"
    assert change(46.811, 46.812, modelled)[0] == "same"
    assert change(46.812, 46.811, modelled)[0] == "same"
    assert change(100.0, 100.06, modelled) == ("worse", "+0.1%")
    assert change(0.0, 0.1, modelled) == ("REGRESSION", "+0.1")
    assert change(254_887, 254_888, "bundles run") == ("worse", "+1")
    assert change(1_000_000_000, 1_000_400_000, "VMEM bytes") == ("worse", "+400,000")
    assert change(0.2358, 0.2357, "MXU slots filled") == ("worse", "-0.0001")


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """A folder with both files, comparable here."""
    here = machine.describe() | {"cpu_details": machine.cpu_details()}
    fact = {"median": 1.0, "low": 0.99, "high": 1.01}
    fact |= {"rounds": 9, "processes": 2, "tokens_per_s": 1.0}
    for name, facts in ((measure.STATIC, {"a": {"spills": 1}}), (measure.TIMED, {"b": fact})):
        (tmp_path / name).write_text(json.dumps({"machine": here, "facts": facts}))
    return tmp_path


def test_static_end_to_end(baseline: Path, monkeypatch: Any, capsys: Any) -> None:
    facts = {"a": {"spills": 1}}
    monkeypatch.setattr(measure, "_static", lambda quick: facts)
    monkeypatch.setattr(measure.compiler, "need_libtpu", lambda: None)
    words = ["check", "--static", "--baseline", str(baseline)]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no regression in 1 facts"
    facts["a"]["spills"] = 2
    report = baseline / "found.json"
    assert main([*words, "--json", str(report)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "regression: a: spills 1 -> 2, +100.0%"
    assert json.loads(report.read_text())["changes"][0]["verdict"] == "REGRESSION"
    assert main([*words, "--update"]) == 0
    assert "1 of 1 facts changed" in capsys.readouterr().out
    assert main(words) == 0


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (measure.STATIC, None, "static.json is not there"),
        (measure.STATIC, "{", "static.json is damaged"),
        (measure.STATIC, '{"machine": {}}', "static.json is damaged"),
        (measure.STATIC, {"jax": "0.1"}, "was made with jax 0.1, here is"),
        (measure.STATIC, {"libtpu": "0.0.1"}, "was made with libtpu 0.0.1, here is"),
        (measure.TIMED, '{"machine": {}, "facts": {"b": {"median": 1}}}', "timed.json is damaged"),
    ],
)
def test_a_baseline_that_does_not_fit_is_one_line(
    baseline: Path, name: str, spoil: Any, message: str, capsys: Any
) -> None:
    path = baseline / name
    if spoil is None:
        path.unlink()
    elif isinstance(spoil, str):
        path.write_text(spoil)
    else:
        stored = json.loads(path.read_text())
        stored["machine"] |= spoil
        path.write_text(json.dumps(stored))
    assert main(["check", "--baseline", str(baseline)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert "--update" in error


@pytest.mark.parametrize(
    ("spoil", "message"), [({"cpu": "Z80"}, "was made with cpu Z80, here is"), (None, "not there")]
)
def test_speeds_without_a_baseline_of_this_machine_are_a_line(
    baseline: Path, spoil: Any, message: str, monkeypatch: Any, capsys: Any
) -> None:
    path = baseline / measure.TIMED
    path.unlink()
    if spoil is not None:
        here = machine.describe() | {"cpu_details": machine.cpu_details()} | spoil
        path.write_text(json.dumps({"machine": here, "facts": {}}))
    monkeypatch.setattr(measure, "_static", lambda quick: {"a": {"spills": 1}})
    assert main(["check", "--baseline", str(baseline)]) == 0
    line, last = capsys.readouterr().out.splitlines()[-2:]
    assert line.startswith("Speeds were not compared: ")
    assert message in line
    assert line.endswith("; or name a revision with --against.")
    assert last == "no regression in 1 facts"


def test_no_compiler_is_one_line(baseline: Path, monkeypatch: Any, capsys: Any) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else real(name, *a)
    )
    assert main(["check", "--static", "--baseline", str(baseline)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "libtpu, the TPU compiler, is not installed" in error


def test_the_stored_baselines_are_whole() -> None:
    static = json.loads((BASELINE / measure.STATIC).read_text())
    timed = json.loads((BASELINE / measure.TIMED).read_text())
    assert set(timed["facts"]) == set(measure.WORKLOADS)
    assert not any("error" in facts for facts in static["facts"].values())
    assert len(static["facts"]) >= len(static_facts.CASES) + len(static_facts.STEPS)
    for facts in timed["facts"].values():
        assert facts["low"] <= facts["median"] <= facts["high"]
        spread = slower(Interval(1, 1, 1), Interval(facts["median"], facts["low"], facts["high"]))
        assert (spread.high - spread.low) / facts["median"] < verdicts.TIMED_LIMIT / 2
