"""The kernels for Hopper: in which bands rows go, what is lowered, what comes out interpreted."""

import contextlib
import importlib
import io
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from taskmoe.kernels import gmm, hopper_kernels, hopper_products, hopper_ring
from taskmoe.kernels.hopper_ring import Blocks
from taskmoe.tests.kernels import support

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this JAX interprets no GPU kernels"
)
BLOCKS = [Blocks(64), Blocks(192), Blocks(256), Blocks(64, beside=True), Blocks(128, beside=True)]


@contextlib.contextmanager
def interpreting(detect_races: bool) -> Iterator[None]:
    """GPU kernels run in JAX's interpreter, on four multiprocessors.

    It takes every copy for a group of its own, so that it sees races where several copies make up a
    piece of a result: where groups do not begin and end with pieces. A product is over at once, so
    that it does not see a buffer of the ring that is loaded too early.
    """
    params = plgpu.InterpretGPUParams(
        detect_races=detect_races, out_of_bounds_reads="uninitialized"
    )
    printed = io.StringIO()
    with (
        mock.patch.object(hopper_ring, "num_multiprocessors", return_value=4),
        plgpu.force_gpu_interpret_mode(params),
        contextlib.redirect_stdout(printed),
    ):
        yield
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()


def bounds_of(sizes: list[int], first: int) -> tuple[jax.Array, jax.Array]:
    bounds = np.cumsum([first, *sizes])
    return jnp.asarray(bounds[:-1], jnp.int32), jnp.asarray(bounds[1:], jnp.int32)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def bf16(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.bfloat16)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def same(have: jax.Array, want: np.ndarray) -> bool:
    """Whether it is right but for the rounding to bfloat16."""
    return bool(np.all(np.abs(wide(have) - want) <= 2**-8 * np.abs(want) + 2**-8))


@pytest.mark.parametrize("height", [64, 128])
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    sizes=support.group_patterns(300, 5), before=st.integers(0, 40), after=st.integers(0, 40)
)
def test_bands_hold_every_row_once_with_its_matrix(
    height: int, sizes: list[int], before: int, after: int
) -> None:
    num_rows = before + sum(sizes) + after
    hypothesis.assume(num_rows > 0)
    starts, ends = bounds_of(sizes, before)
    table, count = hopper_kernels.bands(starts, ends, num_rows, height)
    of_row = np.full(num_rows, len(sizes))
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        of_row[start:end] = group
    assert 4 * int(count[0]) <= table.size
    seen = np.zeros(num_rows, int)
    for matrix, row, first, last in np.asarray(table).reshape(-1, 4)[: int(count[0])]:
        assert row % hopper_ring.TILE_ROWS == 0
        assert row <= first < last <= row + height
        assert (of_row[first:last] == matrix).all()
        seen[first:last] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_are_lowered_here(blocks: Blocks, transposed: bool) -> None:
    """With all their layouts; a GPU or its compiler is not wanted."""
    height, columns = blocks.block
    x, (starts, ends) = jax.ShapeDtypeStruct((300, 128), jnp.bfloat16), bounds_of([100, 200], 0)
    shape = (2, 2 * columns, 128) if transposed else (2, 128, 2 * columns)
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    g = jax.ShapeDtypeStruct((300, 2 * columns), jnp.bfloat16)

    def products(x: Any, w: Any) -> Any:
        return hopper_kernels.rows_times_matrices(blocks, x, w, starts, ends, transposed)

    def sums(x: Any, g: Any) -> Any:
        return hopper_kernels.sums_of_groups(blocks, x, g, starts, ends)

    for f, args in ((products, (x, w)), (sums, (x, g))):
        lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu_v2" in lowered.as_text()
    buffers = blocks.stages * hopper_ring.DEPTH * (height + columns)
    written = 2 * 2 * hopper_ring.ROWS * hopper_ring.COLUMNS
    assert 2 * (buffers + written) < 227 * 1024  # what a thread block may have


@interpreted
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("first", "sizes", "rows"),
    [(0, [64, 0, 128], 192), (0, [70, 0, 130], 200), (30, [40, 5, 105, 1], 203), (1, [1], 3)],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # rows of no group
def test_rows_times_matrices(
    blocks: Blocks, first: int, sizes: list[int], rows: int, transposed: bool
) -> None:
    """Rows of no group are zero, whatever they hold."""
    starts, ends = bounds_of(sizes, first)
    columns = 2 * blocks.block[1]
    x, w = bf16(normal(0, rows, 128)), bf16(normal(1, len(sizes), 128, columns))
    want = np.zeros((rows, columns))
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        want[start:end] = wide(x[start:end]) @ wide(w[group])
    x = x.at[:first].set(jnp.nan).at[int(ends[-1]) :].set(jnp.inf)
    with interpreting(detect_races=all(size % 64 == 0 for size in sizes)):
        w = w.swapaxes(1, 2) if transposed else w
        have = hopper_kernels.rows_times_matrices(blocks, x, w, starts, ends, transposed)
        assert same(have, want)


@interpreted
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("first", "sizes", "rows"),
    [(0, [64, 0, 128], 192), (0, [70, 0, 130], 200), (33, [37, 5, 105, 1], 203), (1, [1], 3)],
)
def test_sums_of_groups(blocks: Blocks, first: int, sizes: list[int], rows: int) -> None:
    """Whatever the rows of other groups hold."""
    starts, ends = bounds_of(sizes, first)
    height, columns = blocks.block
    x, g = bf16(normal(0, rows, 2 * height)), bf16(normal(1, rows, 2 * columns))
    want = [wide(x[s:e]).T @ wide(g[s:e]) for s, e in zip(starts, ends, strict=True)]
    x, g = x.at[:first].set(jnp.nan), g.at[int(ends[-1]) :].set(jnp.inf)
    with interpreting(detect_races=True):
        have = hopper_kernels.sums_of_groups(blocks, x, g, starts, ends)
        assert same(have, np.stack(want))


@interpreted
def test_a_race_is_seen() -> None:
    """The check of the search: buffers of results that are written before they are copied out."""
    starts, ends = bounds_of([64, 128], 0)
    x, w = bf16(normal(0, 192, 128)), bf16(normal(1, 2, 128, 256))
    wait = plgpu.wait_smem_to_gmem

    def at_the_end(n: int, wait_read_only: bool = False) -> None:
        if not wait_read_only:
            wait(n)

    with (
        pytest.raises(AssertionError, match="RACE DETECTED"),
        interpreting(detect_races=True),
        mock.patch.object(plgpu, "wait_smem_to_gmem", at_the_end),
    ):
        np.asarray(hopper_kernels.rows_times_matrices(Blocks(256), x, w, starts, ends, False))


@interpreted
def test_rows_that_are_not_cut_off_are_seen() -> None:
    """The check of the sums: what another group's rows hold comes in where they are left as is."""
    starts, ends = bounds_of([60, 70], 0)
    x, g = bf16(normal(0, 130, 128)), bf16(normal(1, 130, 128))
    want = np.stack([wide(x[:60]).T @ wide(g[:60]), wide(x[60:]).T @ wide(g[60:])])
    with (
        interpreting(detect_races=True),
        mock.patch.object(hopper_kernels, "_cut"),
    ):
        have = hopper_kernels.sums_of_groups(Blocks(128), x, g, starts, ends)
        assert not same(have, want)


@interpreted
def test_rows_that_are_not_held_back_are_seen() -> None:
    """The check of the products: a group that begins inside a piece would overwrite its row's."""
    starts, ends = bounds_of([60, 70], 0)
    x, w = bf16(normal(0, 130, 128)), bf16(normal(1, 2, 128, 128))
    want = np.concatenate([wide(x[:60]) @ wide(w[0]), wide(x[60:]) @ wide(w[1])])

    def whole(smem: Any, out: Any, row: Any, column: Any, *_: Any) -> None:
        at = pl.ds(row, hopper_ring.ROWS), pl.ds(column, hopper_ring.COLUMNS)
        plgpu.copy_smem_to_gmem(smem, out.at[at], commit_group=False)

    with interpreting(detect_races=False), mock.patch.object(hopper_kernels, "_out_rows", whole):
        have = hopper_kernels.rows_times_matrices(Blocks(128), x, w, starts, ends, False)
        assert not same(have, want)


@interpreted
@pytest.mark.parametrize(
    ("rows", "depth", "width"), [(0, 64, 64), (9, 64, 64), (9, 192, 128), (300, 128, 320)]
)
def test_any_size_that_fits(rows: int, depth: int, width: int) -> None:
    """Where blocks are wider than the matrices, and where there is nothing to multiply."""
    starts, ends = bounds_of([rows // 3, rows - rows // 3], 0)
    x, w, g = normal(0, rows, depth), normal(1, 2, depth, width), normal(2, rows, width)
    x, w, g = map(bf16, (x, w, g))
    cut = rows // 3
    want = np.concatenate([wide(x[:cut]) @ wide(w[0]), wide(x[cut:]) @ wide(w[1])])
    sums = np.stack([wide(x[:cut]).T @ wide(g[:cut]), wide(x[cut:]).T @ wide(g[cut:])])
    with interpreting(detect_races=False):
        assert same(hopper_products.rows_times_matrices(x, w, starts, ends, False), want)
        assert same(hopper_products.sums_of_groups(x, g, starts, ends), sums)


def for_cuda(lhs: Any, rhs: Any, sizes: list[int], implementation: str | None) -> str:
    """What is lowered of gmm and of its gradients, which tgmm is one of."""

    def run(lhs: Any, rhs: Any) -> Any:
        out, pull = jax.vjp(lambda *x: gmm(*x, sizes, implementation=implementation), lhs, rhs)
        return out, pull(out)

    module = jax.jit(run).trace(lhs, rhs).lower(lowering_platforms=("cuda",))
    return str(module.as_text())


@pytest.mark.parametrize("rows", [1, 50, 300, 1031])
def test_hopper_kernels_take_any_number_of_rows(rows: int) -> None:
    shapes = [(rows, 128), (3, 128, 192)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    run = jax.jit(lambda x, w: gmm(x, w, [rows, 0, 0], implementation="mosaic_gpu"))
    module = jax.export.export(run, platforms=["cuda"])(*args)
    assert module.out_avals[0].shape == (rows, 192)
    assert "mosaic_gpu" in module.mlir_module()


def test_hopper_kernels_in_64_bit_mode() -> None:
    lhs, rhs = jnp.ones((9, 64), jnp.bfloat16), jnp.ones((2, 64, 128), jnp.bfloat16)
    with jax.enable_x64(True):
        assert for_cuda(lhs, rhs, [4, 5], "mosaic_gpu").count("mosaic_gpu_v2") == 3


def test_the_platform_that_is_lowered_for_chooses_hopper_kernels() -> None:
    lhs, rhs = jnp.ones((9, 64), jnp.bfloat16), jnp.ones((2, 64, 128), jnp.bfloat16)
    run = jax.jit(lambda *x: gmm(*x, [4, 5]))
    with mock.patch.object(hopper_products, "is_present", return_value=True):
        assert "mosaic_gpu" in for_cuda(lhs, rhs, [4, 5], None)
        lowered = run.trace(lhs, rhs).lower(lowering_platforms=("rocm",))
        assert "mosaic_gpu" not in lowered.as_text()
    with pytest.raises(ValueError, match=r"'mosaic_gpu' of gmm runs on NVIDIA GPUs.*'cpu'"):
        gmm(lhs, rhs, [4, 5], implementation="mosaic_gpu")


def test_what_hopper_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"'mosaic_gpu' of gmm takes and gives bfloat16.*float32"):
        for_cuda(jnp.ones((64, 64)), jnp.ones((2, 64, 64)), [32, 32], "mosaic_gpu")
    lhs, rhs = jnp.ones((8, 60), jnp.bfloat16), jnp.ones((2, 60, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="multiples of 64, got 60 and 64"):
        for_cuda(lhs, rhs, [4, 4], "mosaic_gpu")
    with (
        mock.patch.object(jax, "__version_info__", (0, 10, 1)),
        pytest.raises(ValueError, match=r"wants JAX 0.10.2 or newer"),
    ):
        for_cuda(lhs[:, :4], rhs[:, :4], [4, 4], "mosaic_gpu")


def test_hopper_kernels_say_what_package_they_want() -> None:
    lhs, rhs = jnp.ones((8, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    missing = ModuleNotFoundError("No module named 'absl'", name="absl")
    with (
        mock.patch.object(importlib, "import_module", side_effect=missing),
        pytest.raises(ModuleNotFoundError, match=r"absl-py: pip install 'taskmoe\[gpu\]'"),
    ):
        for_cuda(lhs, rhs, [4, 4], "mosaic_gpu")
