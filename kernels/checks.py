"""What every op asks of its arguments, and which implementation runs.

Errors name the argument, what it was and what fits. `None` as implementation means the Pallas
kernel ("mosaic") on TPU and "xla" elsewhere. Arrays that meet inside `jax.shard_map` are brought to
one set of varying axes, so that loops and custom gradients see operands of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

IMPLEMENTATIONS = ("mosaic", "xla", "reference")
#: Ops that have a Pallas TPU kernel.
MOSAIC_OPS = ("combine", "dispatch", "expert_ffn", "gmm", "tgmm", "top_k_gating")


def choose_implementation(op: str, implementation: str | None) -> str:
    """The implementation that `op` runs with here; ValueError if the one asked for cannot run."""
    if implementation is None:
        return "mosaic" if op in MOSAIC_OPS and pltpu.is_tpu_device() else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))} or None, "
            f"got {implementation!r}"
        )
    if implementation == "mosaic":
        if op not in MOSAIC_OPS:
            raise ValueError(
                f"implementation='mosaic' is not there for {op}, only for: "
                f"{', '.join(MOSAIC_OPS) or 'no op yet'}; None, 'xla' and 'reference' fit"
            )
        if not pltpu.is_tpu_device() and not in_interpret_mode():
            raise ValueError(
                f"implementation='mosaic' of {op} runs on TPU, or inside "
                "jax.experimental.pallas.tpu.force_tpu_interpret_mode(); the device here is "
                f"{jax.default_backend()!r}: use None, 'xla' or 'reference'"
            )
    return implementation


def in_interpret_mode() -> bool:
    """Whether Pallas TPU kernels traced here would run in interpret mode."""

    def copy(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...]

    def probe(x: jax.Array) -> jax.Array:
        return pl.pallas_call(copy, out_shape=result_like(x, x.shape, x.dtype))(x)

    jaxpr = jax.make_jaxpr(probe)(jax.ShapeDtypeStruct((8, 128), jnp.float32))
    return any(eqn.params.get("interpret") for eqn in jaxpr.eqns)


def check_shape(name: str, x: Any, shape: Sequence[int | str]) -> None:
    """ValueError unless x has this shape; a str stands for any size and is how it is written."""
    actual = jnp.shape(x)
    if len(actual) != len(shape) or any(
        isinstance(want, int) and want != have for want, have in zip(shape, actual, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(actual)}")


def check_float(name: str, x: Any, like: tuple[str, Any] | None = None) -> None:
    """TypeError unless x is bf16, f32 or f64, and of the same dtype as `like` (name, array)."""
    dtype = jnp.asarray(x).dtype if not hasattr(x, "dtype") else x.dtype
    if dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(f"{name} must be bfloat16 or float32, got {dtype}")
    if like is not None and dtype != like[1].dtype:
        raise TypeError(f"{name} must have the dtype of {like[0]}, {like[1].dtype}, got {dtype}")


def check_int(name: str, x: Any) -> None:
    """TypeError unless x is of an integer dtype."""
    dtype = jnp.asarray(x).dtype if not hasattr(x, "dtype") else x.dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"{name} must be of an integer dtype such as int32, got {dtype}")


def match_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, all varying over the union of their manual mesh axes.

    The transpose is a psum, so that an array shared by all devices gets its whole gradient.
    """
    axes = frozenset().union(*map(varying_axes, arrays))
    return tuple(
        jax.lax.pcast(x, tuple(missing), to="varying") if (missing := axes - varying_axes(x)) else x
        for x in arrays
    )


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """Manual mesh axes over which x differs between devices; none outside `jax.shard_map`."""
    aval: Any = jax.typeof(x)
    return aval.manual_axis_type.varying


def result_like(x: jax.Array, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """What a kernel returns: this shape and dtype, differing between devices as x does."""
    aval: Any = jax.typeof(x)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=aval.manual_axis_type)


def in_hbm(x: jax.Array) -> jax.Array:
    """X as an operand that XLA keeps in HBM, where the kernel's DMAs look for it.

    A BlockSpec alone does not tell XLA, which may choose VMEM or CMEM: jax-ml/jax issue 39744.
    """
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def accumulator(dtype: Any) -> Any:
    """The dtype that sums of `dtype` are kept in: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
