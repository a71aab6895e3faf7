"""The commands of `python -m taskmoe.bench`: a small exchange for real, and wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskmoe.bench.__main__ import COMMANDS, main
from taskmoe.bench.exchange import measure
from taskmoe.bench.exchange import view as exchange
from taskmoe.bench.exchange.measure import Exchanged, Row, Size
from taskmoe.bench.exchange.spec import Spec
from taskmoe.bench.exchange.step import timed, with_copy_shares
from taskmoe.bench.harness.results import from_json
from taskmoe.bench.harness.worker import Worker
from taskmoe.cli.errors import InputError

#: The tests' settings without their eight devices: the command asks for its own.
QUICKLY_COMPILED = " ".join(f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f)


def test_a_small_exchange_agrees_with_one_device_and_a_sub_network_needs_none(
    tmp_path: Path,
) -> None:
    words = "exchange --devices 4 --batches 8 --step-batches 8 --experts 4 --d-model 16".split()
    words += ["--rounds", "2"]
    result = tmp_path / "exchange.json"
    done = subprocess.run(
        [sys.executable, "-m", "taskmoe.bench", *words, "--json", str(result)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": QUICKLY_COMPILED},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text(encoding="utf-8"))
    (shape,), (step,) = found["shapes"], found["steps"]
    for measured in (shape, step):
        rows = {row["system"]: row for row in measured["rows"]}
        assert all(row["agrees"] for row in rows.values())
        small = rows.pop("task-routed sub-network")
        assert small["collectives"] == {}
        assert small["transfer_share"] == small["waiting_share"] == 0
        for name in ("dropless, kept", "capacity 1.25, kept"):
            kept = rows.pop(name)
            assert kept["error"] is None
            assert kept["collectives"] == {}
        for name, row in rows.items():
            assert sum(row["collectives"].values()) >= 3, name
            assert row["transfer_share"] + row["waiting_share"] > 0, name
            assert ("copy_share" in row) == name.startswith("all_to_all")
    assert all(row["alone_us"] > 0 for row in shape["rows"] if "copy_share" in row)
    assert "fastest here" in done.stdout
    assert "Decoding step of 8 sequences" in done.stdout
    assert "Sub-networks: 0 collectives, 0.0% of their time in communication." in done.stdout


@pytest.mark.parametrize("whole", [True, False])
def test_an_exchange_that_found_all_does_not_mind_how_its_processes_end(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Spec(2, 1, 1, [], [], [], [])

    class Aborts(Worker):
        def __init__(self, module: str) -> None:
            found = Exchanged(spec, {}, [], []).to_json() if whole else {"done": 0}
            script = f"import os, sys; print({json.dumps(found)!r}, flush=True); os.abort()"
            super().__init__("timeit", ["-n", "1", "-r", "1", script])

    monkeypatch.setattr(measure, "Worker", Aborts)
    if whole:
        assert measure.measure(spec) == Exchanged(spec, {}, [], [])
    else:
        with pytest.raises(InputError, match="process 0 of 1 ended with exit code -6"):
            measure.measure(spec)


def test_shares_of_the_exchange_two_ways_and_why_they_differ() -> None:
    def row(name: str, us: float, moving: float = 0.0, waiting: float = 0.0) -> Row:
        sends = {"all-to-all": 3} if moving else {}
        error = 1e-6 if moving else None
        one = Row(name, error, True, sends, transfer_share=moving, waiting_share=waiting)
        return timed(one, [us / 1e6] * 3)

    def said(waiting: float, devices: int) -> list[str]:
        rows = with_copy_shares([
            row("all_to_all, dropless", 100, 0.18, waiting), row("dropless, kept", 80),
            row("ragged, dropless", 90, 0.2, 0.1),
        ])  # fmt: skip
        assert rows[0].copy_share == pytest.approx(0.2)
        assert rows[2].copy_share is None
        spec = {"batches": [8], "step_batches": [8], "experts": [8], "d_model": [8]}
        spec |= {"devices": devices, "processes": 1, "rounds": 3}
        result = Exchanged(from_json(Spec, spec), {"cores": "2"}, [Size(8, 8, rows, 8)], [])
        return exchange.findings(from_json(Exchanged, result.to_json()))

    assert "within 5 points in 1 of 1 cases" in said(0.05, 2)[0]
    assert len(said(0.05, 8)) == 1
    assert "within 5 points in 0 of 1 cases" in said(0.3, 8)[0]
    assert "8 devices share 2 cores" in said(0.3, 8)[1]
    assert "each device has a core of its own" in said(0.3, 2)[1]
    assert exchange.WHY_LESS in said(-0.1, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exchange", "--devices", "3", "--processes", "2"], "--processes must divide --devices"),
        (["exchange", "--devices", "65"], "--devices must be at most 64"),
        (["exchange", "--batches", "7"], "--batches must be multiples of 8, got 7"),
        (["exchange", "--experts", "many"], "--experts must be numbers"),
        (["exchange", "--d-model", "12"], "--d-model must be multiples of 8, got 12"),
        (["exchange", "--step-batches", "9"], "--step-batches must be multiples of 8, got 9"),
        (["demo", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["demo", "--sentences", "999"], "--sentences must be from 1 to 200, got 999"),
        (["task", "--tokens", "0"], "--tokens must be at least 1"),
        (["task", "--experts", "1"], "top_k must be at most num_experts=1"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert "--json" in capsys.readouterr().out
