"""Expert parallelism over host devices equals one device; sub-networks need no collective."""

import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.moe.exchange import STRATEGIES, choose
from taskmoe.moe.travel import Peers
from taskmoe.tests.kernels.support import running
from taskmoe.tests.moe import support

COLLECTIVE = r"\b(all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute)(-start)?\("
VALID = np.random.default_rng(0).random((8, 3)) < 0.7


def mesh_of(shape: tuple[int, ...], axis_type: AxisType = AxisType.Auto) -> Mesh:
    names = ("data", "expert")[-len(shape) :]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape), devices=devices)


def config_of(routing: Any, **fields: Any) -> moe.MoEConfig:
    return support.make(routing=routing, num_experts=8, gated=routing == "task", **fields)


@functools.cache
def compiled(config: moe.MoEConfig, mesh: Mesh | None, strategy: str) -> Any:
    task = np.array([0, 1, 2, 0, 0, 2, 1, 1], np.int32) if config.routing == "task" else None
    options: Any = {"valid": VALID, "task": task, "mesh": mesh, "strategy": strategy}
    noisy = config.jitter or config.second_policy != "all"

    def loss(weights: Any, x: Any) -> Any:
        key = jax.random.key(7) if noisy else None
        y, report = moe.apply(weights, config, x, key=key, **options)
        return jnp.sum(jnp.sin(y)) + report.aux_loss, (y, report)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def loss_and_gradients(
    config: moe.MoEConfig, mesh: Mesh | None, weights: Any, strategy: str = "all_to_all"
) -> Any:
    run = compiled(config, mesh, strategy)
    return jax.tree.map(np.asarray, run(weights, support.normal(1, 8, 3, 6)))


@pytest.mark.parametrize(
    ("routing", "shape"),
    [
        ("token", (2,)),
        ("token", (4,)),
        ("token", (8,)),
        ("token", (2, 4)),
        ("sentence", (4,)),
        ("task", (2, 4)),
    ],
)
def test_many_devices_equal_one(routing: Any, shape: tuple[int, ...]) -> None:
    config = config_of(routing)
    weights = support.params(config)
    want = loss_and_gradients(config, None, weights)
    have = loss_and_gradients(config, mesh_of(shape), weights)
    support.check(have, want)


DROPPING: Any = {"capacity_factor": 0.8, "group_size": 3}


@pytest.mark.parametrize("strategy", ["all_to_all", "ragged", "all_gather"])
@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"routing": "token"}, (4,)),
        ({"routing": "token", **DROPPING, "second_policy": "random", "jitter": 0.1}, (2, 4)),
        ({"routing": "task"}, (8,)),
    ],
    ids=["dropless", "capacity", "task"],
)
def test_every_strategy_equals_one_device(fields: Any, shape: Any, strategy: str) -> None:
    config = config_of(**fields)
    weights = support.params(config)
    want = loss_and_gradients(config, None, weights)
    support.check(loss_and_gradients(config, mesh_of(shape), weights, strategy), want)
    assert bool(want[1][1].dropped) == ("capacity_factor" in fields)


def test_rows_that_travel_by_remote_dma_equal_one_device() -> None:
    config = config_of("token", **DROPPING, second_policy="random", jitter=0.1)
    weights = support.params(config)
    want = loss_and_gradients(config, None, weights)
    with running("mosaic"):
        have = loss_and_gradients(config, mesh_of((2, 2)), weights, "mosaic")
    support.check(have, want)


@pytest.mark.parametrize("width", [128, 72])
def test_experts_in_the_kernel_that_moves_rows_equal_one_device(width: int) -> None:
    narrow = {"biases": True} if width == 72 else {}
    config = support.make(d_model=width, d_ff=width, gated=True, activation="silu", **narrow)
    weights, x = support.params(config), support.normal(1, 2, 5, width)
    want = support.apply(config, x)[0]
    options: Any = {"mesh": mesh_of((2,)), "strategy": "mosaic", "implementation": "mosaic"}
    with running("mosaic"):
        run = jax.jit(lambda w, x: moe.apply(w, config, x, **options)[0])
        assert "taskmoe_exchange_ffn" in str(jax.make_jaxpr(run)(weights, x))
        have = np.asarray(run(weights, x))
    support.check(have, want)


def test_one_expert_a_device_and_few_rows_are_taken_by_the_kernel_that_moves_rows() -> None:
    config = support.make(d_model=128, d_ff=128, num_experts=2, top_k=1)
    weights, x = support.params(config), support.normal(1, 2, 24, 128)
    want = support.apply(config, x)[0]
    options: Any = {"mesh": mesh_of((2,)), "strategy": "mosaic", "implementation": "mosaic"}
    with running("mosaic"):
        have = jax.jit(lambda w, x: moe.apply(w, config, x, **options)[0])(weights, x)
    support.check(np.asarray(have), want)


def test_remote_dma_off_tpu_is_an_error() -> None:
    config = config_of("token")
    with pytest.raises(ValueError, match=r"strategy='mosaic' runs on TPU, or inside .*'cpu'"):
        moe.apply(
            support.params(config), config, support.normal(0, 8, 3, 6),
            mesh=mesh_of((8,)), strategy="mosaic",
        )  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_layer_compiles_with_remote_dma_for_eight_tpus() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    axes: Any = {"axis_types": (AxisType.Auto,) * 2}
    mesh = Mesh(np.array(devices).reshape(2, 4), ("data", "expert"), **axes)
    config = support.make(d_model=256, d_ff=512, num_experts=16)
    shapes = jax.eval_shape(lambda: moe.init(jax.random.key(0), config, jnp.bfloat16))

    def loss(weights: Any, x: Any) -> Any:
        y, report = moe.apply(weights, config, x, mesh=mesh, strategy="mosaic")
        return jnp.sum(y.astype(jnp.float32) ** 2) + report.aux_loss

    with jax.set_mesh(mesh):
        weights, x = (
            jax.tree.map(
                lambda leaf, spec: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
                ),
                tree,
                specs,
            )
            for tree, specs in (
                (shapes, moe.param_specs(shapes)),
                (jax.ShapeDtypeStruct((16, 64, 256), jnp.bfloat16), P(("data", "expert"))),
            )
        )
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, x).compile().as_text()
    assert "taskmoe_exchange_ffn" in text
    assert "taskmoe_exchange_rows" in text
    assert "all-to-all" not in text


def test_auto_sends_the_fewest_rows() -> None:
    pod, host = Peers(32, ragged=True), Peers(8, ragged=False)
    dropless, tight = (
        support.make(num_experts=32),
        support.make(num_experts=32, capacity_factor=1.0),
    )
    assert choose("auto", dropless, 64, pod) == "ragged"
    assert choose("auto", dropless, 64, host) == "all_gather"
    assert choose("auto", tight, 64, host) == "all_to_all"
    for strategy in ("all_to_all", "ragged", "all_gather"):
        assert choose(strategy, dropless, 64, pod) == strategy
    assert STRATEGIES["all_gather"].sent(dropless, 64, host) == 2 * 7 * 64
    ragged = STRATEGIES["ragged"].sent(dropless, 64, pod)
    assert ragged == 2 * 31 / 32 * 2 * 64
    assert STRATEGIES["mosaic"].sent(dropless, 64, pod) == ragged


def test_an_unknown_strategy_is_an_error() -> None:
    config = config_of("token")
    with pytest.raises(ValueError, match=r"strategy must be one of auto, .*got 'broadcast'"):
        moe.apply(
            support.params(config), config, support.normal(0, 8, 3, 6),
            mesh=mesh_of((8,)), strategy="broadcast",
        )  # fmt: skip


@pytest.mark.parametrize("strategy", ["all_to_all", "ragged", "all_gather"])
def test_an_expert_on_the_wrong_device_is_noticed(strategy: str) -> None:
    config = config_of("token")
    weights = support.params(config)
    moved = weights | {"w_in": jnp.roll(weights["w_in"], 1, axis=0)}
    want = loss_and_gradients(config, None, weights)
    have = loss_and_gradients(config, mesh_of((4,)), moved, strategy)
    with pytest.raises(AssertionError, match="relative error"):
        support.check(have, want)


@pytest.mark.parametrize("routing", ["token", "sentence"])
def test_capacity_is_counted_on_each_device(routing: Any) -> None:
    config = config_of(routing, capacity_factor=0.8)
    weights, x = support.params(config), support.normal(2, 8, 6, 6)
    valid = np.random.default_rng(1).random((8, 6)) < 0.8
    y, report = support.apply(config, x, valid, mesh=mesh_of((4,)))
    parts = [
        support.transcription(config, weights, x[i : i + 2], valid[i : i + 2])
        for i in range(0, 8, 2)
    ]
    want = np.concatenate([part for part, _ in parts])
    support.check(y, want)
    units = [v.sum() if routing == "token" else v.any(1).sum() for v in np.split(valid, 4)]
    dropped = np.average([facts["dropped"] for _, facts in parts], weights=units)
    support.check(report.dropped, dropped)
    assert 0 < dropped < 1
    one_group, _ = support.transcription(config, weights, x, valid)
    with pytest.raises(AssertionError, match="relative error"):
        support.check(y, one_group)


def test_explicit_meshes_keep_the_sharding_of_x() -> None:
    config = config_of("token")
    mesh = mesh_of((8,), AxisType.Explicit)
    x = support.normal(2, 8, 3, 6)
    want = support.apply(config, x, VALID)[0]
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("expert")))
        y, _ = jax.jit(lambda w, x: moe.apply(w, config, x, valid=VALID, mesh=mesh))(
            support.params(config), sharded
        )
    assert y.sharding.spec[0] == "expert"
    support.check(y, want)


def test_parameters_lie_as_their_specs_say() -> None:
    config = config_of("task")
    mesh = mesh_of((8,))
    specs = moe.param_specs(support.params(config))
    assert {name for name, spec in specs.items() if spec == P("expert")} == {
        "w_in", "w_out", "w_gate",
    }  # fmt: skip
    placed = {
        name: jax.device_put(w, NamedSharding(mesh, specs[name]))
        for name, w in support.params(config).items()
    }
    assert placed["w_in"].addressable_shards[0].data.shape == (1, 6, 5)
    x, task = support.normal(2, 8, 3, 6), np.arange(8, dtype=np.int32) % 3
    y, _ = support.apply(config, x, VALID, task, mesh=mesh, weights=placed)
    support.check(y, support.apply(config, x, VALID, task)[0])


def collectives(f: Any, *args: Any) -> list[str]:
    text = jax.jit(f).lower(*args).compile().as_text()
    return [kind for kind, _ in re.findall(COLLECTIVE, text)]


def test_token_routing_exchanges_rows_and_a_sub_network_nothing() -> None:
    mesh = mesh_of((8,))
    x = jax.device_put(support.normal(0, 8, 3, 6), NamedSharding(mesh, P("expert")))
    token = config_of("token")
    sharded = {
        name: jax.device_put(w, NamedSharding(mesh, spec))
        for (name, w), spec in zip(
            support.params(token).items(),
            moe.param_specs(support.params(token)).values(),
            strict=True,
        )
    }
    found = collectives(lambda w, x: moe.apply(w, token, x, mesh=mesh)[0], sharded, x)
    assert found.count("all-to-all") >= 2

    task = config_of("task")
    everywhere = NamedSharding(mesh, P())
    weights = jax.device_put(support.params(task), everywhere)
    small = jax.device_put(moe.extract(weights, task, 1), everywhere)
    assert collectives(moe.ffn, small, x) == []
    scalar = collectives(lambda w, x: moe.apply(w, task, x, task=1)[0], weights, x)
    assert scalar == []
