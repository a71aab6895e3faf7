"""What README.md shows is what runs."""

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.kernels.support import running

README = Path(__file__).parents[1] / "README.md"


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
    assert "jax.vmap(lambda params: moe.apply(params, config, x)[0])(layers)" in "".join(examples())
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
