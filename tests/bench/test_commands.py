"""The commands of `python -m taskmoe.bench`: a small exchange for real, and wrong input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskmoe.bench.__main__ import COMMANDS, main


def test_a_small_exchange_agrees_with_one_device_and_a_sub_network_needs_none(
    tmp_path: Path,
) -> None:
    words = "exchange --devices 4 --batches 8 --experts 4 --d-model 16 --rounds 2".split()
    result = tmp_path / "exchange.json"
    done = subprocess.run(
        [sys.executable, "-m", "taskmoe.bench", *words, "--json", str(result)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (shape,) = json.loads(result.read_text(encoding="utf-8"))["shapes"]
    rows = {row["system"]: row for row in shape["rows"]}
    assert all(row["agrees"] for row in rows.values())
    small = rows.pop("task-routed sub-network")
    assert small["collectives"] == {}
    assert small["transfer_share"] == small["waiting_share"] == small["bytes_sent"] == 0
    kept = rows.pop("capacity 1.25, kept")
    assert kept["collectives"] == {}
    for name, row in rows.items():
        assert sum(row["collectives"].values()) >= 3, name
        assert row["transfer_share"] + row["waiting_share"] > 0, name
    assert "fastest here" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exchange", "--devices", "3", "--processes", "2"], "--processes must divide --devices"),
        (["exchange", "--devices", "65"], "--devices must be at most 64"),
        (["exchange", "--batches", "7"], "--batches must be multiples of 8, got 7"),
        (["exchange", "--experts", "many"], "--experts must be numbers"),
        (["demo", "--steps", "0"], "--steps must be from 1 to inf, got 0"),
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
