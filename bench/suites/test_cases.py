"""The benchmarks' own cases for pytest-benchmark: pytest bench/suites --benchmark-json=FILE.

Each is built and checked by the code that its command runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest

from taskmoe.bench.gate.workloads import WORKLOADS
from taskmoe.bench.ops import measure as ops
from taskmoe.bench.ops.cases import OURS, OpCase, build, quick_cases
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.serving.decode import measure as decode
from taskmoe.bench.serving.task import measure as task
from taskmoe.bench.serving.task.spec import Spec
from taskmoe.moe import MoEConfig

Run = Callable[[], Any]


def op(case: OpCase) -> Run:
    """Ours, once its result is the plain definition's."""
    built = build(case)
    run = jax.jit(built.ways[OURS])
    ops.check(case.name, run(*built.arguments), jax.jit(built.plain)(*built.arguments))
    return functools.partial(run, *built.arguments)


@functools.cache
def decoding_systems() -> Any:
    """Systems in their places, and how each agrees with one device."""
    return decode.build(decode.random_models(), 8, given=True)


def decoding(name: str) -> Run:
    """A program of 64 sequences, once the system agrees with one device."""
    systems, checks = decoding_systems()
    assert checks[name].error <= decode.TOLERANCE
    return serving.serve(systems[name], 64, given=True).run


def layer(name: str) -> Run:
    """A forward pass of one task's layer, its sub-network or a dense layer."""
    x, systems = task.systems(Spec(MoEConfig(256, 1024, 32, routing="task", num_tasks=16), 512, 9))
    function, params = systems[name]
    return functools.partial(jax.jit(function), params, x)


def workload(name: str) -> Run:
    """A training step, or decoding of the small fixed model."""
    return WORKLOADS[name]().run


CASES: dict[str, Callable[[], Run]] = {
    **{case.name: functools.partial(op, case) for case in quick_cases()},
    **{
        f"decode {name}": functools.partial(decoding, name)
        for name in (decode.DENSE, decode.DROPLESS, decode.CAPACITY, decode.TASK)
    },
    **{f"task {name}": functools.partial(layer, name) for name in task.SYSTEMS},
    **{f"check {name}": functools.partial(workload, name) for name in WORKLOADS},
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, benchmark: Any) -> None:
    """What the command times, by itself."""
    run = CASES[name]()
    benchmark.pedantic(lambda: jax.block_until_ready(run()), rounds=5, warmup_rounds=1)
