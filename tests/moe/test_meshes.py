"""The layer on the meshes of frameworks: outputs and gradients are those of one device."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.tests.moe import support

CONFIG = support.make(num_experts=8, d_ff=8, gated=True)
TASKS = support.make(num_experts=8, d_ff=8, gated=True, routing="task")


def mesh_of(*axes: tuple[str, int], kind: AxisType = AxisType.Auto) -> Mesh:
    names, sizes = zip(*axes, strict=True)
    devices = jax.devices()[: int(np.prod(sizes))]
    if len(devices) < np.prod(sizes):
        pytest.skip(f"wants {np.prod(sizes)} devices, here are {len(devices)}")
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names), devices=devices)


def framework() -> tuple[Mesh, moe.MeshAxes]:
    """Axes as MaxText has them: experts' hidden units are cut along "tensor"."""
    mesh = mesh_of(("data", 2), ("fsdp", 1), ("expert", 2), ("tensor", 2))
    return mesh, moe.MeshAxes(batch=("data", "fsdp"), hidden="tensor")


def all_of(config: moe.MoEConfig, **options: Any) -> Callable[..., Any]:
    """Gradients, output and report of a loss that all of them go into."""

    def loss(params: Any, x: Any) -> Any:
        y, report = moe.apply(params, config, x, **options)
        return jnp.sum(jnp.sin(y)) + report.aux_loss, (y, report)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)


def batch(size: int) -> Any:
    return support.normal(size, size, 3, 6)


@functools.cache
def wanted(size: int, config: moe.MoEConfig = CONFIG, task: int | None = None) -> Any:
    """On one device."""
    return jax.jit(all_of(config, task=task))(support.params(config), batch(size))


@pytest.mark.parametrize("strategy", ["auto", "all_to_all", "ragged", "all_gather"])
def test_experts_and_their_hidden_units_cut_at_once(strategy: str) -> None:
    mesh, axes = framework()
    run = jax.jit(all_of(CONFIG, mesh=mesh, axes=axes, strategy=strategy))
    support.check(run(support.params(CONFIG), batch(4)), wanted(4))


def place(params: Any, mesh: Mesh, axes: moe.MeshAxes | None = None) -> Any:
    """Parameters as `moe.param_specs` lays them; experts everywhere where no axis is theirs."""
    if axes is None and "expert" not in mesh.axis_names:
        axes = moe.MeshAxes(expert=None)
    specs = moe.param_specs(params, axes)
    return {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in params.items()}


def test_parameters_lie_as_the_axes_say() -> None:
    mesh, axes = framework()
    specs = moe.param_specs(support.params(CONFIG), axes)
    assert specs["w_in"] == specs["w_gate"] == P("expert", None, ("tensor",))
    assert specs["w_out"] == P("expert", ("tensor",))
    assert specs["gate"] == P()
    placed = place(support.params(CONFIG), mesh, axes)
    run = jax.jit(lambda p, x: moe.apply(p, CONFIG, x, mesh=mesh, axes=axes)[0])
    text = run.lower(placed, batch(4)).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather(" in line and "6,8" in line]
    assert gathered == []  # no matrix travels
    support.check(run(placed, batch(4)), wanted(4)[1][0])


@pytest.mark.parametrize("size", [1, 3])
def test_a_batch_that_the_mesh_does_not_divide(size: int) -> None:
    mesh = mesh_of(("expert", 8))
    support.check(all_of(CONFIG, mesh=mesh)(support.params(CONFIG), batch(size)), wanted(size))


def test_the_mesh_in_use_is_taken() -> None:
    mesh, axes = framework()
    with jax.set_mesh(mesh):
        found = jax.jit(all_of(CONFIG, axes=axes))(support.params(CONFIG), batch(4))
        given = jax.jit(all_of(CONFIG, axes=axes, mesh=mesh.abstract_mesh))
        support.check(given(support.params(CONFIG), batch(4)), wanted(4))
        text = jax.jit(all_of(CONFIG, axes=axes)).lower(support.params(CONFIG), batch(4)).as_text()
    assert "all_gather" in text or "all_to_all" in text
    support.check(found, wanted(4))
    other = mesh_of(("data", 8))
    with jax.set_mesh(other):  # has no axis of experts: one device's program
        support.check(jax.jit(all_of(CONFIG))(support.params(CONFIG), batch(4)), wanted(4))


def test_axes_that_are_given_count_on_the_mesh_in_use() -> None:
    """Hidden units cut, experts everywhere: parts are added up, and nothing else travels."""
    mesh, axes = mesh_of(("data", 2), ("wide", 4)), moe.MeshAxes("data", None, "wide")
    placed = place(support.params(CONFIG), mesh, axes)
    with jax.set_mesh(mesh):
        x = jax.device_put(batch(4), NamedSharding(mesh, P("data")))
        run = jax.jit(lambda p, x: moe.apply(p, CONFIG, x, axes=axes))
        text = run.lower(placed, x).compile().as_text()
        assert "all-reduce" in text
        assert "all-gather" not in text
        support.check(jax.jit(all_of(CONFIG, axes=axes))(placed, x), wanted(4))
        with pytest.raises(ValueError, match=r"mesh must have an axis 'expert' \(axes.expert\)"):
            moe.apply(placed, CONFIG, x, axes=moe.MeshAxes())


def within(whole: Mesh, manual: set[str], x_spec: P, param_specs: Any, **options: Any) -> Any:
    """All of the layer inside a `jax.shard_map` that cuts some axes only."""

    def local(params: Any, x: Any) -> Any:
        return moe.apply(params, CONFIG, x, **options)

    mapped = jax.shard_map(
        local,
        mesh=whole,
        in_specs=(param_specs, x_spec),
        out_specs=(x_spec, P()),
        axis_names=manual,
    )

    def loss(params: Any, x: Any) -> Any:
        y, report = mapped(params, x)
        return jnp.sum(jnp.sin(y)) + report.aux_loss, (y, report)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(support.params(CONFIG), batch(8))


@pytest.mark.parametrize("given", [True, False])
def test_inside_a_map_over_the_experts(given: bool) -> None:
    mesh = mesh_of(("data", 2), ("expert", 4))
    cut = moe.param_specs(support.params(CONFIG))
    have = within(mesh, {"expert"}, P("expert"), cut, mesh=mesh if given else None)
    support.check(have, wanted(8))


@pytest.mark.parametrize("manual", [{"data"}, {"data", "expert"}])
def test_inside_a_map_over_the_batch(manual: set[str]) -> None:
    mesh = mesh_of(("data", 2), ("expert", 4))
    axes = moe.MeshAxes(batch="data")
    cut = moe.param_specs(support.params(CONFIG)) if "expert" in manual else P()
    spec = P(("data", "expert")) if "expert" in manual else P("data")
    support.check(within(mesh, manual, spec, cut, mesh=mesh, axes=axes), wanted(8))


def test_inside_a_map_where_every_device_has_all_experts() -> None:
    mesh = mesh_of(("expert", 4))

    def local(params: Any, x: Any) -> Any:
        return moe.apply(params, CONFIG, x)[0]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("expert")), out_specs=P("expert"))
    y = jax.jit(mapped)(support.params(CONFIG), batch(8))
    support.check(y, wanted(8)[1][0])


def test_inside_a_pipeline() -> None:
    mesh = mesh_of(("stage", 2), ("expert", 4))
    params = jax.tree.map(lambda w: jnp.stack([w, w / 2]), support.params(CONFIG))
    x = jnp.stack([batch(8), 2 * batch(8)])

    def local(params: Any, x: Any) -> Any:
        run = all_of(CONFIG, mesh=mesh)
        found = run(jax.tree.map(lambda w: w[0], params), x[0])
        return jax.tree.map(lambda leaf: leaf[None], found)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"}
    )
    have = jax.jit(mapped)(params, x)
    run = jax.jit(all_of(CONFIG))
    each = [run(jax.tree.map(lambda w, i=i: w[i], params), x[i]) for i in range(2)]
    support.check(have, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


@pytest.mark.parametrize("axes", [(("data", 8),), (("data", 2), ("expert", 4))])
@pytest.mark.parametrize("in_use", [True, False])
def test_explicit_sharding(axes: Any, in_use: bool) -> None:
    mesh = mesh_of(*axes, kind=AxisType.Explicit)
    placed = place(support.params(CONFIG), mesh)
    x = jax.device_put(batch(8), NamedSharding(mesh, P("data")))
    run = jax.jit(all_of(CONFIG))
    if in_use:
        with jax.set_mesh(mesh):
            have = run(placed, x)
    else:
        have = run(placed, x)
    assert have[1][0].sharding.spec[0] == "data"
    support.check(have, wanted(8))


@pytest.mark.parametrize("in_use", [True, False])
def test_sub_networks_of_explicitly_sharded_layers(in_use: bool) -> None:
    mesh = mesh_of(("wide", 2), ("expert", 4), kind=AxisType.Explicit)
    axes = moe.MeshAxes(hidden="wide")

    def both(config: moe.MoEConfig, cut: Any) -> None:
        params = support.params(config)
        placed = place(params, mesh, axes)
        with jax.set_mesh(mesh) if in_use else contextlib.nullcontext():
            found = jax.device_get(cut(placed))
        jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(cut(params)))

    by_task = dataclasses.replace(TASKS, shared=4, biases=True, gated=True)
    both(by_task, lambda params: moe.extract(params, by_task, 1))
    both(by_task, lambda params: moe.extract_tasks(params, by_task, [2, 0])[0])
    usage = np.arange(float(CONFIG.num_experts))
    both(CONFIG, lambda params: moe.prune(params, CONFIG, usage, 2)[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_of_one_task_on_a_mesh(kind: AxisType) -> None:
    axes = None
    if kind == AxisType.Explicit:
        mesh = mesh_of(("data", 2), ("expert", 4), kind=kind)
    else:
        mesh, axes = framework()
    placed = place(support.params(TASKS), mesh, axes)
    with jax.set_mesh(mesh):
        x = jax.device_put(batch(8), NamedSharding(mesh, P("data")))
        have = jax.jit(all_of(TASKS, task=1, axes=axes))(placed, x)
    support.check(have, wanted(8, TASKS, 1))


def test_a_second_call_at_the_prompt_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    mesh = mesh_of(("data", 2), ("expert", 4))

    def compiled() -> list[str]:
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            all_of(CONFIG, mesh=mesh)(support.params(CONFIG), batch(8))
        return [line for line in caplog.messages if "Compiling" in line]

    assert compiled()
    assert compiled() == []


@pytest.mark.parametrize("strategy", ["ragged", "all_gather"])
def test_a_bounded_buffer_drops_and_counts_what_exceeds_it(strategy: str) -> None:
    mesh = mesh_of(("expert", 4))
    roomy = support.make(num_experts=8, d_ff=8, gated=True, buffer_factor=4.0)
    options: Any = {"mesh": mesh, "strategy": strategy}
    have = jax.jit(all_of(roomy, **options))(support.params(CONFIG), batch(8))
    support.check(have, wanted(8))
    tight = support.make(num_experts=8, d_ff=8, gated=True, buffer_factor=0.5)
    params = support.params(CONFIG)
    y, report = jax.jit(lambda p, x: moe.apply(p, tight, x, **options))(params, batch(8))
    most = 4 * 6  # devices, and rows each has room for: half of top_k * 6 tokens
    assert 1 - most / (8 * 3 * 2) - 1e-6 <= report.dropped < 1
    # What was dropped contributes nothing: each token is a sum of some of its two parts.
    parts = each_choice(params, batch(8))
    close = [np.abs(np.asarray(y) - part).max(-1) < 1e-5 for part in parts]
    assert np.any(close, axis=0).all()
    lost = np.mean([2, 1, 1, 0] @ np.array(close).reshape(4, -1)) / 2
    np.testing.assert_allclose(report.dropped, lost, atol=1e-6)
    grads = jax.jit(all_of(tight, **options))(params, batch(8))[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def each_choice(params: Any, x: Any) -> list[np.ndarray]:
    """Outputs [B, S, D] of no choice, of the first, of the second, and of both."""
    logits = np.asarray(x) @ np.asarray(params["gate"])
    order = np.argsort(-logits, axis=-1)[..., :2]
    chosen = np.take_along_axis(logits, order, -1)
    weights = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    outs = np.stack([np.zeros(x.shape)] * 2)
    for place in np.ndindex(*x.shape[:2]):
        for j in range(2):
            out = support.expert(CONFIG, params, order[place][j], np.asarray(x)[place])
            outs[(j, *place)] = weights[place][j] * out
    return [0 * outs[0], outs[0], outs[1], outs.sum(0)]


def test_the_default_holds_no_more_than_the_other_strategies() -> None:
    mesh = mesh_of(("expert", 8))
    config = moe.MoEConfig(d_model=64, d_ff=32, num_experts=128, top_k=2)
    params = jax.eval_shape(lambda: moe.init(jax.random.key(0), config))
    x = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
    held = {}
    for strategy in ("auto", "all_to_all", "ragged", "all_gather"):
        run = jax.jit(lambda p, x, s=strategy: moe.apply(p, config, x, mesh=mesh, strategy=s)[0])
        held[strategy] = run.lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert held["auto"] == min(held.values())
    assert held["all_to_all"] > 2 * held["auto"]


def test_a_hidden_unit_on_the_wrong_device_is_noticed() -> None:
    mesh, axes = framework()
    params = dict(support.params(CONFIG))
    params["w_out"] = jnp.roll(params["w_out"], 1, axis=1)
    have = jax.jit(all_of(CONFIG, mesh=mesh, axes=axes))(params, batch(4))
    with pytest.raises(AssertionError, match="relative error"):
        support.check(have, wanted(4))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"hidden": "model"}, r"mesh must have an axis 'model' \(axes.hidden\), got"),
        ({"batch": "rows"}, r"mesh must have an axis 'rows' \(axes.batch\), got"),
        ({"expert": "experts"}, r"mesh must have an axis 'experts' \(axes.expert\), got"),
        ({"hidden": "wide"}, "mesh axis 'wide' must divide d_ff=8, got size 3"),
    ],
)
def test_axes_that_do_not_fit(axes: Any, message: str) -> None:
    mesh = mesh_of(("expert", 2), ("wide", 3))
    with pytest.raises(ValueError, match=message):
        moe.apply(support.params(CONFIG), CONFIG, batch(4), mesh=mesh, axes=moe.MeshAxes(**axes))


def test_an_axis_has_one_purpose() -> None:
    with pytest.raises(ValueError, match="axes must name an axis for one purpose only"):
        moe.MeshAxes(batch="data", hidden=("tensor", "data"))
    with pytest.raises(ValueError, match="axes must name an axis for one purpose only"):
        moe.MeshAxes(hidden="expert")
