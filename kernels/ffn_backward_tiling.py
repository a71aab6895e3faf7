"""How expert_ffn's backward runs: in one kernel or in several, and with which block sizes.

One kernel, `ffn_backward_kernel`, reads and writes least, but wants the gradients' f32 sums in VMEM
beside the matrices. Where VMEM is small for that, or the MXU so fast that many short sweeps cost
more than bytes, products in kernels of their own are faster, see `hidden_gradients_kernel`. Both
times are estimated as `tiling` has it.
"""

from __future__ import annotations

import functools
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels.group_visits import FFN_PART
from taskmoe.kernels.tiling import (
    LANES,
    LONGEST,
    TALLEST,
    Tiling,
    best,
    block_rows,
    executed_rows,
    gmm_seconds,
    gmm_tiling,
    heights,
    seconds,
    shared_splits,
    sublanes,
    tgmm_seconds,
    tgmm_tiling,
    tiles_of,
)

#: Share of the time that is given for memory: several kernels hold h, du and ds, [M, F] each, and
#: parts of dx. They must be faster by this where that is as much as the experts take.
WORTH_OF_MEMORY = 0.2
#: Hidden units of a piece whose products and gradients lie side by side in VMEM.
HIDDEN_PIECE = 256


def ffn_backward_vmem_bytes(
    t: Tiling, f: int, matrices: int, itemsize: int, info: pltpu.TpuInfo
) -> int:
    """VMEM of the backward of f hidden units: buffers, f32 sums, and what the compiler spills.

    Buffered: rows, dy, dx (with cut hidden units its sums or a part), matrices and theirs. Spilled
    at most, as compiled: dx, three values a matrix's hidden unit, on narrow MXUs a gradient.
    """
    dx = itemsize if t.n >= f else itemsize + 8 if info.num_cores == 1 else 4
    buffers = 2 * t.k * (t.m * (2 * itemsize + dx) + 2 * matrices * t.n * itemsize)
    sums = matrices + (info.mxu_column_size == LANES)
    spilled = min(t.m, FFN_PART) * (4 * t.k + 13 * matrices * t.n)
    return buffers + 4 * sums * t.k * t.n + spilled


def ffn_backward_bytes(t: Tiling, m: int, f: int, e: int, matrices: int, itemsize: int) -> int:
    """HBM bytes of the backward: rows once a hidden block, matrices read and written once.

    Each hidden block but the last writes dx in f32, and the next reads it.
    """
    cuts = -(-f // t.n)
    d_rows = m * t.k * (itemsize + 8 * (cuts - 1))
    return cuts * 2 * m * t.k * itemsize + d_rows + 2 * e * matrices * t.k * f * itemsize


def ffn_backward_seconds(
    t: Tiling, m: int, d: int, f: int, e: int, matrices: int, itemsize: int, info: pltpu.TpuInfo
) -> tuple[float, int]:
    """Estimated time of the backward in one kernel, and the bytes that it moves."""
    mxu = info.mxu_column_size
    moved = ffn_backward_bytes(t, m, f, e, matrices, itemsize)
    sweeps = -(-f // t.n)
    steps = (-(-m // t.m) + e - 1) * sweeps
    rows = executed_rows(t.m, m, e, info)
    summed = executed_rows(t.m, m, e, info, contracted=True)
    # A sweep masks its rows and adds to dx, which takes as long as some more hidden units.
    tiles = tiles_of(d, d, mxu) * (tiles_of(f, t.n, mxu) + sweeps * mxu / 512)
    # A matrix enters a wide MXU in the time of more rows than the shortest part has.
    work = matrices * summed + (2 * matrices - 1) * (rows + summed) / 2
    return seconds(info, moved, work, tiles, steps), moved


@functools.cache
def ffn_backward_tiling(
    m: int, d: int, f: int, e: int, matrices: int, itemsize: int, info: pltpu.TpuInfo
) -> Tiling:
    """Block sizes for the backward of expert_ffn in one kernel."""
    base, sizes = block_rows(m, e, itemsize), (m, d, f, e, matrices, itemsize, info)
    return best(
        (Tiling(h, d, n) for h in heights(base, m, TALLEST) for n in shared_splits(f, info)),
        lambda t: ffn_backward_vmem_bytes(t, f, matrices, itemsize, info),
        lambda t: (*ffn_backward_seconds(t, *sizes), t.m),
        info,
        Tiling(sublanes(itemsize), d, min(f, LANES)),
        3 * matrices - 1,
        2 * LONGEST,  # a sweep over the rows that is saved is worth the compiler's time
        info.vmem_capacity_bytes * 31 // 32,
    )


def hidden_gradients_vmem_bytes(
    t: Tiling, f: int, matrices: int, itemsize: int, with_dx: bool
) -> int:
    """VMEM of `hidden_gradients`: rows, dy, matrices and results twice, and a piece in f32."""
    dx = 0 if not with_dx else itemsize if t.n >= f else 4
    streams = t.m * t.k * (2 * itemsize + dx) + matrices * t.n * (t.k + t.m) * itemsize
    whole = t.n % LANES > 0  # such a block is one piece
    piece = min(t.m, FFN_PART) * (t.n if whole else min(t.n, HIDDEN_PIECE))
    return 2 * streams + 4 * (2 * matrices + 2) * piece


def split_seconds(
    t: Tiling,
    m: int,
    d: int,
    f: int,
    e: int,
    matrices: int,
    itemsize: int,
    info: pltpu.TpuInfo,
    with_dx: bool,
) -> tuple[float, int]:
    """Estimated time of the backward in several kernels, and the bytes that they move.

    t, with_dx: of `hidden_gradients`.
    """
    mxu, sweeps, pairs = info.mxu_column_size, -(-f // t.n), matrices - 1
    moved = (sweeps * 2 * m * d + matrices * f * (e * d + m)) * itemsize
    products = matrices + pairs if with_dx else matrices
    tiles = products * tiles_of(d, d, mxu) * tiles_of(f, t.n, mxu)
    if not with_dx:
        back = m, f, d, e, itemsize, itemsize, info
        found = [gmm_seconds(gmm_tiling(*back, None, pairs), *back, None, pairs)]
    elif sweeps == 1:
        moved += m * d * itemsize
        found = []
    else:
        moved += m * d * 4 * sweeps
        summed = m * d * (4 * sweeps + itemsize)  # by XLA
        found = [(summed / info.mem_bw_bytes_per_second, summed)]
    steps = (-(-m // t.m) + e - 1) * sweeps
    found.append((seconds(info, moved, executed_rows(t.m, m, e, info), tiles, steps), moved))
    for k, n, grads in ((d, f, pairs), (f, d, 1)):
        product = m, k, n, e, itemsize, itemsize, info, grads
        found.append(tgmm_seconds(tgmm_tiling(*product), *product))
    return sum(time for time, _ in found), sum(moved for _, moved in found)


@functools.cache
def hidden_gradients_tiling(
    m: int, d: int, f: int, e: int, matrices: int, itemsize: int, info: pltpu.TpuInfo
) -> tuple[Tiling, bool]:
    """Block sizes for `hidden_gradients`, and whether it finds dx too."""
    base, sizes = block_rows(m, e, itemsize), (m, d, f, e, matrices, itemsize, info)
    mxu = info.mxu_column_size

    def chosen(with_dx: bool) -> Tiling:
        def cost(t: Tiling) -> tuple[Any, ...]:
            # Blocks that leave a wide MXU half empty take longer than is estimated: the last
            # choice.
            return t.n < min(f, mxu), *split_seconds(t, *sizes, with_dx), t.m

        return best(
            (Tiling(h, d, n) for h in heights(base, m, TALLEST) for n in shared_splits(f, info)),
            lambda t: hidden_gradients_vmem_bytes(t, f, matrices, itemsize, with_dx),
            cost,
            info,
            Tiling(sublanes(itemsize), d, min(f, LANES)),
        )

    def time(choice: tuple[Tiling, bool]) -> float:
        return split_seconds(choice[0], *sizes, choice[1])[0]

    return min(((chosen(with_dx), with_dx) for with_dx in (True, False)), key=time)


@functools.cache
def is_split(
    m: int, d: int, f: int, e: int, matrices: int, itemsize: int, info: pltpu.TpuInfo
) -> bool:
    """Whether the backward of expert_ffn runs in several kernels."""
    sizes = m, d, f, e, matrices, itemsize, info
    whole, _ = ffn_backward_seconds(ffn_backward_tiling(*sizes), *sizes)
    t, with_dx = hidden_gradients_tiling(*sizes)
    apart, _ = split_seconds(t, *sizes, with_dx)
    parts = -(-f // t.n) if with_dx else 0
    kept = matrices * m * f * itemsize + (4 * parts * m * d if parts > 1 else 0)
    memory = kept / (matrices * e * d * f * itemsize)  # over that of the experts
    return apart < whole * (1 - WORTH_OF_MEMORY * memory)
