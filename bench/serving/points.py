"""How fast a system decodes a batch, and where the time goes; in tables and charts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from taskmoe.bench.harness.view import Columns


@dataclasses.dataclass(frozen=True)
class Point:
    """A system's decoding of a batch: speed with its 10th and 90th percentile, and where it goes.

    seconds: of each round, a run. params_per_device, bytes_per_device: as `Served`. step_ms,
    transfer_share, waiting_share: by the profiler.
    """

    system: str
    batch: int
    tokens_per_s: float
    tokens_per_s_p10: float
    tokens_per_s_p90: float
    collectives: dict[str, int]
    step_ms: float
    transfer_share: float
    waiting_share: float
    params_per_device: int
    bytes_per_device: int = 0
    seconds: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """Share of the time in collectives."""
        return self.transfer_share + self.waiting_share


def fastest(points: Iterable[Point]) -> dict[str, Point]:
    """System -> its fastest point."""
    best: dict[str, Point] = {}
    for point in points:
        if point.system not in best or point.tokens_per_s > best[point.system].tokens_per_s:
            best[point.system] = point
    return best


#: Of a table of points.
SPEED: Columns[Point] = {
    "tokens/s": lambda p: f"{p.tokens_per_s:,.0f}",
    "p10 to p90": lambda p: f"{p.tokens_per_s_p10:,.0f} to {p.tokens_per_s_p90:,.0f}",
    "moving": lambda p: f"{p.transfer_share:.1%}",
    "waiting": lambda p: f"{p.waiting_share:.1%}",
    "collectives": lambda p: ", ".join(f"{n} {k}" for k, n in p.collectives.items()) or "0",
}


def speeds(axis: Any, points: Sequence[Point], colour: str, unit: float = 1, **band: Any) -> None:
    """Draw one system's tokens/s, in units, over batch: a line in its 10th to 90th percentile."""
    batches = [p.batch for p in points]
    middle = [p.tokens_per_s / unit for p in points]
    axis.plot(batches, middle, "o-", color=colour, label=points[0].system)
    low, high = ([getattr(p, f"tokens_per_s_p{q}") / unit for p in points] for q in (10, 90))
    axis.fill_between(batches, low, high, color=colour, alpha=0.15, **band)
