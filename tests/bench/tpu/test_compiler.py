"""What the lab keeps of a run that was interrupted, with a compiler that only counts."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskmoe.bench.tpu import compiler
from taskmoe.bench.tpu.cases import Case
from taskmoe.bench.tpu.compiler import Compiled, Kernel, compile_all
from taskmoe.bench.tpu.regions import Bundles
from taskmoe.cli.errors import InputError

CASES = [Case(op, "taskmoe", "forward", "v5e", "bf16", "wmt") for op in ("gmm", "tgmm", "combine")]


def counting(monkeypatch: Any, stops_at: str | None = None) -> list[str]:
    """The ops that are compiled from here on; at one of them the run is interrupted."""
    asked: list[str] = []

    def compile_one(case: Case) -> Compiled:
        if case.op == stops_at:
            raise KeyboardInterrupt
        asked.append(case.op)
        if case.op == "combine":
            return Compiled(error="Mosaic refuses it")
        regions = Bundles(1, 2, [3, 4], [0, 5])
        return Compiled(kernels=[Kernel(case.op, 200, 100, {"MXU": 0.5}, 0, regions, vmem_bytes=7)])

    @contextlib.contextmanager
    def fake() -> Iterator[Any]:
        yield compile_one

    monkeypatch.setattr(compiler, "compiler", fake)
    monkeypatch.setattr(compiler, "need_libtpu", lambda: None)
    return asked


def test_a_run_goes_on_with_what_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    asked = counting(monkeypatch, stops_at="tgmm")
    with pytest.raises(KeyboardInterrupt):
        compile_all(CASES, tmp_path)
    assert asked == ["gmm"]
    asked = counting(monkeypatch)
    first = compile_all(CASES, tmp_path)
    assert asked == ["tgmm", "combine"]
    asked = counting(monkeypatch)
    assert compile_all(CASES, tmp_path) == first
    assert asked == ["combine"]  # a refusal is not kept
    assert first[0].kernels[0].regions == Bundles(1, 2, [3, 4], [0, 5])
    asked = counting(monkeypatch)
    compile_all(CASES)
    assert asked == ["gmm", "tgmm", "combine"]


def test_other_sources_are_compiled_anew(tmp_path: Path, monkeypatch: Any) -> None:
    counting(monkeypatch)
    compile_all(CASES, tmp_path)
    monkeypatch.setattr(compiler, "_sources", lambda: "others")
    asked = counting(monkeypatch)
    compile_all(CASES, tmp_path)
    assert asked == ["gmm", "tgmm", "combine"]


def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    counting(monkeypatch)
    compile_all(CASES[:1], tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text("{")
    with pytest.raises(InputError, match=kept.name):
        compile_all(CASES, tmp_path)
