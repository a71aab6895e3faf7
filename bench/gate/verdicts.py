"""When `check` calls a fact worse: facts of the compiler exactly, timings by an interval.

Facts are compared one by one; worse by more than `STATIC_LIMIT` fails, and so does a collective
that was not there. Those of a model are sums of floats: the same within `NOISE`.
Timings are ratios to a calibration workload that ran in turns with them. Those of one machine swing
and neighbours swing alike, so rounds lie in blocks of about a second, and the interval of their
median comes from resampling whole blocks. Only an interval that lies wholly above `TIMED_LIMIT`
fails; one that holds it asks for more rounds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

STATIC_LIMIT, TIMED_LIMIT = 0.02, 0.08
#: Share of a modelled fact, by how such facts end, that is no change: no digit of it is shown.
NOISE, MODELLED = 0.0005, "(modelled)"
#: Share of resampled medians that an interval holds.
CONFIDENCE = 0.99
RESAMPLES = 2000
#: Facts of which more is better; of all others less is.
MORE_IS_BETTER = ("MXU slots filled",)
TIMED_FACT = "time, in calibrations"
#: How facts of collectives begin; one that is missing counts as none.
COLLECTIVES = ("collectives: ", "collective bytes: ")

Facts = Mapping[str, Mapping[str, float | str]]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A median with the interval that holds it with probability `CONFIDENCE`."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Change:
    """One fact, old and new, of a subject such as "gmm forward v5e bf16 wmt".

    worse: share by which it got worse, negative where better; None where there is nothing to
    compare. verdict: "same", "better", "worse" (within the limit), "new", "gone", "undecided" or
    "REGRESSION". interval: of a timing, the share by which it takes longer.
    """

    subject: str
    fact: str
    old: float | str | None
    new: float | str | None
    worse: float | None
    verdict: str
    interval: Interval | None = None

    @property
    def fails(self) -> bool:
        """Whether the check must fail because of it."""
        return self.verdict == "REGRESSION"


def compare(old: Facts, new: Facts) -> list[Change]:
    """Every fact of either, in the new one's order, subjects that are gone last."""
    found = []
    for subject in dict.fromkeys([*new, *old]):
        before, after = old.get(subject), new.get(subject)
        if after is None:
            found.append(Change(subject, "", None, None, None, "gone"))
            continue
        for fact in dict.fromkeys([*after, *(before or {})]):
            was = None if before is None else before.get(fact)
            found.append(_judge(subject, fact, was, after.get(fact), before is None))
    return found


def _judge(
    subject: str, fact: str, old: float | str | None, new: float | str | None, unknown: bool
) -> Change:
    if fact.startswith(COLLECTIVES) and not unknown:
        old, new = old or 0, new or 0
    if isinstance(new, str):  # an error, in place of facts
        verdict = "same" if old == new else "REGRESSION"
        return Change(subject, fact, old, new, None, verdict)
    if old is None or new is None or isinstance(old, str):
        return Change(subject, fact, old, new, None, "new" if old is None else "gone")
    noise = NOISE * abs(old) if fact.endswith(MODELLED) else 0
    if old == new or abs(new - old) < noise:
        return Change(subject, fact, old, new, 0.0, "same")
    gain = old - new if fact in MORE_IS_BETTER else new - old
    worse = gain / abs(old) if old else math.copysign(math.inf, gain)
    verdict = "better" if worse < 0 else "worse" if worse <= STATIC_LIMIT else "REGRESSION"
    return Change(subject, fact, old, new, worse, verdict)


def interval(blocks: Sequence[np.ndarray]) -> Interval:
    """Median of all rounds, and its interval by resampling blocks with replacement.

    blocks: [n] of ratios, rounds that ran within about a second. Raises ValueError for fewer than
    two blocks, which tell nothing of their spread.
    """
    if len(blocks) < 2:
        raise ValueError(f"blocks must be at least 2, got {len(blocks)}")
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(blocks), (RESAMPLES, len(blocks)))
    medians = [np.median(np.concatenate([blocks[i] for i in pick])) for pick in picks]
    low, high = np.quantile(medians, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(np.median(np.concatenate(blocks))), float(low), float(high))


def slower(old: Interval, new: Interval) -> Interval:
    """Share by which new takes longer than old: both intervals' widths add up as independent."""
    change = math.log(new.median / old.median)
    above = math.hypot(math.log(new.high / new.median), math.log(old.median / old.low))
    below = math.hypot(math.log(new.median / new.low), math.log(old.high / old.median))
    return Interval(math.expm1(change), math.expm1(change - below), math.expm1(change + above))


def decided(change: Interval) -> bool:
    """Whether the interval lies wholly on one side of `TIMED_LIMIT`."""
    return change.low > TIMED_LIMIT or change.high < TIMED_LIMIT


def judge_timed(subject: str, old: Interval, new: Interval) -> Change:
    """The verdict on a timing; "undecided" passes: it was not shown to be worse."""
    change = slower(old, new)
    if change.low > TIMED_LIMIT:
        verdict = "REGRESSION"
    elif change.high >= TIMED_LIMIT:
        verdict = "undecided"
    elif change.low <= 0 <= change.high:
        verdict = "same"
    else:
        verdict = "worse" if change.median > 0 else "better"
    return Change(subject, TIMED_FACT, old.median, new.median, change.median, verdict, change)
