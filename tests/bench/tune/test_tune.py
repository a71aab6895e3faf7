"""The rule beside its neighbours: which they are, by how much it misses, and bad input."""

import dataclasses
from typing import Any

import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.tpu.cases import chip_info
from taskmoe.bench.tpu.compiler import Compiled, Kernel
from taskmoe.bench.tune import measure as tune
from taskmoe.bench.tune.spec import Spec
from taskmoe.kernels import tiling
from taskmoe.kernels.ffn_tiling import FFNSizes, ffn_tiling

SPEC = Spec("v6e", "gmm", "qwen3", "bf16", 40)


@pytest.mark.parametrize("op", ["gmm", "tgmm", "expert_ffn_gated"])
def test_neighbours_are_others_that_the_op_takes(op: str) -> None:
    spec = dataclasses.replace(SPEC, op=op)
    chosen = tune.rule(spec)
    found = tune.neighbours(spec, chosen)
    assert len(set(found)) == len(found) >= 4
    assert chosen not in found
    for t in found:
        tiling.check_tiling(t, 2048, 768, 2)
        if op == "expert_ffn_gated":
            assert t.k == 2048
    assert len(tune.neighbours(dataclasses.replace(spec, tries=2), chosen)) == 2


def fake(times: dict[tuple[int, int, int], float], refused: tuple[int, int, int]) -> Any:
    kernel = Kernel("taskmoe_gmm", 200, 100, {"MXU": 0.5}, 0, vmem_bytes=1 << 20)

    def compile_all(cases: Any) -> list[Compiled]:
        return [
            Compiled(error="Mosaic refuses it")
            if case.tiling == refused
            else Compiled(kernels=[kernel], modelled_us=times[case.tiling], roofline_us=80.0)
            for case in cases
        ]

    return compile_all


def test_the_miss_by_hand_and_in_words(monkeypatch: Any, capsys: Any) -> None:
    rule = tune.rule(SPEC)
    others = [dataclasses.astuple(t) for t in tune.neighbours(SPEC, rule)]
    times = dict.fromkeys(others, 130.0) | {dataclasses.astuple(rule): 120.0}
    times[others[1]] = 100.0
    monkeypatch.setattr(tune, "compile_all", fake(times, others[0]))
    found = tune.measure(SPEC)
    assert found.best.blocks == others[1]
    assert found.missed == pytest.approx(0.2)
    words = ["tune", "--chip", "v6e", "--op", "gmm", "--shape", "qwen3", "--tries", "40"]
    assert main(words) == 0
    assert "by 20.0%" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(tune, "compile_all", fake(times, dataclasses.astuple(rule)))
    assert main(words) == 2
    assert "do not compile: Mosaic refuses it" in capsys.readouterr().err


def test_the_estimate_wants_pieces_as_wide_as_the_mxu() -> None:
    """Of blocks that move the same bytes, those that halve a 256-wide MXU take twice as long."""
    info = chip_info("v6e")
    assert tiling.tiles_of(2048, 128, 256) == 2 * tiling.tiles_of(2048, 256, 256)
    assert tiling.tiles_of(896, 896, 256) == 4
    t = ffn_tiling(FFNSizes(8192, 7168, 2048, 64, 3, 2, info))
    assert t.n % 256 == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--chip v9 --op gmm --shape wmt", "--chip must be of v3, v4"),
        ("--chip v6e --op dispatch --shape wmt", "--op must be of gmm, "),
        ("--chip v6e --op gmm --shape huge", "--shape must be of wmt, "),
        ("--chip v3 --op gmm --shape wmt", "v3 takes kernels in f32 only"),
        ("--chip v6e --op gmm --shape wmt --tries 0", "--tries must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(words: str, message: str, capsys: Any) -> None:
    assert main(["tune", *words.split()]) == 2
    assert message in capsys.readouterr().err
