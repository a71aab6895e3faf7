"""Every kernel compiled, its bytes counted and its time modelled."""

from __future__ import annotations

import dataclasses
import importlib.metadata

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result
from taskmoe.bench.tpu.cases import Case
from taskmoe.bench.tpu.compiler import Compiled, compile_all
from taskmoe.bench.tpu.kernels import expert_bytes
from taskmoe.bench.tpu.kernels.expert_bytes import ExpertBytes
from taskmoe.bench.tpu.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class Row(Compiled, Case):
    """A case and what became of it."""


@dataclasses.dataclass(frozen=True)
class Kernels(Result):
    """A row a case, and the bytes of whole experts."""

    machine: dict[str, str]
    kernels: list[Row]
    expert_bytes: list[ExpertBytes]
    command: str = "tpu --kernels"
    note: str = "schedules as compiled; bytes and times are modelled, nothing is measured"


def measure(spec: KernelSpec) -> Kernels:
    """Compile all cases, then count the bytes of whole experts."""
    rows = [
        Row(**vars(result), **vars(case))
        for case, result in zip(spec.cases, compile_all(spec.cases, spec.work), strict=True)
    ]
    experts = [row for chip in spec.expert_chips for row in expert_bytes.table(chip)]
    about = machine.describe()
    if any(row.by == "tokamax" for row in rows):
        about["tokamax"] = importlib.metadata.version("tokamax")
    return Kernels(about, rows, experts)
