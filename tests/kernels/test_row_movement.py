"""dispatch and combine: rows arrive exactly, sums are f32, gradients are each other's dual."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import combine, dispatch
from taskmoe.tests.kernels import support

ALL = ["reference", "xla", "mosaic"]
FAST = ["xla", "mosaic"]


def distinct_rows(seed: int, tokens: int, top_k: int, num_rows: int, drop: float) -> np.ndarray:
    """[T, k] distinct destinations, some dropped: num_rows, beyond it, or negative."""
    rng = np.random.default_rng(seed)
    size = max(num_rows, tokens * top_k)
    rows = rng.permutation(size)[: tokens * top_k].reshape(tokens, top_k)
    lost = rng.random(rows.shape) < drop
    rows = np.where(lost, rng.choice([num_rows, num_rows + 9, -1], rows.shape), rows)
    return np.where(rows >= num_rows, np.maximum(rows, num_rows), rows).astype(np.int32)


def moved(x: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
    y = np.zeros((num_rows, x.shape[1]), x.dtype)
    for (t, _), row in np.ndenumerate(rows):
        if 0 <= row < num_rows:
            y[row] = x[t]
    return y


@functools.cache
def both(implementation: str, num_rows: int) -> Any:
    def f(x: Any, y: Any, rows: Any, weights: Any) -> Any:
        def there(x: Any) -> Any:
            return dispatch(x, rows, num_rows, implementation=implementation)

        def back_again(y: Any, weights: Any) -> Any:
            return combine(y, rows, weights, implementation=implementation)

        sent, pull = jax.vjp(there, x)
        back, pull_back = jax.vjp(back_again, y, weights)
        return {"dispatch": sent, "d dispatch": pull(y), "combine": back, "d combine": pull_back(x)}

    return f


def check(
    implementation: str,
    tokens: int,
    top_k: int,
    num_rows: int,
    width: int,
    dtype: Any,
    drop: float,
    seed: int = 0,
) -> None:
    rows = distinct_rows(seed, tokens, top_k, num_rows, drop)
    x, y = support.normal(0, (tokens, width), dtype), support.normal(1, (num_rows, width), dtype)
    args = (x, y, jnp.asarray(rows), support.normal(2, (tokens, top_k)))
    truth = support.in_float64(both("reference", num_rows), *args)
    plain = support.call("reference", both("reference", num_rows), *args)
    used = np.zeros(num_rows, bool)
    used[rows[(rows >= 0) & (rows < num_rows)]] = True
    poisoned = jnp.where(used[:, None], y, jnp.nan)
    ours = support.call(implementation, both(implementation, num_rows), x, poisoned, *args[2:])
    np.testing.assert_array_equal(ours["dispatch"], moved(np.asarray(x), rows, num_rows))
    support.assert_as_good(ours, plain, truth)


@pytest.mark.as_shipped
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_rows", "width"), [(40, 2, 80, 256), (23, 3, 37, 100)]
)
def test_forward_and_gradients(
    implementation: str, dtype: Any, tokens: int, top_k: int, num_rows: int, width: int
) -> None:
    check(implementation, tokens, top_k, num_rows, width, dtype, drop=0.2)


@pytest.mark.parametrize("implementation", FAST)
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.sampled_from([(17, 3, 29, 31), (1, 1, 90, 130)]),
    seed=st.integers(0, 1000),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_rows(
    implementation: str, shape: tuple[int, int, int, int], seed: int, drop: float
) -> None:
    check(implementation, *shape, jnp.float32, drop, seed)


@pytest.mark.parametrize("implementation", ALL)
def test_there_and_back_is_the_identity(implementation: str) -> None:
    rows = jnp.asarray(np.random.default_rng(0).permutation(64).reshape(32, 2), jnp.int32)

    def f(x: Any) -> Any:
        y = dispatch(x, rows, 64, implementation=implementation)
        return combine(y, rows, jnp.full((32, 2), 0.5), implementation=implementation)

    x = support.normal(0, (32, 48), jnp.bfloat16)
    np.testing.assert_array_equal(support.call(implementation, f, x), x)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("fault", ["off by one", "bf16 sums"])
def test_a_planted_fault_is_caught(implementation: str, fault: str) -> None:
    rows = distinct_rows(3, 40, 2, 80, 0.1)
    x, y = support.normal(0, (40, 64)), support.normal(1, (80, 64))
    weights = support.normal(2, (40, 2))
    args = (x, y, jnp.asarray(rows), weights)
    truth = support.in_float64(both("reference", 80), *args)
    plain = support.call("reference", both("reference", 80), *args)
    if fault == "off by one":
        args = (x, y, jnp.asarray(np.roll(rows, 1, axis=0)), weights)  # still different ones
    else:
        args = (x, y, jnp.asarray(rows), weights.astype(jnp.bfloat16).astype(jnp.float32))
    ours = support.call(implementation, both(implementation, 80), *args)
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good(ours, plain, truth)


ROWS = jnp.zeros((4, 2), jnp.int32)


@pytest.mark.parametrize(
    ("x", "rows", "num_rows", "error", "message"),
    [
        (jnp.zeros(4), ROWS, 8, ValueError, r"x must have shape \[rows, D\], got \[4\]"),
        (
            jnp.zeros((4, 3), jnp.int8),
            ROWS,
            8,
            TypeError,
            "x must be bfloat16 or float32, got int8",
        ),
        (
            jnp.zeros((4, 3)),
            ROWS[:3],
            8,
            ValueError,
            r"rows must have shape \[4, k\], got \[",
        ),
        (jnp.zeros((4, 3)), ROWS * 1.0, 8, TypeError, "rows must be of an integer dtype"),
        (jnp.zeros((4, 3)), ROWS, 0, ValueError, "num_rows must be an int of at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(
    x: Any, rows: Any, num_rows: int, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        dispatch(x, rows, num_rows)


def test_combine_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape \[4, 2\], got \[4, 1\]"):
        combine(jnp.zeros((8, 3)), ROWS, jnp.zeros((4, 1)))
    with pytest.raises(TypeError, match="weights must be bfloat16 or float32, got int32"):
        combine(jnp.zeros((8, 3)), ROWS, ROWS)
