"""Kernels, models, or what is published: each by its own `view`."""

from __future__ import annotations

from taskmoe.bench.harness.view import View
from taskmoe.bench.tpu.kernels.measure import Kernels
from taskmoe.bench.tpu.kernels.view import view as kernels
from taskmoe.bench.tpu.measure import Result
from taskmoe.bench.tpu.model.measure import Models
from taskmoe.bench.tpu.model.view import view as model
from taskmoe.bench.tpu.published.view import view as published


def view(result: Result) -> View:
    """What the result means."""
    if isinstance(result, Kernels):
        return kernels(result)
    return model(result) if isinstance(result, Models) else published(result)
