"""The gate's speeds: intervals of noisy rounds, and two revisions side by side."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.gate import measure, revision, view
from taskmoe.bench.gate import timed as timed_facts
from taskmoe.bench.gate import worker as timed_worker
from taskmoe.bench.gate.timed import Effort
from taskmoe.bench.gate.verdicts import Interval, decided, interval, judge_timed, slower
from taskmoe.bench.gate.workloads import Workload


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
    assert "decoding: time, in calibrations" in view.last_line([same, slow], [slow])


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
    assert view.last_line([open_one], []) == (
        "no regression in 1 facts, 1 undecided within the limit of rounds"
    )


def test_more_processes_are_asked_while_it_is_open() -> None:
    started = []

    @contextlib.contextmanager
    def start(core: int, folder: Path) -> Iterator[Any]:
        started.append(core)
        ratios = synthetic(0.0, seed=len(started))
        yield lambda name, blocks: {"blocks": ratios[:blocks], "tokens_per_s": 1.0}

    def after_three(name: str, so_far: Any) -> bool:
        return name == "easy" or len(started) >= 3

    sides = {measure.HERE: start}
    found = timed_facts.collect(sides, ["easy", "hard"], Effort(1, 9, 2), after_three)
    timed = found[measure.HERE]
    assert [len(timed[name].blocks) for name in ("easy", "hard")] == [2, 6]
    never = timed_facts.collect(sides, ["hard"], Effort(1, 4, 2), lambda *_: False)
    assert never[measure.HERE]["hard"].speed().processes == 4


def test_blocks_of_two_revisions_alternate_and_each_may_go_first() -> None:
    asked = []

    def side(name: str) -> Any:
        @contextlib.contextmanager
        def start(core: int, folder: Path) -> Iterator[Any]:
            def ask(workload: str, blocks: int) -> Any:
                asked.append(name)
                return {"blocks": synthetic(0.0)[:blocks], "tokens_per_s": 1.0}

            yield ask

        return start

    sides = {name: side(name) for name in ("here", "there")}
    found = timed_facts.collect(sides, ["train"], Effort(1, 1, 4), lambda *_: False)
    assert asked == ["here", "there", "there", "here"] * 2
    assert [len(found[name]["train"].blocks) for name in sides] == [4, 4]
    assert found["there"]["train"].processes == 1


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
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one revision that has a worker, and one before it that has none."""
    root = tmp_path / "checkout"
    worker = root / "bench" / "gate" / "worker.py"
    worker.parent.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q", str(root)], check=True)
    for words in ("", "# there"):
        if words:
            worker.write_text(words)
        subprocess.run([*git, "add", "-A"], cwd=root, check=True)
        subprocess.run([*git, "commit", "-qm", "one", "--allow-empty"], cwd=root, check=True)
    monkeypatch.setattr(revision, "HERE", root)
    return root


def test_the_other_revision_is_there_while_needed_and_then_gone(repository: Path) -> None:
    def trees() -> int:
        command = ["git", "worktree", "list"]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
        return done.stdout.count("\n")

    with revision.checked_out("HEAD") as (tree, module):
        assert (tree / "bench/gate/worker.py").read_text() == "# there"
        assert module == "taskmoe.bench.gate.worker"
        assert trees() == 2
    with pytest.raises(KeyboardInterrupt), revision.checked_out("HEAD") as (tree, _):
        raise KeyboardInterrupt
    assert trees() == 1
    assert not tree.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "nothing"], "has no revision 'nothing'"),
        (["--against", "--all"], "expected one argument"),
        (["--against", "HEAD~1"], "'HEAD~1' is older than the workloads of check"),
        (["--against", "HEAD", "--static"], "leave --static out"),
        (["--against", "HEAD", "--update"], "leave --update out"),
    ],
)
def test_a_wrong_revision_is_one_line(
    repository: Path, words: list[str], message: str, capsys: Any
) -> None:
    try:
        code = main(["check", *words])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_revision_outside_a_checkout_is_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(revision, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(["check", "--against", "HEAD"]) == 2
    assert "needs a git checkout" in capsys.readouterr().err


def test_speeds_against_a_revision_end_to_end(
    repository: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(measure, "_static", lambda quick: {})
    monkeypatch.setattr(measure, "_baseline", lambda *_: {})

    def side(slowdown: float, seed: int) -> Any:
        @contextlib.contextmanager
        def start(core: int, folder: Path) -> Iterator[Any]:
            ratios = iter(synthetic(slowdown, blocks=30, seed=seed))
            yield lambda name, blocks: {"blocks": [next(ratios)], "tokens_per_s": 1.0}

        return start

    monkeypatch.setattr(measure.timed, "of_revision", lambda *_: side(0.0, 1))
    for slowdown, code in ((0.0, 0), (0.15, 1)):
        monkeypatch.setattr(measure.timed, "worker", side(slowdown, 2))
        assert main(["check", "--against", "HEAD"]) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("regression: decoding, tokens/s: time, in calibrations")
