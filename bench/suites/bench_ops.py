"""The cases of `ops` for pytest-benchmark: pytest bench/suites --benchmark-json=FILE."""

from typing import Any

import jax
import pytest

from taskmoe.bench.ops.cases import OURS, OpCase, build, quick_cases
from taskmoe.bench.ops.measure import check


@pytest.mark.parametrize("case", quick_cases(), ids=lambda case: case.name.replace(" ", "-"))
def test_op(case: OpCase, benchmark: Any) -> None:
    """Ours, once its result is the plain definition's."""
    built = build(case)
    run = jax.jit(built.ways[OURS])
    check(case.name, run(*built.arguments), jax.jit(built.plain)(*built.arguments))
    benchmark.pedantic(lambda: jax.block_until_ready(run(*built.arguments)), rounds=5)
