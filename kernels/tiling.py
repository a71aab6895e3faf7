"""Block sizes by one rule: of the candidates that fit in VMEM, the one that takes least time.

What fits is counted with double buffering of every block that is streamed. Time is estimated: the
larger of bytes at the HBM's rate and products at the MXU's, whose pieces are as wide as it is
whatever they hold, and a cost a grid step. Rows that straddle groups are multiplied for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.group_visits import FFN_PART, SHORTEST_PART, part_sizes
from taskmoe.kernels.platforms import chip, interpreting_a_batch

#: Lanes of a vector register: the unit of a block's last dimension on every TPU.
LANES = 128
#: Hidden units that expert_ffn works on at a time.
HIDDEN_CHUNK = 512
#: Most rows of a block that gmm and tgmm, and that expert_ffn, are tried with.
TALLEST, TALLEST_FFN = 2048, 1024
#: Seconds that a grid step takes beside its products: starting copies, waiting, predicates. About
#: 350 bundles in every kernel that was compiled.
STEP_SECONDS = 2e-7
#: Rows by which a visit's first part begins before its first row, on average.
ROUNDED_START = 8
#: Share of what the longer of copies and products hides that is seen all the same.
SEEN = 0.1
#: Most cycles of products in a block, which are written out: compiling more takes a minute.
LONGEST = 9 << 12


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Block sizes of one kernel call.

    m: rows a block; a multiple of 8 (f32) or 16 (bf16), or all rows
    k: depth a block, the contracted size; a multiple of 128 or all of it
    n: width a block; a multiple of 128 or all of it. In expert_ffn: hidden units a block
    """

    m: int
    k: int
    n: int


def vmem_budget_bytes(info: pltpu.TpuInfo) -> int:
    """VMEM that a kernel's blocks may take: the compiler needs some, of a small VMEM a quarter."""
    capacity = info.vmem_capacity_bytes
    return capacity * 7 // 8 if capacity > 32 << 20 else capacity * 3 // 4


def sublanes(itemsize: int) -> int:
    """Rows that one vector register holds: 8 of 4 bytes, 16 of 2."""
    return 32 // itemsize


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is at least x."""
    return -(-x // multiple) * multiple


def splits(size: int, parts: Iterable[int] = (1, 2, 3, 4, 6, 7, 8, 14, 16, 32, 64)) -> list[int]:
    """Block sizes that cut `size` into equal multiples of 128 where it is one, largest first.

    Other sizes are cut into about equal multiples, the last block overhanging.
    """
    sizes = {size, LANES} | {round_up(-(-size // part), LANES) for part in parts}
    even = size % LANES == 0
    return sorted((s for s in sizes if s <= size and not (even and size % s)), reverse=True)


def block_rows(num_rows: int, num_groups: int, itemsize: int, largest: int = 256) -> int:
    """Rows a block: the mean group, rounded up to a power of two, between one register and 256.

    Larger blocks make tiles that straddle groups dearer, smaller ones starve the MXU.
    """
    size = sublanes(itemsize)
    while size < min(-(-num_rows // num_groups), largest):
        size *= 2
    return min(size, round_up(num_rows, sublanes(itemsize)))


def shared_splits(size: int, info: pltpu.TpuInfo) -> list[int]:
    """`splits` of what the cores of a chip share: at least two blocks where there are two cores."""
    return [s for s in splits(size) if info.num_cores == 1 or s < size or size <= LANES]


def heights(base: int, num_rows: int, tallest: int) -> list[int]:
    """Block heights to try: `block_rows`, down to a quarter, and doubled up to what rows fill."""
    lower = [h for h in (base // 4, base // 2) if h >= SHORTEST_PART]
    upper = [base << i for i in range(1, 7) if base << i <= min(tallest, 2 * num_rows)]
    return [base, *lower, *upper]


def executed_rows(
    height: int, m: int, e: int, info: pltpu.TpuInfo, contracted: bool = False
) -> float:
    """Rows' worth of time where blocks of this height meet e about equal groups of m rows.

    Blocks that straddle groups are visited by each, and a visit's rows are rounded up to parts.
    contracted: whether products sum over rows, which then fill the MXU's depth.
    """
    least = info.mxu_column_size if contracted else SHORTEST_PART
    visits = -(-m // height) + e - 1
    if height % SHORTEST_PART:  # few rows are bound by the matrix, but not by it alone
        return visits * max(height, (least + height) / 2)
    ragged = min(visits, 2 * (e - 1))
    return max(m + ragged * (least / 2 + ROUNDED_START), visits * least)


def seconds(
    info: pltpu.TpuInfo, moved_bytes: float, rows: float, tiles: float, steps: float
) -> float:
    """Estimated time: the larger of bytes, and rows through MXU-sized tiles and grid steps.

    A little of the smaller counts too, so that of two that wait for HBM the shorter work is chosen.
    """
    size = info.mxu_column_size
    work = 2.0 * rows * tiles * size * size / info.bf16_ops_per_second + steps * STEP_SECONDS
    copies = moved_bytes / info.mem_bw_bytes_per_second
    return max(copies, work) + SEEN * min(copies, work)


def tiles_of(size: int, block: int, mxu: int) -> int:
    """MXU-sized pieces that cover an axis, cut into these blocks."""
    whole, rest = divmod(size, block)
    return whole * -(-block // mxu) + -(-rest // mxu)


def best(
    candidates: Iterable[Tiling],
    vmem_bytes: Callable[[Tiling], int],
    cost: Callable[[Tiling], Any],
    info: pltpu.TpuInfo,
    otherwise: Tiling,
    products: int = 0,
    longest: int = LONGEST,
    budget: int | None = None,
) -> Tiling:
    """The candidate that fits in VMEM and costs least; `otherwise` where none fits.

    products: of blocks [m, k] and [k, n] that one step writes out, if it does not loop. Of steps
    longer than `longest` only the shortest counts. budget: of VMEM, with the compiler's own.
    """
    budget = budget or vmem_budget_bytes(info)
    fits = [t for t in candidates if vmem_bytes(t) <= budget]
    lengths = [
        products * sum(part_sizes(t.m, FFN_PART)) * t.k * t.n / (4 * info.mxu_column_size**2)
        for t in fits
    ]
    limit = max(longest, min(lengths, default=0))
    fits = [t for t, length in zip(fits, lengths, strict=True) if length <= limit]
    return min(fits, key=cost, default=otherwise)


def compiler_params(
    semantics: Sequence[Literal["parallel", "arbitrary"]], vmem_bytes: int
) -> pltpu.CompilerParams:
    """How Mosaic may order the grid, and VMEM for the blocks and what the compiler itself needs.

    Copies are not checked against the bounds of arrays, which takes some 15 bundles each: tokens
    and visits are cut off where they are found, and the tests' interpreter raises beyond them.
    """
    capacity = chip().vmem_capacity_bytes
    limit = min(capacity, max(16 << 20, vmem_bytes + (vmem_bytes >> 2) + (4 << 20)))
    # A batch is one more axis of the grid, for which the interpreter wants an entry as well.
    known = None if interpreting_a_batch.get() else semantics
    return pltpu.CompilerParams(
        dimension_semantics=known, vmem_limit_bytes=limit, disable_bounds_checks=True
    )


def check_tiling(tiling: Tiling | None, k: int, n: int, itemsize: int) -> None:
    """TypeError or ValueError unless the tiling is one that Mosaic takes for these sizes."""
    if tiling is None:
        return
    if not isinstance(tiling, Tiling):
        raise TypeError(f"tiling must be a Tiling or None, got {type(tiling).__name__}")
    if tiling.m < 1 or tiling.m % sublanes(itemsize):
        raise ValueError(f"tiling.m must be a multiple of {sublanes(itemsize)}, got {tiling.m}")
    for name, block, size in (("k", tiling.k, k), ("n", tiling.n, n)):
        if block != size and (block < 1 or block % LANES or block > size):
            raise ValueError(
                f"tiling.{name} must be {size} (all of it) or a smaller multiple of {LANES}, "
                f"got {block}"
            )
