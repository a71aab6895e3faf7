"""Whole decoding steps for `bench exchange`, and how else to tell what their exchange takes.

The profiler tells each device's time in collectives. Two other ways need no profiler: the same
program with every part kept instead of sent (strategy "kept") takes less time by what the exchange
cost; and the all-to-alls of a layer run by themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.bench.exchange.measure import Row
from taskmoe.bench.harness.results import Spread
from taskmoe.bench.serving import systems as serving
from taskmoe.moe.mesh import EXPERT_AXIS
from taskmoe.moe.routing import capacity
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model.subnetwork import one_task
from taskmoe.wmt.model.transformer import Tasks

#: System -> capacity factor and strategy, of layers and of steps.
SYSTEMS: dict[str, tuple[float | None, str]] = {
    "all_to_all, dropless": (None, "all_to_all"),
    "dropless, kept": (None, "kept"),
    "all_to_all, capacity 1.25": (1.25, "all_to_all"),
    "capacity 1.25, kept": (1.25, "kept"),
    "ragged, dropless": (None, "ragged"),
    "all_gather, dropless": (None, "all_gather"),
}
#: System that sends -> the same with every part kept.
TWINS = {
    "all_to_all, dropless": "dropless, kept",
    "all_to_all, capacity 1.25": "capacity 1.25, kept",
}
SUB = "task-routed sub-network"
#: A decoder whose every other layer is a mixture, as the paper's; hidden width 4 * d_model.
LAYERS, VOCABULARY, TASKS = 2, 1000, 8


def measure_step(
    mesh: Mesh, batch: int, experts: int, d_model: int, rounds: int, tolerance: float
) -> list[Row]:
    """A row a system for one greedy decoding step of `batch` sequences.

    us and its percentiles are of a step: a program of `serving.POSITIONS` over their number.
    Systems that decode otherwise than one device have `agrees` False and are not timed.
    """
    systems, errors = _systems(mesh, experts, d_model)
    rows = {name: Row(name, e, e is None or e <= tolerance) for name, e in errors.items()}
    good = {name: systems[name] for name, row in rows.items() if row.agrees}
    for told in serving.measure(good, batch, rounds=rounds, given=True):
        rows[told.system] = dataclasses.replace(
            timed(rows[told.system], np.asarray(told.seconds) / serving.POSITIONS),
            collectives=told.collectives,
            transfer_share=told.transfer_share,
            waiting_share=told.waiting_share,
        )
    return with_copy_shares(list(rows.values()))


def _systems(
    mesh: Mesh, experts: int, d_model: int
) -> tuple[dict[str, serving.System], dict[str, float | None]]:
    """Systems by name, and how far each is from one device; None where by design."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "d_model": d_model, "d_ff": 4 * d_model, "num_heads": 4,
        "encoder_layers": 1, "decoder_layers": LAYERS, "num_experts": experts,
        "encoder": "dense", "tie_embeddings": True, "dropout": 0.0,
    }  # fmt: skip
    pairs = tuple(f"en-x{i}" for i in range(TASKS))
    whole, task = (ModelConfig(pairs=pairs, decoder=d, **sizes) for d in ("token", "target"))
    params = serving.random_model(whole)
    systems: dict[str, serving.System] = {}
    errors: dict[str, float | None] = {}
    for name, (factor, strategy) in SYSTEMS.items():
        config = dataclasses.replace(whole, capacity_factor=factor)
        systems[name] = serving.expert_parallel(params, config, mesh, strategy)
        errors[name] = None
        if strategy != "kept":
            roomy = serving.with_room(config)
            spread = serving.expert_parallel(params, roomy, mesh, strategy)
            errors[name] = serving.agreement(spread, params, roomy, mesh.size).error
    params = serving.random_model(task)
    small, small_config, _ = one_task(params, task, Tasks(None, np.int32(3)))
    systems[SUB] = serving.sub_networks([small] * mesh.size, small_config, mesh)
    ids = np.full(mesh.size, 3, np.int32)
    errors[SUB] = serving.agreement(systems[SUB], params, task, mesh.size, ids).error
    return systems, errors


def timed(row: Row, seconds: Sequence[float] | np.ndarray) -> Row:
    """The row with its rounds: us with percentiles, and every round for ratios."""
    us = np.asarray(seconds) * 1e6
    of = Spread.of(us)
    whole = us.tolist()
    return dataclasses.replace(row, us=of.median, us_p10=of.p10, us_p90=of.p90, rounds_us=whole)


def with_copy_shares(rows: Sequence[Row]) -> list[Row]:
    """The rows, each that has a twin which keeps what it sends with the time that the twin saves.

    copy_share, with its 10th and 90th percentile over the rounds, which ran in turns.
    """
    by_name = {row.system: row for row in rows if row.rounds_us}
    found = []
    for row in rows:
        kept = by_name.get(TWINS.get(row.system, ""))
        if kept is not None and row.rounds_us:
            of = Spread.of(1 - np.array(kept.rounds_us) / row.rounds_us)
            row = dataclasses.replace(
                row, copy_share=of.median, copy_share_p10=of.p10, copy_share_p90=of.p90
            )
        found.append(row)
    return found


def exchange_alone(mesh: Mesh, config: moe.MoEConfig, tokens: int) -> Callable[[], Any]:
    """The three all-to-alls of one layer with nothing between them, compiled, inputs in place."""
    units = tokens // mesh.size
    room = capacity(config, config.group_size or units) or units
    shape = mesh.size * config.num_experts * room, config.d_model
    rows = serving.place(mesh, np.ones(shape, np.float32), P(EXPERT_AXIS))
    filled = serving.place(mesh, np.ones(shape[0], bool), P(EXPERT_AXIS))

    def local(rows: jax.Array, filled: jax.Array) -> tuple[jax.Array, jax.Array]:
        def swap(x: jax.Array) -> jax.Array:
            parts = x.reshape(mesh.size, -1, *x.shape[1:])
            return jax.lax.all_to_all(parts, EXPERT_AXIS, 0, 0).reshape(x.shape)

        there, mask = swap(rows), swap(filled)
        # Negated, so that the way back is not taken for the inverse of the way there.
        return swap(-there), mask

    whole = jax.shard_map(local, mesh=mesh, in_specs=P(EXPERT_AXIS), out_specs=P(EXPERT_AXIS))
    compiled = jax.jit(whole).lower(rows, filled).compile()
    return functools.partial(compiled, rows, filled)
