"""Layers with quantised experts: those of what they stand for, on meshes and extracted alike."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.kernels import Quantized, dequantize
from taskmoe.tests.kernels.support import running
from taskmoe.tests.moe import support

TASK = np.array([0, 1, 2, 0, 0, 2, 1, 1], np.int32)
X = support.normal(1, 8, 3, 6)


def config_of(routing: Any, **fields: Any) -> moe.MoEConfig:
    return support.make(routing=routing, num_experts=8, gated=True, activation="silu", **fields)


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def restored(tree: Any) -> Any:
    """The same with plain arrays for what is quantised."""
    return jax.tree.map(
        lambda w: dequantize(w) if is_quantized(w) else w, tree, is_leaf=is_quantized
    )


@functools.cache
def small(config: moe.MoEConfig, dtype: str = "int8", activations: str | None = None) -> Any:
    return moe.quantize(support.params(config), dtype, activations=activations)


def run(config: moe.MoEConfig, weights: Any, task: Any = None, **options: Any) -> Any:
    """Output, metrics, and gradients of the input and of what is not quantised."""
    frozen = {name: w for name, w in weights.items() if name in ("w_in", "w_gate", "w_out")}
    free = {name: w for name, w in weights.items() if name not in frozen}

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def loss(free: Any, x: Any) -> Any:
        y, report = moe.apply(free | frozen, config, x, task=task, **options)
        return jnp.sum(jnp.sin(y)) + report.aux_loss, (y, report)

    return jax.tree.map(np.asarray, jax.jit(loss)(free, X))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("routing", ["token", "sentence", "task"])
def test_a_layer_is_that_of_what_it_stands_for(routing: Any, dtype: str) -> None:
    config = config_of(routing, biases=routing == "token")
    weights, task = small(config, dtype), TASK if routing == "task" else None
    assert weights["w_in"].values.dtype == dtype
    have, want = run(config, weights, task), run(config, restored(weights), task)
    support.check(have, want)
    rough = run(config, support.params(config), task)
    with pytest.raises(AssertionError, match="relative error"):
        support.check(rough, want, 1e-4)
    support.check(rough[1][0], want[1][0], 0.2)


@pytest.mark.parametrize("strategy", ["all_to_all", "ragged", "all_gather"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_many_devices_equal_one(strategy: str, dtype: str) -> None:
    config = config_of("token")
    weights = small(config, dtype)
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    have = run(config, weights, mesh=mesh, strategy=strategy)
    support.check(have, run(config, weights))


def test_rows_that_travel_by_remote_dma_meet_experts_in_a_kernel_of_their_own() -> None:
    config = support.make(d_model=128, d_ff=128, gated=True, activation="silu")
    weights, x = small(config), support.normal(1, 2, 5, 128)
    mesh = jax.make_mesh((2,), ("expert",), devices=jax.devices()[:2])
    options: Any = {"mesh": mesh, "strategy": "mosaic", "implementation": "mosaic"}
    with running("mosaic"):
        layer = jax.jit(lambda w, x: moe.apply(w, config, x, **options)[0])
        kernels = str(jax.make_jaxpr(layer)(weights, x))
        have = np.asarray(layer(weights, x))
    assert "taskmoe_exchange_ffn" not in kernels
    assert "taskmoe_expert_ffn" in kernels
    support.check(have, np.asarray(moe.apply(weights, config, x)[0]))


def test_hidden_units_may_be_spread() -> None:
    config = config_of("token", d_ff=8)
    mesh = jax.make_mesh((2, 4), ("expert", "tensor"))
    axes = moe.MeshAxes(hidden="tensor")
    weights = small(config)
    support.check(run(config, weights, mesh=mesh, axes=axes), run(config, weights))
    specs = moe.param_specs(weights, axes)
    placed = {
        name: jax.tree.map(
            lambda leaf, spec: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec)),
            weights[name],
            specs[name],
        )
        for name in weights
    }
    support.check(run(config, placed, mesh=mesh, axes=axes), run(config, weights))
    with pytest.raises(ValueError, match=r"4 parts, which must divide the 1 blocks.*smaller block"):
        run(config, small(config, activations="int8"), mesh=mesh, axes=axes)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_batch_of_one_task_on_a_mesh(dtype: str) -> None:
    config = config_of("task")
    weights, task = small(config, dtype), jnp.int32(1)
    mesh = jax.make_mesh((2, 4), ("data", "expert"))
    have = run(config, weights, task, mesh=mesh)
    support.check(have, run(config, restored(weights), np.full(8, 1, np.int32)))


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"biases": True}])
def test_extraction_keeps_the_values(fields: Any, activations: str | None) -> None:
    config = config_of("task", **fields)
    weights = small(config, activations=activations)
    for task in range(3):
        ffn = support.extract(weights, config, task)
        assert isinstance(ffn.w_out, Quantized)
        y, _ = moe.apply(weights, config, X, task=np.full(8, task, np.int32))
        support.check(support.run_ffn(ffn, X), np.asarray(y))
        wrong = jax.tree.map(lambda x: x, ffn)
        object.__setattr__(wrong, "w_out", Quantized(ffn.w_out.values, 1.01 * ffn.w_out.scales))
        with pytest.raises(AssertionError, match="relative error"):
            support.check(support.run_ffn(wrong, X), np.asarray(y))


def test_a_shared_expert_stays_as_it_is() -> None:
    config = config_of("task", shared=4, shared_gate=True)
    weights = small(config)
    assert not is_quantized(weights["shared_in"])
    want = run(config, restored(weights), TASK)
    support.check(run(config, weights, TASK), want)
    ffn = support.extract(weights, config, 1)  # whose hidden units are of both
    assert not is_quantized(ffn.w_in)
    y, _ = moe.apply(weights, config, X, task=np.full(8, 1, np.int32))
    support.check(support.run_ffn(ffn, X), np.asarray(y))
    with pytest.raises(ValueError, match="quantised without activations to join"):
        support.extract(small(config, activations="int8"), config, 1)


def test_smaller_layers_keep_the_values() -> None:
    config = config_of("task")
    weights = small(config)
    fewer, smaller = moe.extract_tasks(weights, config, [2, 0])
    want, _ = moe.apply(weights, config, X, task=np.where(np.arange(8) % 2, 0, 2))
    have, _ = moe.apply(fewer, smaller, X, task=np.arange(8, dtype=np.int32) % 2)
    support.check(have, np.asarray(want))
    token = config_of("token")
    kept, pruned = moe.prune(small(token), token, np.arange(8.0), 3)
    assert kept["w_in"].scales.shape[0] == pruned.num_experts == 3


def test_an_extracted_network_passes_gradients_to_rows() -> None:
    config = config_of("task")
    ffn = support.extract(small(config, activations="int8"), config, 0)
    dense = restored(ffn)

    def loss(x: Any, ffn: Any) -> Any:
        return jnp.sum(moe.ffn(ffn, x))

    d_x, d_ffn = jax.grad(loss, argnums=(0, 1), allow_int=True)(X, ffn)
    support.check(d_x, np.asarray(jax.grad(loss)(X, dense)), 0.05)
    assert d_ffn.w_in.values.dtype == jax.dtypes.float0


def test_errors() -> None:
    config = config_of("token")
    with pytest.raises(TypeError, match="params are quantised already"):
        moe.quantize(small(config))
    with pytest.raises(ValueError, match="block must be K=6 or a multiple of 128"):
        moe.quantize(support.params(config), block=128)
