"""Kernels of `tpu --kernels` for pytest-benchmark: what is timed is the TPU compiler itself."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from taskmoe.bench.tpu.cases import Case
from taskmoe.bench.tpu.compiler import compiler

OPS = ("top_k_gating", "dispatch", "combine", "gmm", "tgmm", "expert_ffn")


@pytest.fixture(scope="module")
def compile_one() -> Iterator[Any]:
    """A function of a case, with a compiler beside this process."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    with compiler() as compile_one:
        yield compile_one


@pytest.mark.parametrize("op", OPS)
def test_kernel(op: str, compile_one: Any, benchmark: Any) -> None:
    """A kernel at decoding's sizes for v5e; schedule and modelled time are extra information."""
    case = Case(op, "taskmoe", "forward", "v5e", "bf16", "decode")
    result = benchmark.pedantic(compile_one, (case,), rounds=1)
    assert "error" not in result
    benchmark.extra_info |= {
        "main_bundles": sum(kernel["main_bundles"] for kernel in result["kernels"]),
        "modelled_us": result["modelled_us"],
    }
