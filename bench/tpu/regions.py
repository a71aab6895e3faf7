"""How long a grouped kernel runs: bundles of its schedule's regions, times how often each runs.

A grid step makes a visit (see `taskmoe.kernels.group_visits`). Its schedule falls into what runs at
every step, the path of a block of rows that is all the visit's own, the loop over sub-blocks where
only a part of it is, and what runs once a result: setting sums to zero, writing them out. The
compiler marks them: a conditional branch skips to the label that ends the region, and loops are
marked by their depth.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
#: Skipped regions without products that are shorter start and await copies: part of every step.
SHORT = 32


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Bundles of one run of each region, 0 where there is none.

    step: at every grid step. whole: rows of a block that is the visit's own. part: one sub-block of
    rows where it is not. result: once a block of results.
    """

    step: int
    whole: int
    part: int
    result: int

    def run(self, trips: Trips) -> int:
        """Bundles that run in so many trips."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(trips), strict=True)
        return sum(bundles * trip for bundles, trip in pairs)


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often each region runs, over the whole grid; fields as in `Bundles`."""

    step: int
    whole: int
    part: int
    result: int


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle: its text, how deep in loops it lies, and MXU slots that it fills."""

    text: str
    depth: int
    mxu: int


def find(schedule: Sequence[Bundle]) -> Bundles | None:
    """The regions of a kernel; None where it has no path of whole blocks, so is not of this kind.

    Of regions that lie side by side in one path (a first, a middle and a last block of depth) one
    runs, of those with products and of those without: the longest counts.
    """

    def multiplies(region: range) -> bool:
        return any(schedule[i].mxu for i in region)

    labels = {n: i for i, b in enumerate(schedule) for n in _LABEL.findall(b.text)}
    skips = []
    for start, bundle in enumerate(schedule):
        for label in _BRANCH.findall(bundle.text):
            region = range(start + 1, labels.get(label, 0))
            depths = {schedule[i].depth for i in region if schedule[i].mxu}
            if bundle.depth and region and len(depths) < 2:  # more: what all of a step lies in
                skips.append(region)
    top = [r for r in skips if not any(_inside(r, other) for other in skips)]
    whole = part = result = skipped = 0
    for region in top:
        loop = [i for i in region if schedule[i].depth > 1]
        if loop and multiplies(region):
            part += _length(range(loop[0], loop[-1] + 1), skips, multiplies)
        elif multiplies(region):
            whole += _length(region, skips, multiplies)
        elif len(region) >= SHORT:
            result += len(region)
        else:
            continue
        skipped += len(region)
    step = sum(b.depth > 0 for b in schedule) - skipped
    return Bundles(step, whole, part, result) if whole else None


def of_loop(schedule: Sequence[Bundle], main: range) -> Bundles:
    """The regions of a kernel that walks blocks in a loop of its own around its main run.

    All else in that loop counts as run once a block: what prepares it, a last, shorter block of
    matrices, what writes its results, and all ways to copy pieces, of which a block takes few: at
    most as long as that. Bundles at no depth say nothing, and stand between others.
    """
    depth = schedule[main.start].depth

    def outside(i: int) -> bool:
        return 0 < schedule[i].depth < depth

    first = max((i + 1 for i in range(main.start) if outside(i)), default=0)
    end = min((i for i in range(main.stop, len(schedule)) if outside(i)), default=len(schedule))
    return Bundles(0, len(main), 0, end - first - len(main))


def of_steps(schedule: Sequence[Bundle]) -> Bundles | None:
    """The regions of a kernel that multiplies nothing: all that lies in the loop over the grid.

    part: one run of its longest inner loop. result: one of each other one.
    None where a kernel has inner loops of inner loops, of which nothing says how often they run.
    """
    depths = [bundle.depth for bundle in schedule]
    if max(depths, default=0) > 2 or any(bundle.mxu for bundle in schedule):
        return None
    runs = [len([*run]) for deep, run in itertools.groupby(depths, lambda d: d > 1) if deep]
    longest = max(runs, default=0)
    return Bundles(depths.count(1), 0, longest, sum(runs) - longest)


def of_scalars(schedule: Sequence[Bundle]) -> Bundles:
    """The regions of the kernel that finds the visits.

    step: what lies in no loop, and loops that seldom run, once. whole: a group's, part: a visit's.
    """
    inner = [i for i, bundle in enumerate(schedule) if bundle.depth > 1]
    first, end = inner[0] - 1, inner[-1] + 1
    while " LB:" not in schedule[first].text:
        first -= 1
    while schedule[end].depth > 0:
        end += 1
    return Bundles(len(schedule) - (end - first), end - first - len(inner), len(inner), 0)


def _inside(inner: range, outer: range) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def _length(region: range, skips: Sequence[range], multiplies: Callable[[range], bool]) -> int:
    """Bundles of a path: what all runs of it share, and the longest of each kind inside it."""
    inside = [r for r in skips if _inside(r, region)]
    inside = [r for r in inside if not any(_inside(r, other) for other in inside)]
    shared = len(region) - sum(map(len, inside))
    kinds = [[len(r) for r in inside if multiplies(r) == kind] for kind in (True, False)]
    return shared + sum(max(kind, default=0) for kind in kinds)
