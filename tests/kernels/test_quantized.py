"""Quantised experts: as good as what they stand for, frozen, and never NaN where a row is zero."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import Quantized, dequantize, expert_ffn, gmm, quantize, quantized
from taskmoe.kernels.tiling import Tiling
from taskmoe.tests.kernels import support

FAST = ["xla", "ragged_dot", "mosaic"]
KINDS = ["int8", "float8_e4m3fn"]
#: (M, K, N, block, group sizes): sizes that nothing divides, and several blocks a column.
SHAPES = [
    (50, 61, 139, None, [10, 0, 25, 3]),
    (50, 256, 384, 128, [10, 0, 25, 3]),
]


@functools.cache
def products(implementation: str, transpose_rhs: bool = False, tiling: Any = None) -> Any:
    """gmm and its gradient for the rows, as one function of (rows, matrices, gradient, sizes)."""

    def f(lhs: Any, rhs: Any, grad: Any, sizes: Any) -> Any:
        def run(lhs: Any) -> Any:
            options: Any = {"tiling": tiling, "implementation": implementation}
            return gmm(lhs, rhs, sizes, transpose_rhs=transpose_rhs, **options)

        out, pull = jax.vjp(run, lhs)
        return {"out": out, "d lhs": pull(grad)[0]}

    return f


@functools.cache
def networks(implementation: str, tiling: Tiling | None = None) -> Any:
    """expert_ffn, gated and biased, and its gradients for rows and biases."""

    def f(x: Any, matrices: Any, biases: Any, grad: Any, sizes: Any) -> Any:
        w_in, w_out, w_gate = matrices

        def run(x: Any, biases: Any) -> Any:
            return expert_ffn(
                x, w_in, w_out, sizes, activation="silu", w_gate=w_gate,
                tiling=tiling, implementation=implementation, **biases,
            )  # fmt: skip

        out, pull = jax.vjp(run, x, biases)
        return {"out": out, "gradients": pull(grad)}

    return f


def matrices(seed: int, shape: tuple[int, ...], kind: str, block: int | None) -> Quantized:
    return quantize(support.normal(seed, shape) * shape[1] ** -0.5, kind, block)


def check(f: Any, plain: Any, implementation: str, first: Any, frozen: Any, others: Any) -> Any:
    """Against float64, with NaN in rows of none; plain is to dequantise, then multiply."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda w: dequantize(w, jnp.float64), frozen, is_leaf=is_quantized)
        exact = jax.tree.map(np.asarray, exact)
    truth = support.in_float64(plain, first, exact, *others)
    dense = jax.tree.map(lambda w: dequantize(w, first.dtype), frozen, is_leaf=is_quantized)
    base = support.call("reference", plain, first, dense, *others)
    tail = int(np.sum(others[-1]))
    first = support.poison_tail(first, tail)
    ours = support.call(implementation, f, first, frozen, *others)
    support.assert_as_good(ours, base, truth)
    assert not ours["out"][tail:].any()
    return ours, base, truth


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def product_arguments(
    shape: Any, kind: str, dtype: Any, transpose_rhs: bool = False
) -> tuple[Any, ...]:
    m, k, n, block, sizes = shape
    held = (len(sizes), n, k) if transpose_rhs else (len(sizes), k, n)
    grad = support.normal(2, (m, n), dtype)
    frozen = matrices(1, held, kind, block)
    return support.normal(0, (m, k), dtype), frozen, (grad, jnp.asarray(sizes, jnp.int32))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "shape"), [(jnp.float32, SHAPES[0]), (jnp.bfloat16, SHAPES[1])])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_gmm_and_its_gradient(
    implementation: str, kind: str, dtype: Any, shape: Any, transpose_rhs: bool
) -> None:
    args = product_arguments(shape, kind, dtype, transpose_rhs)
    plain = products("reference", transpose_rhs)
    check(products(implementation, transpose_rhs), plain, implementation, *args)


@pytest.mark.parametrize("tiling", [Tiling(16, 128, 128), Tiling(16, 256, 256)])
@pytest.mark.parametrize("block", [128, 384])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_blocks_of_scales_and_of_the_kernel_need_not_agree(
    tiling: Tiling, block: int, transpose_rhs: bool
) -> None:
    args = product_arguments((50, 384, 384, block, [10, 0, 25]), "int8", jnp.float32, transpose_rhs)
    ours, plain = (
        products(i, transpose_rhs, t) for i, t in (("mosaic", tiling), ("reference", None))
    )

    def forward(f: Any) -> Any:
        return lambda *args: {"out": f(*args)["out"]}

    check(forward(ours), forward(plain), "mosaic", *args)


def network_arguments(kind: str, dtype: Any, blocks: Any = (None, None)) -> tuple[Any, ...]:
    m, d, f, sizes = (50, 24, 130, [10, 0, 25, 3]) if blocks[0] is None else (40, 256, 384, [9, 20])
    e = len(sizes)
    shapes = ((e, d, f), blocks[0]), ((e, f, d), blocks[1]), ((e, d, f), blocks[0])
    frozen = [matrices(1 + i, shape, kind, block) for i, (shape, block) in enumerate(shapes)]
    names = {"b_in": f, "b_out": d, "b_gate": f}
    biases = {n: support.normal(4 + i, (e, names[n]), dtype) for i, n in enumerate(names)}
    grad = support.normal(9, (m, d), dtype)
    x = support.normal(0, (m, d), dtype)
    return x, frozen, (biases, grad, jnp.asarray(sizes, jnp.int32))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "blocks"), [(jnp.float32, (None, None)), (jnp.bfloat16, (128, 128))]
)
def test_expert_ffn_and_its_gradients(
    implementation: str, kind: str, dtype: Any, blocks: Any
) -> None:
    args = network_arguments(kind, dtype, blocks)
    check(networks(implementation), networks("reference"), implementation, *args)


@pytest.mark.parametrize(("blocks", "hidden"), [((None, None), 128), ((128, 128), 256)])
def test_hidden_units_cut_with_a_tail(blocks: Any, hidden: int) -> None:
    x, *others = network_arguments("int8", jnp.float32, blocks)
    tiling = Tiling(16, x.shape[1], hidden)
    check(networks("mosaic", tiling), networks("reference"), "mosaic", x, *others)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("fault", ["scales of another column", "values off by one", "lost group"])
def test_a_planted_fault_is_caught(implementation: str, fault: str) -> None:
    first, frozen, (grad, sizes) = product_arguments(SHAPES[1], "int8", jnp.float32)
    f, plain = products(implementation), products("reference")
    _, base, truth = check(f, plain, implementation, first, frozen, (grad, sizes))
    values, scales = frozen.values, frozen.scales
    if fault == "scales of another column":
        scales = jnp.roll(scales, 1, axis=-1)
    elif fault == "values off by one":
        values = values.at[0, 0].add(1)
    else:
        sizes = sizes.at[-1].set(0)
    wrong = support.call(implementation, f, first, Quantized(values, scales), grad, sizes)
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good(wrong, base, truth)


def test_values_are_the_nearest_and_scales_use_all_of_them() -> None:
    w = support.normal(0, (3, 256, 40)).at[:, :, 5].set(0)
    for kind, block in (("int8", None), ("int8", 128), ("float8_e4m3fn", 128)):
        q = quantize(w, kind, block)
        assert q.scales.shape == (3, 256 // (block or 256), 1, 40)
        assert not np.asarray(q.scales)[..., 5].any()
        assert not np.asarray(q.values, np.float32)[..., 5].any()
        cut = np.abs(np.asarray(w)).reshape(3, q.blocks, -1, 40).max(2, keepdims=True)
        error = np.abs(np.asarray(dequantize(q)) - np.asarray(w)).reshape(3, q.blocks, -1, 40)
        half = 0.5 / 127 if kind == "int8" else 2.0**-4  # of a step; of a value, with 3 bits
        assert (error <= half * cut * 1.001).all()
        assert (error.max(2, keepdims=True) >= 0.2 * half * cut).all()


@functools.cache
def rounded_rows(implementation: str, activations: str | None, tiling: Any = None) -> Any:
    def f(lhs: Any, rhs: Any, grad: Any, sizes: Any) -> Any:
        held = Quantized(rhs.values, rhs.scales, activations)
        return products(implementation, False, tiling)(lhs, held, grad, sizes)

    return f


def rounded(x: np.ndarray, blocks: int) -> np.ndarray:
    """Rows in int8 with a scale a row and block, by hand."""
    cut = x.astype(np.float64).reshape(x.shape[0], blocks, -1)
    scale = np.abs(cut).max(2, keepdims=True) / 127
    with np.errstate(invalid="ignore"):
        return np.where(scale > 0, np.round(cut / scale), 0).reshape(x.shape) * np.repeat(
            scale[..., 0], x.shape[1] // blocks, axis=1
        )


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_quantised_on_the_way(implementation: str, shape: Any) -> None:
    check_rounded_rows(implementation, shape)


@pytest.mark.parametrize(("depth", "block"), [(300, None), (384, 128), (384, None)])
def test_rows_are_quantised_where_the_kernel_cuts_them(depth: int, block: int | None) -> None:
    shape = (50, depth, 200, block, [20, 0, 25])
    check_rounded_rows("mosaic", shape, Tiling(32, 256, 128))


def check_rounded_rows(implementation: str, shape: Any, tiling: Tiling | None = None) -> None:
    lhs, rhs, (grad, sizes) = product_arguments(shape, "int8", jnp.float32)
    lhs = lhs.at[3].set(0).at[11, : lhs.shape[1] // 2].set(0)  # zeros: scale 0, and no NaN
    f = rounded_rows(implementation, "int8", tiling)
    tail = int(np.sum(sizes))
    ours = support.call(implementation, f, support.poison_tail(lhs, tail), rhs, grad, sizes)
    want, at = np.zeros(ours["out"].shape), 0
    x, held = rounded(np.asarray(lhs), rhs.blocks), np.asarray(dequantize(rhs), np.float64)
    for e, size in enumerate(np.asarray(sizes)):
        want[at : at + size] = x[at : at + size] @ held[e]
        at += size
    np.testing.assert_allclose(ours["out"], want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert not ours["out"][3].any()
    unrounded = support.call("reference", rounded_rows("reference", None), lhs, rhs, grad, sizes)
    assert np.abs(unrounded["out"] - want).max() > 1e-3  # the rounding is there
    np.testing.assert_allclose(ours["d lhs"], unrounded["d lhs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", FAST)
def test_expert_ffn_over_quantised_rows(implementation: str) -> None:
    x, frozen, (biases, grad, sizes) = network_arguments("int8", jnp.float32)
    x = x.at[0].set(0)
    frozen = [Quantized(w.values, w.scales, "int8") for w in frozen]
    ours = support.call(implementation, networks(implementation), x, frozen, biases, grad, sizes)
    want = support.call("reference", networks("reference"), x, frozen, biases, grad, sizes)["out"]
    # A hidden unit that lies between two int8 values may go to either.
    np.testing.assert_allclose(ours["out"], want, rtol=0, atol=0.01 * np.abs(want).max())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))
    dense = [dequantize(w) for w in frozen]
    near = support.call("reference", networks("reference"), x, dense, biases, grad, sizes)
    for have, want in zip(jax.tree.leaves(ours), jax.tree.leaves(near), strict=True):
        assert np.abs(have - want).max() <= 0.05 * np.abs(want).max()
    assert np.abs(ours["out"] - near["out"]).max() > 1e-4


def test_frozen_matrices_get_no_gradient() -> None:
    lhs, rhs, (_, sizes) = product_arguments(SHAPES[0], "int8", jnp.float32)

    def loss(lhs: Any, rhs: Any) -> Any:
        return jnp.sum(gmm(lhs, rhs, sizes) ** 2)

    grads = jax.grad(loss, argnums=(0, 1), allow_int=True)(lhs, rhs)
    assert grads[0].any()
    assert grads[1].values.dtype == jax.dtypes.float0
    assert not grads[1].scales.any()
    with pytest.raises(TypeError, match="int8"):
        jax.grad(loss, argnums=1)(lhs, rhs)


def test_a_shard_holds_some_of_the_groups() -> None:
    lhs, rhs, (_, sizes) = product_arguments(SHAPES[1], "int8", jnp.float32)
    own = jax.tree.map(lambda x: x[2:], rhs)
    with support.running("mosaic"):
        out = np.asarray(gmm(lhs, own, sizes, group_offset=2, implementation="mosaic"))
    want = np.array(gmm(lhs, rhs, sizes, implementation="reference"))
    want[:10] = 0
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"w": jnp.zeros(3)}, ValueError, r"w must be matrices \[..., K, N\].*got \[3\]"),
        ({"w": jnp.zeros((2, 3), jnp.int8)}, TypeError, "w must be bfloat16 or float32, got int8"),
        ({"dtype": "int4"}, TypeError, "dtype must be int8 or float8_e4m3fn, got 'int4'"),
        ({"dtype": "foo"}, TypeError, "dtype must be int8 or float8_e4m3fn, got 'foo'"),
        ({"block": "a"}, ValueError, "block must be an int of at least 1, got 'a'"),
        ({"block": 64}, ValueError, "block must be K=256 or a multiple of 128.*got 64"),
        ({"block": 384}, ValueError, "block must be K=256 or a multiple of 128.*got 384"),
        ({"activations": "int4"}, ValueError, "activations must be None or 'int8', got 'int4'"),
        (
            {"dtype": "float8_e4m3fn", "activations": "int8"},
            ValueError,
            "activations must be None for matrices of float8_e4m3fn",
        ),
    ],
)
def test_errors_of_quantize(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(**({"w": jnp.ones((2, 256, 6))} | arguments))


def test_errors_of_dequantize() -> None:
    with pytest.raises(TypeError, match="w must be Quantized, got "):
        dequantize(jnp.ones((2, 256, 6)))
    with pytest.raises(TypeError, match="dtype must be bfloat16 or float16 or float32, got 'foo'"):
        dequantize(quantize(jnp.ones((2, 256, 6))), "foo")


def test_errors_of_the_ops() -> None:
    lhs, sizes = jnp.zeros((4, 256)), jnp.zeros(2, jnp.int32)
    good = quantize(jnp.ones((2, 256, 6)))
    with pytest.raises(ValueError, match=r"rhs must have shape \[E, 256, N\], got \[2, 128, 6\]"):
        gmm(lhs, quantize(jnp.ones((2, 128, 6))), sizes)
    with pytest.raises(TypeError, match=r"rhs\.values must be int8 or float8_e4m3fn, got float32"):
        gmm(lhs, Quantized(jnp.ones((2, 256, 6)), good.scales), sizes)
    with pytest.raises(TypeError, match=r"rhs\.scales must be float32, got bfloat16"):
        gmm(lhs, Quantized(good.values, good.scales.astype(jnp.bfloat16)), sizes)
    for wrong in ((2, 1, 6), (2, 3, 1, 6), (2, 4, 1, 6), (2, 1, 1, 5)):
        with pytest.raises(ValueError, match=r"rhs\.scales must be \[2, 'K/block', 1, 6\] with a"):
            gmm(lhs, Quantized(good.values, jnp.ones(wrong)), sizes)
    rounding = quantize(jnp.ones((2, 6, 256)), activations="int8")
    with pytest.raises(ValueError, match=r"rhs\.activations must be None with transpose_rhs"):
        gmm(lhs, rounding, sizes, transpose_rhs=True)
    down = jnp.ones((2, 6, 256))
    with pytest.raises(TypeError, match="must all be Quantized, or none of them"):
        expert_ffn(lhs, good, down, sizes)
    with pytest.raises(ValueError, match="tiling must be None where matrices quantise rows"):
        expert_ffn(lhs, good, rounding, sizes, tiling=Tiling(16, 256, 6))


def test_a_fault_in_rounding_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(w: Any, rows: jax.Array) -> Any:
        found = quantized.rows_to_meet(w, rows)
        return quantized.QuantizedRows(found.values, found.scales / 2)

    monkeypatch.setattr("taskmoe.kernels.grouped_matmul.rows_to_meet", halved)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_rows_are_quantised_on_the_way("xla", SHAPES[0])
    monkeypatch.undo()
    jax.clear_caches()
