"""The systems of `decode` for pytest-benchmark, at its smallest batch."""

import functools
from typing import Any

import jax
import pytest

from taskmoe.bench.harness.collectives import count_collectives
from taskmoe.bench.serving import decode
from taskmoe.bench.serving import systems as serving

DEVICES, BATCH = 8, 64


@functools.cache
def built() -> Any:
    """Systems in their places, and how their tokens agree with one device's."""
    return decode.build(decode.random_models(), DEVICES, given=True)


@pytest.mark.parametrize("name", [decode.DENSE, decode.DROPLESS, decode.CAPACITY, decode.TASK])
def test_decode(name: str, benchmark: Any) -> None:
    """A program of `serving.POSITIONS` tokens a sequence, once its tokens are one device's."""
    systems, checks = built()
    assert checks[name].error <= decode.TOLERANCE
    served = serving.serve(systems[name], BATCH, given=True)
    benchmark.extra_info["tokens"] = served.tokens
    benchmark.extra_info["collectives"] = count_collectives(served.hlo)
    benchmark.pedantic(lambda: jax.block_until_ready(served.run()), rounds=5, warmup_rounds=1)
