"""The rule's block sizes and its neighbours, compiled and modelled."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp

from taskmoe.bench.harness import machine
from taskmoe.bench.harness.results import Result
from taskmoe.bench.tpu import cases as kernel_cases
from taskmoe.bench.tpu.cases import DTYPES, SHAPES, Case
from taskmoe.bench.tpu.compiler import compile_all
from taskmoe.bench.tune.spec import Spec
from taskmoe.cli.errors import InputError
from taskmoe.kernels import tiling
from taskmoe.kernels.ffn_tiling import FFNSizes, ffn_tiling
from taskmoe.kernels.product_tiling import ProductSizes, gmm_tiling, tgmm_tiling
from taskmoe.kernels.tiling import Tiling


@dataclasses.dataclass(frozen=True)
class Row:
    """Block sizes m, k and n, and their modelled time, or why they do not compile."""

    blocks: tuple[int, int, int]
    error: str | None = None
    modelled_us: float | None = None
    bundles: int | None = None


@dataclasses.dataclass(frozen=True)
class Tuned(Result):
    """rows: the rule's choice first. roofline_us: of the op at these sizes."""

    machine: dict[str, str]
    chip: str
    op: str
    shape: str
    dtype: str
    roofline_us: float | None
    rows: list[Row]
    command: str = "tune"
    note: str = "schedules as compiled; times are modelled, nothing is measured"

    @property
    def best(self) -> Row:
        """The fastest that compiled."""
        modelled = [row for row in self.rows if row.modelled_us is not None]
        return min(modelled, key=lambda row: row.modelled_us or 0.0)

    @property
    def missed(self) -> float:
        """Share by which the rule's choice takes longer than the best."""
        return (self.rows[0].modelled_us or 0.0) / (self.best.modelled_us or 1.0) - 1


def rule(spec: Spec) -> Tiling:
    """What the rule chooses."""
    s, info = SHAPES[spec.shape], kernel_cases.chip_info(spec.chip)
    m, d, f, e = s.tokens * s.top_k, s.d_model, s.d_ff, s.experts
    itemsize = jnp.dtype(DTYPES[spec.dtype]).itemsize
    if spec.op in ("gmm", "tgmm"):
        choose = gmm_tiling if spec.op == "gmm" else tgmm_tiling
        return choose(ProductSizes(m, d, f, e, itemsize, itemsize, info))
    matrices = 3 if spec.op == "expert_ffn_gated" else 2
    held = 1 if spec.op == "expert_ffn_int8" else itemsize
    return ffn_tiling(FFNSizes(m, d, f, e, matrices, itemsize, info, held))


def neighbours(spec: Spec, chosen: Tiling) -> list[Tiling]:
    """Other block sizes, the nearest first: heights halved and doubled, widths one split away.

    expert_ffn cuts hidden units alone: k is all of D.
    """
    s = SHAPES[spec.shape]
    itemsize = jnp.dtype(DTYPES[spec.dtype]).itemsize
    least = tiling.sublanes(itemsize)

    def beside(size: int, block: int) -> list[int]:
        sizes = tiling.splits(size)
        at = sizes.index(block)
        return [block, *sizes[max(at - 1, 0) : at], *sizes[at + 1 : at + 2]]

    heights = [h for h in (chosen.m, 2 * chosen.m, chosen.m // 2) if h >= least and h % least == 0]
    depths = beside(s.d_model, chosen.k) if spec.op in ("gmm", "tgmm") else [chosen.k]
    widths = beside(s.d_ff, chosen.n)
    was = dataclasses.astuple(chosen)
    found = [blocks for blocks in itertools.product(heights, depths, widths) if blocks != was]
    found.sort(key=lambda blocks: sum(a != b for a, b in zip(blocks, was, strict=True)))
    return [Tiling(*blocks) for blocks in found[: spec.tries]]


def measure(spec: Spec) -> Tuned:
    """Compile them all; InputError where libtpu is missing, or the rule's choice does not fit."""
    chosen = rule(spec)
    tried = [dataclasses.astuple(t) for t in (chosen, *neighbours(spec, chosen))]
    case = Case(spec.op, "taskmoe", "forward", spec.chip, spec.dtype, spec.shape)
    results = compile_all([dataclasses.replace(case, tiling=blocks) for blocks in tried])
    if results[0].error is not None:
        raise InputError(f"the rule's blocks {tried[0]} do not compile: {results[0].error}")
    rows = [
        Row(blocks, r.error, r.modelled_us, None if r.error else r.main_bundles)
        for blocks, r in zip(tried, results, strict=True)
    ]
    sizes = spec.chip, spec.op, spec.shape, spec.dtype
    return Tuned(machine.describe(), *sizes, results[0].roofline_us, rows)
