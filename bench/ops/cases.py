"""What `ops` times: each op at given sizes, its baselines, and its plain definition.

A case names its sizes; `build` makes arrays and functions of it. All ways of a case are functions
of the same arguments. The plain definition knows the group sizes when it is traced: it is a loop
over groups with one matrix product each, and JAX differentiates it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.bench.harness.shapes import MODELS, Sizes
from taskmoe.bench.ops import baselines, pytorch
from taskmoe.kernels import combine, dispatch, expert_ffn, gmm, tgmm, top_k_gating
from taskmoe.moe import MoEConfig, apply, init

GROUPS = ("balanced", "zipf", "one-hot", "empty-heavy")
DIRECTIONS = ("forward", "forward+backward")
OURS = "taskmoe"


@dataclasses.dataclass(frozen=True)
class OpCase:
    """T tokens (rows, for the grouped ops), E experts, widths D and F, and how rows are spread.

    gated: whether experts are gated. shape: the model whose sizes these are, by its name in SHAPES.
    """

    op: str
    direction: str
    tokens: int
    experts: int
    groups: str
    d_model: int = 512
    d_ff: int = 2048
    top_k: int = 2
    gated: bool = False
    shape: str | None = None

    @property
    def name(self) -> str:
        """One word a fact, for tables and test ids."""
        shape = "" if self.shape is None else f"{self.shape} "
        return f"{shape}{self.op} {self.direction} T={self.tokens} E={self.experts} {self.groups}"


SHAPES = MODELS | {"decode": Sizes(32, 2048, 768, 128, 8, gated=True)}


@dataclasses.dataclass(frozen=True)
class Built:
    """A case as functions.

    ways: ours under the name "taskmoe", and baselines; each a function of `arguments`
    outside: baselines of other frameworks, see `pytorch`
    arguments: integers first, which have no gradients
    plain: the definition, for the check of numerics
    flops, least_bytes: what the op must do; the same for all ways
    """

    arguments: tuple[Any, ...]
    ways: Mapping[str, Callable[..., Any]]
    plain: Callable[..., Any]
    flops: int
    least_bytes: int
    outside: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)


def all_cases() -> list[OpCase]:
    """Every case of the full suite."""
    spread = [
        *((op, 2048, 8, "balanced") for op in ("gmm", "tgmm")),
        *((op, 2048, 32, groups) for op in ("gmm", "tgmm", "expert_ffn") for groups in GROUPS),
        *((op, 4096, 32, "random") for op in ("top_k_gating", "dispatch", "combine", "moe_layer")),
    ]
    return [OpCase(op, way, t, e, groups) for op, t, e, groups in spread for way in DIRECTIONS]


def shape_cases(shapes: Sequence[str]) -> list[OpCase]:
    """Every grouped op, and the layer, at the sizes of models."""
    forward, both = DIRECTIONS
    spread = [
        *(("gmm", forward, groups) for groups in ("balanced", "zipf", "one-hot")),
        ("tgmm", forward, "zipf"),
        *(("expert_ffn", both, groups) for groups in ("balanced", "zipf", "one-hot")),
        ("moe_layer", forward, "random"),
        ("moe_layer", both, "random"),
    ]
    cases = []
    for shape in shapes:
        s = SHAPES[shape]
        for op, direction, groups in spread:
            rows = s.tokens if op == "moe_layer" else s.tokens * s.top_k
            sizes = (rows, s.experts, groups, s.d_model, s.d_ff, s.top_k, s.gated, shape)
            cases.append(OpCase(op, direction, *sizes))
    return cases


def quick_cases() -> list[OpCase]:
    """One spread an op, and both numbers of experts for gmm."""
    return [case for case in all_cases() if case.groups in ("balanced", "random")]


def group_sizes(rows: int, experts: int, groups: str) -> tuple[int, ...]:
    """Rows of each expert, all rows spread.

    balanced: even; zipf: in proportion to 1/rank; one-hot: one expert takes all; empty-heavy: one
    expert in eight takes an even share.
    """
    rank = np.arange(experts)
    share = {
        "balanced": np.ones(experts),
        "zipf": 1.0 / (1 + rank),
        "one-hot": (rank == experts // 2).astype(float),
        "empty-heavy": (rank % 8 == 3).astype(float),
    }[groups]
    ends = np.round(np.cumsum(share / share.sum()) * rows).astype(int)
    return tuple(np.diff(ends, prepend=0).tolist())


def build(case: OpCase, dtype: Any = jnp.float32) -> Built:
    """Arrays and functions of the case; gradients are with respect to every floating argument."""
    built = _BUILDERS[case.op](case, dtype)
    count = len(built.arguments)
    theirs = built.outside if pytorch.is_present() else {}
    outside = {name: functools.partial(f, count) for name, f in theirs.items()}
    built = dataclasses.replace(built, outside=outside)
    if case.direction == "forward":
        return built
    leaves = jax.tree.leaves(jax.eval_shape(built.plain, *built.arguments))
    grads = [_normal(9 + i, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    whole = sum(jnp.issubdtype(a.dtype, jnp.integer) for a in built.arguments)

    def fitting(grad: jax.Array, out: jax.Array) -> jax.Array:
        """A dense baseline may have one result where the op has one an expert."""
        return grad if grad.shape == out.shape else grad[0]

    def both(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            out, pull = jax.vjp(functools.partial(f, *args[:whole]), *args[whole:count])
            given = jax.tree.unflatten(jax.tree.structure(out), args[count:])
            return out, pull(jax.tree.map(fitting, given, out))

        return run

    floating = sum(a.nbytes for a in built.arguments[whole:])
    return dataclasses.replace(
        built,
        arguments=(*built.arguments, *grads),
        ways={name: both(f) for name, f in built.ways.items()},
        plain=both(built.plain),
        flops=3 * built.flops,
        least_bytes=built.least_bytes + 2 * floating + sum(g.nbytes for g in grads),
    )


def _normal(seed: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def _sizes(case: OpCase) -> tuple[tuple[int, ...], jax.Array]:
    sizes = group_sizes(case.tokens, case.experts, case.groups)
    return sizes, jnp.asarray(sizes, jnp.int32)


def _nbytes(*arrays: Any) -> int:
    return sum(a.size * a.dtype.itemsize for a in arrays)


def _products() -> dict[str, Callable[..., Any]]:
    """Grouped products that others made: rows, matrices and group sizes to rows."""
    found: dict[str, Callable[..., Any]] = {"lax.ragged_dot": jax.lax.ragged_dot}
    if jax.default_backend() == "gpu" and importlib.util.find_spec("tokamax") is not None:
        found["tokamax.ragged_dot"] = importlib.import_module("tokamax").ragged_dot
    return found


def _gmm(case: OpCase, dtype: Any) -> Built:
    (m, d, f, e), (sizes, groups) = _shape(case), _sizes(case)
    x, w = _normal(0, (m, d), dtype), _normal(1, (e, d, f), dtype, d**-0.5)
    held = int(np.count_nonzero(sizes))

    def by(product: Callable[..., Any]) -> Callable[..., Any]:
        return lambda groups, x, w: product(x, w, groups)

    return Built(
        arguments=(groups, x, w),
        ways={
            OURS: by(gmm),
            **{name: by(product) for name, product in _products().items()},
            "one dense matmul": by(lambda x, w, _: x @ w[0]),
        },
        outside={"torch grouped_mm": pytorch.gmm},
        plain=by(lambda x, w, _: baselines.plain_gmm(sizes, x, w)),
        flops=2 * m * d * f,
        least_bytes=_nbytes(x) + _nbytes(w) * held // e + m * f * x.dtype.itemsize,
    )


def _tgmm(case: OpCase, dtype: Any) -> Built:
    (m, d, f, e), (sizes, groups) = _shape(case), _sizes(case)
    x, g = _normal(0, (m, d), dtype), _normal(1, (m, f), dtype)
    ways: dict[str, Any] = {
        OURS: lambda groups, x, g: tgmm(x, g, groups),
        "one dense matmul": lambda _, x, g: x.T @ g,
    }
    if case.direction == "forward":  # JAX has no second gradient of ragged_dot
        for name, product in _products().items():
            ways[f"gradient of {name}"] = functools.partial(baselines.ragged_outer, product, e)
    return Built(
        arguments=(groups, x, g),
        ways=ways,
        outside={"torch grouped_mm": pytorch.tgmm},
        plain=lambda _, x, g: baselines.plain_tgmm(sizes, x, g),
        flops=2 * m * d * f,
        least_bytes=_nbytes(x, g) + e * d * f * x.dtype.itemsize,
    )


def _expert_ffn(case: OpCase, dtype: Any) -> Built:
    (m, d, f, e), (sizes, groups) = _shape(case), _sizes(case)
    x, w_in = _normal(0, (m, d), dtype), _normal(1, (e, d, f), dtype, d**-0.5)
    weights = [w_in, _normal(2, (e, f, d), dtype, f**-0.5)]
    if case.gated:
        weights.append(_normal(3, (e, d, f), dtype, d**-0.5))
    held = int(np.count_nonzero(sizes))

    def ours(groups: Any, x: Any, w_in: Any, w_out: Any, *w_gate: Any) -> jax.Array:
        if not w_gate:
            return expert_ffn(x, w_in, w_out, groups)
        return expert_ffn(x, w_in, w_out, groups, activation="silu", w_gate=w_gate[0])

    def by(product: Callable[..., Any]) -> Callable[..., Any]:
        return lambda groups, *args: baselines.ffn(lambda x, w: product(x, w, groups), *args)

    return Built(
        arguments=(groups, x, *weights),
        ways={
            OURS: ours,
            **{f"by {name}": by(product) for name, product in _products().items()},
            "one dense FFN": by(lambda x, w, _: x @ w[0]),
        },
        outside={"torch grouped_mm": pytorch.expert_ffn},
        plain=by(lambda x, w, _: baselines.plain_gmm(sizes, x, w)),
        flops=2 * len(weights) * m * d * f,
        least_bytes=2 * _nbytes(x) + _nbytes(*weights) * held // e,
    )


def _top_k_gating(case: OpCase, dtype: Any) -> Built:
    logits = _normal(0, (case.tokens, case.experts), dtype)

    def ours(logits: jax.Array) -> Any:
        found = top_k_gating(logits, case.top_k)
        return found.weights, found.mean_probs, found.slots.astype(jnp.float32)

    return Built(
        arguments=(logits,),
        ways={
            OURS: ours,
            "lax.top_k, one-hot cumsum": functools.partial(baselines.one_hot_gating, case.top_k),
        },
        plain=functools.partial(baselines.plain_gating, case.top_k),
        flops=0,
        least_bytes=_nbytes(logits) + 2 * case.tokens * case.top_k * 4,
    )


def _dispatch(case: OpCase, dtype: Any) -> Built:
    rows = _rows(case)
    x, m = _normal(0, (case.tokens, case.d_model), dtype), rows.size
    return Built(
        arguments=(x,),
        ways={
            OURS: lambda x: dispatch(x, rows, m),
            "one-hot einsum": functools.partial(baselines.one_hot_dispatch, rows, m),
        },
        plain=lambda x: jnp.zeros((m, x.shape[1]), x.dtype).at[rows].set(x[:, None]),
        flops=0,
        least_bytes=_nbytes(x) * (1 + case.top_k),
    )


def _combine(case: OpCase, dtype: Any) -> Built:
    rows = _rows(case)
    y = _normal(0, (rows.size, case.d_model), dtype)
    weights = _normal(1, rows.shape, jnp.float32)
    return Built(
        arguments=(y, weights),
        ways={
            OURS: lambda y, weights: combine(y, rows, weights),
            "one-hot einsum": functools.partial(baselines.one_hot_combine, rows),
        },
        plain=lambda y, weights: jnp.sum(y[rows] * weights[..., None], axis=1).astype(y.dtype),
        flops=2 * y.size,
        least_bytes=_nbytes(y) + case.tokens * case.d_model * y.dtype.itemsize,
    )


def _moe_layer(case: OpCase, dtype: Any) -> Built:
    t, d, f, e = _shape(case)
    activation: Any = "silu" if case.gated else "relu"
    config = MoEConfig(d, f, e, top_k=case.top_k, gated=case.gated, activation=activation)
    x, params = _normal(0, (t, d), dtype), init(jax.random.key(1), config, dtype)
    names = ("gate", "w_in", "w_out", "w_gate")[: 4 if case.gated else 3]
    weights = tuple(params[name] for name in names)
    # Which experts a token uses is found once: ties apart, all ways agree about it.
    logits = jnp.dot(x, params["gate"], preferred_element_type=jnp.float32)
    experts = np.asarray(jax.lax.top_k(logits, case.top_k)[1])

    def ours(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return apply(dict(zip(names, weights, strict=True)), config, x[None])[0][0]

    gshard = functools.partial(baselines.gshard_layer, case.top_k, 1.25)
    others = {
        "GShard einsum, capacity 1.25": functools.partial(gshard, t),
        "GShard einsum, capacity 1.25, groups of 1024": functools.partial(gshard, min(t, 1024)),
    }
    if case.shape is not None:
        others = {
            f"sorted, by {name}": functools.partial(baselines.sorted_layer, product, case.top_k)
            for name, product in _products().items()
        }
    return Built(
        arguments=(x, *weights),
        ways={OURS: ours, **others},
        outside={"torch grouped_mm": functools.partial(pytorch.layer, case.top_k)},
        plain=functools.partial(baselines.plain_layer, experts),
        flops=2 * t * d * e + case.top_k * 2 * (len(names) - 1) * t * d * f,
        least_bytes=2 * _nbytes(x) + _nbytes(*weights),
    )


def _shape(case: OpCase) -> tuple[int, int, int, int]:
    return case.tokens, case.d_model, case.d_ff, case.experts


def _rows(case: OpCase) -> jax.Array:
    order = np.random.default_rng(0).permutation(case.tokens * case.top_k)
    return jnp.asarray(order.reshape(case.tokens, case.top_k), jnp.int32)


_BUILDERS: dict[str, Callable[[OpCase, Any], Built]] = {
    "gmm": _gmm,
    "tgmm": _tgmm,
    "expert_ffn": _expert_ffn,
    "top_k_gating": _top_k_gating,
    "dispatch": _dispatch,
    "combine": _combine,
    "moe_layer": _moe_layer,
}
OPS = tuple(_BUILDERS)
