"""The platform that is lowered for decides which implementation runs, not the host."""

import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.kernels import Router, for_chip, gmm, platforms, top_k_gating
from taskmoe.tests.kernels import support

CONFIG = moe.MoEConfig(d_model=128, d_ff=256, num_experts=4, gated=True)
NAMES = ("tpu_custom_call", "ragged_dot", "stablehlo.while")


def loss(params: Any, x: Any, implementation: Any = None) -> Any:
    y, report = moe.apply(params, CONFIG, x, implementation=implementation)
    return jnp.sum(y.astype(jnp.float32) ** 2) + report.aux_loss


gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)


@functools.cache
def arguments() -> tuple[Any, jax.Array]:
    return moe.init(jax.random.key(0), CONFIG), support.normal(0, (2, 8, 128))


def exported(*platforms: str, implementation: Any = None) -> Any:
    run = jax.jit(lambda *args: gradients(*args, implementation))
    return jax.export.export(run, platforms=platforms)(*arguments())


def found(module: str) -> set[str]:
    return {name for name in NAMES if name in module}


def test_each_platform_gets_its_own_way() -> None:
    tpu, cuda, cpu = (exported(name).mlir_module() for name in ("tpu", "cuda", "cpu"))
    assert found(tpu) == {"tpu_custom_call"}
    assert found(cuda) == {"ragged_dot", "stablehlo.while"}  # gradients of matrices in tiles
    assert found(cpu) == {"stablehlo.while"}


def test_one_export_for_all_runs_here() -> None:
    everywhere = exported("tpu", "cuda", "cpu")
    assert found(everywhere.mlir_module()) == set(NAMES)
    read = jax.export.deserialize(everywhere.serialize())
    want = gradients(*arguments(), None)
    jax.tree.map(np.testing.assert_array_equal, read.call(*arguments()), want)


def test_mosaic_may_be_asked_for_wherever_a_tpu_is_lowered_for() -> None:
    assert found(exported("tpu", implementation="mosaic").mlir_module()) == {"tpu_custom_call"}
    with pytest.raises(ValueError, match=r"'mosaic' of top_k_gating runs on TPU, .* for 'cpu'"):
        exported("cpu", implementation="mosaic")
    with pytest.raises(ValueError, match=r"runs on TPU, or inside .*force_tpu_interpret_mode"):
        gmm(jnp.ones((8, 4)), jnp.ones((2, 4, 4)), [4, 4], implementation="mosaic")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_what_was_exported_here_compiles_for_every_chip(topology: str) -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    kinds: Any = {"axis_types": (AxisType.Auto,)}
    whole = NamedSharding(Mesh(np.array(devices[:1]), ("one",), **kinds), P())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments()
    )
    text = jax.jit(tpu_artifact().call).lower(*shapes).compile().as_text()
    kernels = (
        "top_k_gating",
        "take_rows",
        "add_rows",
        "visits",
        "expert_ffn",
        "expert_ffn_backward",
    )
    for kernel in kernels:
        assert f"taskmoe_{kernel}" in text


@functools.cache
def tpu_artifact() -> Any:
    return exported("tpu")


def test_the_chip_can_be_named() -> None:
    def seen() -> Any:
        return platforms.chip().generation, platforms.chip().vmem_capacity_bytes >> 20

    assert seen() == (4, 16)
    with for_chip("v6e"):
        assert seen() == (6, 128)
        assert found(exported("tpu").mlir_module()) == {"tpu_custom_call"}
    with pytest.raises(ValueError, match=r"name must be one of v3, v4, .*got 'v9'"):
        for_chip("v9")


@support.on_cpu
def test_rows_may_be_symbolic_where_there_are_no_kernels() -> None:
    params, x = arguments()
    batch, length = jax.export.symbolic_shape("b, s")
    rows = jax.ShapeDtypeStruct((batch, length, x.shape[2]), x.dtype)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    run = jax.export.export(gradients, platforms=["cpu"])(shapes, rows)
    for size in ((2, 8), (1, 1), (3, 50)):
        some = support.normal(1, (*size, x.shape[2]))
        have, want = run.call(params, some), gradients(params, some)
        for ours, theirs in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
            largest = float(jnp.max(jnp.abs(theirs)))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * largest)
    with pytest.raises(ValueError, match="'mosaic' of top_k_gating takes no symbolic dimensions"):
        jax.export.export(gradients, platforms=["tpu"])(shapes, rows)


@pytest.mark.parametrize(
    ("saved", "times"),
    [((), 2), (("taskmoe_expert_out", "taskmoe_expert_hidden"), 1)],
)
def test_a_policy_that_saves_the_products_runs_them_once(saved: Any, times: int) -> None:
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    run = jax.grad(jax.checkpoint(loss, policy=policy))
    text = str(jax.make_jaxpr(run)(*arguments()))
    assert text.count("op=taskmoe_expert_ffn_keeping") == times
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4),
        run(*arguments()),
        gradients(*arguments(), None)[0],
    )


@pytest.mark.parametrize("implementation", ["reference", "xla", "ragged_dot"])
def test_group_sizes_beyond_32_bits_are_cut_off(implementation: str) -> None:
    sizes = [2**31 - 1] * 4
    out = gmm(jnp.ones((5, 3)), jnp.ones((4, 3, 2)), sizes, implementation=implementation)
    np.testing.assert_array_equal(out, np.full((5, 2), 3))
    with jax.enable_x64(True):
        wide = np.array([2, 2**40, 7, 7])
        x = jnp.ones((5, 3), jnp.float32)
        w = jnp.arange(1, 5, dtype=jnp.float32)[:, None, None] * jnp.ones((4, 3, 2), jnp.float32)
        out = gmm(x, w, wide, implementation=implementation)
    np.testing.assert_array_equal(out[:, 0], [3, 3, 6, 6, 6])


@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic"])
def test_no_expert_is_chosen_twice_among_nan(implementation: str) -> None:
    logits = jnp.array([[1.0, jnp.nan, 3.0, jnp.nan], [jnp.nan] * 4, [-jnp.inf, 2.0, -jnp.inf, 1]])
    f = lambda x: top_k_gating(x, 3, implementation=implementation).experts  # noqa: E731
    experts = support.call(implementation, f, logits)
    np.testing.assert_array_equal(experts, [[2, 0, 1], [0, 1, 2], [1, 3, 0]])
    for scores in ("softmax", "sigmoid", "sqrt_softplus"):
        router = Router(scores, normalise=False)
        options: Any = {"router": router, "bias": jnp.zeros(4), "implementation": implementation}
        g = lambda x, o=options: top_k_gating(x, 3, **o)[:2]  # noqa: E731
        experts, weights = support.call(implementation, g, logits)
        np.testing.assert_array_equal(experts, [[2, 0, 1], [0, 1, 2], [1, 3, 0]])
        assert np.isfinite(weights).all()


@support.on_cpu
def test_gating_many_experts_takes_few_temporaries() -> None:
    logits = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
    run = jax.jit(lambda x: top_k_gating(x, 8, implementation="xla"))
    temporaries = run.lower(logits).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 8 * logits.size * 4


@pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is not None, reason="tokamax is installed here"
)
def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'taskmoe\[gpu\]'"):
        gmm(jnp.ones((8, 4)), jnp.ones((2, 4, 4)), [4, 4], implementation="tokamax")
