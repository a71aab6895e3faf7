"""How long a grouped kernel runs: bundles of its schedule's regions, times how often each runs.

A grid step makes a visit (see `taskmoe.kernels.group_visits`). Its schedule falls into what runs at
every step, the parts in which the visit works on its rows, and what runs once a result: setting
sums to zero, writing them out. The tallest parts are in a loop, those of each smaller size have a
region of their own, and each may have a loop inside. The compiler marks them: a conditional branch
skips to the label that ends the region, and loops are marked by their depth.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_TARGET = re.compile(r"^\s*\w+\s+[A-Z]{2}\s*:")
#: Skipped regions without products that are shorter start and await copies: part of every step.
SHORT = 32


@dataclasses.dataclass(frozen=True)
class Bundles:
    """Bundles of one run of each region.

    step: at every grid step. result: once a block of results. parts: of each size of what a visit
    works on at a time. inner: of them, what lies in a loop inside; 0 where there is none
    """

    step: int
    result: int
    parts: list[int]
    inner: list[int]

    def run(self, trips: Trips) -> int:
        """Bundles that run in so many trips."""
        regions = zip(trips.parts, trips.passes, self.parts, self.inner, strict=True)
        parts = sum(trip * (own + passes * inner) for trip, passes, own, inner in regions)
        return trips.step * self.step + trips.result * self.result + parts


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often each region runs, over the whole grid; fields as in `Bundles`.

    passes: of the loop inside each part
    """

    step: int
    result: int
    parts: list[int]
    passes: list[int]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle: its text, how deep in loops it lies, and MXU slots that it fills."""

    text: str
    depth: int
    mxu: int


def find(schedule: Sequence[Bundle]) -> Bundles | None:
    """The regions of a kernel; None where it multiplies in none, so is not of this kind.

    One that does not work on parts has all its products in one. Of regions that lie side by side in
    one path (a first, a middle and a last block of depth) one runs, of those with products and of
    those without: the longest counts.
    """

    def multiplies(region: range) -> bool:
        return any(schedule[i].mxu for i in region)

    skips = skips_of(schedule)
    all_products = sum(bundle.mxu for bundle in schedule)

    def is_all_of_a_step(region: range) -> bool:
        """Has all products, and regions with some that begin outside of the loop over parts."""
        inside = (r for r in skips if is_inside(r, region) and multiplies(r))
        return sum(schedule[i].mxu for i in region) == all_products and any(
            schedule[r.start - 1].depth == 1 for r in inside
        )

    skips = [r for r in skips if not is_all_of_a_step(r)]
    top = [r for r in skips if not any(is_inside(r, other) for other in skips)]
    found: list[list[int]] = []
    whole = result = skipped = 0
    for region in top:
        if multiplies(region):
            depths = [schedule[i].depth for i in _path(region, skips, multiplies)]
            whole += len(depths)
            own = 1 if found else 2  # the first part is worked on in a loop, others at most once
            found.append([depths.count(own), sum(depth > own for depth in depths)])
        elif len(region) >= SHORT:
            result += len(region)
        else:
            continue
        skipped += len(region)
    step = sum(b.depth > 0 for b in schedule) - skipped
    parts, inner = ([part[i] for part in found] for i in (0, 1))
    if found and not parts[0]:
        return Bundles(step, result, [whole], [0])
    return Bundles(step, result, parts, inner) if found else None


def skips_of(schedule: Sequence[Bundle]) -> list[range]:
    """Regions inside loops that a conditional branch skips."""
    labels = {n: i for i, b in enumerate(schedule) for n in _LABEL.findall(b.text)}
    found = []
    for start, bundle in enumerate(schedule):
        for label in _BRANCH.findall(bundle.text):
            region = range(start + 1, labels.get(label, 0))
            if bundle.depth and region:
                found.append(region)
    return found


def loops_of(schedule: Sequence[Bundle]) -> list[range]:
    """Every loop: from the label that a branch goes back to, to the next control target behind."""
    labels = {n: i for i, b in enumerate(schedule) for n in _LABEL.findall(b.text)}
    found = []
    for back, bundle in enumerate(schedule):
        for label in _BRANCH.findall(bundle.text):
            if labels.get(label, back) < back:
                behind = range(back + 1, len(schedule))
                end = next((i for i in behind if _TARGET.match(schedule[i].text)), len(schedule))
                found.append(range(labels[label], end))
    return sorted(found, key=lambda loop: loop.start)


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
    return Bundles(0, end - first - len(main), [len(main)], [0])


def of_steps(schedule: Sequence[Bundle]) -> Bundles | None:
    """The regions of a kernel that works on no parts: all that lies in the loop over the grid.

    parts: one run of its longest inner loop. result: one of each other one. Of a kernel that has
    products, result is what branches skip at all steps but the first or the last.
    None where a kernel has inner loops of inner loops, of which nothing says how often they run.
    """
    depths = [bundle.depth for bundle in schedule]
    deepest = max(depths, default=0)
    if any(bundle.mxu for bundle in schedule):
        rare = {i for region in skips_of(schedule) if len(region) >= SHORT for i in region}
        every = sum(depth > 0 for depth in depths) - len(rare)
        return Bundles(every, len(rare), [0], [0]) if deepest == 1 else None
    if deepest > 2:
        return None
    runs = [len([*run]) for deep, run in itertools.groupby(depths, lambda d: d > 1) if deep]
    longest = max(runs, default=0)
    return Bundles(depths.count(1), sum(runs) - longest, [longest], [0])


def of_scalars(schedule: Sequence[Bundle]) -> Bundles:
    """The regions of the kernel that finds the visits.

    step: what lies in no loop, and loops that seldom run, once; all, where no loop has another
    inside. result: a group. parts: a visit.
    """
    inner = [i for i, bundle in enumerate(schedule) if bundle.depth > 1]
    if not inner:
        return Bundles(len(schedule), 0, [0], [0])
    first, end = inner[0] - 1, inner[-1] + 1
    while " LB:" not in schedule[first].text:
        first -= 1
    while schedule[end].depth > 0:
        end += 1
    return Bundles(len(schedule) - (end - first), end - first - len(inner), [len(inner)], [0])


def is_inside(inner: range, outer: range) -> bool:
    """Whether a stretch of the schedule lies in another, and is not all of it."""
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def _path(region: range, skips: Sequence[range], multiplies: Callable[[range], bool]) -> set[int]:
    """Bundles of a path: what all runs of it share, and the longest of each kind inside it."""
    inside = [r for r in skips if is_inside(r, region)]
    inside = [r for r in inside if not any(is_inside(r, other) for other in inside)]
    path = set(region).difference(*inside)
    for kind in (True, False):
        paths = (_path(r, skips, multiplies) for r in inside if multiplies(r) == kind)
        path |= max(paths, key=len, default=set())
    return path
