"""Block sizes of gmm and tgmm, by the rule of `tiling`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.tiling import (
    LANES,
    TALLEST,
    Tiling,
    best,
    block_rows,
    executed_rows,
    heights,
    seconds,
    shared_splits,
    splits,
    tiles_of,
)


@dataclasses.dataclass(frozen=True)
class ProductSizes:
    """Sizes of a grouped product of M rows in E groups, and the chip that runs it.

    gmm: [m, k] x [e, k, n]. tgmm: [m, k]^T x [m, n] into [e, k, n].
    itemsize, out_itemsize: bytes of an element of the operands, and of the result
    rhs_itemsize: bytes of an element of gmm's matrices, where it is not the rows'
    count: pairs of gmm's operands, whose products are added; gradients that tgmm has for one lhs
    """

    m: int
    k: int
    n: int
    e: int
    itemsize: int
    out_itemsize: int
    info: pltpu.TpuInfo
    rhs_itemsize: int | None = None
    count: int = 1

    def seconds(self, t: Tiling, moved_bytes: int, contracted: bool = False) -> float:
        """Estimated time with these blocks; contracted: as in `executed_rows`."""
        mxu = self.info.mxu_column_size
        steps = (-(-self.m // t.m) + self.e - 1) * -(-self.n // t.n) * -(-self.k // t.k)
        tiles = self.count * tiles_of(self.k, t.k, mxu) * tiles_of(self.n, t.n, mxu)
        rows = executed_rows(t.m, self.m, self.e, self.info, contracted)
        return seconds(self.info, moved_bytes, rows, tiles, steps)


def _best(
    s: ProductSizes,
    vmem_bytes: Callable[[Tiling, ProductSizes], int],
    time: Callable[[Tiling, ProductSizes], tuple[float, int]],
) -> Tiling:
    """The block sizes that fit and take least time, of fewer bytes and wider where equal."""
    base = block_rows(s.m, s.e, s.itemsize)
    return best(
        (
            Tiling(rows, k, n)
            for rows in heights(base, s.m, TALLEST)
            for n in shared_splits(s.n, s.info)
            for k in splits(s.k)
        ),
        lambda t: vmem_bytes(t, s),
        lambda t: (*time(t, s), -t.n),
        s.info,
        Tiling(base, min(s.k, LANES), min(s.n, LANES)),
    )


def gmm_vmem_bytes(t: Tiling, s: ProductSizes) -> int:
    """VMEM that gmm takes with these blocks: three streams twice, and the sum if depth is cut."""
    rhs = t.k * t.n * (s.rhs_itemsize or s.itemsize)
    streams = s.count * (t.m * t.k * s.itemsize + rhs) + t.m * t.n * s.out_itemsize
    return 2 * streams + (0 if t.k >= s.k else t.m * t.n * 4)


def gmm_bytes(t: Tiling, s: ProductSizes) -> int:
    """HBM bytes that gmm moves: rows once a column block, matrices once a group unless k is cut."""
    visits = -(-s.m // t.m) + s.e - 1
    rhs_reads = s.e if t.k >= s.k else visits
    lhs_reads = -(-s.n // t.n) * (1 if t.k >= s.k else visits * t.m / s.m)
    rhs = rhs_reads * s.k * s.n * (s.rhs_itemsize or s.itemsize)
    return s.count * int(lhs_reads * s.m * s.k * s.itemsize + rhs) + s.m * s.n * s.out_itemsize


def gmm_seconds(t: Tiling, s: ProductSizes) -> tuple[float, int]:
    """Estimated time of gmm with these blocks, and the bytes that it moves."""
    moved = gmm_bytes(t, s)
    return s.seconds(t, moved), moved


@functools.cache
def gmm_tiling(s: ProductSizes) -> Tiling:
    """Block sizes for gmm."""
    return _best(s, gmm_vmem_bytes, gmm_seconds)


def tgmm_vmem_bytes(t: Tiling, s: ProductSizes) -> int:
    """VMEM that tgmm takes with these blocks: three streams twice, and the sums."""
    streams = t.m * (t.k + s.count * t.n) * s.itemsize + s.count * t.k * t.n * s.out_itemsize
    return 2 * streams + s.count * t.k * t.n * 4


def tgmm_bytes(t: Tiling, s: ProductSizes) -> int:
    """HBM bytes that tgmm moves: lhs once a column block, grads a depth block, results once."""
    lhs, grads = -(-s.n // t.n) * s.m * s.k, s.count * -(-s.k // t.k) * s.m * s.n
    return (lhs + grads) * s.itemsize + s.count * s.e * s.k * s.n * s.out_itemsize


def tgmm_seconds(t: Tiling, s: ProductSizes) -> tuple[float, int]:
    """Estimated time of tgmm with these blocks, and the bytes that it moves."""
    moved = tgmm_bytes(t, s)
    return s.seconds(t, moved, contracted=True), moved


@functools.cache
def tgmm_tiling(s: ProductSizes) -> Tiling:
    """Block sizes for tgmm."""
    return _best(s, tgmm_vmem_bytes, tgmm_seconds)
