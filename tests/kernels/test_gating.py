"""top_k_gating and row_plan: choices, queues, statistics and gradients."""

import contextlib
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from taskmoe.kernels import ROUTERS, Gating, Router, given_gating, row_plan, top_k_gating
from taskmoe.tests.kernels import support

ALL = ["reference", "xla", "mosaic"]
FAST = ["xla", "mosaic"]


def by_hand(logits: np.ndarray, top_k: int, valid: np.ndarray) -> dict[str, np.ndarray]:
    """Choices and queues by a loop that knows no arrays."""
    tokens, num_experts = logits.shape
    experts = np.zeros((tokens, top_k), np.int32)
    slots = np.full((tokens, top_k), -1, np.int32)
    counts = np.zeros((top_k, num_experts), np.int32)
    queue = [0] * num_experts
    for j in range(top_k):
        for t in range(tokens):
            row = logits[t] if valid[t] else np.zeros(num_experts)
            experts[t, j] = sorted(range(num_experts), key=lambda e: (-row[e], e))[j]
            if valid[t]:
                slots[t, j] = queue[experts[t, j]]
                queue[experts[t, j]] += 1
                counts[j, experts[t, j]] += 1
    return {"experts": experts, "slots": slots, "counts": counts}


@functools.cache
def run(implementation: str, top_k: int, router: Router | None = None) -> Any:
    """Gating and its logits' gradient for given gradients of weights, mean_probs and z_loss."""

    def f(logits: Any, valid: Any, d_weights: Any, d_probs: Any, bias: Any = None) -> Any:
        def differentiable(logits: Any) -> Any:
            options: Any = {"router": router, "bias": bias, "implementation": implementation}
            gating = top_k_gating(logits, top_k, valid=valid, **options)
            return (gating.weights, gating.mean_probs, gating.z_loss), gating

        _, pull, gating = jax.vjp(differentiable, logits, has_aux=True)
        d_z = jnp.asarray(0.7, gating.z_loss.dtype)
        return gating, pull((d_weights, d_probs, d_z))[0]

    return f


def check(implementation: str, logits: jax.Array, valid: jax.Array, top_k: int) -> None:
    tokens, num_experts = logits.shape
    grads = support.normal(5, (tokens, top_k)), support.normal(6, (num_experts,))
    args = (logits, valid, *grads)
    truth, d_truth = support.in_float64(run("reference", top_k), *args)
    plain, d_plain = support.call("reference", run("reference", top_k), *args)
    logits = jnp.where(valid[:, None], logits, jnp.nan)
    ours, d_ours = support.call(implementation, run(implementation, top_k), logits, *args[1:])
    want = by_hand(np.asarray(args[0], np.float64), top_k, np.asarray(valid))
    for name, value in want.items():
        np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)
        assert getattr(ours, name).dtype == np.int32
    for name in ("weights", "mean_probs", "z_loss"):
        have, base, true = (getattr(g, name) for g in (ours, plain, truth))
        assert have.dtype == np.float32
        support.assert_as_good({name: have}, {name: base}, {name: true})
    support.assert_as_good({"d logits": d_ours}, {"d logits": d_plain}, {"d logits": d_truth})
    assert not ours.weights[~np.asarray(valid)].any()
    assert not np.asarray(d_ours, np.float32)[~np.asarray(valid)].any()


@pytest.mark.as_shipped
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(300, 32, 2), (37, 130, 1)])
def test_forward_and_gradient(
    implementation: str, dtype: Any, tokens: int, experts: int, top_k: int
) -> None:
    logits = 3 * support.normal(0, (tokens, experts), dtype)
    check(implementation, logits, jnp.arange(tokens) % 5 != 2, top_k)


@pytest.mark.parametrize("implementation", FAST)
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.sampled_from([(67, 19, 2), (23, 4, 4)]),
    levels=st.integers(0, 3),
    data=st.data(),
)
def test_any_logits(
    implementation: str, shape: tuple[int, int, int], levels: int, data: Any
) -> None:
    tokens, experts, top_k = shape
    logits = support.normal(1, (tokens, experts))
    if levels:  # few distinct values: ties everywhere
        logits = jnp.round(logits * levels) / levels
    valid = jnp.asarray(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    check(implementation, logits, valid, top_k)


@pytest.mark.parametrize("implementation", ALL)
def test_ties_go_to_the_lower_expert(implementation: str) -> None:
    f = lambda x: top_k_gating(x, 3, implementation=implementation)  # noqa: E731
    gating = support.call(implementation, f, jnp.zeros((9, 5)))
    np.testing.assert_array_equal(gating.experts, np.tile(np.arange(3), (9, 1)))
    np.testing.assert_array_equal(gating.slots, np.tile(np.arange(9)[:, None], (1, 3)))


@pytest.mark.parametrize("implementation", ALL)
def test_nobody_valid(implementation: str) -> None:
    def f(x: Any, valid: Any) -> Any:
        gating = top_k_gating(x, 2, valid=valid, implementation=implementation)
        return gating, row_plan(gating)

    logits = jnp.full((6, 4), jnp.nan)
    gating, plan = support.call(implementation, f, logits, jnp.zeros(6, bool))
    assert not gating.weights.any()
    assert not gating.mean_probs.any()
    assert gating.z_loss == 0
    assert not plan.group_sizes.any()
    assert (plan.rows == plan.num_rows).all()


@pytest.mark.parametrize("implementation", ALL)
def test_extreme_logits_stay_finite(implementation: str) -> None:
    logits = jnp.asarray([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [88.0, -300.0, 88.0]])
    f = lambda x: top_k_gating(x, 2, implementation=implementation)._replace(z_loss=jnp.zeros(()))  # noqa: E731
    gating = support.call(implementation, f, logits)
    np.testing.assert_allclose(gating.weights, [[1, 0], [0.5, 0.5], [0.5, 0.5]])
    assert np.isfinite(gating.mean_probs).all()


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("fault", ["second choices first", "padding counted"])
def test_a_planted_fault_is_caught(implementation: str, fault: str) -> None:
    logits, valid = support.normal(0, (40, 6)), jnp.arange(40) % 5 != 2
    used = jnp.ones_like(valid) if fault == "padding counted" else valid
    f = lambda x, v: top_k_gating(x, 2, valid=v, implementation=implementation)  # noqa: E731
    ours = support.call(implementation, f, logits, used)
    if fault == "second choices first":
        ours = ours._replace(slots=ours.slots[:, ::-1])
    want = by_hand(np.asarray(logits), 2, np.asarray(valid))
    with pytest.raises(AssertionError, match="slots"):
        np.testing.assert_array_equal(ours.slots, want["slots"], err_msg="slots")


def scores_by_hand(router: Router, logits: np.ndarray) -> np.ndarray:
    if router.scores == "softmax":
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)
    return {
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    }[router.scores](logits)


def routed_by_hand(
    router: Router, top_k: int, logits: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights, a token at a time."""
    experts, weights = [], []
    for score in scores_by_hand(router, logits):
        choice = score + bias
        groups = choice.reshape(router.groups, -1)
        largest = np.sort(groups, axis=1)[:, ::-1]
        judged = largest[:, 0] if router.group_score == "max" else largest[:, :2].sum(1)
        best = np.argsort(-judged, kind="stable")[: router.kept_groups]
        open_ = np.full_like(groups, -np.inf)
        open_[best] = groups[best]
        chosen = np.argsort(-open_.reshape(-1), kind="stable")[:top_k]
        w = score[chosen]
        experts.append(chosen)
        weights.append(router.scale * (w / w.sum() if router.normalise else w))
    return np.array(experts), np.array(weights)


MODELS = [
    ("switch", 1), ("qwen2_moe", 4), ("deepseek_v2", 6), ("deepseek_v3", 8), ("kimi_k2", 8),
    ("deepseek_v4", 6), ("nllb_moe", 2),
]  # fmt: skip


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("model", "top_k"), MODELS)
def test_routers_of_models(implementation: str, biased: bool, model: str, top_k: int) -> None:
    router, tokens, experts = ROUTERS[model], 70, 40
    logits = 2 * support.normal(0, (tokens, experts))
    bias = 0.3 * support.normal(1, (experts,)) if biased else None
    grads = support.normal(5, (tokens, top_k)), support.normal(6, (experts,))
    valid = jnp.arange(tokens) % 5 != 2
    args = (logits, valid, *grads, *([] if bias is None else [bias]))
    truth, d_truth = support.in_float64(run("reference", top_k, router), *args)
    plain, d_plain = support.call("reference", run("reference", top_k, router), *args)
    ours, d_ours = support.call(implementation, run(implementation, top_k, router), *args)
    used = np.asarray(valid)
    chosen, weights = routed_by_hand(
        router, top_k, np.asarray(logits, np.float64), np.asarray(0.0 if bias is None else bias)
    )
    for gating in (truth, ours):
        np.testing.assert_array_equal(gating.experts[used], chosen[used])
        np.testing.assert_allclose(gating.weights[used], weights[used], rtol=2e-6)
        assert not gating.weights[~used].any()
    np.testing.assert_array_equal(ours.slots, plain.slots)
    np.testing.assert_array_equal(ours.counts, plain.counts)
    for name in ("weights", "mean_probs", "z_loss"):
        have, base, true = (getattr(g, name) for g in (ours, plain, truth))
        support.assert_as_good({name: have}, {name: base}, {name: true})
    support.assert_as_good({"d logits": d_ours}, {"d logits": d_plain}, {"d logits": d_truth})


@pytest.mark.parametrize("implementation", ALL)
def test_one_expert_a_token_learns_from_its_weight(implementation: str) -> None:
    logits, upstream = support.normal(0, (9, 5)), support.normal(1, (9, 1))

    def loss(logits: Any, router: Any) -> Any:
        gating = top_k_gating(logits, 1, router=router, implementation=implementation)
        return jnp.sum(gating.weights * upstream)

    switch = ROUTERS["switch"]
    slope = support.call(implementation, lambda x: jax.grad(loss)(x, switch), logits)
    step = np.eye(5, dtype=np.float64)[1] * 1e-6
    probs = scores_by_hand(switch, np.asarray(logits, np.float64) + step)
    moved = scores_by_hand(switch, np.asarray(logits, np.float64) - step)
    best = np.argmax(logits, axis=1)
    rows = np.arange(9)
    change = (probs[rows, best] - moved[rows, best]) / 2e-6 * np.asarray(upstream)[:, 0]
    np.testing.assert_allclose(slope[:, 1], change, rtol=1e-4, atol=1e-7)
    assert np.abs(slope).min() > 0
    normalised = support.call(implementation, lambda x: jax.grad(loss)(x, None), logits)
    assert not normalised.any()


@pytest.mark.parametrize("implementation", ALL)
def test_a_bias_chooses_and_does_not_weigh(implementation: str) -> None:
    logits, router = jnp.zeros((3, 4)), Router("sigmoid", normalise=False)

    def f(logits: Any, bias: Any) -> Any:
        options: Any = {"router": router, "implementation": implementation}
        run = lambda b: top_k_gating(logits, 1, bias=b, **options)  # noqa: E731
        return run(bias), jax.grad(lambda b: run(b).weights.sum())(bias)

    gating, slope = support.call(implementation, f, logits, jnp.array([0.0, 0.0, 2.0, 0.0]))
    np.testing.assert_array_equal(gating.experts, [[2]] * 3)
    np.testing.assert_allclose(gating.weights, [[0.5]] * 3)
    assert not slope.any()


@pytest.mark.parametrize("implementation", ALL)
def test_a_bias_of_minus_infinity_chooses_last(implementation: str) -> None:
    bias = jnp.asarray([-jnp.inf, 0.5, -jnp.inf, -jnp.inf, 0.0, -jnp.inf, -jnp.inf, -jnp.inf])
    router = Router("sigmoid")
    f = lambda x: top_k_gating(x, 4, router=router, bias=bias, implementation=implementation)  # noqa: E731
    gating = support.call(implementation, f, jnp.zeros((5, 8)))
    np.testing.assert_array_equal(gating.experts, [[1, 4, 0, 2]] * 5)


def test_what_a_router_must_be() -> None:
    for field, value in (("scores", "tanh"), ("group_score", "mean"), ("scale", 0.0)):
        with pytest.raises(ValueError, match=field):
            Router(**{field: value})
    with pytest.raises(ValueError, match=r"kept_groups must be in \[1, groups=2\], got 3"):
        Router(groups=2, kept_groups=3)
    logits = jnp.zeros((2, 6))
    with pytest.raises(ValueError, match="groups must divide the 6 experts, got groups=4"):
        top_k_gating(logits, 1, router=Router(groups=4))
    with pytest.raises(ValueError, match="kept_groups must hold top_k=4 experts, got 1"):
        top_k_gating(logits, 4, router=Router(groups=2))
    with pytest.raises(ValueError, match="groups of two experts or more, got 1"):
        top_k_gating(logits, 1, router=Router(groups=6, group_score="top2"))
    with pytest.raises(TypeError, match="router must be a Router or None, got str"):
        top_k_gating(logits, 1, router="switch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias must have shape \[6\], got \[5\]"):
        top_k_gating(logits, 1, bias=jnp.zeros(5))


def test_packed_rows_are_sorted_by_expert() -> None:
    gating = top_k_gating(support.normal(0, (50, 7)), 2, valid=jnp.arange(50) % 3 != 0)
    plan = row_plan(gating)
    assert plan.num_rows == 100
    expert_of_row = np.full(100, 99)
    valid = np.arange(50) % 3 != 0
    expert_of_row[np.asarray(plan.rows)[valid]] = np.asarray(gating.experts)[valid]
    assert (np.diff(expert_of_row) >= 0).all()
    np.testing.assert_array_equal(np.bincount(expert_of_row, minlength=100)[:7], plan.group_sizes)
    assert (np.asarray(plan.rows)[~valid] == 100).all()


def test_capacity_drops_late_comers() -> None:
    gating = top_k_gating(jnp.tile(jnp.asarray([[3.0, 1.0, 2.0]]), (6, 1)), 2)
    plan = row_plan(gating, capacity=4)
    assert plan.num_rows == 12
    want = np.stack([[0, 1, 2, 3, 12, 12], [8, 9, 10, 11, 12, 12]], axis=1)
    np.testing.assert_array_equal(plan.rows, want)
    np.testing.assert_array_equal(plan.group_sizes, [4, 4, 4])


def test_row_plan_is_a_pytree_with_static_size() -> None:
    plan = jax.jit(lambda x: row_plan(top_k_gating(x, 1)))(jnp.zeros((5, 2)))
    assert plan.num_rows == 5
    assert len(jax.tree.leaves(plan)) == 2


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((jnp.zeros(4), 1), {}, ValueError, r"logits must have shape \[T, E\], got \[4\]"),
        ((jnp.zeros((4, 3), jnp.int32), 1), {}, TypeError, "logits must be bfloat16 or float32"),
        ((jnp.zeros((4, 3)), 4), {}, ValueError, r"top_k must be an int in \[1, E=3\], got 4"),
        ((jnp.zeros((4, 3)), 1.0), {}, ValueError, "top_k must be an int"),
        ((jnp.zeros((4, 3)),), {"valid": jnp.ones(3, bool)}, ValueError, r"valid must have shape"),
        ((jnp.zeros((4, 3)),), {"valid": jnp.ones(4)}, TypeError, "valid must be bool, got float"),
        ((jnp.zeros((4, 3)),), {"implementation": 1}, ValueError, "implementation must be one of"),
    ],
)
def test_errors_name_the_argument(
    arguments: Any, options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        top_k_gating(*arguments, **options)


@pytest.mark.parametrize(
    ("experts", "valid", "error", "message"),
    [
        ((3, 2), [1, 0, 2], TypeError, "valid must be bool, got int"),
        ((3, 2), [1.0, 0.0, 1.0], TypeError, "valid must be bool, got float"),
        ((3, 0), None, ValueError, r"experts must be \[T, k\] with k of at least 1, got \[3, 0\]"),
    ],
)
def test_given_gating_errors_name_the_argument(
    experts: tuple[int, int], valid: Any, error: type[Exception], message: str
) -> None:
    valid = None if valid is None else jnp.array(valid)
    with pytest.raises(error, match=message):
        given_gating(jnp.zeros(experts, int), jnp.ones(experts), 4, valid=valid)


@pytest.mark.parametrize("in_use", [True, False])
def test_given_gating_of_explicitly_sharded_choices(in_use: bool) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    experts, weights = jnp.arange(16).reshape(8, 2) % 4, jnp.arange(16.0).reshape(8, 2)
    cut = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh) if in_use else contextlib.nullcontext():
        found = given_gating(jax.device_put(experts, cut), jax.device_put(weights, cut), 4)
    jax.tree.map(np.testing.assert_array_equal, found, given_gating(experts, weights, 4))


def test_given_gating_of_no_tokens() -> None:
    found = given_gating(jnp.zeros((0, 2), int), jnp.ones((0, 2)), 4)
    assert found.experts.shape == found.weights.shape == found.slots.shape == (0, 2)
    assert found.counts.tolist() == [[0] * 4] * 2
    assert found.mean_probs.tolist() == [0.0] * 4
    assert found.z_loss.shape == ()


def test_row_plan_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match="gating must be a Gating, got tuple"):
        row_plan(())  # type: ignore[arg-type]
    gating = Gating(*top_k_gating(jnp.zeros((4, 3)), 1))
    with pytest.raises(ValueError, match="capacity must be an int of at least 1, got 0"):
        row_plan(gating, capacity=0)


def test_more_tokens_than_f32_counts_exactly_are_not_the_kernels() -> None:
    def gating(logits: jax.Array) -> Gating:
        return top_k_gating(logits, 2, implementation="mosaic")

    for tokens, ours in ((1 << 24, True), ((1 << 24) + 1, False)):
        traced = jax.jit(gating).trace(jax.ShapeDtypeStruct((tokens, 8), jnp.bfloat16))
        program = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in program) == ours
