"""Timing in turns: order, counts, and that a planted slowness shows."""

import dataclasses
import time

import numpy as np
import pytest

from taskmoe.bench.harness.results import Spread
from taskmoe.bench.harness.timing import alternate


def test_functions_run_in_turns() -> None:
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = alternate(functions, rounds=3, min_seconds=0)
    assert {name: seconds.shape for name, seconds in found.items()} == {"a": (3,), "b": (3,)}
    assert "".join(order[-6:]) == "ababab"


def test_a_planted_slowness_shows() -> None:
    found = alternate(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)},
        rounds=5, min_seconds=0,
    )  # fmt: skip
    ratio = Spread.of(found["slow"] / found["fast"])
    assert ratio.p10 <= ratio.median <= ratio.p90
    assert ratio.median > 2


def test_medians_and_ratios_of_known_times() -> None:
    a, b = np.array([4.0, 2.0, 100.0]), np.array([2.0, 1.0, 50.0])
    assert Spread.of(a).median == 4.0
    assert Spread.of(a / b) == Spread(2.0, 2.0, 2.0)  # a noisy round hits both, and cancels
    assert dataclasses.astuple(Spread.of(np.arange(11.0))) == pytest.approx((5.0, 1.0, 9.0))
