"""How good the model of kernel times is: its figures beside measurements that others published.

tokamax ships what its autotuning measured on TPUs, ragged_dot in bf16 among it. Our gmm is compiled
for the same chip at the same sizes, once with the blocks that it chooses and once with those that
tokamax was fastest with, and modelled as every kernel here is: the larger of bytes at the HBM's
rate and FLOPs at the peak times the share of MXU slots filled. Ours is modelled, theirs is
published; what the model leaves out (time to start, copies that wait, tiles of two groups) is its
error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.cases import SHAPES, Case
from taskmoe.bench.tpu.compiler import compile_all

SOURCE = (
    "openxla/tokamax at 783ea95704a5, tokamax/data/autotuning: tpu_v5_lite and tpu7x, "
    "pallas_mosaic_tpu_ragged_dot.json, the median of the fastest configuration"
)
HEADINGS = (
    *("chip", "rows x depth by groups x depth x width", "blocks"),
    *("modelled TFLOP/s", "published TFLOP/s", "error", "of peak, modelled"),
)


@dataclasses.dataclass(frozen=True)
class Published:
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
    Published("v5e", "groups-8", 5.255, (1024, 512, 1024)),
    Published("v5e", "groups-128", 7.223, (256, 2048, 768)),
    Published("tpu7x", "groups-128-long", 8.153, (256, 4096, 1536)),
)


def compare() -> list[dict[str, Any]]:
    """A row a measurement and choice of blocks; `error` where that does not compile."""
    wanted = [(m, blocks) for m in MEASUREMENTS for blocks in (None, m.blocks)]
    cases = [Case("gmm", "taskmoe", "forward", m.chip, "bf16", m.shape, b) for m, b in wanted]
    return [
        row(measured, blocks, result)
        for (measured, blocks), result in zip(wanted, compile_all(cases), strict=True)
    ]


def row(
    measured: Published, blocks: tuple[int, int, int] | None, result: dict[str, Any]
) -> dict[str, Any]:
    """One line as JSON. relative_error: modelled TFLOP/s over published, minus 1."""
    found: dict[str, Any] = {
        "chip": measured.chip,
        "shape": measured.shape,
        **dataclasses.asdict(SHAPES[measured.shape]),
        "blocks": "as ours chooses" if blocks is None else "x".join(map(str, blocks)),
        "published_tflop_per_s": measured.flops / measured.ms / 1e9,
    }
    if "error" in result:
        return found | {"error": result["error"]}
    modelled = measured.flops / result["modelled_us"] / 1e6
    peak = kernel_cases.chip_info(measured.chip).bf16_ops_per_second / 1e12
    return found | {
        "modelled_tflop_per_s": modelled,
        "relative_error": modelled / found["published_tflop_per_s"] - 1,
        "share_of_peak": modelled / peak,
    }


def cells(r: dict[str, Any]) -> tuple[str, ...]:
    """A row as words under `HEADINGS`."""
    rows = r["tokens"] * r["top_k"]
    size = f"{rows}x{r['d_model']} by {r['experts']}x{r['d_model']}x{r['d_ff']}"
    published = f"{r['published_tflop_per_s']:.0f}"
    if "error" in r:
        return (r["chip"], size, r["blocks"], r["error"][:60], published, "", "")
    return (
        *(r["chip"], size, r["blocks"], f"{r['modelled_tflop_per_s']:.0f}", published),
        *(f"{r['relative_error']:+.0%}", f"{r['share_of_peak']:.0%}"),
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """Modelled beside published."""
    found = Table(
        *HEADINGS,
        title="gmm, bf16: our model beside published measurements of tokamax's ragged_dot",
        caption=f"Published: {SOURCE}. Group sizes here are random, about equal. {verdict(rows)}",
    )
    for r in rows:
        found.add_row(*cells(r))
    return found


def verdict(rows: list[dict[str, Any]]) -> str:
    """The model's error in one sentence."""
    errors = [r["relative_error"] for r in rows if "relative_error" in r]
    if not errors:
        return "Nothing compiled, so nothing was compared."
    return (
        f"The model is off by {min(errors):+.0%} to {max(errors):+.0%}: it leaves out what is "
        "neither a byte from HBM nor an MXU slot, so read its times as least times."
    )
