"""Timing on machines that are not quiet: what is compared runs in turns, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """Seconds of each round of one function, in order; round i of all functions ran together."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> tuple[float, float]:
        """10th and 90th percentile of the seconds a call."""
        low, high = np.quantile(self.seconds, (0.1, 0.9))
        return float(low), float(high)


def alternate(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int = 9, min_seconds: float = 0.01
) -> dict[str, Timing]:
    """Time functions in turns: A B C A B C ..., after a first call of each that is not counted.

    rounds: times that each is measured. min_seconds: a shorter function is called several times a
    round, as often as its first calls say, and the round counts their mean.
    """
    calls = {}
    for name, function in functions.items():
        jax.block_until_ready(function())
        calls[name] = max(1, int(np.ceil(min_seconds / max(_seconds(function, 1), 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(_seconds(function, calls[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


def ratio(a: Timing, b: Timing) -> tuple[float, float, float]:
    """How many times longer a takes than b: median, 10th and 90th percentile over the rounds."""
    each = np.asarray(a.seconds) / np.asarray(b.seconds)
    low, middle, high = np.quantile(each, (0.1, 0.5, 0.9))
    return float(middle), float(low), float(high)


def _seconds(function: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / calls
