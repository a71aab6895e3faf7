"""Every way of every case, checked against the plain definition, then timed in turns."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.console import each
from taskmoe.bench.harness.results import Result, Spread
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.ops import pytorch
from taskmoe.bench.ops.cases import OURS, Built, OpCase, build
from taskmoe.bench.ops.spec import Spec
from taskmoe.cli.command_line import write_text
from taskmoe.cli.devices import use_present_devices

#: Largest error, as a share of the result's norm. Both sides sum in float32, in another order.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}


class Disagreement(Exception):
    """An op's result is not its plain definition's."""


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine was seen to reach: FLOP/s of a large product, bytes/s of a copy."""

    flops_per_s: float
    bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class Line(OpCase):
    """A case done one way: microseconds, rates, shares of ceilings, and the speedup of ours.

    failed: why it could not be timed, or, where it was, why its result is wrong.
    """

    way: str = OURS
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    gflop_per_s: float = 0.0
    gb_per_s: float = 0.0
    share_of_matmul: float = 0.0
    share_of_copy: float = 0.0
    ours_times_as_fast: Spread | None = None
    failed: str | None = None


@dataclasses.dataclass(frozen=True)
class Ops(Result):
    """A line a case and way. wrong: the cases that were not timed, and why."""

    command: str
    machine: dict[str, str]
    dtype: str
    rounds: int
    ceilings: Ceilings
    lines: list[Line]
    wrong: list[str] = dataclasses.field(default_factory=list)


def measure(spec: Spec) -> Ops:
    """Check and time every case; the result is written to spec.json as it grows."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some
    use_present_devices()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    compiled = compile_all(spec.cases, dtype)
    where = machine.describe() | {"backend": jax.default_backend()}
    name, ceilings = jnp.dtype(dtype).name, measure_ceilings(dtype)
    found = Ops(spec.command, where, name, spec.rounds, ceilings, [])
    for case in each("timing ops", "case", spec.cases):
        try:
            built = build(case, dtype)
            found.lines.extend(time_case(case, built, compiled.pop(case), spec.rounds, ceilings))
        except Disagreement as error:
            found.wrong.append(str(error))
        if spec.json is not None:  # an interrupted run leaves what it has measured
            write_text(spec.json, json.dumps(found.to_json(), indent=1) + "\n")
    return found


def measure_ceilings(dtype: Any) -> Ceilings:
    """A product of large matrices and a copy of an array beyond the caches, the best of rounds."""
    on_gpu = jax.default_backend() == "gpu"
    side, copied = (8192, 2 << 30) if on_gpu else (2048, 256 << 20)
    a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    long = jnp.ones(copied // a.dtype.itemsize, dtype)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(jnp.copy)
    times = alternate({"product": lambda: product(a), "copy": lambda: copy(long)}, rounds=5)
    fastest = {name: seconds.min() for name, seconds in times.items()}
    return Ceilings(2 * side**3 / fastest["product"], 2 * long.nbytes / fastest["copy"])


#: The ways of a case, compiled; what a baseline raised where it could not be.
Compiled = dict[str, Callable[..., Any] | Exception]
PLAIN = "plain definition"


def compile_all(cases: Sequence[OpCase], dtype: Any) -> dict[OpCase, Compiled]:
    """Compile every way of every case on all cores, so that nothing compiles while one is timed."""
    waiting: dict[OpCase, dict[str, Future[Any]]] = {}
    shared: dict[tuple[OpCase, str], Future[Any]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case in cases:
            built = build(case, dtype)
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in built.arguments]
            waiting[case] = {PLAIN: pool.submit(_compile, built.plain, shapes)}
            for name, way in built.ways.items():  # group sizes are an argument
                key = dataclasses.replace(case, groups=""), name
                if key not in shared:
                    shared[key] = pool.submit(_compile, way, shapes)
                waiting[case][name] = shared[key]
        found: dict[OpCase, Compiled] = {}
        for case in each("compiling", "case", cases):
            found[case] = {name: future.result() for name, future in waiting[case].items()}
    return found


def _compile(way: Callable[..., Any], shapes: Sequence[Any]) -> Callable[..., Any] | Exception:
    try:
        return jax.jit(way).lower(*shapes).compile()
    except Exception as error:  # of whatever kind a baseline raises
        return error


def time_case(
    case: OpCase, built: Built, compiled: Compiled, rounds: int, ceilings: Ceilings
) -> list[Line]:
    """A line for ours and for each baseline; Disagreement if ours is not the definition."""
    arguments = built.arguments
    for name, way in {**built.ways, PLAIN: built.plain}.items():
        if isinstance(compiled[name], Exception):  # others may have held the GPU's memory
            compiled[name] = _compile(way, arguments)
    want = _ready(compiled[PLAIN])(*arguments)
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name in [*built.ways, *built.outside]:
        try:
            if name in built.ways:
                calls[name] = functools.partial(_ready(compiled[name]), *arguments)
                have = calls[name]()
            else:
                calls[name] = built.outside[name](*arguments)
                have = calls[name]().arrays()
            if "dense" not in name and "GShard" not in name:
                check(f"{case.name}: {name}", have, want)
        except Exception as error:  # of whatever kind a baseline raises
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            if not isinstance(error, Disagreement):  # what is wrong is timed, and said to be wrong
                calls.pop(name, None)
    del want
    if OURS in failed:
        agreeing = [name for name in calls if name not in failed and "dense" not in name]
        raise Disagreement(f"{failed[OURS]}; these agree with it: {', '.join(agreeing) or 'none'}")
    times = alternate(calls, rounds=rounds)
    pytorch.release()
    lines = [line(case, built, name, times, ceilings, failed.pop(name, None)) for name in calls]
    return lines + [Line(**vars(case), way=name, failed=why) for name, why in failed.items()]


def _ready(compiled: Callable[..., Any] | Exception) -> Callable[..., Any]:
    if isinstance(compiled, Exception):
        raise compiled
    return compiled


def check(name: str, have: Any, plain: Any) -> None:
    """Raise Disagreement unless every array is the plain one but for rounding."""
    found = dict(jax.tree_util.tree_leaves_with_path(have))
    for path, want in jax.tree_util.tree_leaves_with_path(plain):
        error, tolerance = float(_distance(found[path], want)), TOLERANCES[want.dtype.name]
        if not error <= tolerance:
            raise Disagreement(
                f"{name}: result{jax.tree_util.keystr(path)} differs from the plain definition "
                f"by {error:.2g} of its norm, more than {tolerance:g}"
            )


@jax.jit
def _distance(have: jax.Array, want: jax.Array) -> jax.Array:
    """Norm of the difference over that of what is wanted, on the device: arrays are large."""
    have, want = have.astype(jnp.float32), want.astype(jnp.float32)
    norm = jnp.linalg.norm(want.reshape(-1))
    return jnp.linalg.norm((have - want).reshape(-1)) / jnp.where(norm > 0, norm, 1.0)


def line(
    case: OpCase,
    built: Built,
    way: str,
    times: dict[str, np.ndarray],
    ceilings: Ceilings,
    failed: str | None,
) -> Line:
    """One way's figures, and the speedup of ours over it."""
    us = Spread.of(1e6 * times[way])
    flops, moved = 1e6 * built.flops / us.median, 1e6 * built.least_bytes / us.median
    return Line(
        **vars(case),
        way=way,
        median_us=us.median,
        p10_us=us.p10,
        p90_us=us.p90,
        gflop_per_s=flops / 1e9,
        gb_per_s=moved / 1e9,
        share_of_matmul=flops / ceilings.flops_per_s,
        share_of_copy=moved / ceilings.bytes_per_s,
        ours_times_as_fast=None if way == OURS else Spread.of(times[way] / times[OURS]),
        failed=failed,
    )
