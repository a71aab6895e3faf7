"""Kernels, models, or what is published: each by its own `measure`."""

from __future__ import annotations

from taskmoe.bench.tpu.compiler import need_libtpu
from taskmoe.bench.tpu.kernels import measure as kernels
from taskmoe.bench.tpu.model import measure as model
from taskmoe.bench.tpu.published import measure as published
from taskmoe.bench.tpu.spec import KernelSpec, ModelSpec, PublishedSpec

Result = kernels.Kernels | model.Models | published.Published


def measure(spec: KernelSpec | ModelSpec | PublishedSpec) -> Result:
    """Compile what the specification names; InputError where libtpu is not installed."""
    need_libtpu()
    if isinstance(spec, KernelSpec):
        return kernels.measure(spec)
    return model.measure(spec) if isinstance(spec, ModelSpec) else published.measure(spec)
