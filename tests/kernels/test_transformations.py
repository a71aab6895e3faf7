"""Every public op under every transformation, in every implementation: the same as without it.

An op is in by standing in OPS, which must hold all that `taskmoe.kernels` exports.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskmoe.kernels as ops
from taskmoe.tests.kernels import support

T, D, F, E, K = 12, 8, 16, 3, 2
M = T * K
SIZES = np.array([7, 0, 11], np.int32)  # an empty group, and rows of none
ROWS = np.random.default_rng(0).permutation(M).reshape(T, K).astype(np.int32)


class Case(NamedTuple):
    """run(implementation, *arrays) of floating arrays with these shapes."""

    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


def gating(implementation: Any, logits: Any) -> Any:
    found = ops.top_k_gating(logits, K, implementation=implementation)
    return found.weights, found.mean_probs, found.z_loss


def planned(implementation: Any, logits: Any, x: Any) -> Any:
    found = ops.top_k_gating(logits, K, implementation=implementation)
    plan = ops.row_plan(found)
    return ops.dispatch(x, plan.rows, plan.num_rows, implementation=implementation)


def ffn(implementation: Any, x: Any, w_in: Any, w_out: Any, w_gate: Any) -> Any:
    options: Any = {"activation": "silu", "w_gate": w_gate, "implementation": implementation}
    return ops.expert_ffn(x, w_in, w_out, SIZES, **options)


def given(implementation: Any, weights: Any) -> Any:
    del implementation  # it has one
    found = ops.given_gating(ROWS % E, weights, E)
    return found.weights, found.mean_probs


def frozen(implementation: Any, x: Any, w: Any) -> Any:
    """Rows get their gradient, what was quantised none."""
    return ops.gmm(x, ops.quantize(w), SIZES, implementation=implementation)


OPS = {
    "given_gating": Case(given, ((T, K),)),
    "top_k_gating": Case(gating, ((T, E),)),
    "row_plan": Case(planned, ((T, E), (T, D))),
    "dispatch": Case(lambda i, x: ops.dispatch(x, ROWS, M, implementation=i), ((T, D),)),
    "combine": Case(lambda i, y, w: ops.combine(y, ROWS, w, implementation=i), ((M, D), (T, K))),
    "quantize": Case(frozen, ((M, D), (E, D, F))),
    "dequantize": Case(lambda i, w: ops.dequantize(ops.quantize(w)), ((E, D, F),)),
    "gmm": Case(lambda i, x, w: ops.gmm(x, w, SIZES, implementation=i), ((M, D), (E, D, F))),
    "tgmm": Case(lambda i, x, g: ops.tgmm(x, g, SIZES, implementation=i), ((M, D), (M, F))),
    "expert_ffn": Case(ffn, ((M, D), (E, D, F), (E, F, D), (E, D, F))),
}


def total_of(op: str, implementation: Any) -> Callable[..., Any]:
    """A scalar that all results of floats go into."""

    def total(*args: Any) -> Any:
        leaves = jax.tree.leaves(OPS[op].run(implementation, *args))
        return sum(jax.numpy.sum(x**3) for x in leaves if x.dtype == np.float32)

    return total


@pytest.mark.parametrize("op", ["dispatch", "top_k_gating", "expert_ffn"])
def test_forward_mode_and_second_derivatives_want_the_reference(op: str) -> None:
    args = first(stacked(op))
    total = total_of(op, "xla")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(total, args, args)
    with pytest.raises(TypeError, match="forward mode, want implementation='reference'"):
        jax.grad(lambda *a: jax.numpy.sum(jax.grad(total)(*a) ** 2))(*args)
    total = total_of(op, "reference")
    _, along = jax.jvp(total, args, args)
    slopes = jax.grad(total, tuple(range(len(args))))(*args)
    np.testing.assert_allclose(
        along, sum(np.vdot(g, x) for g, x in zip(slopes, args, strict=True)), rtol=1e-4
    )
    jax.jvp(jax.grad(total), args, args)


@pytest.mark.parametrize("op", ["gmm", "tgmm"])
def test_products_have_second_derivatives(op: str) -> None:
    args = first(stacked(op))

    def second(implementation: Any) -> Any:
        total = total_of(op, implementation)
        return jax.grad(lambda *a: jax.numpy.sum(jax.grad(total)(*a) ** 2), (0, 1))(*args)

    for have, want in zip(second("xla"), second("reference"), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_every_op_is_here() -> None:
    others = {"Gating", "Quantized", "ROUTERS", "Router", "RowPlan", "Tiling", "for_chip"}
    assert set(ops.__all__) - others == set(OPS)


def value_and_gradients(op: str, implementation: Any) -> Callable[..., Any]:
    """Results, and gradients of a scalar that all of them go into."""

    def run(*args: Any) -> Any:
        out, pull = jax.vjp(functools.partial(OPS[op].run, implementation), *args)
        return out, pull(jax.tree.map(jnp.cos, out))

    return run


@functools.cache
def stacked(op: str) -> tuple[Any, ...]:
    """Three sets of arguments, one behind the other."""
    return tuple(0.3 * support.normal(i, (3, *shape)) for i, shape in enumerate(OPS[op].shapes))


def first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


@functools.cache
def wanted(op: str) -> Any:
    """By the definition, one set after the other."""
    run = jax.jit(value_and_gradients(op, "reference"))
    each = [run(*(x[i] for x in stacked(op))) for i in range(3)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def plain(f: Any, args: Any) -> Any:
    return f(*first(args))


def with_numpy(f: Any, args: Any) -> Any:
    return f(*jax.tree.map(np.asarray, first(args)))


def vmapped(f: Any, args: Any) -> Any:
    return jax.vmap(f)(*args)


def vmapped_twice(f: Any, args: Any) -> Any:
    return first(jax.jit(jax.vmap(jax.vmap(f)))(*(x[None] for x in args)))


def vmapped_along_the_first(f: Any, args: Any) -> Any:
    axes = (0, *[None] * (len(args) - 1))
    return first(jax.vmap(f, axes)(args[0], *first(args[1:])))


def scanned(f: Any, args: Any) -> Any:
    return jax.jit(lambda args: jax.lax.scan(lambda _, xs: (None, f(*xs)), None, args)[1])(args)


def recomputed(f: Any, args: Any) -> Any:
    return jax.jit(jax.checkpoint(f))(*first(args))


def with_strict_promotion(f: Any, args: Any) -> Any:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        return f(*first(args))


def in_64_bit_mode(f: Any, args: Any) -> Any:
    with jax.enable_x64(True):
        return jax.jit(f)(*first(args))


def without_jit(f: Any, args: Any) -> Any:
    with jax.disable_jit():
        return f(*first(args))


ANYWHERE = [
    plain, with_numpy, vmapped, vmapped_twice, vmapped_along_the_first, scanned, recomputed,
    with_strict_promotion, in_64_bit_mode, without_jit,
]  # fmt: skip
#: Of the interpreter's minutes only what differs for a kernel.
OF_KERNELS = [vmapped, scanned, with_strict_promotion, in_64_bit_mode]


def check(op: str, implementation: Any, transformation: Any) -> None:
    with support.running(implementation):
        have = transformation(value_and_gradients(op, implementation), stacked(op))
        have = jax.tree.map(np.asarray, have)
    whole = transformation in (vmapped, vmapped_twice, scanned)
    want = wanted(op) if whole else first(wanted(op))
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = dict(jax.tree_util.tree_leaves_with_path(have))[path]
        name = jax.tree_util.keystr(path)
        assert (got.dtype, got.shape) == (leaf.dtype, leaf.shape), name
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("transformation", ANYWHERE, ids=lambda t: t.__name__)
@pytest.mark.parametrize("implementation", ["xla", "ragged_dot"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_transforms_as_jax_users_expect(
    op: str, implementation: str, transformation: Any
) -> None:
    check(op, implementation, transformation)


@pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None, reason="tokamax, the extra [gpu], is not installed"
)
def test_tokamax_transforms_as_jax_users_expect() -> None:
    for op in OPS:
        for transformation in ANYWHERE:
            check(op, "tokamax", transformation)


@pytest.mark.parametrize("op", OPS)
def test_a_definition_minds_no_settings(op: str) -> None:
    for transformation in (with_numpy, with_strict_promotion, in_64_bit_mode):
        check(op, "reference", transformation)


@support.on_cpu
@pytest.mark.parametrize("transformation", OF_KERNELS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("op", OPS)
def test_a_kernel_transforms_as_jax_users_expect(op: str, transformation: Any) -> None:
    check(op, "mosaic", transformation)


def test_a_wrong_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(f: Any, args: Any) -> Any:
        return jax.vmap(f)(*(x[::-1] for x in args))

    monkeypatch.setattr("taskmoe.tests.kernels.test_transformations.vmapped", shuffled)
    with pytest.raises(AssertionError):
        check("gmm", "xla", shuffled)
