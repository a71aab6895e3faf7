"""What `exchange` is asked to measure."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from taskmoe.bench.harness.options import need_at_least_one, numbers
from taskmoe.cli.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spec:
    """Devices in processes, rounds, and every size that is measured."""

    devices: int
    processes: int
    rounds: int
    batches: list[int]
    step_batches: list[int]
    experts: list[int]
    d_model: list[int]

    @property
    def words(self) -> str:
        """How many devices in how many processes."""
        return f"{self.devices} devices in {self.processes} process" + "es" * (self.processes > 1)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--devices", type=int, default=8, help="host devices in all")
    p.add_argument("--processes", type=int, default=1, help="processes that share the devices")
    p.add_argument("--batches", default="64,512,4096", help="tokens in all, each a multiple of N")
    p.add_argument("--step-batches", default="64,512", help="sequences of a whole decoding step")
    p.add_argument("--experts", default="32", help="experts, each a multiple of N")
    p.add_argument("--d-model", default="256", help="widths; hidden width is four times as much")
    p.add_argument("--rounds", type=int, default=9, help="times that each is measured")
    p.add_argument("--quick", action="store_true", help="one small batch, three rounds")
    p.add_argument("--png", type=Path, help="draw shares in communication here")


def read(a: argparse.Namespace) -> Spec:
    """The specification; InputError where a number does not fit."""
    if a.devices < 1 or a.processes < 1 or a.devices % a.processes:
        raise InputError(
            f"--processes must divide --devices, got {a.processes} and {a.devices} "
            "(both at least 1)"
        )
    if a.devices > 64:
        raise InputError(f"--devices must be at most 64 on one host, got {a.devices}")
    need_at_least_one(a, "rounds")
    sizes = {}
    for name in ("batches", "step_batches", "experts", "d_model"):
        by = 8 if name == "d_model" else a.devices  # four heads of an even width
        sizes[name] = numbers(f"--{name.replace('_', '-')}", getattr(a, name), by)
    if a.quick:
        sizes = {name: every[:1] for name, every in sizes.items()}
    return Spec(a.devices, a.processes, 3 if a.quick else a.rounds, **sizes)
