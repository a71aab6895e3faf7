"""Decoding steps as they are served: expert-parallel over devices, or one sub-network a device.

Each is one compiled program that decodes `POSITIONS` tokens of every sequence of a batch, greedily
and without early exit, over a fixed source length. What differs is where parameters lie:

    expert-parallel   each device holds 1/n of the experts and 1/n of the sequences; rows travel
    sub-networks      each device holds one task's extracted sub-network and that task's sequences
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.bench.collectives import count_collectives, profile_communication
from taskmoe.bench.timing import alternate
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.tokenizer import BOS
from taskmoe.wmt.transformer import (
    Params,
    decode_step,
    most_likely,
    start_cache,
    with_softmax,
)

POSITIONS = 16
SOURCE_LENGTH = 32
AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Served:
    """A compiled decoding program with its inputs in place.

    run: starts it and returns the last logits. tokens: decoded by one run, all devices together.
    collectives: kind -> instructions in the compiled program. params_per_device: scalars held.
    """

    run: Callable[[], Any]
    tokens: int
    collectives: dict[str, int]
    params_per_device: int


def device_mesh(devices: int) -> Mesh:
    """The first `devices` devices as a mesh with one axis; ValueError where there are fewer."""
    present = jax.devices()
    if len(present) < devices:
        raise ValueError(f"devices must be at most {len(present)}, as many as there are here")
    return Mesh(np.array(present[:devices]), (AXIS,), axis_types=(AxisType.Auto,))


def expert_parallel(params: Params, config: ModelConfig, batch: int, mesh: Mesh) -> Served:
    """Decoding of `batch` sequences with the decoder's experts spread over the mesh."""

    def program(params: Params, memory: jax.Array, token: jax.Array) -> jax.Array:
        return _decode(params, config, memory, token, mesh)

    specs = _expert_specs(params)
    return _serve(program, params, specs, config, batch, mesh)


def sub_networks(models: Sequence[Params], config: ModelConfig, batch: int, mesh: Mesh) -> Served:
    """Decoding of `batch` sequences in all, each device with its own sub-network of `models`.

    config: of a sub-network, whose feed-forward layers are all dense.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def local(params: Params, memory: jax.Array, token: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf[0], params)
        return _decode(own, config, memory, token, None)

    program = jax.shard_map(local, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
    specs = jax.tree.map(lambda _: P(AXIS), stacked)
    return _serve(program, stacked, specs, config, batch, mesh)


def _decode(
    params: Params, config: ModelConfig, memory: jax.Array, token: jax.Array, mesh: Mesh | None
) -> jax.Array:
    params = with_softmax(params)
    valid = jnp.ones(memory.shape[:2], bool)
    cache = start_cache(params, config, memory, valid, POSITIONS)

    def step(position: jax.Array, state: Any) -> Any:
        token, cache, _ = state
        logits, cache = decode_step(params, config, cache, valid, token, position, None, mesh=mesh)
        return most_likely(logits), cache, logits

    first = step(jnp.int32(0), (token, cache, None))
    return jax.lax.fori_loop(1, POSITIONS, step, first)[2]


def _expert_specs(params: Params) -> Any:
    """Experts over the mesh, everything else on every device."""

    def specs(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {
                name: moe.param_specs(leaf) if name == "moe" else specs(leaf)
                for name, leaf in tree.items()
            }
        if isinstance(tree, list):
            return [specs(leaf) for leaf in tree]
        return jax.tree.map(lambda _: P(), tree)

    return specs(params)


def _serve(
    program: Callable[..., jax.Array],
    params: Params,
    specs: Any,
    config: ModelConfig,
    batch: int,
    mesh: Mesh,
) -> Served:
    rng = np.random.default_rng(0)
    memory = rng.standard_normal((batch, SOURCE_LENGTH, config.d_model)).astype(np.float32)
    token = np.full((batch,), BOS, np.int32)

    def place(tree: Any, spec: Any) -> Any:
        put = jax.tree.map(
            lambda leaf, s: jax.device_put(leaf, NamedSharding(mesh, s)),
            tree,
            spec,
            is_leaf=lambda leaf: isinstance(leaf, P),
        )
        return put

    params = place(params, specs)
    inputs = [place(memory, P(AXIS)), place(token, P(AXIS))]
    compiled = jax.jit(program).lower(params, *inputs).compile()
    held = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params)]
    return Served(
        run=lambda: compiled(params, *inputs),
        tokens=batch * POSITIONS,
        collectives=count_collectives(compiled.as_text() or ""),
        params_per_device=sum(held),
    )


def measure(
    systems: dict[str, Callable[[int], Served]], batch: int, *, rounds: int = 7
) -> list[dict[str, Any]]:
    """Compile each system for a batch, time them in turns and profile each.

    Returns a JSON-ready row a system: system, batch, tokens_per_s (median) with its 10th and 90th
    percentile, collectives, params_per_device, and the profiler's step_ms, transfer_share and
    waiting_share.
    """
    served = {name: make(batch) for name, make in systems.items()}
    timings = alternate({name: s.run for name, s in served.items()}, rounds=rounds)
    rows = []
    for name, s in served.items():
        speeds = s.tokens / np.asarray(timings[name].seconds)
        told = profile_communication(s.run)
        rows.append(
            {
                "system": name,
                "batch": batch,
                "tokens_per_s": float(np.median(speeds)),
                "tokens_per_s_p10": float(np.quantile(speeds, 0.1)),
                "tokens_per_s_p90": float(np.quantile(speeds, 0.9)),
                "collectives": s.collectives,
                "params_per_device": s.params_per_device,
                "step_ms": told.step_ms / POSITIONS,
                "transfer_share": told.transfer_share,
                "waiting_share": told.waiting_share,
            }
        )
    return rows
