"""gmm and tgmm: every implementation against float64, zeros where zeros are due, clear errors."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from taskmoe.kernels import (
    block_products,
    for_chip,
    gmm,
    gmm_kernel,
    tgmm,
    tgmm_kernel,
)
from taskmoe.kernels.group_visits import Visit
from taskmoe.kernels.groups import check_groups, group_bounds
from taskmoe.kernels.tiling import Tiling
from taskmoe.tests.kernels import support

#: (M, K, N, group sizes): empty groups, one that takes all, single rows, sum < M, primes.
SHAPES = [
    (50, 12, 20, [10, 0, 25, 3, 7]),
    (131, 61, 139, [0, 131, 0]),
    (300, 130, 260, [140, 1, 0, 97]),
    (17, 128, 256, [0, 0]),
]
FAST = ["xla", "ragged_dot", "mosaic"]


@functools.cache
def both_gradients(implementation: str, transpose_rhs: bool = False) -> Any:
    """Output and gradients of gmm and of tgmm as one function of (lhs, rhs, d_out, sizes)."""

    def f(lhs: Any, rhs: Any, d_out: Any, d_rhs: Any, sizes: Any) -> Any:
        def product(lhs: Any, rhs: Any) -> Any:
            return gmm(lhs, rhs, sizes, transpose_rhs=transpose_rhs, implementation=implementation)

        def outer(lhs: Any, grad: Any) -> Any:
            return tgmm(lhs, grad, sizes, implementation=implementation)

        out, pull = jax.vjp(product, lhs, rhs)
        out_t, pull_t = jax.vjp(outer, lhs, d_out)
        return {"gmm": out, "d gmm": pull(d_out), "tgmm": out_t, "d tgmm": pull_t(d_rhs)}

    return f


def operands(m: int, k: int, n: int, sizes: Any, dtype: Any, transpose_rhs: bool = False) -> Any:
    matrix = (len(sizes), n, k) if transpose_rhs else (len(sizes), k, n)
    return (
        support.normal(0, (m, k), dtype),
        support.normal(1, matrix, dtype),
        support.normal(2, (m, n), dtype),
        support.normal(3, (len(sizes), k, n), dtype),
        jnp.asarray(sizes, jnp.int32),
    )


def check(implementation: str, args: Any, transpose_rhs: bool = False) -> None:
    """Against float64, with NaN in every row that no group owns."""
    truth = support.in_float64(both_gradients("reference", transpose_rhs), *args)
    plain = support.call("reference", both_gradients("reference", transpose_rhs), *args)
    lhs, rhs, d_out, d_rhs, sizes = args
    tail = int(np.sum(sizes))
    args = (support.poison_tail(lhs, tail), rhs, support.poison_tail(d_out, tail), d_rhs, sizes)
    ours = support.call(implementation, both_gradients(implementation, transpose_rhs), *args)
    support.assert_as_good(ours, plain, truth)
    assert not ours["gmm"][tail:].any()


@pytest.mark.as_shipped
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("dtype", "shape"), [*((jnp.float32, s) for s in SHAPES), (jnp.bfloat16, SHAPES[2])]
)
def test_forward_and_gradients(implementation: str, dtype: Any, shape: Any) -> None:
    if (implementation, dtype, shape) == ("ragged_dot", jnp.float32, SHAPES[2]):
        pytest.skip("XLA for CPU sums over all groups at once, which rounds otherwise")
    m, k, n, sizes = shape
    check(implementation, operands(m, k, n, sizes, dtype))


@support.on_hopper
@pytest.mark.parametrize(
    ("m", "k", "n", "sizes"),
    [
        (300, 128, 192, [140, 1, 0, 97]),
        (50, 64, 128, [0, 0]),
        (1031, 256, 320, [0, 513, 64, 0, 0, 300, 1, 2, 0]),
    ],
)
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_forward_and_gradients_on_hopper(
    m: int, k: int, n: int, sizes: list[int], transpose_rhs: bool
) -> None:
    check("mosaic_gpu", operands(m, k, n, sizes, jnp.bfloat16, transpose_rhs), transpose_rhs)


def test_group_sizes_may_be_a_list_and_not_a_number() -> None:
    lhs, grad = support.normal(0, (9, 4)), support.normal(1, (9, 3))
    for sizes in ([5, 4], np.array([5, 4])):
        np.testing.assert_array_equal(tgmm(lhs, grad, sizes), tgmm(lhs, grad, jnp.array([5, 4])))
    with pytest.raises(ValueError, match="group_sizes must have shape"):
        tgmm(lhs, grad, 9)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31 - 2, -(2**31)])
def test_an_offset_beyond_all_groups_gives_zeros(offset: int) -> None:
    lhs, rhs = support.normal(0, (10, 4)), support.normal(1, (2, 4, 3))
    for implementation in ("reference", "xla", "ragged_dot"):
        out = gmm(lhs, rhs, [4, 6], group_offset=offset, implementation=implementation)
        np.testing.assert_array_equal(out, 0)
    starts, ends = group_bounds(check_groups([4, 6], offset, 2, "E"), 2, 10)
    assert list(starts) == sorted(starts)
    assert list(ends) == sorted(ends)


@pytest.mark.parametrize("implementation", FAST)
def test_transposed_matrices(implementation: str) -> None:
    args = operands(70, 24, 40, [33, 0, 20], jnp.float32, transpose_rhs=True)
    check(implementation, args, transpose_rhs=True)


@pytest.mark.parametrize("implementation", FAST)
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(shape=st.sampled_from([(97, 31, 17, 6), (16, 7, 128, 3)]), data=st.data())
def test_any_groups(implementation: str, shape: tuple[int, int, int, int], data: Any) -> None:
    m, k, n, e = shape
    sizes = data.draw(support.group_patterns(m, e))
    check(implementation, operands(m, k, n, sizes, jnp.float32))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
@pytest.mark.parametrize("offset", [0, 1, 3, 5, -1])
def test_a_shard_holds_some_of_the_groups(implementation: str, offset: int) -> None:
    sizes = jnp.asarray([5, 9, 0, 14, 3], jnp.int32)
    lhs, rhs = support.normal(0, (40, 6)), support.normal(1, (2, 6, 10))
    d_out = support.normal(2, (40, 10))

    def f(lhs: Any, rhs: Any, d_out: Any, offset: Any) -> Any:
        options: Any = {"group_offset": offset, "implementation": implementation}
        return gmm(lhs, rhs, sizes, **options), tgmm(lhs, d_out, sizes, num_groups=2, **options)

    out, out_t = support.call(implementation, f, lhs, rhs, d_out, jnp.int32(offset))
    want, want_t = np.zeros((40, 10), np.float32), np.zeros((2, 6, 10), np.float32)
    ends = np.cumsum(sizes)
    for e in range(2):
        if 0 <= e + offset < 5:
            rows = slice(ends[e + offset] - sizes[e + offset], ends[e + offset])
            want[rows] = np.asarray(lhs)[rows] @ np.asarray(rhs)[e]
            want_t[e] = np.asarray(lhs)[rows].T @ np.asarray(d_out)[rows]
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out_t, want_t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_group_sizes_out_of_range_are_cut(implementation: str) -> None:
    lhs, rhs = support.normal(0, (20, 6)), support.normal(1, (3, 6, 10))
    f = lambda sizes: gmm(lhs, rhs, sizes, implementation=implementation)  # noqa: E731
    out = support.call(implementation, f, jnp.asarray([-4, 15, 90], jnp.int32))
    want = support.call(implementation, f, jnp.asarray([0, 15, 5], jnp.int32))
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("tiling", [Tiling(16, 128, 128), Tiling(128, 128, 256)])
def test_explicit_tiling_with_tails(tiling: Tiling) -> None:
    m, k, n, sizes = 150, 200, 300, [37, 80, 0, 20]
    lhs, rhs, d_out, _, sizes = operands(m, k, n, sizes, jnp.float32)

    def f(implementation: str, tiling: Any) -> Any:
        def run(lhs: Any, rhs: Any, d_out: Any) -> Any:
            options: Any = {"tiling": tiling, "implementation": implementation}
            return gmm(lhs, rhs, sizes, **options), tgmm(lhs, d_out, sizes, **options)

        return run

    ours = support.call("mosaic", f("mosaic", tiling), lhs, rhs, d_out)
    plain = support.call("reference", f("reference", None), lhs, rhs, d_out)
    truth = support.in_float64(f("reference", None), lhs, rhs, d_out)
    support.assert_as_good(ours, plain, truth)


#: Groups that end in blocks of 1,024 rows, take one of all sizes of parts, or are in two blocks.
TALL = [0, 3, 700, 0, 517, 130, 0, 100]


def in_parts(implementation: str, depth: int) -> Any:
    """All products of gmm, with blocks of 1,024 rows and some of the depth and width."""

    def f(lhs: Any, rhs: Any, turned: Any, d_out: Any, sizes: Any) -> Any:
        def tiled(k: int, n: int) -> Any:
            if implementation == "reference":
                return {"implementation": implementation}
            return {"implementation": implementation, "tiling": Tiling(1024, k, n)}

        return {
            "gmm": gmm(lhs, rhs, sizes, **tiled(depth, 512)),
            "transposed": gmm(lhs, turned, sizes, transpose_rhs=True, **tiled(depth, 512)),
            "tgmm": tgmm(lhs, d_out, sizes, **tiled(256, 512)),
        }

    return f


@pytest.mark.parametrize("chip", ["v5e", "v6e", "tpu7x"])
@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("written", [1, 64])
@pytest.mark.parametrize("depth", [128, 256])
def test_blocks_are_worked_on_in_parts(
    chip: str, dtype: Any, written: int, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lhs, rhs, d_out, _, sizes = operands(1500, 256, 512, TALL, dtype)
    turned, tail = jnp.swapaxes(rhs, 1, 2), sum(TALL)
    args = lhs, rhs, turned, d_out, sizes
    truth = support.in_float64(in_parts("reference", depth), *args)
    plain = support.call("reference", in_parts("reference", depth), *args)
    monkeypatch.setattr(gmm_kernel, "WRITTEN", written)  # products beyond are made in a loop
    monkeypatch.setattr(tgmm_kernel, "WRITTEN", written)
    lhs, d_out = support.poison_tail(lhs, tail), support.poison_tail(d_out, tail)
    with for_chip(chip):
        ours = support.call("mosaic", in_parts("mosaic", depth), lhs, rhs, turned, d_out, sizes)
    support.assert_as_good(ours, plain, truth)
    assert not ours["gmm"][tail:].any()
    faulty = ours | {"tgmm": ours["tgmm"].copy()}
    # A row of the group before, in the same block.
    row = np.float32(args[0][702])[:, None] * np.float32(args[3][702])
    faulty["tgmm"][4] += row.astype(faulty["tgmm"].dtype)
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good(faulty, plain, truth)


@pytest.mark.parametrize("fault", ["no short part", "one pass too few"])
def test_a_part_that_is_left_out_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lhs, rhs, d_out, _, sizes = operands(1500, 256, 512, TALL, jnp.float32)
    args = lhs, rhs, jnp.swapaxes(rhs, 1, 2), d_out, sizes
    truth = support.in_float64(in_parts("reference", 256), *args)
    plain = support.call("reference", in_parts("reference", 256), *args)
    right = block_products.each
    if fault == "no short part":
        planted = support.planted(Visit, "work", without_short_parts)
    else:
        monkeypatch.setattr(gmm_kernel, "WRITTEN", 1)
        planted = support.planted(
            gmm_kernel,
            "each",
            lambda parts, passes, act: right(parts[:-1], max(passes - 1, 1), act),
        )
    with planted:
        ours = support.call("mosaic", in_parts("mosaic", 256), *args)
    with pytest.raises(AssertionError, match=r"exceeds|finite"):
        support.assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("fault", ["others' rows are not put back", "nobody's are not cleared"])
def test_rows_of_others_that_are_overwritten_are_caught(fault: str) -> None:
    lhs, rhs, d_out, _, sizes = operands(1500, 256, 512, TALL, jnp.float32)
    args = lhs, rhs, jnp.swapaxes(rhs, 1, 2), d_out, sizes
    truth = support.in_float64(in_parts("reference", 256), *args)
    plain = support.call("reference", in_parts("reference", 256), *args)
    if fault == "others' rows are not put back":
        planted = support.planted(gmm_kernel, "mixed_rows", lambda rows, unit: 0)
    else:
        planted = support.planted(Visit, "finish", lambda *_: None)
    with planted:
        ours = support.call("mosaic", in_parts("mosaic", 256), *args)
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good(ours, plain, truth)


def without_short_parts(visit: Visit, act: Any, unit: int, **sizes: int) -> None:
    """`Visit.work`, but for the last rows of a visit."""
    del sizes
    start = visit.low & -unit

    @pl.when(visit.high > start + 512)
    def _one() -> None:
        act(pl.multiple_of(jnp.minimum(start, visit.rows - 512), unit), 512)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_result_dtype_can_be_chosen(implementation: str) -> None:
    lhs, rhs = support.normal(0, (20, 6), jnp.bfloat16), support.normal(1, (2, 6, 10), jnp.bfloat16)
    sizes = jnp.asarray([10, 7], jnp.int32)
    options: Any = {"preferred_element_type": jnp.float32, "implementation": implementation}
    out = support.call(implementation, lambda *a: gmm(*a, **options), lhs, rhs, sizes)
    assert out.dtype == jnp.float32
    want = np.asarray(lhs, np.float32)[:10] @ np.asarray(rhs, np.float32)[0]
    np.testing.assert_allclose(out[:10], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("fault", ["wrong boundary", "lost group", "rounded sums"])
def test_a_planted_fault_is_caught(implementation: str, fault: str) -> None:
    args = operands(60, 40, 24, [20, 13, 27], jnp.float32)
    f = both_gradients("reference")
    truth, plain = support.in_float64(f, *args), support.call("reference", f, *args)
    lhs, rhs, d_out, d_rhs, sizes = args
    if fault == "wrong boundary":
        args = (lhs, rhs, d_out, d_rhs, jnp.asarray([21, 12, 27], jnp.int32))
    elif fault == "lost group":
        args = (lhs, rhs, d_out, d_rhs, jnp.asarray([20, 13, 0], jnp.int32))
    else:
        args = (lhs.astype(jnp.bfloat16).astype(jnp.float32), rhs, d_out, d_rhs, sizes)
    ours = support.call(implementation, both_gradients(implementation), *args)
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good(ours, plain, truth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lhs": jnp.zeros((4,))}, ValueError, r"lhs must have shape \[M, K\], got \[4\]"),
        ({"rhs": jnp.zeros((2, 5, 7))}, ValueError, r"rhs must have shape \[E, 6, N\], got"),
        ({"rhs": jnp.zeros((2, 6, 7), jnp.bfloat16)}, TypeError, "rhs must have the dtype of lhs"),
        ({"lhs": jnp.zeros((4, 6), jnp.int32)}, TypeError, "lhs must be bfloat16 or float32"),
        ({"group_sizes": jnp.zeros((2,))}, TypeError, "group_sizes must be of an integer dtype"),
        ({"group_sizes": jnp.zeros((3,), jnp.int32)}, ValueError, "group_sizes must have"),
        ({"group_offset": 1.5}, TypeError, "group_offset must be of an integer dtype"),
        ({"implementation": "cuda"}, ValueError, "implementation must be one of 'mosaic'"),
        ({"implementation": "mosaic"}, ValueError, "runs on TPU, or inside"),
        ({"preferred_element_type": jnp.int8}, TypeError, "preferred_element_type must be"),
        ({"preferred_element_type": "foo"}, TypeError, "preferred_element_type .*got 'foo'"),
        ({"preferred_element_type": "float64"}, TypeError, "it wants jax_enable_x64"),
        ({"tiling": (8, 8, 8)}, TypeError, "tiling must be a Tiling"),
        ({"tiling": Tiling(12, 128, 128)}, ValueError, "tiling.m must be"),
        ({"tiling": Tiling(16, 6, 100)}, ValueError, "tiling.n must be"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type, message: str) -> None:
    arguments: dict[str, Any] = {
        "lhs": jnp.zeros((4, 6)),
        "rhs": jnp.zeros((2, 6, 300)),
        "group_sizes": jnp.zeros((2,), jnp.int32),
    }
    with pytest.raises(error, match=message):
        gmm(**(arguments | change))


def test_tgmm_errors_name_the_argument() -> None:
    lhs, sizes = jnp.zeros((4, 6)), jnp.zeros((2,), jnp.int32)
    with pytest.raises(ValueError, match=r"grad must have shape \[4, N\], got \[5, 7\]"):
        tgmm(lhs, jnp.zeros((5, 7)), sizes)
    with pytest.raises(ValueError, match="num_groups must be an int of at least 1, got 0"):
        tgmm(lhs, jnp.zeros((4, 7)), sizes, num_groups=0)
    with pytest.raises(TypeError, match="grad must have the dtype of lhs"):
        tgmm(lhs, jnp.zeros((4, 7), jnp.bfloat16), sizes)
