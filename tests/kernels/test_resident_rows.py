"""Row movement with tokens in VMEM, whole or in slices, and row by row where they do not fit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import combine, tiling
from taskmoe.kernels import resident_rows_kernel as resident
from taskmoe.kernels.platforms import for_chip
from taskmoe.kernels.row_gather_kernel import block_sizes, gather_rows
from taskmoe.tests.kernels import support

pytestmark = support.on_cpu
TOKENS, ROWS = 21, 45


def case(width: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Tokens, rows, the token of each row, -1 for some, and scales; rows of nobody are NaN."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, TOKENS, ROWS).astype(np.int32)
    token[rng.random(ROWS) < 0.2] = -1
    rows = support.normal(1, (ROWS, width), dtype)
    rows = jnp.where((token >= 0)[:, None], rows, jnp.nan)
    return (
        support.normal(0, (TOKENS, width), dtype),
        rows,
        jnp.asarray(token),
        support.normal(2, (ROWS,)),
    )


def run(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) by a program of its own: how it is cut is no part of what JAX knows programs by."""
    with support.running("mosaic"):
        return jax.tree.map(np.asarray, jax.jit(lambda *a: f(*a))(*args))


def cut(monkeypatch: pytest.MonkeyPatch, columns: int, block: int = 16) -> None:
    """Let slices have so many columns at most, and blocks so many rows: there are several."""
    monkeypatch.setattr(resident, "MOST_COLUMNS", columns)
    monkeypatch.setattr(resident, "BLOCK", block)


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize(
    ("width", "columns"), [(512, 8192), (512, 256), (200, 8192), (300, 256), (700, 512)]
)
def test_take(monkeypatch: pytest.MonkeyPatch, dtype: Any, width: int, columns: int) -> None:
    cut(monkeypatch, columns)
    source, rows, token, scale = case(width, dtype)
    there = np.asarray(token) >= 0
    taken = np.where(there[:, None], np.asarray(source, np.float64)[np.asarray(token)], 0)
    out, none = run(lambda s, t: resident.take(s, t, None, None), source, token)
    assert none is None
    np.testing.assert_array_equal(out, taken.astype(dtype))
    out, dots = run(resident.take, source, token, scale, rows)
    scaled = jnp.asarray(taken, jnp.float32) * scale[:, None]
    np.testing.assert_array_equal(out, np.asarray(scaled.astype(dtype)))
    wanted = (taken * np.asarray(rows, np.float64))[there].sum(axis=1)
    np.testing.assert_allclose(dots[there], wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize(
    ("width", "columns"), [(512, 8192), (512, 256), (200, 8192), (300, 128), (700, 512)]
)
def test_add(monkeypatch: pytest.MonkeyPatch, dtype: Any, width: int, columns: int) -> None:
    cut(monkeypatch, columns)
    _, rows, token, scale = case(width, dtype)
    for factor in (None, scale):
        wanted = np.zeros((TOKENS, width))
        for r, t in enumerate(np.asarray(token)):
            if t >= 0:
                wanted[t] += np.asarray(rows, np.float64)[r] * (1 if factor is None else factor[r])
        out = run(lambda *a: resident.add(*a, TOKENS), rows, token, factor)
        error = 1e-2 if dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=error, atol=error)


def test_rows_and_tokens_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    source, rows, token, scale = case(384, jnp.bfloat16)
    cut(monkeypatch, 256)
    several = run(resident.take, source, token, scale, rows)
    sums = run(lambda *a: resident.add(*a, TOKENS), rows, token, scale)
    cut(monkeypatch, 8192, block=256)
    (out, dots), there = run(resident.take, source, token, scale, rows), np.asarray(token) >= 0
    np.testing.assert_array_equal(several[0], out)
    np.testing.assert_allclose(several[1][there], dots[there], rtol=1e-4, atol=1e-4)
    whole = run(lambda *a: resident.add(*a, TOKENS), rows, token, scale)
    np.testing.assert_array_equal(sums, whole)


@pytest.mark.parametrize("check", ["take", "add"])
@pytest.mark.parametrize(
    "fault", ["a row too near", "every block is the first", "nobody is a token"]
)
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str, check: str) -> None:
    lines, column = resident.lines, resident.column
    if fault == "a row too near":
        monkeypatch.setattr(
            resident, "lines", lambda row, step: lines(jnp.maximum(row - 1, 0), step)
        )
    elif fault == "every block is the first":
        monkeypatch.setattr(resident, "column", lambda first, *rest: column(first % 16, *rest))
    else:
        scalars = resident._scalars

        def somebody(x: Any, p: Any, nothing: Any) -> Any:
            is_token = isinstance(nothing, int)
            return scalars(jnp.where(x == nothing, 0, x) if is_token else x, p, nothing)

        monkeypatch.setattr(resident, "_scalars", somebody)
    test = test_take if check == "take" else test_add
    with pytest.raises(AssertionError):
        test(monkeypatch, jnp.float32, 512, 8192)


def test_columns_behind_the_width_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = resident.take_kernel
    unmasked: Any = lambda *refs, all_columns, **sizes: kernel(*refs, all_columns=0, **sizes)  # noqa: E731
    monkeypatch.setattr(resident, "take_kernel", unmasked)
    with pytest.raises(AssertionError):
        test_take(monkeypatch, jnp.float32, 700, 512)


def test_weights_of_other_rows_do_not_reach_those_of_nobody() -> None:
    y, grad = support.normal(0, (40, 128)), support.normal(1, (8, 128))
    rows = jnp.arange(16, dtype=jnp.int32).reshape(8, 2).at[0, 0].set(-1)
    weights = jnp.ones((8, 2)).at[0, 0].set(jnp.inf)

    def gradient(y: Any) -> Any:
        return jax.vjp(lambda y: combine(y, rows, weights, implementation="mosaic"), y)[1](grad)

    (d_y,) = run(gradient, y)
    assert np.isfinite(d_y).all()
    assert (d_y[16:] == 0).all()


@pytest.mark.parametrize("dtype", support.DTYPES)
def test_rows_are_gathered_one_by_one_where_tokens_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    monkeypatch.setattr(tiling, "vmem_budget_bytes", lambda info: 1 << 16)
    source, rows, token, scale = case(256, dtype)
    assert resident.take(source, token, None, None) is None
    assert resident.add(rows, token, None, TOKENS) is None
    index = jnp.stack([token, jnp.roll(token, 1)], axis=1)
    weights = jnp.stack([scale, 1 - scale], axis=1)
    there = (np.asarray(index) >= 0)[..., None]
    picked = np.where(there, np.asarray(source, np.float64)[np.asarray(index)], 0)
    out = run(lambda *a: gather_rows(*a, None), source, index, weights)
    wanted = (picked * np.asarray(weights, np.float64)[..., None]).sum(axis=1)
    error = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=error, atol=error)
    grad = support.normal(3, (ROWS, 256), dtype)
    dots = run(lambda s, i, g: gather_rows(s, i, None, g), source, index, grad)
    np.testing.assert_allclose(
        dots, np.einsum("rjd,rd->rj", picked, np.asarray(grad, np.float64)), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("version", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("width", [512, 2880, 7168, 128 * 1024])
def test_slices_fit_and_cover_the_width(
    version: str, itemsize: int, adds: bool, width: int
) -> None:
    name = {"tpu7x": "7x"}.get(version, version)
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), 1)
    with for_chip(version):
        for tokens in (16, 4096, 1 << 22):
            p = resident.plan(tokens, 8 * tokens, width, itemsize, adds)
            if tokens == 1 << 22:
                assert p is None
                continue
            if p is None:  # of the chips, v4 has the least VMEM
                assert (tokens, version) == (4096, "v4")
                continue
            assert p.slices == 1 or p.columns % 128 == 0
            assert p.slices % info.num_cores == 0
            assert (p.slices - 1) * p.columns < width <= p.slices * p.columns
            needed = resident.vmem_bytes(p.token_blocks, p.block, p.columns, itemsize, adds)
            assert needed <= tiling.vmem_budget_bytes(info)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("top_k", [1, 4, 8])
@pytest.mark.parametrize("width", [512, 2048, 2880])
def test_indices_fit_in_the_scalar_memory_of_tpu_v3(itemsize: int, top_k: int, width: int) -> None:
    with for_chip("v3"):
        rows, _ = block_sizes(4096, top_k, width, itemsize)
    assert rows * top_k <= 256
