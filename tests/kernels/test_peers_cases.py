"""Cases that other libraries test, written anew: which groups are empty, and serving's shapes.

tokamax: every pattern of empty groups among eight. tpu-inference: products of decoding and prefill
with 8-bit matrices, per channel and in blocks, on devices that hold some of the experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import dequantize, expert_ffn, gmm, quantize, tgmm
from taskmoe.tests.kernels import support

FAST = ["xla", "ragged_dot", "mosaic"]
M, K, N, GROUPS = 64, 16, 24, 8


def group_sizes(pattern: int, rng: np.random.Generator, total: int = M) -> np.ndarray:
    """Sizes whose sum is total, or 0 where all are empty: bit i says that group i is."""
    held = np.array([not pattern >> i & 1 for i in range(GROUPS)])
    if not held.any():
        return np.zeros(GROUPS, np.int32)
    return rng.multinomial(total - held.sum(), held / held.sum()).astype(np.int32) + held


@functools.cache
def both(implementation: str, kind: str | None) -> Any:
    """gmm and tgmm, jitted once for all patterns."""

    def f(lhs: Any, rhs: Any, grad: Any, sizes: Any) -> Any:
        held = rhs if kind is None else quantize(rhs, kind)
        out = gmm(lhs, held, sizes, implementation=implementation)
        return out, tgmm(lhs, grad, sizes, implementation=implementation)

    return jax.jit(f)


def wrong_patterns(implementation: str, kind: str | None, patterns: Any) -> list[int]:
    """Patterns of empty groups whose products are not those of the groups one by one."""
    rng = np.random.default_rng(0)
    lhs, rhs, grad = (
        support.normal(i, shape) for i, shape in enumerate(((M, K), (GROUPS, K, N), (M, N)))
    )
    held = np.asarray(rhs if kind is None else dequantize(quantize(rhs, kind)))
    wrong = []
    for pattern in patterns:
        sizes = group_sizes(pattern, rng)
        found = both(implementation, kind)(lhs, rhs, grad, jnp.asarray(sizes))
        out, out_t = (np.asarray(x) for x in found)
        want, want_t, at = np.zeros((M, N)), np.zeros((GROUPS, K, N)), 0
        for g, size in enumerate(sizes):
            rows = slice(at, at + size)
            want[rows] = np.asarray(lhs)[rows] @ held[g]
            want_t[g] = np.asarray(lhs)[rows].T @ np.asarray(grad)[rows]
            at += size
        close = np.allclose(out, want, atol=1e-4) and np.allclose(out_t, want_t, atol=1e-4)
        exact = not out[at:].any() and not out_t[sizes == 0].any()
        if not (close and exact):
            wrong.append(pattern)
    return wrong


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("kind", [None, "int8"])
def test_every_pattern_of_empty_groups(implementation: str, kind: str | None) -> None:
    step = 15 if implementation == "mosaic" else 1  # the interpreter takes its time
    with support.running(implementation):
        assert wrong_patterns(implementation, kind, range(0, 256, step)) == []


def test_a_wrong_pattern_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = both("xla", None)

    def shifted(*_: Any) -> Any:  # every group's rows go to the one behind it
        return lambda lhs, rhs, grad, sizes: run(lhs, rhs, grad, jnp.roll(sizes, 1))

    monkeypatch.setitem(globals(), "both", shifted)
    assert wrong_patterns("xla", None, range(256)) == list(range(255))  # the last has no rows


#: (tokens, experts, held from, held, K, N): decoding, prefill, and a shard of the experts.
SERVING = [
    (16, 8, 0, 8, 256, 384),
    (128, 8, 2, 4, 256, 256),
    (100, 16, 12, 4, 128, 130),
]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("case", SERVING)
@pytest.mark.parametrize("weights", [None, ("int8", None), ("int8", 128), ("float8_e4m3fn", 128)])
def test_products_of_serving(implementation: str, case: Any, weights: Any) -> None:
    m, groups, first, held, k, n = case
    rng = np.random.default_rng(m)
    sizes = jnp.asarray(rng.multinomial(m, rng.dirichlet(np.ones(groups))), jnp.int32)
    lhs = support.normal(0, (m, k), jnp.bfloat16)
    dense = (support.normal(1, (held, k, n)) / k**0.5).astype(jnp.bfloat16)
    rhs: Any = dense if weights is None else quantize(dense, *weights)
    plain = dense if weights is None else dequantize(rhs, jnp.bfloat16)

    def f(implementation: str) -> Any:
        def run(lhs: Any, rhs: Any) -> Any:
            options: Any = {"group_offset": first, "implementation": implementation}
            return gmm(lhs, rhs, sizes, **options)

        return run

    with jax.enable_x64(True):
        exact = np.asarray(dense if weights is None else dequantize(rhs, jnp.float64), np.float64)
    truth = support.in_float64(f("reference"), lhs, exact)
    base = support.call("reference", f("reference"), lhs, plain)
    support.assert_as_good(support.call(implementation, f(implementation), lhs, rhs), base, truth)


@pytest.mark.parametrize("implementation", ["xla", "mosaic"])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_a_step_of_serving(implementation: str, kind: str) -> None:
    m, experts, d, f = 16, 8, 128, 256
    rng = np.random.default_rng(1)
    sizes = jnp.asarray(rng.multinomial(m, np.ones(experts) / experts), jnp.int32)
    x = support.normal(0, (m, d), jnp.bfloat16)
    shapes = (experts, d, f), (experts, f, d), (experts, d, f)
    held = [
        quantize(support.normal(1 + i, s) / s[1] ** 0.5, kind, 128) for i, s in enumerate(shapes)
    ]

    def run(implementation: str) -> Any:
        def f(x: Any, w_in: Any, w_out: Any, w_gate: Any) -> Any:
            options: Any = {"activation": "silu", "implementation": implementation}
            return expert_ffn(x, w_in, w_out, sizes, w_gate=w_gate, **options)

        return f

    with jax.enable_x64(True):
        exact = [np.asarray(dequantize(w, jnp.float64)) for w in held]
    truth = support.in_float64(run("reference"), x, *exact)
    plain = [dequantize(w, jnp.bfloat16) for w in held]
    base = support.call("reference", run("reference"), x, *plain)
    support.assert_as_good(support.call(implementation, run(implementation), x, *held), base, truth)
