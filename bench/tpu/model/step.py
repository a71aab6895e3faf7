"""Compiles one decoding step of the paper's WMT models for TPU, without a TPU.

Nothing of a model's size is ever made; all arrays are shapes. One step is greedy: token ids [B] and
a cache of `CACHE_LENGTH` positions over `SOURCE_LENGTH` source positions in, the next token ids [B]
and the cache, in its own place, out. Every parameter of the model lies in HBM, the encoder's too:
whoever serves needs both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from taskmoe.bench.harness.collectives import collectives, count_collectives
from taskmoe.bench.serving.systems import expert_specs, place_shapes
from taskmoe.wmt.config import PRESETS, ModelConfig
from taskmoe.wmt.model import subnetwork, transformer
from taskmoe.wmt.model.quantization import quantized
from taskmoe.wmt.model.transformer import Params, Tasks
from taskmoe.wmt.text import cldr

SOURCE_LENGTH, CACHE_LENGTH = 32, 64
#: GShard's capacity: every expert has room for this many times its even share of rows.
CAPACITY_FACTOR = 2.0
#: System -> routing of both sides of the model that it is, or is extracted from.
SYSTEMS = {"dense": "dense", "token-MoE": "token", "sub-network": "target"}
#: Mesh of the expert-parallel system: 32 experts, one a core, twice.
DATA, EXPERT = 2, 32
CORES = {"dense": 1, "token-MoE": DATA * EXPERT, "sub-network": 1}
#: The sub-network with its matrices in other numbers; each is served on one core.
SMALLER = {"sub-network in bf16": "bf16", "sub-network in int8": "int8"}
#: Slices of 64 cores; of v3 it is the blog's.
SLICES = {"v3": "v3:4x8", "v5e": "v5e:8x8", "v6e": "v6e:8x8"}


@dataclasses.dataclass(frozen=True)
class Step:
    """What the compiler says of one step of a batch, per core: `error`, or facts in bytes and s.

    batch: sequences over all cores of the system. hbm_bytes: arguments, results that are not
    written over arguments, temporaries. read_bytes: of the arguments, what a step must read:
    decoder, softmax and cache. flops, accessed_bytes, optimal_s: as the compiler estimates them.
    collectives: kind -> instructions. exchange_bytes: sent in all-to-alls. kernels: Pallas calls.
    busiest_link, hops: of the exchange. limit: of the largest batch, why the next one up does not
    compile.
    """

    batch: int = 0
    error: str | None = None
    compile_s: float = 0.0
    hbm_bytes: int = 0
    temporary_bytes: int = 0
    read_bytes: int = 0
    flops: float = 0.0
    accessed_bytes: float = 0.0
    optimal_s: float = 0.0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    exchange_bytes: int = 0
    kernels: int = 0
    busiest_link: float = 0.0
    hops: int = 0
    limit: str | None = None


@functools.cache
def shapes(system: str) -> tuple[Params, ModelConfig]:
    """Shapes of a system's parameters and its configuration, of the base preset."""
    if system in SMALLER:
        params, config = shapes("sub-network")
        make = quantized if SMALLER[system] == "int8" else _in_bfloat16
        return jax.eval_shape(make, params), config
    sizes, routing = PRESETS["base"][0], SYSTEMS[system]
    room = CAPACITY_FACTOR if routing == "token" else None
    sides: Any = {"encoder": routing, "decoder": routing, "capacity_factor": room}
    config = ModelConfig(pairs=cldr.PAIRS, **(sizes | sides))
    params = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    if system != "sub-network":
        return params, config
    left: list[ModelConfig] = []

    def extract(params: Params) -> Params:
        params, small, _ = subnetwork.one_task(params, config, Tasks(np.int32(0), np.int32(0)))
        left.append(small)
        return params

    return jax.eval_shape(extract, params), left[0]


def _in_bfloat16(params: Params) -> Params:
    """Matrices as bf16; norms stay."""
    small: Params = jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.ndim > 1 else w, params)
    return small


def cache_shapes(system: str, batch: int) -> transformer.Cache:
    """Shapes of the cache of `batch` sequences."""
    params, config = shapes(system)
    kind = jnp.bfloat16 if SMALLER.get(system) == "bf16" else jnp.float32
    memory = jax.ShapeDtypeStruct((batch, SOURCE_LENGTH, config.d_model), kind)
    valid = jax.ShapeDtypeStruct(memory.shape[:2], bool)

    def start(params: Params, memory: jax.Array, valid: jax.Array) -> transformer.Cache:
        return transformer.start_cache(params, config, memory, valid, CACHE_LENGTH)

    cache: transformer.Cache = jax.eval_shape(start, params, memory, valid)
    return cache


def system_mesh(system: str, chip: str) -> Mesh:
    """The cores that serve a system: 2 x 32 of the slice, or one."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=SLICES[chip]).devices
    cores = CORES.get(system, 1)
    shape = (DATA, EXPERT) if cores > 1 else (1, 1)
    axes: Any = {"axis_types": (AxisType.Auto,) * 2}
    return Mesh(np.array(devices[:cores]).reshape(shape), ("data", "expert"), **axes)


def compile_step(system: str, chip: str, batch: int) -> Step:
    """Compile one step of a batch; see `Step`."""
    params, config = shapes(system)
    mesh = system_mesh(system, chip)
    by_sequence = P(mesh.axis_names)

    def step(params: Params, cache: Any, valid: Any, token: Any, position: Any) -> Any:
        logits, cache = transformer.decode_step(
            params, config, cache, valid, token, position, None, mesh=exchange
        )
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    exchange = mesh if CORES.get(system, 1) > 1 else None
    placed = place_shapes(mesh, params, expert_specs(params))
    held = cache_shapes(system, batch)
    spread = jax.tree.map(lambda s: by_sequence if s.ndim else P(), held)
    cache = place_shapes(mesh, held, spread)
    valid = jax.ShapeDtypeStruct((batch, SOURCE_LENGTH), bool)
    token, position = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    inputs = place_shapes(mesh, (valid, token, position), (by_sequence, by_sequence, P()))
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):  # by which Pallas knows the chip
            jitted = jax.jit(step, donate_argnums=1, keep_unused=True)
            compiled = jitted.lower(placed, cache, *inputs).compile()
    except Exception as error:  # a refusal is a result
        return Step(batch, error=" ".join(str(error).split())[:500])
    hlo = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    read = [placed["decoder"], placed["decoder_norm"], placed["softmax"], cache]
    groups = [[tuple(d.coords) for d in row] for row in mesh.devices]
    return Step(
        batch,
        compile_s=time.perf_counter() - start,
        hbm_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        read_bytes=held_bytes(read),
        flops=cost["flops"],
        accessed_bytes=cost["bytes accessed"],
        optimal_s=cost["optimal_seconds"],
        collectives=count_collectives(hlo),
        exchange_bytes=exchange_bytes(hlo),
        kernels=hlo.count('custom_call_target="tpu_custom_call"'),
        busiest_link=max(busiest_link(group) for group in groups),
        hops=max(longest_way(group) for group in groups),
    )


def held_bytes(tree: Any) -> int:
    """Bytes that one core holds of a tree of placed shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def exchange_bytes(hlo: str) -> int:
    """Bytes that one core sends to others in the all-to-alls of an optimised HLO text.

    Of what an all-to-all in a group of n returns, (n-1)/n came from others, and as much was sent.
    Raises ValueError where an all-to-all is written in a way that is not known here.
    """
    sent = 0
    for one in collectives(hlo):
        if one.kind != "all-to-all":
            continue
        peers = group_size(one.line)
        if peers is None or one.form or one.result.startswith("("):
            raise ValueError(f"all-to-all of an unknown form: {one.line[:200]}")
        if one.bytes % peers:
            raise ValueError(f"all-to-all that {peers} peers do not divide: {one.line[:200]}")
        sent += one.bytes // peers * (peers - 1)
    return sent


def group_size(line: str) -> int | None:
    """Devices of a group of a collective; None where its form is not known here.

    The known forms: {{0,1},{2,3}}, [2,2]<=[4], and from jax 0.12 on mesh['x'=2,'y'=2] {'y'}.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(axis.split("=") for axis in match[1].split(","))
        axes = match[2].split(",")
        return math.prod(int(sizes[axis]) for axis in axes) if sizes.keys() >= set(axes) else None
    return None


def busiest_link(cores: Sequence[tuple[int, ...]]) -> float:
    """Bytes over the busiest link, one way, for each byte that a core sends to its peers evenly.

    cores: coordinates of each core's chip in a mesh without wrap-around links. Over a plane that
    cuts the group in l and r of n cores go l*r/(n-1) bytes each way, shared evenly by the links
    that cross it inside the group's box. Cores on one chip exchange over no link.
    """
    worst, n = 0.0, len(cores)
    extents = [max(at) - min(at) + 1 for at in zip(*cores, strict=True)]
    for axis, extent in enumerate(extents):
        first = min(core[axis] for core in cores)
        for cut in range(first + 1, first + extent):
            left = sum(core[axis] < cut for core in cores)
            links = math.prod(extents) // extent
            worst = max(worst, left * (n - left) / (n - 1) / links)
    return worst


def longest_way(cores: Sequence[tuple[int, ...]]) -> int:
    """Links between the two cores of a group that are farthest apart, in a mesh."""
    return sum(max(at) - min(at) for at in zip(*cores, strict=True))
