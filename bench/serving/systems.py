"""Decoding steps as they are served: expert-parallel over devices, or one sub-network a device.

Each is one compiled program that decodes `POSITIONS` tokens of every sequence of a batch, greedily
and without early exit, over a fixed source length. What differs is where parameters lie:

    expert-parallel   each device holds 1/n of the experts and 1/n of the sequences; rows travel
    sub-networks      each device holds one task's extracted sub-network and that task's sequences
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.bench.harness.collectives import count_collectives, profile_communication
from taskmoe.bench.harness.results import Spread
from taskmoe.bench.harness.timing import alternate
from taskmoe.bench.serving.points import Point
from taskmoe.moe.exchange import STRATEGIES
from taskmoe.moe.travel import all_to_all
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import transformer
from taskmoe.wmt.model.ranking import most_likely
from taskmoe.wmt.model.transformer import Params
from taskmoe.wmt.text.tokenizer import BOS, PAD

POSITIONS = 16
SOURCE_LENGTH = 32
AXIS = "expert"
#: The strategy "kept" of `moe.apply` is "all_to_all" with every part kept instead of sent: what a
#: step costs without its exchange. Its results are wrong, and it is known in benchmarks only.
STRATEGIES["kept"] = dataclasses.replace(
    STRATEGIES["all_to_all"],
    run=functools.partial(all_to_all, swap=lambda parts, _: jnp.copy(parts)),
    sent=lambda *_: 0.0,
)

Decoded = tuple[jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class System:
    """A model in its place: parameters (each process holds them whole), how they lie on the mesh.

    program: (params, memory, token, keep_logits) -> `POSITIONS` tokens and logits, as `decode`.
    """

    config: ModelConfig
    params: Params
    specs: Any
    mesh: Mesh
    program: Callable[..., Decoded]


@dataclasses.dataclass(frozen=True)
class Served:
    """A compiled decoding program with its inputs in place.

    run: starts it and returns the tokens [batch, positions]. tokens: decoded by one run, all
    devices together. hlo: the optimised program. params_per_device: scalars held.
    bytes_per_device: of arguments and temporaries, as XLA counts them; 0 where it does not.
    """

    run: Callable[[], Any]
    tokens: int
    hlo: str
    params_per_device: int
    bytes_per_device: int


def use_host_devices(devices: int) -> None:
    """Make JAX show this machine's cores as so many devices; those it already shows stay."""
    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX runs already, as in a test
        jax.config.update("jax_num_cpu_devices", devices)


def device_mesh(devices: int) -> Mesh:
    """The first `devices` devices as a mesh with one axis; ValueError where there are fewer."""
    present = jax.devices()
    if len(present) < devices:
        raise ValueError(f"devices must be at most {len(present)}, as many as there are here")
    return Mesh(np.array(present[:devices]), (AXIS,), axis_types=(AxisType.Auto,))


def expert_parallel(
    params: Params, config: ModelConfig, mesh: Mesh, strategy: str = "all_to_all"
) -> System:
    """One model whose decoder's experts are spread over the mesh, each sequence on one device.

    strategy: as in `moe.apply`, or "kept", with which nothing travels and results are wrong.
    """

    def program(params: Params, memory: jax.Array, token: jax.Array, keep_logits: bool) -> Decoded:
        options: Any = {"mesh": mesh, "strategy": strategy, "keep_logits": keep_logits}
        return decode(params, config, memory, token, POSITIONS, **options)

    return System(config, params, expert_specs(params), mesh, program)


def sub_networks(models: Sequence[Params], config: ModelConfig, mesh: Mesh) -> System:
    """One model a device, for its own share of the sequences.

    config: of a sub-network, whose feed-forward layers are all dense. A dense model is served so
    too, as one replica a device.
    """
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models)

    def program(params: Params, memory: jax.Array, token: jax.Array, keep_logits: bool) -> Decoded:
        def local(params: Params, memory: jax.Array, token: jax.Array) -> Any:
            own = jax.tree.map(lambda leaf: leaf[0], params)
            return decode(own, config, memory, token, POSITIONS, keep_logits=keep_logits)

        # An empty cache is the same on every device, a filled one is not: without the check of it.
        options: Any = {"in_specs": P(AXIS), "out_specs": P(AXIS), "check_vma": False}
        found: Decoded = jax.shard_map(local, mesh=mesh, **options)(params, memory, token)
        return found

    return System(config, stacked, jax.tree.map(lambda _: P(AXIS), stacked), mesh, program)


def decode(
    params: Params,
    config: ModelConfig,
    memory: jax.Array,
    token: jax.Array,
    positions: int,
    task: jax.Array | None = None,
    *,
    mesh: Mesh | None = None,
    strategy: str = "all_to_all",
    keep_logits: bool = False,
) -> Decoded:
    """Greedy decoding without early exit: tokens [B, positions], and logits [B, positions, V].

    memory: [B, S, D], the encoder's output, all of it valid. token: [B] i32, where to begin; or
    [B, positions], what stands at each position whatever was found likely before it.
    keep_logits: return them; else None.
    """
    params = transformer.with_softmax(params)
    given = token.T if token.ndim == 2 else None
    valid = jnp.ones(memory.shape[:2], bool)
    cache = transformer.start_cache(params, config, memory, valid, positions)

    def step(state: Any, position: jax.Array) -> Any:
        token, cache = state
        token = token if given is None else given[position]
        logits, cache = transformer.decode_step(
            params, config, cache, valid, token, position, task, mesh=mesh, strategy=strategy
        )
        chosen, _ = most_likely(logits)
        return (chosen, cache), (chosen, logits if keep_logits else None)

    start = (token if given is None else given[0], cache)
    _, (tokens, logits) = jax.lax.scan(step, start, jnp.arange(positions))
    return tokens.T, None if logits is None else logits.swapaxes(0, 1)


def place(mesh: Mesh, tree: Any, spec: Any) -> Any:
    """Arrays that every process holds whole, laid out over all devices of the mesh.

    spec: one `PartitionSpec` for all leaves, or a tree of them.
    """

    def one(leaf: Any, s: P) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, s), lambda i: leaf[i])

    return jax.tree.map(one, tree, jax.tree.broadcast(spec, tree))


def place_shapes(mesh: Mesh, tree: Any, spec: Any) -> Any:
    """As `place`, of arrays' shapes alone."""

    def one(leaf: Any, s: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, s))

    return jax.tree.map(one, tree, jax.tree.broadcast(spec, tree))


def padded(ids: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Token ids as rows of one width, cut or filled up, [rows, width] i32."""
    rows = np.full((len(ids), width), PAD, np.int32)
    for row, line in zip(rows, ids, strict=True):
        row[: min(len(line), width)] = line[:width]
    return rows


def inputs(
    config: ModelConfig, batch: int, *, given: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A batch to decode: what an encoder might give [B, S, D] f32, and first tokens [B] i32.

    given: all tokens instead, drawn at random, [B, POSITIONS], for models of `random_model`.
    """
    rng = np.random.default_rng(0)
    memory = rng.standard_normal((batch, SOURCE_LENGTH, config.d_model)).astype(np.float32)
    if given:
        return memory, rng.integers(0, config.vocab_size, (batch, POSITIONS), np.int32)
    return memory, np.full((batch,), BOS, np.int32)


def expert_specs(params: Any) -> Any:
    """Experts over the mesh axis "expert", everything else on every device."""
    if isinstance(params, dict):
        return {k: moe.param_specs(v) if k == "moe" else expert_specs(v) for k, v in params.items()}
    if isinstance(params, list):
        return [expert_specs(leaf) for leaf in params]
    return jax.tree.map(lambda _: P(), params)


def random_model(config: ModelConfig) -> Params:
    """Random parameters whose routers spread tokens about as evenly as trained ones.

    Fresh ones send most tokens to few experts (the busiest of 32 gets 5.5 times its share): what
    all tokens have in common weighs too much. With larger embeddings the token itself decides; that
    tokens differ, `inputs` sees to with given=True: greedy decoding would soon repeat one.
    """
    params = transformer.init(jax.random.key(0), config)
    return params | {"embedding": 10 * params["embedding"]}


def serve(system: System, batch: int, *, given: bool = False) -> Served:
    """Compile a system's decoding of a batch and put its inputs in place; given: as `inputs`."""
    params = place(system.mesh, system.params, system.specs)
    arguments = place(system.mesh, inputs(system.config, batch, given=given), P(AXIS))

    def program(params: Params, memory: jax.Array, token: jax.Array) -> jax.Array:
        return system.program(params, memory, token, False)[0]

    compiled = jax.jit(program).lower(params, *arguments).compile()
    held = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params)]
    memory: Any = compiled.memory_analysis()
    return Served(
        run=lambda: compiled(params, *arguments),
        tokens=batch * POSITIONS,
        hlo=compiled.as_text() or "",
        params_per_device=sum(held),
        bytes_per_device=memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0,
    )


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a system's decoding compares with the whole model's on one device.

    tokens, identical: compared, and those that are the same. error: largest difference of logits,
    relative to the largest logit, up to and with the first token of a sequence that differs.
    """

    tokens: int
    identical: int
    error: float


def agreement(
    system: System,
    params: Params,
    config: ModelConfig,
    batch: int,
    task: np.ndarray | None = None,
    *,
    given: bool = True,
) -> Agreement:
    """Decode a batch with a system and with the whole model on one device.

    params, config: of the whole model. task: [batch] i32 for a task-routed decoder. given: as
    `inputs`; models of `random_model` would repeat one token and route all alike. What they find
    likely is compared at every position; in greedy decoding a sequence is another one after the
    first token that differs, and no longer compared. Of several processes each compares the
    sequences that its devices hold.
    """
    memory, token = inputs(config, batch, given=given)
    placed = place(system.mesh, system.params, system.specs)
    arguments = place(system.mesh, (memory, token), P(AXIS))
    found = jax.jit(system.program, static_argnums=3)(placed, *arguments, True)
    (mine, tokens), (_, logits) = map(_local_rows, found)
    whole = _on_one_device(params, config, memory, token, POSITIONS, task, keep_logits=True)
    want_tokens, want = (np.asarray(array)[mine] for array in whole)
    same = tokens == want_tokens
    counted = np.ones_like(same)
    if not given:
        counted[:, 1:] = np.logical_and.accumulate(same[:, :-1], axis=1)
    error = np.abs(logits - want).max(axis=-1)[counted].max() / np.abs(want).max()
    return Agreement(same.size, int((same & counted).sum()), float(error))


_on_one_device: Any = jax.jit(decode, static_argnames=("config", "positions", "keep_logits"))


def _local_rows(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an array [batch, ...] on this process's devices: which, and what they hold."""
    every = np.arange(array.shape[0])
    if array.is_fully_addressable:
        return every, np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
    which = [every[s.index[0]] for s in shards]
    return np.concatenate(which), np.concatenate([np.asarray(s.data) for s in shards])


def with_room(config: ModelConfig) -> ModelConfig:
    """The same with capacity for all rows.

    Capacity is counted on each device's own rows, so one device drops others: what must agree with
    it is the same program with room.
    """
    if config.capacity_factor is None:
        return config
    return dataclasses.replace(config, capacity_factor=float(config.num_experts))


def measure(
    systems: dict[str, System], batch: int, *, rounds: int = 7, given: bool = False
) -> list[Point]:
    """Compile each system for a batch, time them in turns and profile each; given: as `inputs`."""
    served = {name: serve(system, batch, given=given) for name, system in systems.items()}
    # Where several processes take part all must make the same calls: a round is one, however short.
    timings = alternate({name: s.run for name, s in served.items()}, rounds=rounds, min_seconds=0)
    points = []
    for name, s in served.items():
        speed = Spread.of(s.tokens / timings[name])
        told = profile_communication(s.run)
        points.append(
            Point(
                name, batch, speed.median, speed.p10, speed.p90, count_collectives(s.hlo),
                told.step_ms / POSITIONS, told.transfer_share, told.waiting_share,
                s.params_per_device, s.bytes_per_device, tuple(timings[name].tolist()),
            )
        )  # fmt: skip
    return points
