"""Block sizes of `exchange_ffn`, by the rule of `tiling`: what fits in VMEM and takes least time.

An expert whose matrices fit twice is read whole, once. One that does not is cut along its hidden
units, and its matrices are read once for every `held` blocks of its rows.
"""

from __future__ import annotations

import dataclasses
import functools

from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import tiling as tilings
from taskmoe.kernels.group_visits import SHORTEST_PART
from taskmoe.kernels.tiling import LANES, round_up, sublanes

#: Blocks of rows that may be held, and most rows in them.
HELD, MOST_HELD_ROWS = (1, 2, 3, 4, 6, 8, 16), 2048
#: An expert with more rows than the mean should not be read often: so many times the mean counts.
BUSY = 2
#: Rows travel between devices this much slower than HBM is read: links of v5e to tpu7x all have
#: about an eighth of its rate where eight devices exchange.
LINK_SHARE = 8
#: A height other than the tallest must be so much faster: estimates are no finer.
MARGIN = 1.05
#: Most cycles of products in a block, which are written out: compiling more takes a minute.
LONGEST = 3 << 13


@dataclasses.dataclass(frozen=True)
class ExchangeTiling:
    """Block sizes of one call.

    rows: of a block, of one expert; a power of two of 8 (f32) or 16 (bf16) or more
    held: blocks of rows in VMEM that meet a block of matrices before the next is read; counts
      nothing where matrices are whole
    hidden: units of a block of matrices: all, or a smaller multiple of 128
    """

    rows: int
    held: int
    hidden: int

    def cuts(self, f: int) -> int:
        """Blocks that an expert of f hidden units is read in."""
        return -(-f // self.hidden)

    def span(self, f: int) -> int | None:
        """Blocks of rows that read an expert once; None where all of them do."""
        return self.held if self.cuts(f) > 1 else None


def row_bytes(d: int, itemsize: int) -> int:
    """Bytes of a row as it travels: whole registers of 32-bit words."""
    return round_up(d, 4 // itemsize * LANES) * itemsize


def vmem_bytes(t: ExchangeTiling, d: int, f: int, matrices: int, itemsize: int) -> int:
    """VMEM of the kernel.

    Two buffers each of matrices, of rows and of results; values and sums, in f32, of the blocks
    that are held; hidden units of one; a block of zeros.
    """
    wide, words = round_up(d, sublanes(itemsize)), row_bytes(d, itemsize)
    hidden, held = round_up(t.hidden, LANES) * itemsize, t.span(f) or 1
    weights = 2 * matrices * wide * hidden
    sums = words * 4 // itemsize
    return weights + t.rows * (4 * words + held * (words + sums) + hidden) + LANES * words


def moved_bytes(
    t: ExchangeTiling, sizes: list[int], d: int, f: int, matrices: int, itemsize: int
) -> int:
    """HBM bytes of one device whose experts get so many rows, and which sends as many.

    A row is read to be sent, written and read by its expert; so is its result. Matrices are read
    once for every `span` of blocks.
    """
    span = t.span(f)
    blocks = [-(-size // t.rows) for size in sizes]
    visits = sum(-(-b // span) if span else min(b, 1) for b in blocks)
    return visits * matrices * d * f * itemsize + 6 * sum(sizes) * row_bytes(d, itemsize)


def tallest(m: int, own: int, itemsize: int) -> int:
    """Most rows of a block: as in gmm, and a power of two where all rows are fewer than that."""
    return 1 << (tilings.block_rows(m, own, itemsize) - 1).bit_length()


def candidates(m: int, own: int, f: int, itemsize: int) -> list[ExchangeTiling]:
    """Blocks to try: the tallest or smaller, held ones, matrices whole or cut."""
    rows = tallest(m, own, itemsize)
    found = []
    while rows >= sublanes(itemsize):
        for held in HELD:
            if held == 1 or held * rows <= MOST_HELD_ROWS:
                widths = tilings.splits(f)[held > 1 :]  # all rows meet whole matrices
                found += [ExchangeTiling(rows, held, hidden) for hidden in widths]
        rows //= 2
    return found


@functools.cache
def exchange_tiling(
    m: int, d: int, f: int, own: int, matrices: int, itemsize: int, info: pltpu.TpuInfo
) -> ExchangeTiling | None:
    """Blocks for m rows that come to `own` experts of `matrices` [d, f]; None where none fit.

    The larger of bytes and products decides, and the way home of the last rows held, which nothing
    hides. So matrices stay whole where they fit, unless a block's products were too many to write
    out.
    """
    mxu, budget = info.mxu_column_size, tilings.vmem_budget_bytes(info)
    base, mean = tallest(m, own, itemsize), -(-m // own)

    def fits(t: ExchangeTiling) -> bool:
        return vmem_bytes(t, d, f, matrices, itemsize) <= budget

    def cost(t: ExchangeTiling) -> tuple[float, ...]:
        blocks = mean / t.rows + 0.5  # the last one is half full, if sizes are random
        work = own * blocks * max(t.rows, SHORTEST_PART)
        busy = [BUSY * mean] * own
        moved = moved_bytes(t, busy, d, f, matrices, itemsize)
        moved -= 6 * own * mean * (BUSY - 1) * row_bytes(d, itemsize)
        tiles = matrices * tilings.tiles_of(d, d, mxu) * tilings.tiles_of(f, t.hidden, mxu)
        time = tilings.seconds(info, moved, work, tiles, own * blocks * t.cuts(f))
        last = min(t.held, blocks) * t.rows * row_bytes(d, itemsize)
        time += last * LINK_SHARE / info.mem_bw_bytes_per_second
        return time * (1 if t.rows == base else MARGIN), moved, -t.hidden

    found = [t for t in candidates(m, own, f, itemsize) if fits(t)]
    lengths = [matrices * t.rows * d * t.hidden / (4 * mxu**2) for t in found]
    limit = max(LONGEST, min(lengths, default=0))
    found = [t for t, length in zip(found, lengths, strict=True) if length <= limit]
    return min(found, key=cost, default=None)


def check_tiling(t: ExchangeTiling | None, f: int, itemsize: int) -> None:
    """TypeError or ValueError unless the tiling is one that Mosaic takes for these sizes."""
    if t is None:
        return
    if not isinstance(t, ExchangeTiling):
        raise TypeError(f"tiling must be an ExchangeTiling or None, got {type(t).__name__}")
    for name, value in dataclasses.asdict(t).items():
        if not isinstance(value, int):
            raise TypeError(f"tiling.{name} must be an int, got {value!r}")
    if t.rows < sublanes(itemsize) or t.rows & (t.rows - 1):
        raise ValueError(
            f"tiling.rows must be a power of two of at least {sublanes(itemsize)}, got {t.rows}"
        )
    if t.held < 1:
        raise ValueError(f"tiling.held must be at least 1, got {t.held}")
    if t.hidden != f and (t.hidden < 1 or t.hidden % LANES or t.hidden > f):
        raise ValueError(
            f"tiling.hidden must be {f} (all) or a smaller multiple of {LANES}, got {t.hidden}"
        )
