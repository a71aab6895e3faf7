"""Our gmm modelled at the sizes and on the chips of published measurements."""

from __future__ import annotations

import dataclasses

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.cases import SHAPES, Case
from taskmoe.bench.tpu.compiler import Compiled, compile_all
from taskmoe.bench.tpu.spec import PublishedSpec

SOURCE = (
    "openxla/tokamax at 783ea95704a5, tokamax/data/autotuning: tpu_v5_lite and tpu7x, "
    "pallas_mosaic_tpu_ragged_dot.json, the median of the fastest configuration"
)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A measurement: chip and shape by their names here, milliseconds, and the blocks it had."""

    chip: str
    shape: str
    ms: float
    blocks: tuple[int, int, int]

    @property
    def flops(self) -> int:
        """Of all rows through their matrices."""
        s = SHAPES[self.shape]
        return 2 * s.tokens * s.top_k * s.d_model * s.d_ff


MEASUREMENTS = (
    Measurement("v5e", "groups-8", 5.255, (1024, 512, 1024)),
    Measurement("v5e", "groups-128", 7.223, (256, 2048, 768)),
    Measurement("tpu7x", "groups-128-long", 8.153, (256, 4096, 1536)),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Modelled beside published. relative_error: modelled TFLOP/s over published, minus 1."""

    chip: str
    shape: str
    tokens: int
    d_model: int
    d_ff: int
    experts: int
    top_k: int
    blocks: str
    published_tflop_per_s: float
    error: str | None = None
    modelled_tflop_per_s: float | None = None
    relative_error: float | None = None
    share_of_peak: float | None = None


@dataclasses.dataclass(frozen=True)
class Published(Result):
    """A row a measurement and choice of blocks."""

    machine: dict[str, str]
    rows: list[Row]
    source: str = SOURCE
    command: str = "tpu --published"
    note: str = "modelled beside published, nothing is measured here"


def measure(_: PublishedSpec) -> Published:
    """Compile with the blocks that ours chooses, and with those of the measurement."""
    wanted = [(m, blocks) for m in MEASUREMENTS for blocks in (None, m.blocks)]
    cases = [Case("gmm", "taskmoe", "forward", m.chip, "bf16", m.shape, b) for m, b in wanted]
    rows = [
        row(measured, blocks, result)
        for (measured, blocks), result in zip(wanted, compile_all(cases), strict=True)
    ]
    return Published(machine.describe(), rows)


def row(measured: Measurement, blocks: tuple[int, int, int] | None, result: Compiled) -> Row:
    """One line."""
    published, modelled = measured.flops / measured.ms / 1e9, None
    peak = kernel_cases.chip_info(measured.chip).bf16_ops_per_second / 1e12
    if result.modelled_us is not None:
        modelled = measured.flops / result.modelled_us / 1e6
    return Row(
        measured.chip,
        measured.shape,
        **{k: v for k, v in vars(SHAPES[measured.shape]).items() if k != "gated"},
        blocks="as ours chooses" if blocks is None else "x".join(map(str, blocks)),
        published_tflop_per_s=published,
        error=result.error,
        modelled_tflop_per_s=modelled,
        relative_error=modelled and modelled / published - 1,
        share_of_peak=modelled and modelled / peak,
    )
