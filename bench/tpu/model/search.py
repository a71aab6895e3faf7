"""Asking the compiler, in a process beside this one, which batches of a decoding step fit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax

from taskmoe.bench.harness.results import from_json
from taskmoe.bench.harness.worker import Died, Worker
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.compiler import SETTINGS, death_note, need_libtpu
from taskmoe.bench.tpu.model.step import CORES, Step, cache_shapes
from taskmoe.cli.errors import InputError

Ask = Callable[[str, str, int], Step]


@contextlib.contextmanager
def compiler() -> Iterator[Ask]:
    """A function of (system, chip, batch) that compiles in a process beside this one.

    Raises InputError where libtpu is not installed, or could not be loaded.
    """
    need_libtpu()
    with Worker("taskmoe.bench.tpu.model.worker", settings=SETTINGS) as worker:

        def ask(system: str, chip: str, batch: int) -> Step:
            question = {"system": system, "chip": chip, "batch": batch}
            try:
                return from_json(Step, worker.ask(question))
            except Died as death:
                raise InputError(death_note(death)) from None

        yield ask


def largest_batch(system: str, chip: str, ask: Ask) -> Step:
    """Facts of the largest batch that compiles, within 25% (per core 4, 5, 6 or 7 times 2^k).

    Goes down from the smallest rung that the cache alone would not leave in HBM; a batch that does
    not fit is refused within a second. `limit`: why the next rung up does not compile.
    """
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache_shapes(system, 1)))
    most = kernel_cases.chip_info(chip).hbm_capacity_bytes / one
    limit = "no larger one was tried"
    for rung in rungs(most):
        facts = ask(system, chip, rung * CORES[system])
        if facts.error is None:
            return dataclasses.replace(facts, limit=limit)
        limit = facts.error
        if "RESOURCE_EXHAUSTED" not in limit:
            break
    return Step(error=limit)


def rungs(most: float) -> list[int]:
    """Batches 4, 5, 6 and 7 times 2^k, downward from the first above `most`."""
    power = max(0, math.floor(math.log2(max(most, 4))) - 2)
    ladder = [step << k for k in range(power + 2) for step in (4, 5, 6, 7)]
    above = min(rung for rung in ladder if rung > most)
    return sorted((rung for rung in ladder if rung <= above), reverse=True)
