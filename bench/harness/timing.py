"""Timing on machines that are not quiet: what is compared runs in turns, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def alternate(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int = 9, min_seconds: float = 0.01
) -> dict[str, np.ndarray]:
    """Time functions in turns: A B C A B C ..., after a first call of each that is not counted.

    Returns seconds of a call in each round, [rounds] f64. Round i of all functions ran together: in
    ratios round by round what slows both cancels.

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
    return {name: np.array(seconds) for name, seconds in found.items()}


def _seconds(function: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / calls
