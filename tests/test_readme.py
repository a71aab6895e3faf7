"""What README.md shows is what runs."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.kernels.support import running

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
#: Lines of README's shell blocks that are not typed here, and why.
LEFT_OUT = {
    "make demo": "ten minutes; tests/bench runs its parts",
    "make test": "ten minutes; this test is part of it",
    "python examples/task_routed.py": "tests/test_examples.py runs it",
}
#: What makes the rest small enough for a minute: the same commands, less text and fewer steps.
SMALLER = {
    "--out text": "--out text --set max_sentences=300 --set vocab_size=500",
    "--steps 200": "--steps 3 --set d_model=32 --set d_ff=32",
    "--limit 20": "--limit 2 --beam 1",
}


def examples() -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    return blocks


def test_every_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = examples()
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    difference = float(capsys.readouterr().out.split()[0])
    assert 0 <= difference < 1e-4  # the sub-network says what the layer says


def test_the_ten_lines_run_as_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = examples()[0].replace("512", "128").replace("2048", "256").replace("=32", "=8")
    monkeypatch.setattr(moe, "apply", functools.partial(moe.apply, implementation="mosaic"))
    names: dict[str, Any] = {}
    with running("mosaic"):
        exec(compile(lines, str(README), "exec"), names)
    sub_network = moe.ffn(names["small"], names["x"][:2])
    np.testing.assert_allclose(sub_network, names["y"][:2], atol=1e-4)


def test_the_ensemble_runs_as_on_a_tpu() -> None:
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    assert "jax.vmap(lambda params: moe.apply(params, config, x)[0])(layers)" in page
    config = moe.MoEConfig(d_model=64, d_ff=128, num_experts=8)
    x = jnp.ones((2, 10, 64), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 3)
    layers = jax.vmap(lambda key: moe.init(key, config, jnp.bfloat16))(keys)
    each = [moe.apply({n: w[i] for n, w in layers.items()}, config, x)[0] for i in range(3)]
    with running("mosaic"):
        run = jax.vmap(lambda p: moe.apply(p, config, x, implementation="mosaic")[0])
        have = np.asarray(run(layers), np.float32)
    np.testing.assert_allclose(have, np.asarray(jnp.stack(each), np.float32), atol=0.02)


def test_every_command_is_known() -> None:
    from taskmoe.bench.__main__ import COMMANDS as bench
    from taskmoe.wmt.__main__ import COMMANDS as wmt

    known = {"wmt": wmt, "bench": bench}
    for path in (README, README.with_name("BENCHMARKS.md")):
        text = path.read_text(encoding="utf-8")
        for package, command in re.findall(r"python -m taskmoe\.(\w+) (\w+)", text):
            assert command in known[package], f"{path.name}: {package} has no command {command}"


def typed(text: str) -> list[str]:
    """Lines of the shell blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line.partition("  #")[0].strip() for line in "".join(blocks).splitlines()]


def test_the_commands_fit_one_another_when_typed_in_order(tmp_path: Path) -> None:
    lines = typed(README.read_text(encoding="utf-8"))
    assert set(LEFT_OUT) <= set(lines)
    script = "\n".join(line for line in lines if line not in LEFT_OUT)
    for words, fewer in SMALLER.items():
        assert script.count(words) == 1, words
        script = script.replace(words, fewer)
    environment = {name: v for name, v in os.environ.items() if name != "VIRTUAL_ENV"}
    environment |= {"PYTHONPATH": str(ROOT / ".types"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / ".venv").symlink_to(sys.prefix)
    if not (
        tmp_path / ".venv" / "bin" / "activate"
    ).exists():  # tests run in no virtual environment
        script = script.replace("source .venv/bin/activate\n", "")
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: python -m taskmoe.wmt" in done.stdout
    assert "SUBNET: task de, directions en-de" in done.stdout
    between = done.stdout.partition("SUBNET: task de")[2].partition("SERVED/translate")[0]
    assert between.count("\n") >= 4  # three translations behind the line on the sub-network
    assert (tmp_path / "SERVED" / "translate.stablehlo").stat().st_size > 0


def test_the_trainers_page_has_the_same_commands() -> None:
    page = typed((ROOT / "docs" / "trainer.md").read_text(encoding="utf-8"))
    commands = [
        line for line in typed(README.read_text(encoding="utf-8")) if "taskmoe.wmt " in line
    ]
    assert page[: len(commands) - 1] == commands[1:]  # the first asks for help


def test_every_link_leads_to_a_file() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links
        for link in links:
            assert (ROOT / link).is_file(), f"{name}: {link}"
