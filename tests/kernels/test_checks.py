"""Which implementation runs, and that interpret mode would have found a race."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import taskmoe.kernels
from taskmoe.kernels.platforms import interpret_mode
from taskmoe.tests.kernels import support


def test_public_names() -> None:
    assert sorted(taskmoe.kernels.__all__) == [
        "Gating", "ROUTERS", "Router", "RowPlan", "combine", "dispatch", "expert_ffn", "for_chip",
        "given_gating", "gmm", "row_plan", "tgmm", "top_k_gating",
    ]  # fmt: skip
    assert all(getattr(taskmoe.kernels, name).__doc__ for name in taskmoe.kernels.__all__)


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
