"""Timing in turns: order, counts, and that a planted slowness shows."""

import time

import numpy as np
import pytest

from taskmoe.bench.harness.timing import Timing, alternate, ratio


def test_functions_run_in_turns() -> None:
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = alternate(functions, rounds=3, min_seconds=0)
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 3, "b": 3}
    assert "".join(order[-6:]) == "ababab"


def test_a_planted_slowness_shows() -> None:
    found = alternate(
        {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)},
        rounds=5, min_seconds=0,
    )  # fmt: skip
    middle, low, high = ratio(found["slow"], found["fast"])
    assert low <= middle <= high
    assert middle > 2


def test_medians_and_ratios_of_known_times() -> None:
    a, b = Timing((4.0, 2.0, 100.0)), Timing((2.0, 1.0, 50.0))
    assert a.median == 4.0
    assert ratio(a, b) == (2.0, 2.0, 2.0)  # a noisy round hits both, and cancels
    low, high = Timing(tuple(np.arange(11.0))).spread
    assert (low, high) == pytest.approx((1.0, 9.0))
