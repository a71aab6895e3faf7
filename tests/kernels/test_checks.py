"""Which implementation runs, and that interpret mode would have found a race."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import taskmoe.kernels
from taskmoe.kernels.checks import as_floats
from taskmoe.kernels.platforms import interpret_mode
from taskmoe.tests.kernels import support


def test_public_names() -> None:
    assert sorted(taskmoe.kernels.__all__) == [
        "Gating", "Quantized", "ROUTERS", "Router", "RowPlan", "Tiling", "combine", "dequantize",
        "dispatch", "expert_ffn", "for_chip", "given_gating", "gmm", "quantize", "row_plan", "tgmm",
        "top_k_gating",
    ]  # fmt: skip
    assert all(getattr(taskmoe.kernels, name).__doc__ for name in taskmoe.kernels.__all__)


def test_errors_of_dtypes_say_which_cast_fits() -> None:
    x, w, sizes = jnp.ones((4, 6)), jnp.ones((2, 6, 3)), jnp.array([2, 2])
    gmm = taskmoe.kernels.gmm
    with pytest.raises(TypeError, match=r"float16: cast it, lhs\.astype\(jax\.numpy\.bfloat16\)"):
        gmm(x.astype(jnp.float16), w, sizes)
    with pytest.raises(
        TypeError, match=r"bfloat16: cast one of them, such as rhs\.astype\(lhs\.dty"
    ):
        gmm(x, w.astype(jnp.bfloat16), sizes)
    assert gmm(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), sizes).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match=r"logits must be bfloat16 or float32, got float16: cast"):
        taskmoe.kernels.top_k_gating(x.astype(jnp.float16))


def test_gradients_outside_of_jit_copy_no_weights() -> None:
    w = jnp.ones((2, 6, 3))
    taken, _ = jax.vjp(lambda w: as_floats("w", w), w)
    assert taken.unsafe_buffer_pointer() == w.unsafe_buffer_pointer()
    assert jnp.array(w).unsafe_buffer_pointer() != w.unsafe_buffer_pointer()  # of a copy


def test_interpret_mode_is_noticed() -> None:
    assert interpret_mode() is None
    with support.running("mosaic"):
        found = interpret_mode()
        assert found is not None
        assert found.params == support.INTERPRET
    assert interpret_mode() is None


def test_a_planted_race_is_caught() -> None:
    def kernel(x_ref: Any, o_ref: Any, buffer: Any, semaphore: Any) -> None:
        copy = pltpu.make_async_copy(x_ref, buffer, semaphore)
        copy.start()
        o_ref[...] = buffer[...]  # before the copy has arrived
        copy.wait()

    def racing(x: jax.Array) -> jax.Array:
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        )(x)

    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        support.call("mosaic", racing, jnp.ones((8, 128)))


def test_the_error_rule_sees_a_rounded_result() -> None:
    truth = np.linspace(1, 2, 1000)
    plain = truth.astype(np.float32)
    support.assert_as_good({"x": plain}, {"x": plain}, {"x": truth})
    with pytest.raises(AssertionError, match="exceeds"):
        support.assert_as_good({"x": plain * np.float32(1.00001)}, {"x": plain}, {"x": truth})
