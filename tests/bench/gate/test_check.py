"""The regression gate: planted changes are caught, noise is not, and bad input is one line."""

import contextlib
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.gate import check, verdicts
from taskmoe.bench.gate import static as static_facts
from taskmoe.bench.gate import timed as timed_facts
from taskmoe.bench.gate import worker as timed_worker
from taskmoe.bench.gate.timed import Effort
from taskmoe.bench.gate.verdicts import Interval, compare, decided, interval, judge_timed, slower
from taskmoe.bench.gate.workloads import Workload
from taskmoe.bench.harness import machine
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.tpu.cases import Case
from taskmoe.moe import expert_parallel

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
    line = check.last_line(changes, failed)
    assert line.startswith("regression: gmm forward v5e bf16 decode: ")


def test_a_needless_all_gather_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = serving.device_mesh(8)
    layers = {"all_to_all": (None, "all_to_all")}
    monkeypatch.setattr(static_facts, "LAYERS", layers)
    monkeypatch.setattr(static_facts, "WITH_GRADIENTS", ())
    facts = static_facts.layer_facts(mesh)
    small = f"layer, sub-network, forward, {static_facts.DEVICES} devices"
    assert facts[small] == {"collectives: all": 0}
    real: Any = expert_parallel.run_experts

    def wasteful(strategy: str, job: Any) -> Any:
        y, lost = real(strategy, job)
        return y + 0 * jnp.sum(jax.lax.all_gather(job.x, "expert", tiled=True)), lost

    jax.clear_caches()  # of the layer as it was traced before
    monkeypatch.setattr(expert_parallel, "run_experts", wasteful)
    changes = compare(facts, static_facts.layer_facts(mesh))
    failed = [c for c in changes if c.fails]
    assert {c.fact for c in failed} == {
        "collectives: all", "collectives: all-gather", "collective bytes: all-gather",
    }  # fmt: skip
    jax.clear_caches()
    line = check.last_line(changes, failed)
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
    assert check.last_line([broken], [broken]) == "regression: a does not compile: no"


def synthetic(
    slowdown: float, *, blocks: int = 20, rounds: int = 30, common: float = 0.3, seed: int = 0
) -> list[np.ndarray]:
    """Ratios of workload to calibration on a machine whose speed swings for both alike."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(blocks):
        machine_speed = 1 + rng.uniform(-common, common, rounds)
        own = 1.2 * (1 + slowdown) * machine_speed * (1 + 0.05 * rng.standard_normal(rounds))
        beside = machine_speed * (1 + 0.05 * rng.standard_normal(rounds))
        found.append(own / beside)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_noise_common_to_both_passes_and_a_tenth_slower_fails(seed: int) -> None:
    old = interval(synthetic(0.0, blocks=40, seed=100))
    same = judge_timed("decoding", old, interval(synthetic(0.0, seed=seed)))
    assert same.verdict in ("same", "worse", "better")
    slow = judge_timed("decoding", old, interval(synthetic(0.10, blocks=60, seed=seed)))
    assert slow.verdict == "REGRESSION"
    assert slow.worse == pytest.approx(0.10, abs=0.02)
    assert "decoding: time, in calibrations" in check.last_line([same, slow], [slow])


def test_intervals_hold_the_truth_and_shrink_with_rounds() -> None:
    few, many = interval(synthetic(0.0, blocks=4)), interval(synthetic(0.0, blocks=80))
    assert many.high - many.low < few.high - few.low
    assert many.low < 1.2 < many.high
    held = [i.low < 1.2 < i.high for i in (interval(synthetic(0.0, seed=s)) for s in range(30))]
    assert sum(held) >= 27
    # One block that a neighbour spoilt moves the median little.
    spoilt = [*synthetic(0.0, blocks=19), np.full(30, 9.0)]
    assert interval(spoilt).median == pytest.approx(1.2, rel=0.02)
    with pytest.raises(ValueError, match="blocks must be at least 2, got 1"):
        interval(spoilt[:1])


def test_what_is_open_stays_open() -> None:
    old = Interval(1.0, 0.99, 1.01)
    assert not decided(slower(old, Interval(1.08, 1.0, 1.16)))
    assert decided(slower(old, Interval(1.0, 0.97, 1.03)))
    assert decided(slower(old, Interval(1.2, 1.15, 1.25)))
    open_one = judge_timed("x", old, Interval(1.08, 1.0, 1.16))
    assert open_one.verdict == "undecided"
    assert check.last_line([open_one], []) == (
        "no regression in 1 facts, 1 undecided within the limit of rounds"
    )


def test_more_processes_are_asked_while_it_is_open() -> None:
    started = []

    @contextlib.contextmanager
    def start(core: int, folder: Path) -> Iterator[Any]:
        started.append(core)
        ratios = synthetic(0.0, seed=len(started))
        yield lambda name, blocks: {"blocks": ratios[:blocks], "tokens_per_s": 1.0}

    def after_three(name: str, so_far: Interval) -> bool:
        return name == "easy" or len(started) >= 3

    found = timed_facts.collect(["easy", "hard"], Effort(1, 9, 2), after_three, start=start)
    assert [len(found[name].blocks) for name in ("easy", "hard")] == [2, 6]
    never = timed_facts.collect(["hard"], Effort(1, 4, 2), lambda *_: False, start=start)
    assert never["hard"].facts()["processes"] == 4


def test_rounds_alternate_and_a_planted_sleep_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_worker, "BLOCK_S", 0.1)

    def pause(seconds: float) -> Any:
        return lambda: time.sleep(seconds)

    medians = []
    for planted in (0.0, 0.002):
        workload = Workload(pause(0.004 + planted), pause(0.004), 10)
        told = timed_worker.measure(workload, 3)
        medians.append(interval([np.asarray(b) for b in told["blocks"]]).median)
    assert medians[1] / medians[0] > 1.2


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """A folder with both files, comparable here."""
    here = machine.describe() | {"cpu_details": machine.cpu_details()}
    fact = {"median": 1.0, "low": 0.99, "high": 1.01}
    for name, facts in ((check.STATIC, {"a": {"spills": 1}}), (check.TIMED, {"b": fact})):
        (tmp_path / name).write_text(json.dumps({"machine": here, "facts": facts}))
    return tmp_path


def test_static_end_to_end(baseline: Path, monkeypatch: Any, capsys: Any) -> None:
    facts = {"a": {"spills": 1}}
    monkeypatch.setattr(check, "_static", lambda quick: facts)
    monkeypatch.setattr(check.compiler, "need_libtpu", lambda: None)
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
        (check.STATIC, None, "static.json is not there"),
        (check.STATIC, "{", "static.json is damaged"),
        (check.STATIC, '{"machine": {}}', "static.json is damaged"),
        (check.STATIC, {"jax": "0.1"}, "was made with jax 0.1, here is"),
        (check.STATIC, {"libtpu": "0.0.1"}, "was made with libtpu 0.0.1, here is"),
        (check.TIMED, {"cpu": "Z80"}, "was made with cpu Z80, here is"),
        (check.TIMED, '{"machine": {}, "facts": {"b": {"median": 1}}}', "timed.json is damaged"),
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
    static = json.loads((check.BASELINE / check.STATIC).read_text())
    timed = json.loads((check.BASELINE / check.TIMED).read_text())
    assert set(timed["facts"]) == set(check.WORKLOADS)
    assert not any("error" in facts for facts in static["facts"].values())
    assert len(static["facts"]) >= len(static_facts.CASES) + len(static_facts.STEPS)
    for facts in timed["facts"].values():
        assert facts["low"] <= facts["median"] <= facts["high"]
        spread = slower(Interval(1, 1, 1), Interval(facts["median"], facts["low"], facts["high"]))
        assert (spread.high - spread.low) / facts["median"] < verdicts.TIMED_LIMIT / 2
