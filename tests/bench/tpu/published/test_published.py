"""The model's error beside published measurements: by hand, in words, and bad input."""

from typing import Any

import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.compiler import Compiled
from taskmoe.bench.tpu.published import measure as tpu_published
from taskmoe.bench.tpu.published import view
from taskmoe.bench.tpu.published.measure import MEASUREMENTS


@pytest.mark.parametrize(
    ("measured", "tflop_per_s"), list(zip(MEASUREMENTS, (183, 171, 809), strict=True))
)
def test_published_figures_are_those_of_their_milliseconds(measured: Any, tflop_per_s: int) -> None:
    found = tpu_published.row(measured, None, Compiled(error="no compiler"))
    assert found.published_tflop_per_s == pytest.approx(tflop_per_s, abs=0.5)
    assert "no compiler" in [say(found) for say in view.COLUMNS.values()]


def test_error_by_hand() -> None:
    measured = MEASUREMENTS[0]
    right = tpu_published.row(measured, None, Compiled(modelled_us=measured.ms * 1e3))
    assert right.relative_error == pytest.approx(0)
    fast = tpu_published.row(measured, measured.blocks, Compiled(modelled_us=measured.ms * 500))
    assert fast.relative_error == pytest.approx(1)
    assert fast.blocks == "1024x512x1024"
    peak = kernel_cases.chip_info("v5e").bf16_ops_per_second / 1e12
    assert right.share_of_peak == pytest.approx(right.published_tflop_per_s / peak)
    assert "off by +0% to +100%" in view.verdict([right, fast])


def test_command(monkeypatch: Any, capsys: Any, tmp_path: Any) -> None:
    monkeypatch.setattr(
        tpu_published, "compile_all", lambda cases: [Compiled(modelled_us=1e3) for _ in cases]
    )
    assert main(["tpu", "--published", "--json", str(tmp_path / "p.json")]) == 0
    said = capsys.readouterr().out
    assert "tokamax" in said
    assert "tpu7x" in said
    assert main(["tpu", "--published", "--chips", "v5e"]) == 2
    assert "do not go with --published" in capsys.readouterr().err


def test_one_expert_a_token_is_routed_whole() -> None:
    sizes = kernel_cases.routed(4096, 8, 1)
    assert sum(sizes) == 4096
    assert max(sizes) < 2 * min(sizes)
