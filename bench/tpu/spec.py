"""What `tpu` is asked to compile: kernels, the paper's models, or what others have published."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import ClassVar

from taskmoe.bench.harness.options import chosen
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.cases import CHIPS, DTYPES, OPS, SHAPES, Case
from taskmoe.bench.tpu.model.step import SLICES
from taskmoe.cli.errors import InputError

QUICK_CHIPS, QUICK_DTYPES = ("v5e", "v6e"), ("bf16",)
MODELS, QUICK_MODEL_CHIPS = ("wmt",), ("v3",)  # the blog's


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """Cases, and the chips for which the bytes of whole experts are counted.

    work: folder that keeps each case as it is compiled; None keeps none.
    """

    cases: list[Case]
    expert_chips: list[str]
    work: Path | None = None
    package: ClassVar[str] = "taskmoe.bench.tpu.kernels"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Chips whose slices serve the paper's models."""

    chips: list[str]
    package: ClassVar[str] = "taskmoe.bench.tpu.model"


@dataclasses.dataclass(frozen=True)
class PublishedSpec:
    """Every measurement that is known."""

    package: ClassVar[str] = "taskmoe.bench.tpu.published"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tpu`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kernels", action="store_true", help="compile the kernels")
    what.add_argument("--model", help="compile decoding steps of the paper's models: wmt")
    what.add_argument(
        "--published", action="store_true", help="the model beside published measurements"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="kernels: v5e and v6e in bf16 only, in under three minutes; model: v3 only",
    )
    parser.add_argument("--chips", help=f"comma-separated: {','.join(CHIPS)}")
    parser.add_argument("--ops", help=f"comma-separated: {','.join(OPS)}")
    parser.add_argument("--dtypes", help=f"comma-separated: {','.join(DTYPES)}")
    parser.add_argument(
        "--work",
        type=Path,
        help="kernels: keep each as it is compiled in this folder, and take those that it holds",
    )
    parser.add_argument("--shapes", help=f"comma-separated, wmt if not given: {','.join(SHAPES)}")


def read(a: argparse.Namespace) -> KernelSpec | ModelSpec | PublishedSpec:
    """The specification; InputError where an option names what is not there, or does not fit."""
    others = a.ops or a.dtypes or a.shapes or a.work
    if a.model is not None:
        if others:
            raise InputError(
                "--ops, --dtypes, --shapes and --work go with --kernels, not with --model"
            )
        chosen("--model", a.model, MODELS, MODELS)
        return ModelSpec(
            chosen("--chips", a.chips, SLICES, QUICK_MODEL_CHIPS if a.quick else SLICES)
        )
    if a.published:
        if others or a.chips:
            raise InputError(
                "--chips, --ops, --dtypes, --shapes and --work do not go with --published"
            )
        return PublishedSpec()
    if not a.kernels:
        raise InputError("say what to compile: --kernels, --model wmt or --published")
    chips = chosen("--chips", a.chips, CHIPS, QUICK_CHIPS if a.quick else CHIPS)
    ops = chosen("--ops", a.ops, OPS, OPS)
    dtypes = chosen("--dtypes", a.dtypes, DTYPES, QUICK_DTYPES if a.quick else DTYPES)
    cases = kernel_cases.cases(chips, ops, dtypes, chosen("--shapes", a.shapes, SHAPES, ("wmt",)))
    if not cases:
        raise InputError(
            "nothing to compile: v3 takes kernels in f32 only, and none that exchange rows"
        )
    return KernelSpec(cases, chips if "expert_ffn" in ops else [], a.work)
