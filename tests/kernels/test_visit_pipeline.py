"""The pipeline inside of grouped kernels: the same bits as of a grid, and where it is used."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from taskmoe.kernels import expert_ffn, for_chip, gmm, quantize, tgmm, visit_pipeline
from taskmoe.kernels.tiling import Tiling
from taskmoe.tests.kernels import support

E, M, K, N = 5, 160, 256, 256
SIZES = [30, 0, 70, 1, 40]  # of 160 rows: the last 19 are nobody's
M_TILED, FFN_TILED = Tiling(32, 128, 128), Tiling(32, 256, 128)


def operands(dtype: Any) -> dict[str, Any]:
    arrays = {"x": (M, K), "wide": (M, N), "w": (E, K, N), "back": (E, N, K)}
    made = {name: support.normal(i, shape, dtype) for i, (name, shape) in enumerate(arrays.items())}
    tail = sum(SIZES)
    return made | {name: support.poison_tail(made[name], tail) for name in ("x", "wide")}


CASES = {
    "gmm": lambda a, **o: gmm(a["x"], a["w"], a["sizes"], tiling=M_TILED, **o),
    "whole depth": lambda a, **o: gmm(a["x"], a["w"], a["sizes"], **o),
    "transposed": lambda a, **o: gmm(
        a["wide"], a["w"], a["sizes"], transpose_rhs=True, tiling=M_TILED, **o
    ),
    "8 bits": lambda a, **o: gmm(a["x"], quantize(a["w"], block=128), a["sizes"], **o),
    "tgmm": lambda a, **o: tgmm(a["x"], a["wide"], a["sizes"], tiling=M_TILED, **o),
    "expert_ffn": lambda a, **o: expert_ffn(
        a["x"], a["w"], a["back"], a["sizes"], w_gate=a["w"], tiling=FFN_TILED, **o
    ),
    "biases": lambda a, **o: expert_ffn(
        a["x"], a["w"], a["back"], a["sizes"], b_in=a["w"][:, 0], b_out=a["w"][:, 1, :K], **o
    ),
}  # fmt: skip


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each kernel that has the pipeline inside."""
    seen: list[str] = []
    real = visit_pipeline.pipeline

    @functools.wraps(real)
    def noted(*refs: Any, kernel: Any, blocks: Any) -> None:
        seen.append(getattr(kernel, "func", kernel).__module__)
        real(*refs, kernel=kernel, blocks=blocks)

    monkeypatch.setattr(visit_pipeline, "pipeline", noted)
    return seen


def called(case: str, arrays: dict[str, Any], chip: str) -> Any:
    with for_chip(chip), support.running("mosaic"):
        f = functools.partial(CASES[case], implementation="mosaic")
        return jax.tree.map(np.asarray, jax.jit(f)(arrays))


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(
    case: str, dtype: Any, pipelines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = operands(dtype) | {"sizes": jnp.asarray(SIZES, jnp.int32)}
    inside = called(case, arrays, "tpu7x")
    assert pipelines
    pipelines.clear()
    monkeypatch.setattr(visit_pipeline, "PIPELINES", 99)
    jax.clear_caches()
    outside = called(case, arrays, "tpu7x")
    assert not pipelines
    np.testing.assert_array_equal(inside, outside)
    assert np.isfinite(np.asarray(inside, np.float32)).all()


def test_an_index_map_without_the_walk_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = operands(jnp.float32) | {"sizes": jnp.asarray(SIZES, jnp.int32)}
    want = called("gmm", arrays, "v4")

    def of_first_visit(spec: Any, walk: Any) -> Any:
        index_map: Any = spec.index_map
        return pl.BlockSpec(spec.block_shape, lambda w, v, d: index_map(w, v * 0, d, walk))

    monkeypatch.setattr(visit_pipeline, "_with_walk", of_first_visit)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(called("gmm", arrays, "tpu7x"), want)


@pytest.mark.parametrize(
    ("chip", "rows", "width", "inside"),
    [
        ("v3", 320, 256, False),
        ("v4", 320, 256, False),
        ("v5e", 320, 256, True),
        ("v6e", 320, 256, True),
        ("tpu7x", 320, 256, True),
        ("tpu7x", 330, 256, False),  # the last block leaves 10 rows
        ("tpu7x", 320, 200, False),  # the last block leaves 72 columns
    ],
)
def test_where_it_is_used(
    chip: str, rows: int, width: int, inside: bool, pipelines: list[str]
) -> None:
    lhs, rhs = support.normal(0, (rows, 256)), support.normal(1, (2, 256, width))
    sizes = jnp.asarray([100, rows - 100], jnp.int32)
    f = lambda *a: gmm(*a, tiling=Tiling(64, 256, 128), implementation="mosaic")  # noqa: E731
    with for_chip(chip):
        ours = support.call("mosaic", f, lhs, rhs, sizes)
    assert bool(pipelines) == inside
    plain = support.call(
        "reference", lambda *a: gmm(*a, implementation="reference"), lhs, rhs, sizes
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_cores_share_a_grid(pipelines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with for_chip("v5p"):
        two = dataclasses.replace(visit_pipeline.chip(), num_cores=2)
    monkeypatch.setattr(visit_pipeline, "chip", lambda: two)
    called("gmm", operands(jnp.float32) | {"sizes": jnp.asarray(SIZES, jnp.int32)}, "v5p")
    assert not pipelines


def test_without_jit(pipelines: list[str]) -> None:
    lhs, rhs = support.normal(0, (64, 128)), support.normal(1, (2, 128, 128))
    sizes = jnp.asarray([20, 40], jnp.int32)
    f = lambda: np.asarray(gmm(lhs, rhs, sizes, implementation="mosaic"))  # noqa: E731
    with for_chip("tpu7x"), support.running("mosaic"):
        want = f()
        pipelines.clear()
        with jax.disable_jit():
            np.testing.assert_array_equal(f(), want)
    assert pipelines


def test_batches_have_a_grid(pipelines: list[str]) -> None:
    lhs, rhs = support.normal(0, (2, 64, 128)), support.normal(1, (2, 128, 128))
    sizes = jnp.asarray([[20, 44], [64, 0]], jnp.int32)
    f = lambda x, s: gmm(x, rhs, s, implementation="mosaic")  # noqa: E731
    with for_chip("tpu7x"):
        ours = support.call("mosaic", jax.vmap(f), lhs, sizes)
        assert not pipelines
        one = support.call("mosaic", f, lhs[0], sizes[0])
    assert pipelines
    np.testing.assert_array_equal(ours[0], one)
