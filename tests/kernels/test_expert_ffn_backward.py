"""The backward of expert_ffn on TPU, in one kernel and in several, against float64."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import (
    expert_ffn,
    expert_network,
    ffn_backward_kernel,
    hidden_gradients_kernel,
)
from taskmoe.kernels.ffn_backward_kernel import expert_ffn_backward_mosaic
from taskmoe.kernels.groups import Groups
from taskmoe.kernels.hidden_gradients_kernel import expert_ffn_backward_split
from taskmoe.kernels.options import Experts, FFNOptions
from taskmoe.kernels.tiling import Tiling
from taskmoe.tests.kernels import support
from taskmoe.tests.kernels.test_expert_ffn import check, check_biases, operands, run


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
