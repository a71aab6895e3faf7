"""One process of `bench exchange`: builds every system, checks it, times it, profiles it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.bench.exchange import step
from taskmoe.bench.exchange.measure import HEARTBEAT_S, Exchanged, Row, Size, Worked
from taskmoe.bench.harness import machine
from taskmoe.bench.harness.collectives import count_collectives, profile_communication
from taskmoe.bench.harness.results import from_json
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.harness.worker import serve
from taskmoe.bench.serving.systems import device_mesh, place
from taskmoe.moe.exchange import bytes_sent
from taskmoe.moe.mesh import EXPERT_AXIS
from taskmoe.moe.travel import Peers

#: Begins the name of a layer's exchange that runs by itself.
ALONE = "alone: "
#: Largest difference from one device, relative to its largest output, in float32.
TOLERANCE = 1e-5


def answer(asked: object) -> Iterator[dict[str, object]]:
    """Join the others and measure every shape: how many are done after each, and then all of it."""
    worked = from_json(Worked, asked)
    spec = worked.spec
    jax.config.update("jax_num_cpu_devices", spec.devices // spec.processes)
    if spec.processes > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{worked.port}",
            spec.processes,
            worked.process,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    mesh = device_mesh(spec.devices)
    shapes: list[Size] = []
    steps: list[Size] = []
    for experts, d_model in itertools.product(spec.experts, spec.d_model):
        for tokens in spec.batches:
            rows = measure_layer(mesh, tokens, experts, d_model, spec.rounds)
            shapes.append(Size(experts, d_model, rows, tokens=tokens))
            yield {"done": len(shapes) + len(steps)}
        for batch in spec.step_batches:
            rows = step.measure_step(mesh, batch, experts, d_model, spec.rounds, TOLERANCE)
            steps.append(Size(experts, d_model, rows, batch=batch))
            yield {"done": len(shapes) + len(steps)}
    if worked.process == 0:
        yield Exchanged(spec, machine.describe(), shapes, steps).to_json()


def measure_layer(mesh: Mesh, tokens: int, experts: int, d_model: int, rounds: int) -> list[Row]:
    """A row a system for a batch of `tokens` sequences of one token."""
    x = np.random.default_rng(0).standard_normal((tokens, 1, d_model)).astype(np.float32)
    sharded = place(mesh, x, P(EXPERT_AXIS))
    units, sizes = tokens // mesh.size, (d_model, 4 * d_model, experts)
    runs: dict[str, Callable[[], Any]] = {}
    alone: dict[str, Callable[[], Any]] = {}
    rows: list[Row] = []
    for name, (factor, strategy) in step.SYSTEMS.items():
        group = None if factor is None else units
        config = moe.MoEConfig(*sizes, capacity_factor=factor, group_size=group)
        params = jax.tree.map(np.asarray, moe.init(jax.random.key(0), config))
        inputs = place(mesh, params, moe.param_specs(params)), sharded

        def run(p: Any, x: Any, config: Any = config, how: str = strategy) -> Any:
            return moe.apply(p, config, x, mesh=mesh, strategy=how)[0]

        def one_device(p: Any, x: Any, config: Any = config) -> Any:
            return moe.apply(p, config, x)[0]

        compiled = jax.jit(run).lower(*inputs).compile()
        error = None
        if strategy != "kept":
            error = _difference(compiled(*inputs), np.asarray(jax.jit(one_device)(params, x)))
        _, sent = bytes_sent(strategy, config, units, Peers(mesh.size, ragged=False), 4, d_model)
        rows.append(_row(name, compiled, error, sent))
        runs[name] = functools.partial(compiled, *inputs)
        if strategy == "all_to_all":
            alone[name] = step.exchange_alone(mesh, config, tokens)

    task = moe.MoEConfig(*sizes, routing="task", num_tasks=16)
    params = jax.tree.map(np.asarray, moe.init(jax.random.key(0), task))
    small = moe.extract(params, task, 3)
    inputs = place(mesh, small, jax.tree.map(lambda _: P(), small)), sharded
    compiled = jax.jit(moe.ffn).lower(*inputs).compile()
    ids = np.full(tokens, 3, np.int32)
    whole = jax.jit(lambda p, x: moe.apply(p, task, x, task=ids)[0])(params, x)
    error = _difference(compiled(*inputs), np.asarray(whole))
    rows.append(_row(step.SUB, compiled, error, 0.0))
    runs[step.SUB] = functools.partial(compiled, *inputs)

    good = {r.system: runs[r.system] for r in rows if r.agrees}
    beside = {f"{ALONE}{name}": run for name, run in alone.items() if name in good}
    # All processes must make the same calls: a round is one call, however short.
    timings = alternate({**good, **beside}, rounds=rounds, min_seconds=0)
    for at, row in enumerate(rows):
        if row.agrees:
            told = profile_communication(good[row.system])
            by_itself = timings.get(f"{ALONE}{row.system}")
            rows[at] = dataclasses.replace(
                step.timed(row, timings[row.system]),
                transfer_share=told.transfer_share,
                waiting_share=told.waiting_share,
                alone_us=None if by_itself is None else 1e6 * float(np.median(by_itself)),
            )
    return step.with_copy_shares(rows)


def _row(name: str, compiled: Any, error: float | None, sent: float) -> Row:
    agrees = error is None or error <= TOLERANCE
    return Row(name, error, agrees, count_collectives(compiled.as_text() or ""), sent)


def _difference(y: jax.Array, want: np.ndarray) -> float:
    """Largest difference of this process's shards, relative to the largest wanted value."""
    errors = [np.abs(np.asarray(s.data) - want[s.index]).max() for s in y.addressable_shards]
    return float(max(errors) / np.abs(want).max())


if __name__ == "__main__":
    sys.exit(serve(answer))
