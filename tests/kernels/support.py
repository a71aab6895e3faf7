"""What the kernel tests share: implementations to test, group patterns, the error rule."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import hopper_products

on_hopper = pytest.mark.skipif(
    not hopper_products.is_present(), reason="implementation='mosaic_gpu' runs on a Hopper GPU"
)
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels are interpreted on CPU")
DTYPES = (jnp.float32, jnp.bfloat16)
INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@contextlib.contextmanager
def running(implementation: str) -> Iterator[None]:
    """Where this implementation can run: TPU kernels in interpret mode, with all its checks.

    A race is an error: JAX raises it from 0.12 on, and prints it before.
    """
    if implementation != "mosaic":
        yield
        return
    printed = io.StringIO()
    try:
        with pltpu.force_tpu_interpret_mode(INTERPRET), contextlib.redirect_stdout(printed):
            yield
    except Exception:  # or the next kernel meets what this one left, its error included
        with contextlib.suppress(Exception):
            jax.effects_barrier()
        pltpu.reset_tpu_interpret_mode_state()
        raise
    assert "RACE DETECTED" not in printed.getvalue(), printed.getvalue()


def call(implementation: str, f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) jitted, with every leaf brought to numpy while the implementation can run.

    It is called at the prompt as well, and must give the same there. The definitions are not: they
    are plain JAX.
    """
    with running(implementation):
        jitted = eager = jax.tree.map(np.asarray, jax.jit(f)(*args))
        if implementation != "reference":
            eager = jax.tree.map(np.asarray, f(*args))
    assert_same(eager, jitted)
    return jitted


@contextlib.contextmanager
def planted(target: Any, name: str, fault: Any) -> Iterator[None]:
    """Within it target.name is faulty, and what was compiled before or within counts no more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, fault)
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()
            pltpu.reset_tpu_interpret_mode_state()


def assert_same(eager: Any, jitted: Any) -> None:
    """Equal but for what XLA may fuse: a few units in the last place of the largest value."""
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for have, want in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        if jnp.issubdtype(want.dtype, jnp.floating):
            have64, want64 = have.astype(np.float64), want.astype(np.float64)
            largest = float(np.max(np.abs(want64), initial=0, where=np.isfinite(want64)))
            units = 8 * float(jnp.finfo(want.dtype).eps) * largest
            np.testing.assert_allclose(have64, want64, rtol=0, atol=units)
        else:
            np.testing.assert_array_equal(have, want)


def in_float64(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) with every floating array in float64: the truth that errors are measured against."""

    def widen(x: Any) -> Any:
        return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(f)(*jax.tree.map(widen, args)))


def assert_as_good(ours: Any, plain: Any, truth: Any) -> None:
    """Errors of `ours` are at most twice those of `plain`, leaf by leaf, against `truth`.

    Both the largest and the root mean square error count. One unit in the last place of the largest
    value is always granted: a plain result may be exact by luck.
    """
    for path, want in jax.tree_util.tree_leaves_with_path(truth):
        name = jax.tree_util.keystr(path) or "result"
        have, base = _at(ours, path), _at(plain, path)
        assert have.dtype == base.dtype, f"{name}: {have.dtype}, plain {base.dtype}"
        assert have.shape == want.shape, f"{name}: {have.shape}, not {want.shape}"
        ulp = float(jnp.finfo(have.dtype).eps) * float(np.max(np.abs(want), initial=0))
        have, base = np.asarray(have, np.float64), np.asarray(base, np.float64)
        assert np.isfinite(have).all(), f"{name} is not finite"
        for measure, norm in (("largest", _largest), ("rms", _rms)):
            error, allowed = norm(have - want), 2 * norm(base - want) + ulp
            assert error <= allowed, f"{name}: {measure} error {error:.3g} exceeds {allowed:.3g}"


def _largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x))) if x.size else 0.0


def _at(tree: Any, path: Sequence[Any]) -> Any:
    leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
    return leaves[tuple(path)]


@st.composite
def group_patterns(draw: Any, num_rows: int, num_groups: int) -> list[int]:
    """Group sizes with sum <= num_rows: even, empty, skewed, short."""
    cut = st.integers(0, num_rows)
    cuts = sorted(draw(st.lists(cut, min_size=num_groups, max_size=num_groups)))
    return [b - a for a, b in zip([0, *cuts], cuts, strict=False)]


def normal(seed: int, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal values that float32 and bfloat16 both hold exactly when dtype is bfloat16."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(tuple(shape)), dtype)


def poison_tail(x: jax.Array, first: int) -> jax.Array:
    """X with NaN from row `first` on."""
    return x.at[first:].set(jnp.nan)
