"""What README.md shows is what runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_every_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    difference = float(capsys.readouterr().out.split()[0])
    assert 0 <= difference < 1e-4  # the sub-network says what the layer says


def test_every_command_is_known() -> None:
    from taskmoe.bench.__main__ import COMMANDS as bench
    from taskmoe.wmt.__main__ import COMMANDS as wmt

    known = {"wmt": wmt, "bench": bench}
    for path in (README, README.with_name("BENCHMARKS.md")):
        text = path.read_text(encoding="utf-8")
        for package, command in re.findall(r"python -m taskmoe\.(\w+) (\w+)", text):
            assert command in known[package], f"{path.name}: {package} has no command {command}"
