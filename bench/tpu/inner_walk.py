"""How long tokamax's grouped kernels run, which walk their blocks themselves: by their schedule.

These kernels (its `gmm_v2` and `tgmm_v2`) have no grid. They note where each group's blocks of rows
begin, then pass over width, blocks and depth in a loop of their own. A block begins at its group's
first row, cut down to a register's height; a branch takes the product of the fewest rows, a
multiple of a bucket's, that reach to its last row. So the schedule says how long each bucket's
product is, and group sizes say how many blocks take which.

Their names hold the sizes and the tiling. Products follow one another in the schedule from the
largest bucket to the smallest, and of a bucket of tgmm by `_CLASSES`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from taskmoe.bench.tpu.regions import Bundle, is_inside, loops_of, skips_of

_NAME = re.compile(
    r"(?P<op>t?gmm)_v2-g_(?P<groups>\d+)-m_(?P<m>\d+)-k_(?P<k>\d+)-act_None-n_(?P<n>\d+)"
    r"-tm_(?P<tile_m>\d+)-tk_(?P<tile_k>\d+)-tn_(?P<tile_n>\d+)"
)
#: A block of tgmm: whether it is its group's first, and whether its last.
_CLASSES = [(True, True), (True, False), (False, True), (False, False)]


@dataclasses.dataclass(frozen=True)
class WalkBundles:
    """Bundles of each part of such a kernel.

    once: outside of loops. group, visit: noting a group, one of its blocks. step: at each step of
    the loop that multiplies, without products. products: of each branch, in the schedule's order
    """

    once: int
    group: int
    visit: int
    step: int
    products: list[int]


def is_walked(kernel: str) -> bool:
    """Whether the kernel of this name is one of them."""
    return _NAME.fullmatch(kernel) is not None


def find(schedule: Sequence[Bundle]) -> WalkBundles:
    """The parts of one of these kernels.

    Loops before the one that notes blocks run once a group: they zero what groups without rows
    have. Those between it and the one that multiplies zero rows of no group, and have none to zero.
    """
    loops = loops_of(schedule)
    *before, main = [loop for loop in loops if not any(is_inside(loop, other) for other in loops)]
    inner = [sum(len(deep) for deep in loops if is_inside(deep, loop)) for loop in before]
    notes = next(i for i, count in enumerate(inner) if count)
    products = _products(schedule, main)
    return WalkBundles(
        once=len(schedule) - sum(map(len, [*before, main])),
        group=sum(len(loop) for loop in before[: notes + 1]) - inner[notes],
        visit=inner[notes],
        step=len(main) - sum(map(len, products)),
        products=[len(region) for region in products],
    )


def _products(schedule: Sequence[Bundle], main: range) -> list[range]:
    """Branches of the loop that multiply, those that lie around others left out."""
    skips = (r for r in skips_of(schedule) if is_inside(r, main))
    found = [r for r in skips if any(schedule[i].mxu for i in r)]
    return [r for r in found if not any(is_inside(other, r) for other in found)]


def run(kernel: str, bundles: WalkBundles, sizes: Sequence[int], sublanes: int) -> int:
    """Bundles that run for groups of these sizes; sublanes: rows of a register of the operands.

    Raises ValueError where the kernel cuts depth, or has another number of branches than it should.
    """
    match = _NAME.fullmatch(kernel)
    if match is None:
        raise ValueError(f"{kernel} does not walk in a way that is known")
    op, *numbers = match.groups()
    _, m, k, n, tile_m, tile_k, tile_n = map(int, numbers)
    classes = _CLASSES if op == "tgmm" else [(True, True)]
    buckets, rest = divmod(len(bundles.products), len(classes))
    if rest or tile_m % max(buckets, 1) or (op == "gmm" and tile_k < k):
        raise ValueError(f"{kernel} has {len(bundles.products)} products")
    width = -(-n // tile_n) * (-(-k // tile_k) if op == "tgmm" else 1)
    visits = list(_visits(sizes, tile_m, min(sublanes, m)))
    once = bundles.once + bundles.group * len(sizes) + bundles.visit * len(visits)
    total = once + width * bundles.step * len(visits)
    if not buckets:  # one bucket of gmm: no branch, the product is part of the step
        return total
    base = tile_m // buckets
    for rows, first, last in visits:
        reached = rows // base if op == "gmm" else (rows - 1) // base
        place = buckets - 1 - min(reached, buckets - 1)
        which = classes.index((first, last)) if op == "tgmm" else 0
        total += width * bundles.products[place * len(classes) + which]
    return total


def _visits(sizes: Sequence[int], rows: int, sublanes: int) -> Iterator[tuple[int, bool, bool]]:
    """Rows that each block reaches, whether it is its group's first, and whether its last."""
    start = 0
    for size in sizes:
        reach = start % sublanes + size if size else 0
        blocks = -(-reach // rows)
        for block in range(blocks):
            yield min(rows, reach - block * rows), block == 0, block == blocks - 1
        start += size
