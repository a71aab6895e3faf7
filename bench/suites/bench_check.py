"""The workloads that `check` guards, and their calibration, for pytest-benchmark."""

from typing import Any

import jax
import pytest

from taskmoe.bench.gate.workloads import WORKLOADS


@pytest.mark.parametrize("part", ["run", "calibration"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_workload(name: str, part: str, benchmark: Any) -> None:
    """One run; `check` runs both in turns on one core, here each has its own rounds."""
    workload = WORKLOADS[name]()
    run = getattr(workload, part)
    benchmark.extra_info["tokens"] = workload.tokens
    benchmark.pedantic(lambda: jax.block_until_ready(run()), rounds=15, warmup_rounds=2)
