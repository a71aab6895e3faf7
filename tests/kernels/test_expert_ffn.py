"""expert_ffn: every activation, gated and plain, against float64, forward and backward."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import expert_ffn, gmm
from taskmoe.kernels.tiling import Tiling
from taskmoe.tests.kernels import support

FAST = ["xla", "ragged_dot", "mosaic"]


@functools.cache
def run(implementation: str, activation: Any, gated: bool, tiling: Tiling | None = None) -> Any:
    """Output and gradients as one function; biases may follow the gradient."""

    def f(x: Any, w_in: Any, w_out: Any, w_gate: Any, sizes: Any, grad: Any, *biases: Any) -> Any:
        names = ("x", "w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")[: 4 + len(biases)]

        def forward(x: Any, w_in: Any, w_out: Any, w_gate: Any, *biases: Any) -> Any:
            options = dict(zip(names[4:], biases, strict=True))
            if not gated:
                options.pop("b_gate", None)
            return expert_ffn(
                x,
                w_in,
                w_out,
                sizes,
                activation=activation,
                w_gate=w_gate if gated else None,
                tiling=tiling,
                implementation=implementation,
                **options,
            )

        out, pull = jax.vjp(forward, x, w_in, w_out, w_gate, *biases)
        return {"out": out} | dict(zip(names, pull(grad), strict=True))

    return f


def operands(m: int, d: int, f: int, sizes: Any, dtype: Any) -> Any:
    e = len(sizes)
    return (
        support.normal(0, (m, d), dtype),
        (support.normal(1, (e, d, f)) / d**0.5).astype(dtype),
        (support.normal(2, (e, f, d)) / f**0.5).astype(dtype),
        (support.normal(3, (e, d, f)) / d**0.5).astype(dtype),
        jnp.asarray(sizes, jnp.int32),
        support.normal(4, (m, d), dtype),
    )


def check(implementation: str, activation: Any, gated: bool, args: Any) -> None:
    truth = support.in_float64(run("reference", activation, gated), *args)
    plain = support.call("reference", run("reference", activation, gated), *args)
    x, *weights, sizes, grad = args
    tail = int(np.sum(sizes))
    args = (support.poison_tail(x, tail), *weights, sizes, support.poison_tail(grad, tail))
    ours = support.call(implementation, run(implementation, activation, gated), *args)
    support.assert_as_good(ours, plain, truth)
    assert not ours["out"][tail:].any()
    empty = np.asarray(sizes) == 0
    for name in ("w_in", "w_out", "w_gate"):
        assert not ours[name][empty].any()


@pytest.mark.as_shipped
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("activation", "gated", "dtype"),
    [
        ("relu", False, jnp.float32),
        ("gelu", False, jnp.bfloat16),
        ("silu", True, jnp.float32),
        ("gelu", True, jnp.bfloat16),
        ("relu", True, jnp.float32),
        ("silu", False, jnp.bfloat16),
    ],
)
def test_forward_and_gradients(
    implementation: str, activation: str, gated: bool, dtype: Any
) -> None:
    check(implementation, activation, gated, operands(70, 40, 136, [20, 0, 31, 1, 10], dtype))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("activation", "gated", "dtype", "tiling"),
    [
        ("relu", False, jnp.float32, None),
        ("gpt_oss", True, jnp.float32, None),
        ("silu", True, jnp.bfloat16, None),
        ("gelu", False, jnp.float32, Tiling(16, 40, 128)),
    ],
)
def test_biases_reach_the_rows_of_their_experts_alone(
    implementation: str, activation: str, gated: bool, dtype: Any, tiling: Any
) -> None:
    check_biases(implementation, activation, gated, dtype, tiling)


def check_biases(
    implementation: str, activation: str, gated: bool, dtype: Any, tiling: Any
) -> None:
    sizes = [20, 0, 31, 1, 10]
    args = operands(70, 40, 136, sizes, dtype)
    biases = [support.normal(6 + i, (5, n), dtype) for i, n in enumerate((136, 40, 136))]
    args = (*args, *(biases if gated else biases[:2]))
    truth = support.in_float64(run("reference", activation, gated), *args)
    plain = support.call("reference", run("reference", activation, gated), *args)
    x, *weights, sizes, grad = args[:6]
    poisoned = (support.poison_tail(x, 62), *weights, sizes, support.poison_tail(grad, 62))
    tiling = tiling if implementation == "mosaic" else None
    f = run(implementation, activation, gated, tiling)
    ours = support.call(implementation, f, *poisoned, *args[6:])
    support.assert_as_good(ours, plain, truth)
    assert not ours["out"][62:].any()
    assert not ours["b_in"][1].any()
    np.testing.assert_allclose(
        truth["b_out"][0], np.asarray(grad, np.float64)[:20].sum(0), rtol=1e-6, atol=1e-6
    )
    without = support.in_float64(run("reference", activation, gated), *args[:6])
    assert np.abs(without["out"] - truth["out"])[:62].max() > 0.1


def test_biases_that_do_not_fit() -> None:
    x, w_in, w_out, w_gate, sizes, _ = operands(8, 4, 6, [5, 3], jnp.float32)
    with pytest.raises(ValueError, match=r"b_in must have shape \[2, 6\], got \[2, 4\]"):
        expert_ffn(x, w_in, w_out, sizes, b_in=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="b_gate must be None without w_gate"):
        expert_ffn(x, w_in, w_out, sizes, b_gate=jnp.zeros((2, 6)))
    with pytest.raises(TypeError, match="b_out"):
        expert_ffn(x, w_in, w_out, sizes, w_gate=w_gate, b_out=jnp.zeros((2, 4), jnp.bfloat16))


def squared_relu(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def bilinear(gate: jax.Array, up: jax.Array) -> jax.Array:
    return gate * up


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    ("activation", "gated"),
    [("gpt_oss", True), ("deepseek_v4", True), (squared_relu, False), (bilinear, True)],
)
def test_activations_of_models_and_of_callers(
    implementation: str, activation: Any, gated: bool
) -> None:
    x, *others = operands(70, 40, 136, [20, 0, 31, 1, 10], jnp.float32)
    check(implementation, activation, gated, (8 * x, *others))  # beyond what the models clamp


def test_a_gated_activation_wants_a_gate() -> None:
    x, w_in, w_out, _, sizes, _ = operands(8, 4, 6, [5, 3], jnp.float32)
    with pytest.raises(ValueError, match="gpt_oss, deepseek_v4 want gated experts"):
        expert_ffn(x, w_in, w_out, sizes, activation="gpt_oss")


@support.on_hopper
@pytest.mark.parametrize(("activation", "gated"), [("relu", False), ("silu", True)])
def test_forward_and_gradients_on_hopper(activation: str, gated: bool) -> None:
    args = operands(400, 128, 192, [200, 0, 31, 1, 100], jnp.bfloat16)
    check("mosaic_gpu", activation, gated, args)


@pytest.mark.parametrize("implementation", FAST)
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.sampled_from([(97, 31, 17, 6, False), (16, 7, 128, 3, True)]), data=st.data()
)
def test_any_groups(implementation: str, shape: tuple[int, int, int, int, bool], data: Any) -> None:
    m, d, f, e, gated = shape
    sizes = data.draw(support.group_patterns(m, e))
    check(implementation, "silu", gated, operands(m, d, f, sizes, jnp.float32))


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_equals_two_grouped_matmuls(implementation: str) -> None:
    x, w_in, w_out, _, sizes, _ = operands(30, 8, 12, [10, 0, 15], jnp.float32)
    f = lambda *a: expert_ffn(*a, activation="relu", implementation=implementation)  # noqa: E731
    out = support.call(implementation, f, x, w_in, w_out, sizes)
    want = gmm(jax.nn.relu(gmm(x, w_in, sizes)), w_out, sizes)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("fault", ["other activation", "swapped experts"])
def test_a_planted_fault_is_caught(implementation: str, fault: str) -> None:
    args = operands(40, 24, 32, [20, 13, 7], jnp.float32)
    truth = support.in_float64(run("reference", "gelu", False), *args)
    plain = support.call("reference", run("reference", "gelu", False), *args)
    activation = "gelu"
    if fault == "other activation":
        activation = "silu"
    else:
        args = (args[0], args[1][jnp.asarray([0, 2, 1])], *args[2:])
    ours = support.call(implementation, run(implementation, activation, False), *args)
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good(ours, plain, truth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.zeros(3)}, ValueError, r"x must have shape \[M, D\], got \[3\]"),
        ({"w_in": jnp.zeros((2, 5, 8))}, ValueError, r"w_in must have shape \[E, 6, F\]"),
        ({"w_out": jnp.zeros((2, 8, 5))}, ValueError, r"w_out must have shape \[2, 8, 6\]"),
        ({"w_gate": jnp.zeros((2, 6, 9))}, ValueError, r"w_gate must have shape \[2, 6, 8\]"),
        ({"w_in": jnp.zeros((2, 6, 8), jnp.bfloat16)}, TypeError, "w_in must have the dtype of x"),
        ({"activation": "tanh"}, ValueError, "activation must be one of 'relu', 'gelu', 'silu'"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, ValueError, "group_sizes must have w_in.shape"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], error: type, message: str) -> None:
    arguments: dict[str, Any] = {
        "x": jnp.zeros((4, 6)),
        "w_in": jnp.zeros((2, 6, 8)),
        "w_out": jnp.zeros((2, 8, 6)),
        "group_sizes": jnp.zeros(2, jnp.int32),
    }
    with pytest.raises(error, match=message):
        expert_ffn(**(arguments | change))
