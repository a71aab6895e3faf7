"""One training step: parts, recomputation, devices and bf16 change nothing that they should not."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.text.data import Batch, TrainingData
from taskmoe.wmt.training import parallel, step

MODEL = support.model_config(encoder="token", decoder="target")
CONFIG = support.train_config(row_multiple=8)


@functools.cache
def data() -> TrainingData:
    return TrainingData.encoded(support.text(), support.tokenizer(), CONFIG)


def run(
    config: TrainConfig = CONFIG,
    model: ModelConfig = MODEL,
    mesh: Any = None,
    steps: int = 3,
    spoil: tuple[int, ...] = (),
) -> Any:
    """State and the sums of each step; a step in `spoil` meets an infinite parameter."""
    state = step.init_state(model, config, mesh)
    take = step.make_train_step(model, config, mesh)
    sums = []
    for i in range(steps):
        kept = jax.tree.map(np.asarray, state.params["decoder_norm"])
        if i in spoil:
            state.params["decoder_norm"] = jnp.full_like(state.params["decoder_norm"], jnp.inf)
        state, got = take(state, parallel.share(data().batch(i), mesh))
        if i in spoil:
            state.params["decoder_norm"] = jnp.asarray(kept)
        sums.append(jax.device_get(got))
    return state, sums


def assert_same(a: Any, b: Any, tolerance: float) -> None:
    """Parameters and losses, to a tolerance relative to each array's largest entry."""
    np.testing.assert_allclose(
        [s["loss"] for s in a[1]], [s["loss"] for s in b[1]], rtol=max(tolerance, 1e-6)
    )
    for x, y in zip(*(jax.tree.leaves(s[0].params) for s in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(np.abs(x).max()))


@functools.cache
def plain() -> Any:
    return run()


def test_recomputed_layers_give_the_same_step() -> None:
    assert_same(run(dataclasses.replace(CONFIG, remat=True)), plain(), 1e-4)


def without_balance(config: ModelConfig) -> ModelConfig:
    """Dense sides: the load-balance loss of a whole batch is not the mean over its parts."""
    return dataclasses.replace(config, encoder="dense", decoder="dense")


def test_parts_of_a_batch_give_the_step_of_the_whole() -> None:
    model = without_balance(MODEL)
    whole = run(model=model)
    assert_same(run(dataclasses.replace(CONFIG, accumulate=4, row_multiple=2), model), whole, 1e-3)
    with pytest.raises(AssertionError):  # a part's tokens must count as the whole batch's
        assert_same(run(dataclasses.replace(CONFIG, label_smoothing=0.0), model), whole, 1e-3)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (8, 1)])
def test_a_mesh_takes_the_step_of_one_device(shape: tuple[int, int]) -> None:
    mesh = parallel.make_mesh(*shape)
    state, sums = run(mesh=mesh)
    assert_same((state, sums), plain(), 2e-3)
    w_in = state.params["encoder"][1]["feed_forward"]["moe"]["w_in"]
    assert w_in.addressable_shards[0].data.shape[0] == MODEL.num_experts // shape[1]
    moment = state.optimizer.inner_state[1][0].mu["encoder"][1]["feed_forward"]["moe"]["w_in"]
    assert moment.sharding == w_in.sharding


def test_bfloat16_learns_what_float32_learns_and_keeps_float32_weights() -> None:
    state, sums = run(dataclasses.replace(CONFIG, compute_dtype="bfloat16"), steps=8)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    losses = [float(s["loss"] / s["tokens"]) for s in sums]
    want = [float(s["loss"] / s["tokens"]) for s in run(steps=8)[1]]
    np.testing.assert_allclose(losses, want, rtol=0.02)
    assert losses != want
    assert losses[-1] < losses[0]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    state, sums = run(steps=4, spoil=(1, 2))
    assert [int(s["skipped"]) for s in sums] == [0, 1, 2, 2]
    assert [int(s["skipped_in_row"]) for s in sums] == [0, 1, 2, 0]
    assert [float(s["tokens"]) > 0 for s in sums] == [True, False, False, True]
    assert all(np.isfinite(s["loss"]) for s in sums)
    assert int(state.step) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    unbroken, _ = run(steps=4)
    assert any(
        (x != y).any()
        for x, y in zip(*map(jax.tree.leaves, (state.params, unbroken.params)), strict=True)
    )


def slope_along_the_gates(planted: float = 1.0) -> tuple[float, float]:
    """The loss's slope along its gradient by all gates: as JAX has it, and by differences."""
    objective = step.make_objective(MODEL, CONFIG)
    params, batch = support.params(MODEL), data().batch(0)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return objective(params, batch, jnp.float32(64), jax.random.key(0))[0]

    def gates(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if getattr(path[-1], "key", None) == "gate" else jnp.zeros_like(leaf)

    slope = jax.tree_util.tree_map_with_path(gates, jax.grad(loss)(params))
    norm = float(optax.tree.norm(slope))
    assert norm > 1e-4
    apart = 2e-3
    ends = [
        float(loss(jax.tree.map(lambda p, s, way=way: p + way * apart / norm * s, params, slope)))
        for way in (1, -1)
    ]
    return planted * norm, (ends[0] - ends[1]) / (2 * apart)


def test_the_gates_gradient_in_the_trainers_loss_is_that_of_finite_differences() -> None:
    found, wanted = slope_along_the_gates()
    np.testing.assert_allclose(found, wanted, rtol=0.02)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(*slope_along_the_gates(planted=1.05), rtol=0.02)


@pytest.mark.parametrize("field", [{"beta2": 0.5}, {"epsilon": 0.1}])
def test_adams_numbers_are_those_that_are_set(field: dict[str, float]) -> None:
    config = support.train_config(**field)
    rate = 1e-2 / 20  # the first step of warm-up
    theirs = optax.adamw(rate, b1=0.9, b2=config.beta2, eps=config.epsilon, weight_decay=0.0)
    state, grads = numbers(config)
    clipped, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    updates, _ = theirs.update(clipped, theirs.init(state.params), state.params)
    want = optax.apply_updates(state.params, updates)
    got = step.apply_gradients(config, state, grads, jnp.float32(1)).params
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def numbers(config: TrainConfig, width: int = 8) -> tuple[step.State, Any]:
    """A state of random arrays that no model has, and gradients for it, larger than the clip."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"norm": (5,), "matrix": (width, 2 * width)}
    params, grads = (
        {
            name: jax.random.normal(k, shape)
            for k, (name, shape) in zip(two, shapes.items(), strict=True)
        }
        for two in (keys[:2], keys[2:])
    )
    kept = optax.EmptyState(), step.make_optimizer(config).init(params)
    counts = optax.ApplyIfFiniteState(jnp.int32(0), jnp.bool_(True), jnp.int32(0), kept)
    return step.State(params, counts, jnp.int32(0)), grads


def by_optax(config: TrainConfig) -> optax.GradientTransformation:
    rule = step.make_optimizer(config)
    clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
    return optax.apply_if_finite(clipped, 1 << 30)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("jitted", [False, True])
def test_gradients_do_what_optax_would_do_with_them(name: str, jitted: bool) -> None:
    config = support.train_config(optimizer=name, weight_decay=0.1)
    state, grads = numbers(config)
    params, theirs = state.params, by_optax(config).init(state.params)
    take = functools.partial(step.apply_gradients, config)
    take = jax.jit(take) if jitted else take
    for factor in (1.0, 0.01, jnp.nan, -1.0):
        scaled = jax.tree.map(lambda g, factor=factor: g * factor, grads)
        state = take(state, scaled, jnp.float32(1))
        updates, theirs = by_optax(config).update(scaled, theirs, params)
        params = optax.apply_updates(params, updates)
        for x, y in zip(*map(jax.tree.leaves, (state[:2], (params, theirs))), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    assert int(state.step) == 4
    assert int(state.optimizer.total_notfinite) == 1
    looser = dataclasses.replace(config, clip_norm=2.0)
    other = step.apply_gradients(looser, numbers(config)[0], grads, jnp.float32(1))
    moments = (jax.tree.leaves(s.optimizer) for s in (other, take(numbers(config)[0], grads, 1.0)))
    assert any((x != y).any() for x, y in zip(*moments, strict=True))  # the clip is seen


@pytest.mark.parametrize(
    ("loss", "gradient"), [(jnp.inf, 1.0), (1.0, -jnp.inf), (1.0, jnp.nan), (1.0, 1e30)]
)
def test_one_number_that_is_not_finite_stops_the_whole_step(loss: float, gradient: float) -> None:
    state, grads = numbers(CONFIG)
    grads["matrix"] = grads["matrix"].at[3, 4].set(gradient)
    got = jax.jit(functools.partial(step.apply_gradients, CONFIG))(state, grads, loss)
    assert int(got.optimizer.notfinite_count) == 1
    jax.tree.map(np.testing.assert_array_equal, got.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, *(s.optimizer.inner_state for s in (got, state)))


def test_arrays_are_updated_in_place() -> None:
    state, grads = numbers(CONFIG, width=512)

    def theirs(state: step.State, grads: Any, loss: Any) -> step.State:
        updates, kept = by_optax(CONFIG).update(grads, state.optimizer, state.params)
        return step.State(optax.apply_updates(state.params, updates), kept, state.step + 1)

    def copied(update: Any) -> int:
        compiled = jax.jit(update, donate_argnums=0).lower(state, grads, jnp.float32(1)).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert copied(functools.partial(step.apply_gradients, CONFIG)) < size / 10
    assert copied(theirs) >= size


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_is_multiplied_by_the_learning_rate(name: str) -> None:
    params = {"w": jnp.full((256, 256), 2.0), "norm": jnp.full(3, 2.0)}
    still = jax.tree.map(jnp.zeros_like, params)
    config = support.train_config(optimizer=name, weight_decay=0.1)
    optimizer = step.make_optimizer(config)
    updates, state = optimizer.update(still, optimizer.init(params), params)
    for update in jax.tree.leaves(updates):  # the first of 20 steps of warm-up
        np.testing.assert_allclose(update, -2.0 * 0.1 * 1e-2 / 20, rtol=1e-5)
    again, _ = optimizer.update(still, state, params)
    for update in jax.tree.leaves(again):
        np.testing.assert_allclose(update, -2.0 * 0.1 * 1e-2 / 10, rtol=1e-5)


def test_adafactor_takes_steps_on_a_mesh_too() -> None:
    config = dataclasses.replace(CONFIG, optimizer="adafactor")
    assert_same(run(config, mesh=parallel.make_mesh(4, 2)), run(config), 2e-3)


def test_meshes_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="data=3 x expert=4 does not fit 8 devices"):
        parallel.make_mesh(3, 4)
    with pytest.raises(InputError, match="expert=3 must divide the number of devices, 8"):
        parallel.make_mesh(None, 3)
    with pytest.raises(InputError, match="at least 1, got data=0"):
        parallel.make_mesh(0, 1)
    mesh = parallel.make_mesh(1, 8)
    with pytest.raises(InputError, match=r"num_experts=4 must be a multiple of .* expert=8"):
        parallel.check_mesh(mesh, MODEL, CONFIG)
    dense = support.model_config(encoder="dense", decoder="dense")
    parallel.check_mesh(mesh, dense, CONFIG)
    twelve = support.train_config(batch_tokens=384)
    with pytest.raises(InputError, match=r"12 sentences .* by 8 .* row_multiple=8$"):
        parallel.check_mesh(mesh, dense, twelve)
    with pytest.raises(InputError, match=r"row_multiple=8, and any run --data-parallel 3"):
        parallel.check_mesh(parallel.make_mesh(4, 2), dense, twelve)
    parallel.check_mesh(parallel.make_mesh(3, 2), dense, twelve)
    assert parallel.make_mesh(1, 1) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", 2, None), "go together, got localhost:1, 2, None"),
        (("localhost:1", 2, 2), r"--process-id must be in \[0, 2\), got 2"),
        ((None, 0, None), "go together, got None, 0, None"),
        (("nonsense", 1, 0), "--coordinator must be HOST:PORT, got 'nonsense'"),
        (("localhost:x", 1, 0), "--coordinator must be HOST:PORT"),
        (("localhost:65536", 1, 0), "--coordinator must be HOST:PORT"),
    ],
)
def test_processes_that_cannot_join_are_told_why(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parallel.join(*given)


def test_a_batch_on_a_mesh_is_the_batch() -> None:
    batch = data().batch(0)
    shared = parallel.share(batch, parallel.make_mesh(4, 2))
    assert isinstance(shared, Batch)
    jax.tree.map(np.testing.assert_array_equal, parallel.to_host(shared), batch)
    assert len(shared.source.sharding.device_set) == 8  # type: ignore[attr-defined]
