"""The kernels that the compile lab looks at: ours, and others' at the same shapes.

A case is one op in one direction for one chip and dtype; a program is what is compiled for it and
what is counted. Group sizes are those of a random top-2 routing, from a fixed seed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from taskmoe import moe
from taskmoe.bench.harness.shapes import MODELS, Sizes
from taskmoe.kernels import Quantized, combine, dispatch, expert_ffn, gmm, tgmm, top_k_gating
from taskmoe.kernels.tiling import Tiling

#: Chip -> topology that the compiler knows and the version that Pallas knows its limits by.
CHIPS = {
    "v3": ("v3:4x8", "v3"),
    "v4": ("v4:2x2x1", "v4"),
    "v5e": ("v5e:2x2", "v5e"),
    "v5p": ("v5p:2x2x1", "v5p"),
    "v6e": ("v6e:2x2", "v6e"),
    "tpu7x": ("tpu7x:2x2x1", "7x"),
}
DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}
DIRECTIONS = ("forward", "backward")
TILED = ("gmm", "tgmm", "expert_ffn", "expert_ffn_gated", "expert_ffn_int8")
#: Ops between chips, forward alone: their gradients are made of others here. See `across`.
EXCHANGES = ("exchange_rows", "exchange_ffn", "exchange_ffn_gated")
#: A whole layer, routed by its tokens: compiled for its temporaries, its time is not modelled.
LAYER = "moe_layer"
OPS = ("top_k_gating", "dispatch", "combine", *TILED, *EXCHANGES, LAYER)
#: Op -> how many arguments, from the first on, its gradient does not read.
UNREAD_BACKWARD = {"dispatch": 1}
#: Who else has which op.
OTHERS = {"megablox": ("gmm", "tgmm"), "tokamax": ("gmm",)}
MEGABLOX = "jax.experimental.pallas.ops.tpu.megablox.gmm"


SHAPES = MODELS | {
    "decode": Sizes(32, 512, 2048, 32),
    "awkward": Sizes(37, 131, 261, 5, 3),
    # Of published measurements: see `published`.
    "groups-8": Sizes(8192, 4096, 14336, 8, 1),
    "groups-128": Sizes(393216, 2048, 768, 128, 1),
    "groups-128-long": Sizes(524288, 4096, 1536, 128, 1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table: an op by its name, whose it is, and what it is compiled for.

    tiling: blocks of m, k and n in place of those that the op chooses; our gmm, tgmm and expert_ffn
    take them.
    """

    op: str
    by: str
    direction: str
    chip: str
    dtype: str
    shape: str
    tiling: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, its arguments' shapes, and how many of them, the first ones, carry gradients.

    An argument is a `jax.ShapeDtypeStruct`, or a `Quantized` of two.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    gradients: int

    def directed(self, direction: str) -> tuple[Callable[..., Any], list[Any]]:
        """What to compile: the function, or its gradients given those of its result, last.

        A function without gradients is what to compile, whatever the direction.
        """
        if direction == "forward" or not self.gradients:
            return self.function, self.arguments
        count = self.gradients

        def gradients(*args: Any) -> Any:
            first, rest, grad = args[:count], args[count:-1], args[-1]
            return jax.vjp(lambda *first: self.function(*first, *rest), *first)[1](grad)

        return gradients, [*self.arguments, result_shapes(self.function, self.arguments)]


def result_shapes(function: Callable[..., Any], arguments: list[Any]) -> Any:
    """Shapes of the function's results, on any machine: Pallas kernels are not lowered for it."""
    with pltpu.force_tpu_interpret_mode():
        return jax.eval_shape(function, *arguments)


def chip_info(chip: str) -> pltpu.TpuInfo:
    """Limits and rates of one core of the chip."""
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(CHIPS[chip][1]), 1)


def clock_hz(info: pltpu.TpuInfo) -> float:
    """Cycles a second: what the peak comes to with four MXUs a core, two on v3.

    Pallas counts two of 256 x 256 on v6e and tpu7x, which for their published clocks is half.
    """
    mxus = 2 if info.generation == 3 else 4
    return info.bf16_ops_per_second / (2 * info.mxu_column_size**2 * mxus)


def cases(chips: list[str], ops: list[str], dtypes: list[str], shapes: list[str]) -> list[Case]:
    """Every case of these chips, ops, dtypes and shapes that can exist, chip by chip."""
    makers = {
        op: ["taskmoe", *(by for by in OTHERS if op in OTHERS[by] and is_installed(by))]
        for op in ops
    }
    return [
        Case(op, by, direction, chip, dtype, shape)
        for chip in chips
        for dtype in dtypes
        if (chip, dtype) != ("v3", "bf16")  # Mosaic takes no bfloat16 there
        for shape in shapes
        for op in ops
        if (chip, op in EXCHANGES) != ("v3", True)  # the compiler knows no copies to peers there
        for by in makers[op]
        for direction in (DIRECTIONS[:1] if op in EXCHANGES else DIRECTIONS)
    ]


def is_installed(by: str) -> bool:
    """Whether the library is there; megablox comes with JAX."""
    return importlib.util.find_spec(MEGABLOX if by == "megablox" else by) is not None


@functools.cache
def routed(tokens: int, experts: int, top_k: int) -> tuple[int, ...]:
    """Rows of each expert when every token goes to top_k distinct experts at random."""
    rng = np.random.default_rng(0)
    if top_k == 1:
        chosen = rng.integers(0, experts, tokens)
    else:
        chosen = rng.random((tokens, experts)).argsort(axis=1)[:, :top_k].reshape(-1)
    return tuple(np.bincount(chosen, minlength=experts).tolist())


def program(case: Case) -> Program:
    """What the case compiles. Arguments end with group sizes or rows where the op has them."""
    s, dtype = SHAPES[case.shape], DTYPES[case.dtype]
    array = jax.ShapeDtypeStruct
    t, d, f, e, k = s.tokens, s.d_model, s.d_ff, s.experts, s.top_k
    m = t * k
    sizes, rows = array((e,), jnp.int32), array((t, k), jnp.int32)
    shares = array((t, k), jnp.float32)
    x, up, down = array((m, d), dtype), array((e, d, f), dtype), array((e, f, d), dtype)
    wide, tokens = array((m, f), dtype), array((t, d), dtype)
    if case.op == LAYER:
        return _layer(s, dtype)
    if case.by != "taskmoe":
        return Program(*_of_others(case, x, up, wide, sizes))
    mosaic: Any = {"implementation": "mosaic"}
    if case.tiling is not None and case.op not in TILED:
        raise ValueError(f"{case.op} takes no tiling; {', '.join(TILED)} do")
    tiled = mosaic | ({} if case.tiling is None else {"tiling": Tiling(*case.tiling)})

    def gating(logits: Any) -> Any:
        found = top_k_gating(logits, k, **mosaic)
        return found.weights, found.mean_probs, found.z_loss

    def ffn(x: Any, w_in: Any, w_out: Any, sizes: Any) -> Any:
        return expert_ffn(x, w_in, w_out, sizes, activation="relu", **tiled)

    def gated(x: Any, w_in: Any, w_out: Any, w_gate: Any, sizes: Any) -> Any:
        return expert_ffn(x, w_in, w_out, sizes, activation="silu", w_gate=w_gate, **tiled)

    def frozen(w: jax.ShapeDtypeStruct) -> Quantized:
        scales: Any = array((e, 1, 1, w.shape[2]), jnp.float32)
        values: Any = array(w.shape, jnp.int8)
        return Quantized(values, scales)

    programs: dict[str, tuple[Any, list[Any], int]] = {
        "top_k_gating": (gating, [array((t, e), dtype)], 1),
        "dispatch": (lambda x, r: dispatch(x, r, m, **mosaic), [tokens, rows], 1),
        "combine": (lambda y, w, r: combine(y, r, w, **mosaic), [x, shares, rows], 2),
        "gmm": (functools.partial(gmm, **tiled), [x, up, sizes], 2),
        "tgmm": (functools.partial(tgmm, **tiled), [x, wide, sizes], 2),
        "expert_ffn": (ffn, [x, up, down, sizes], 3),
        "expert_ffn_gated": (gated, [x, up, down, up, sizes], 4),
        "expert_ffn_int8": (ffn, [x, frozen(up), frozen(down), sizes], 1),
    }
    return Program(*programs[case.op])


def _layer(s: Sizes, dtype: Any) -> Program:
    """A layer of these sizes, its parameters and tokens with gradients."""
    activation: Any = "silu" if s.gated else "relu"
    config = moe.MoEConfig(
        s.d_model, s.d_ff, s.experts, s.top_k, activation=activation, gated=s.gated
    )
    # The key is traced too: nothing runs on a chip that is not there.
    params = jax.eval_shape(lambda: moe.init(jax.random.key(0), config, dtype))

    def layer(params: Any, x: Any) -> Any:
        y, metrics = moe.apply(params, config, x, implementation="mosaic")
        return y, metrics.aux_loss

    return Program(layer, [params, jax.ShapeDtypeStruct((1, s.tokens, s.d_model), dtype)], 2)


def megablox() -> Any:
    """JAX's megablox module of kernels; its package shadows it with a function of its name."""
    return importlib.import_module(MEGABLOX)


def megablox_tiling(m: int, k: int, n: int) -> tuple[int, int, int]:
    """The tiling that did best on v5e of those tried; rows cut to what divides m."""
    return math.gcd(m, 512), min(k, 512), min(n, 1024)


def _of_others(case: Case, x: Any, up: Any, wide: Any, sizes: Any) -> tuple[Any, list[Any], int]:
    """Function, arguments and gradient count of megablox's or tokamax's op.

    megablox has no gradient of tgmm, and one of gmm that takes one tiling for products of different
    shapes; so its backward rows are the products that make up the gradients, each with its own.
    """
    out: Any = {"preferred_element_type": x.dtype}
    if case.by == "tokamax":
        dot = importlib.import_module("tokamax").ragged_dot
        return (lambda *args: dot(*args, implementation="mosaic_tpu_v2", **out)), [x, up, sizes], 2
    theirs = megablox()
    (m, d), f = x.shape, up.shape[2]
    narrow, broad = megablox_tiling(m, f, d), megablox_tiling(m, d, f)
    product = functools.partial(theirs.gmm, tiling=broad, **out)
    transposed = functools.partial(theirs.gmm, tiling=narrow, transpose_rhs=True, **out)

    def outer(x: Any, wide: Any, sizes: Any) -> Any:
        return theirs.tgmm(x.T, wide, sizes, tiling=broad, **out)

    def gradients(x: Any, up: Any, wide: Any, sizes: Any) -> Any:
        second = outer(x, wide, sizes) if case.op == "gmm" else product(x, up, sizes)
        return transposed(wide, up, sizes), second

    if case.direction == "backward":
        return gradients, [x, up, wide, sizes], 0
    if case.op == "gmm":
        return product, [x, up, sizes], 0
    return outer, [x, wide, sizes], 0
