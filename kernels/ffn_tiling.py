"""Block sizes of expert_ffn, by the rule of `tiling`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.group_visits import FFN_PART
from taskmoe.kernels.options import Experts
from taskmoe.kernels.platforms import chip
from taskmoe.kernels.quantized import itemsize as itemsize_of
from taskmoe.kernels.tiling import (
    HIDDEN_CHUNK,
    LANES,
    TALLEST_FFN,
    Tiling,
    best,
    block_rows,
    executed_rows,
    heights,
    round_up,
    seconds,
    splits,
    sublanes,
    tiles_of,
    vmem_budget_bytes,
)


@dataclasses.dataclass(frozen=True)
class FFNSizes:
    """Sizes of expert_ffn, rows [m, d] through e experts of f hidden units, and the chip it is for.

    matrices: 2, or 3 if gated
    itemsize: bytes of an element of the rows
    weight_itemsize: bytes of an element of the matrices, where it is not the rows'
    """

    m: int
    d: int
    f: int
    e: int
    matrices: int
    itemsize: int
    info: pltpu.TpuInfo
    weight_itemsize: int | None = None

    @classmethod
    def of(cls, x: jax.Array, experts: Experts) -> FFNSizes:
        """Those of a call, on the chip that it is lowered for."""
        (m, d), (e, _, f) = x.shape, experts.w_in.shape
        matrices = 2 if experts.w_gate is None else 3
        return cls(m, d, f, e, matrices, x.dtype.itemsize, chip(), itemsize_of(experts.w_in))


def ffn_vmem_bytes(t: Tiling, s: FFNSizes) -> int:
    """VMEM of expert_ffn: rows, matrices and result twice, sum, a part's product and a chunk's."""
    weights = s.matrices * t.k * t.n * (s.weight_itemsize or s.itemsize)
    streams = 2 * t.m * t.k * s.itemsize + weights
    part = min(t.m, FFN_PART)
    return 2 * streams + 4 * (t.m * t.k + part * (t.k + s.matrices * min(t.n, HIDDEN_CHUNK)))


def ffn_bytes(t: Tiling, s: FFNSizes) -> int:
    """HBM bytes of expert_ffn: rows in and out once, matrices once an expert unless F is cut."""
    reads = s.e if t.n >= s.f else -(-s.m // t.m) + s.e - 1
    weights = reads * s.matrices * t.k * s.f * (s.weight_itemsize or s.itemsize)
    return 2 * s.m * t.k * s.itemsize + weights


@functools.cache
def ffn_tiling(s: FFNSizes) -> Tiling:
    """Block sizes for expert_ffn."""
    mxu, base = s.info.mxu_column_size, block_rows(s.m, s.e, s.itemsize)

    def cost(t: Tiling) -> tuple[Any, ...]:
        moved = ffn_bytes(t, s)
        steps = (-(-s.m // t.m) + s.e - 1) * -(-s.f // t.n)
        tiles = s.matrices * tiles_of(s.d, s.d, mxu) * tiles_of(s.f, t.n, mxu)
        time = seconds(s.info, moved, executed_rows(t.m, s.m, s.e, s.info), tiles, steps)
        # Blocks that leave a wide MXU half empty take longer than is estimated: the last choice.
        return t.n < min(s.f, mxu), time, moved, t.m, -t.n

    unit, least = sublanes(s.itemsize), Tiling(base, s.d, min(s.f, LANES))
    while least.m > unit and ffn_vmem_bytes(least, s) > vmem_budget_bytes(s.info):
        least = dataclasses.replace(least, m=round_up(least.m // 2, unit))
    return best(
        (Tiling(rows, s.d, f) for rows in heights(base, s.m, TALLEST_FFN) for f in splits(s.f)),
        lambda t: ffn_vmem_bytes(t, s),
        cost,
        s.info,
        least,
        s.matrices,
    )
