"""HBM bytes of whole expert networks, against the least that there is, at decode-sized inputs.

expert_ffn keeps hidden activations in VMEM; gmm + activation + gmm writes and reads them. Where
experts are quantised the floor is theirs, values and scales. Bytes are counted by `grid_walk`, for
a random top-2 routing; nothing is measured.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.grid_walk import recording
from taskmoe.kernels import expert_ffn, gmm, quantize
from taskmoe.kernels.quantized import nbytes

ROWS = (64, 256, 1024)
EXPERTS, D_MODEL, D_FF, TOP_K = 32, 512, 2048, 2
QUANTISED = {"taskmoe expert_ffn int8": "int8", "taskmoe expert_ffn fp8": "float8_e4m3fn"}
WAYS = ("taskmoe expert_ffn", "taskmoe gmm + act + gmm", "megablox gmm + act + gmm", *QUANTISED)
#: Row blocks that megablox is tried with; the one that moves least is shown.
MEGABLOX_ROWS = (16, 32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class ExpertBytes:
    """Bytes that one way of running experts moves, and the least that there is."""

    chip: str
    rows: int
    way: str
    moved_bytes: int
    floor_bytes: int
    ratio: float


def table(chip: str) -> list[ExpertBytes]:
    """One row for each number of rows and way; rows in bf16."""
    found = []
    for rows in ROWS:
        sizes = kernel_cases.routed(rows // TOP_K, EXPERTS, TOP_K)
        touched = sum(size > 0 for size in sizes)
        for way in WAYS:
            floor = touched * nbytes(*matrices(way)) // EXPERTS + 2 * 2 * rows * D_MODEL
            moved = moved_bytes(chip, way, rows, sizes)
            found.append(ExpertBytes(chip, rows, way, moved, floor, moved / floor))
    return found


@functools.cache
def matrices(way: str) -> tuple[Any, Any]:
    """W_in and W_out of all experts as this way has them."""
    w_in = jnp.zeros((EXPERTS, D_MODEL, D_FF), jnp.bfloat16)
    w_out = jnp.zeros((EXPERTS, D_FF, D_MODEL), jnp.bfloat16)
    if way in QUANTISED:
        return quantize(w_in, QUANTISED[way]), quantize(w_out, QUANTISED[way])
    return w_in, w_out


def moved_bytes(chip: str, way: str, rows: int, sizes: tuple[int, ...]) -> int:
    """Bytes that one way of running the experts moves."""
    x = jnp.zeros((rows, D_MODEL), jnp.bfloat16)
    w_in, w_out = matrices(way)
    groups = jnp.asarray(sizes, jnp.int32)
    if way.startswith("megablox"):
        return min(
            _megablox_bytes(chip, x, w_in, w_out, groups, block)
            for block in MEGABLOX_ROWS
            if rows % block == 0
        )
    with recording(chip) as calls:
        if "expert_ffn" in way:
            expert_ffn(x, w_in, w_out, groups, implementation="mosaic")
            return sum(call.moved_bytes for call in calls)
        hidden = gmm(x, w_in, groups, implementation="mosaic")
        gmm(hidden, w_out, groups, implementation="mosaic")
    return sum(call.moved_bytes for call in calls) + 2 * hidden.nbytes  # the activation's


def _megablox_bytes(chip: str, x: Any, w_in: Any, w_out: Any, groups: Any, block: int) -> int:
    """Whole matrices a block: no other width or depth moves less."""
    product = kernel_cases.megablox().gmm
    hidden = jnp.zeros((x.shape[0], D_FF), x.dtype)
    with recording(chip) as calls:
        product(x, w_in, groups, x.dtype, (block, D_MODEL, D_FF))
        product(hidden, w_out, groups, x.dtype, (block, D_FF, D_MODEL))
    return sum(call.moved_bytes for call in calls) + 2 * hidden.nbytes
