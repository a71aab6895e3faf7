"""expert_ffn: every activation, gated and plain, against float64, forward and backward."""

import functools
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import (
    expert_ffn,
    expert_network,
    ffn_backward_kernel,
    gmm,
    hidden_gradients_kernel,
)
from taskmoe.kernels.ffn_backward_kernel import expert_ffn_backward_mosaic
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.hidden_gradients_kernel import expert_ffn_backward_split
from taskmoe.kernels.options import Experts, FFNOptions
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


@pytest.fixture
def in_several(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backward runs in several kernels, whatever is estimated."""
    asked = []

    def always(*sizes: Any) -> bool:
        asked.append(sizes)
        return True

    monkeypatch.setattr(expert_network, "is_split", always)
    jax.clear_caches()
    yield
    assert asked
    jax.clear_caches()


@pytest.mark.usefixtures("in_several")
@pytest.mark.parametrize(
    ("activation", "gated", "dtype"),
    [("gpt_oss", True, jnp.float32), ("silu", True, jnp.bfloat16), ("relu", False, jnp.float32)],
)
def test_a_backward_in_several_kernels(activation: str, gated: bool, dtype: Any) -> None:
    check_biases("mosaic", activation, gated, dtype, None)
    check("mosaic", activation, gated, operands(70, 40, 136, [20, 0, 31, 1, 10], dtype))


@pytest.mark.usefixtures("in_several")
def test_a_shard_has_gradients_of_its_own_experts_in_several_kernels() -> None:
    x, w_in, w_out, _, sizes, grad = operands(70, 40, 136, [20, 0, 31, 1, 10], jnp.float32)

    def pulled(implementation: str) -> Any:
        def f(x: Any, w_in: Any, w_out: Any) -> Any:
            of: Any = {"group_offset": 2, "implementation": implementation}
            return expert_ffn(x, w_in, w_out, sizes, **of)

        return lambda *args: dict(zip("xio", jax.vjp(f, *args[:3])[1](args[3]), strict=True))

    args = x, w_in[2:4], w_out[2:4], grad
    truth = support.in_float64(pulled("reference"), *args)
    plain = support.call("reference", pulled("reference"), *args)
    ours = support.call("mosaic", pulled("mosaic"), *args)
    support.assert_as_good(ours, plain, truth)
    assert not ours["x"][:20].any()
    assert ours["x"][20:52].any()


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


def in_several_kernels(*args: Any, with_dx: bool) -> Any:
    *others, tiling = args
    return expert_ffn_backward_split(*others, (tiling, with_dx))


BACKWARDS = {
    "one kernel": expert_ffn_backward_mosaic,
    "several": functools.partial(in_several_kernels, with_dx=True),
    "several, dx apart": functools.partial(in_several_kernels, with_dx=False),
}


def cut(gated: bool, rows: int, backward: str = "one kernel", hidden: int = 128) -> Any:
    """`expert_ffn` and its gradients with hidden units cut into blocks of so many."""

    def f(x: Any, w_in: Any, w_out: Any, w_gate: Any, sizes: Any, grad: Any) -> Any:
        tiling = Tiling(rows, x.shape[1], hidden)
        gate = w_gate if gated else None
        out = expert_ffn(
            x, w_in, w_out, sizes, activation="silu", w_gate=gate,
            tiling=tiling, implementation="mosaic",
        )  # fmt: skip
        groups, options = Groups(sizes, jnp.int32(0)), FFNOptions("silu", False, "mosaic")
        d_x, (d_in, d_out, d_gate, *_) = BACKWARDS[backward](
            options, x, Experts(w_in, w_out, gate), groups, grad, tiling
        )
        d_gate = jnp.zeros_like(w_gate) if d_gate is None else d_gate
        return {"out": out, "x": d_x, "w_in": d_in, "w_out": d_out, "w_gate": d_gate}

    return f


#: Blocks of rows few enough that each block of hidden units writes its own part of dx, and enough
#: that all add to one.
APART = {32: False, 16: True}


def of_cut(
    gated: bool, rows: int, args: Any, used: int, backward: str = "one kernel", hidden: int = 128
) -> tuple[Any, Any, Any]:
    """What `cut` finds with NaN in all rows but those used, and what plain and float64 find."""
    truth = support.in_float64(run("reference", "silu", gated), *args)
    plain = support.call("reference", run("reference", "silu", gated), *args)
    x, *weights, sizes, grad = args
    x, grad = support.poison_tail(x, used), support.poison_tail(grad, used)
    return (
        support.call("mosaic", cut(gated, rows, backward, hidden), x, *weights, sizes, grad),
        plain,
        truth,
    )


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("rows", APART)
@pytest.mark.parametrize("gated", [False, True])
def test_hidden_dimension_cut_with_a_tail(gated: bool, rows: int, backward: str) -> None:
    assert (-(-50 // rows) >= ffn_backward_kernel.BLOCKS_APART) == APART[rows]
    args = operands(50, 24, 300, [20, 0, 13], jnp.float32)
    support.assert_as_good(*of_cut(gated, rows, args, 33, backward))


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_are_worked_on_in_parts(gated: bool, dtype: Any, backward: str) -> None:
    # Groups end in blocks of 1,024 rows, take one of each size of a part, or are in two blocks.
    sizes = [0, 3, 700, 0, 517, 130, 0, 100]
    args = operands(1500, 24, 256, sizes, dtype)
    ours, plain, truth = of_cut(gated, 1024, args, sum(sizes), backward)
    support.assert_as_good(ours, plain, truth)
    faulty = ours | {"w_in": ours["w_in"].copy()}
    faulty["w_in"][4] -= ours["w_in"][2] * np.asarray(0.5, ours["w_in"].dtype)
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good(faulty, plain, truth)


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize(("hidden", "sizes"), [(256, [20, 0, 40]), (384, [0, 0, 0]), (300, [64])])
def test_the_sum_of_dx_begins_in_memory_that_nothing_was_written_to(
    hidden: int, sizes: list[int], dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter's is zero; a TPU's holds anything.
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    args = operands(64, 24, hidden, sizes, dtype)
    ours, plain, truth = of_cut(True, 16, args, sum(sizes))
    support.assert_as_good(ours, plain, truth)
    assert ours["x"].dtype == dtype


def test_what_earlier_blocks_of_hidden_units_added_to_dx_is_kept() -> None:
    args = operands(50, 24, 300, [20, 0, 13], jnp.float32)
    truth = support.in_float64(run("reference", "silu", False), *args)
    plain = support.call("reference", run("reference", "silu", False), *args)
    right = ffn_backward_kernel.kernel

    def forgetful(
        walk: Any, x: Any, dy: Any, experts: Any, _: Any, *out: Any, **sizes: Any
    ) -> None:
        right(walk, x, dy, experts, None, *out, **sizes)

    with support.planted(ffn_backward_kernel, "kernel", forgetful):
        ours = support.call("mosaic", cut(False, 16), *args)
    with pytest.raises(AssertionError, match=r"\['x'\].* exceeds"):
        support.assert_as_good(ours, plain, truth)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("sizes", [[20, 0, 31, 10, 0], [0, 20, 0, 0], [0, 0], [0, 16, 16]])
def test_rows_behind_the_last_group_have_no_gradient(backward: str, sizes: list[int]) -> None:
    args = operands(70, 24, 300, sizes, jnp.float32)
    for rows in (16, 64):
        ours, plain, truth = of_cut(True, rows, args, sum(sizes), backward)
        support.assert_as_good(ours, plain, truth)
        assert not ours["x"][sum(sizes) :].any()


@pytest.mark.parametrize("backward", ["several", "several, dx apart"])
def test_products_of_the_backward_in_loops(backward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = operands(70, 512, 700, [20, 0, 31, 10, 0], jnp.float32)
    ours, plain, truth = of_cut(True, 64, args, 61, backward, hidden=512)
    support.assert_as_good(ours, plain, truth)
    monkeypatch.setattr(hidden_gradients_kernel, "WRITTEN", 1)
    looped = of_cut(True, 64, args, 61, backward, hidden=512)[0]
    support.assert_as_good(looped, plain, truth)


def test_dx_in_a_kernel_of_its_own_is_of_both_matrices() -> None:
    args = operands(50, 24, 300, [20, 0, 13], jnp.float32)
    right = hidden_gradients_kernel.sum_of_gmms_mosaic

    def of_one(options: Any, pairs: Any, groups: Any) -> Any:
        return right(options, pairs[:1], groups)

    with support.planted(hidden_gradients_kernel, "sum_of_gmms_mosaic", of_one):
        ours, plain, truth = of_cut(True, 16, args, 33, "several, dx apart")
    with pytest.raises(AssertionError, match=r"\['x'\].* exceeds"):
        support.assert_as_good(ours, plain, truth)


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
