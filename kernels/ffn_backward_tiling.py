"""How expert_ffn's backward runs: in one kernel or in several, and with which block sizes.

One kernel, `ffn_backward_kernel`, reads and writes least, but wants the gradients' f32 sums in VMEM
beside the matrices. Where VMEM is small for that, or the MXU so fast that many short sweeps cost
more than bytes, products in kernels of their own are faster, see `hidden_gradients_kernel`. Both
times are estimated as `tiling` has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from taskmoe.kernels.ffn_tiling import FFNSizes
from taskmoe.kernels.group_visits import FFN_PART
from taskmoe.kernels.product_tiling import (
    ProductSizes,
    gmm_seconds,
    gmm_tiling,
    tgmm_seconds,
    tgmm_tiling,
)
from taskmoe.kernels.tiling import (
    LANES,
    LONGEST,
    TALLEST,
    Tiling,
    best,
    block_rows,
    executed_rows,
    heights,
    seconds,
    shared_splits,
    sublanes,
    tiles_of,
)

#: Share of the time that is given for memory: several kernels hold h, du and ds, [M, F] each, and
#: parts of dx. They must be faster by this where that is as much as the experts take.
WORTH_OF_MEMORY = 0.2
#: Hidden units of a piece whose products and gradients lie side by side in VMEM.
HIDDEN_PIECE = 256


def ffn_backward_vmem_bytes(t: Tiling, s: FFNSizes) -> int:
    """VMEM of the backward: buffers, f32 sums, and what the compiler spills.

    Buffered: rows, dy, dx (with cut hidden units its sums or a part), matrices and theirs. Spilled
    at most, as compiled: dx, three values a matrix's hidden unit, on narrow MXUs a gradient.
    """
    dx = s.itemsize if t.n >= s.f else s.itemsize + 8 if s.info.num_cores == 1 else 4
    buffers = 2 * t.k * (t.m * (2 * s.itemsize + dx) + 2 * s.matrices * t.n * s.itemsize)
    sums = s.matrices + (s.info.mxu_column_size == LANES)
    spilled = min(t.m, FFN_PART) * (4 * t.k + 13 * s.matrices * t.n)
    return buffers + 4 * sums * t.k * t.n + spilled


def ffn_backward_bytes(t: Tiling, s: FFNSizes) -> int:
    """HBM bytes of the backward: rows once a hidden block, matrices read and written once.

    Each hidden block but the last writes dx in f32, and the next reads it.
    """
    cuts = -(-s.f // t.n)
    d_rows = s.m * t.k * (s.itemsize + 8 * (cuts - 1))
    weights = 2 * s.e * s.matrices * t.k * s.f * s.itemsize
    return cuts * 2 * s.m * t.k * s.itemsize + d_rows + weights


def ffn_backward_seconds(t: Tiling, s: FFNSizes) -> tuple[float, int]:
    """Estimated time of the backward in one kernel, and the bytes that it moves."""
    mxu = s.info.mxu_column_size
    moved = ffn_backward_bytes(t, s)
    sweeps = -(-s.f // t.n)
    steps = (-(-s.m // t.m) + s.e - 1) * sweeps
    rows = executed_rows(t.m, s.m, s.e, s.info)
    summed = executed_rows(t.m, s.m, s.e, s.info, contracted=True)
    # A sweep masks its rows and adds to dx, which takes as long as some more hidden units.
    tiles = tiles_of(s.d, s.d, mxu) * (tiles_of(s.f, t.n, mxu) + sweeps * mxu / 512)
    # A matrix enters a wide MXU in the time of more rows than the shortest part has.
    work = s.matrices * summed + (2 * s.matrices - 1) * (rows + summed) / 2
    return seconds(s.info, moved, work, tiles, steps), moved


def _candidates(s: FFNSizes) -> Iterator[Tiling]:
    """Block sizes to try."""
    for rows in heights(block_rows(s.m, s.e, s.itemsize), s.m, TALLEST):
        for f in shared_splits(s.f, s.info):
            yield Tiling(rows, s.d, f)


def _least(s: FFNSizes) -> Tiling:
    """Block sizes where none fits."""
    return Tiling(sublanes(s.itemsize), s.d, min(s.f, LANES))


@functools.cache
def ffn_backward_tiling(s: FFNSizes) -> Tiling:
    """Block sizes for the backward of expert_ffn in one kernel."""
    return best(
        _candidates(s),
        lambda t: ffn_backward_vmem_bytes(t, s),
        lambda t: (*ffn_backward_seconds(t, s), t.m),
        s.info,
        _least(s),
        3 * s.matrices - 1,
        2 * LONGEST,  # a sweep over the rows that is saved is worth the compiler's time
        s.info.vmem_capacity_bytes * 31 // 32,
    )


def hidden_gradients_vmem_bytes(t: Tiling, s: FFNSizes, with_dx: bool) -> int:
    """VMEM of `hidden_gradients`: rows, dy, matrices and results twice, and a piece in f32."""
    dx = 0 if not with_dx else s.itemsize if t.n >= s.f else 4
    streams = t.m * t.k * (2 * s.itemsize + dx) + s.matrices * t.n * (t.k + t.m) * s.itemsize
    whole = t.n % LANES > 0  # such a block is one piece
    piece = min(t.m, FFN_PART) * (t.n if whole else min(t.n, HIDDEN_PIECE))
    return 2 * streams + 4 * (2 * s.matrices + 2) * piece


def split_seconds(t: Tiling, s: FFNSizes, with_dx: bool) -> tuple[float, int]:
    """Estimated time of the backward in several kernels, and the bytes that they move.

    t, with_dx: of `hidden_gradients`.
    """
    mxu, sweeps, pairs = s.info.mxu_column_size, -(-s.f // t.n), s.matrices - 1

    def product(k: int, n: int, count: int) -> ProductSizes:
        return ProductSizes(s.m, k, n, s.e, s.itemsize, s.itemsize, s.info, count=count)

    moved = (sweeps * 2 * s.m * s.d + s.matrices * s.f * (s.e * s.d + s.m)) * s.itemsize
    products = s.matrices + pairs if with_dx else s.matrices
    tiles = products * tiles_of(s.d, s.d, mxu) * tiles_of(s.f, t.n, mxu)
    found = []
    if not with_dx:
        back = product(s.f, s.d, pairs)
        found.append(gmm_seconds(gmm_tiling(back), back))
    elif sweeps == 1:
        moved += s.m * s.d * s.itemsize
    else:
        moved += s.m * s.d * 4 * sweeps
        summed = s.m * s.d * (4 * sweeps + s.itemsize)  # by XLA
        found.append((summed / s.info.mem_bw_bytes_per_second, summed))
    steps = (-(-s.m // t.m) + s.e - 1) * sweeps
    rows = executed_rows(t.m, s.m, s.e, s.info)
    found.append((seconds(s.info, moved, rows, tiles, steps), moved))
    for gradients in (product(s.d, s.f, pairs), product(s.f, s.d, 1)):
        found.append(tgmm_seconds(tgmm_tiling(gradients), gradients))
    return sum(time for time, _ in found), sum(moved for _, moved in found)


@functools.cache
def hidden_gradients_tiling(s: FFNSizes) -> tuple[Tiling, bool]:
    """Block sizes for `hidden_gradients`, and whether it finds dx too."""

    def chosen(with_dx: bool) -> Tiling:
        def cost(t: Tiling) -> tuple[Any, ...]:
            # Blocks that leave a wide MXU half empty take longer than is estimated: the last
            # choice.
            return t.n < min(s.f, s.info.mxu_column_size), *split_seconds(t, s, with_dx), t.m

        def vmem_bytes(t: Tiling) -> int:
            return hidden_gradients_vmem_bytes(t, s, with_dx)

        return best(_candidates(s), vmem_bytes, cost, s.info, _least(s))

    def time(choice: tuple[Tiling, bool]) -> float:
        return split_seconds(choice[0], s, choice[1])[0]

    return min(((chosen(with_dx), with_dx) for with_dx in (True, False)), key=time)


@functools.cache
def is_split(s: FFNSizes) -> bool:
    """Whether the backward of expert_ffn runs in several kernels."""
    whole, _ = ffn_backward_seconds(ffn_backward_tiling(s), s)
    t, with_dx = hidden_gradients_tiling(s)
    apart, _ = split_seconds(t, s, with_dx)
    parts = -(-s.f // t.n) if with_dx else 0
    kept = s.matrices * s.m * s.f * s.itemsize + (4 * parts * s.m * s.d if parts > 1 else 0)
    memory = kept / (s.matrices * s.e * s.d * s.f * s.itemsize)  # over that of the experts
    return apart < whole * (1 - WORTH_OF_MEMORY * memory)
