"""What every op asks of its arguments.

Errors name the argument, what it was and what fits. Arrays that meet inside `jax.shard_map` are
brought to one set of varying axes, so that custom gradients see operands of one kind.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def check_shape(name: str, x: Any, shape: Sequence[int | str]) -> None:
    """ValueError unless x has this shape; a str stands for any size and is how it is written."""
    actual = tuple(x.shape) if hasattr(x, "shape") else jnp.shape(x)
    if len(actual) != len(shape) or any(
        not isinstance(want, str) and want != have for want, have in zip(shape, actual, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(actual)}")


def as_floats(name: str, x: Any, like: tuple[str, jax.Array] | None = None) -> jax.Array:
    """X as an array; TypeError unless bf16, f32 or f64, with the dtype of `like` (name, array).

    No op promotes dtypes: rows and matrices are large, and a copy of them is the caller's to make.
    The message says which cast would fit.
    """
    if not isinstance(x, jax.Array):  # asarray copies one that is differentiated outside of jax.jit
        x = jnp.asarray(x)
    check_floats(name, x.dtype)
    if like is not None and x.dtype != like[1].dtype:
        wanted = f"{name}.astype({like[0]}.dtype)"
        raise TypeError(
            f"{name} must have the dtype of {like[0]}, {like[1].dtype}, got {x.dtype}: cast one of "
            f"them, such as {wanted}"
        )
    return x


def check_floats(name: str, dtype: Any) -> None:
    """TypeError unless the dtype is bf16, f32 or f64."""
    if dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        return
    message = f"{name} must be bfloat16 or float32, got {dtype}"
    if dtype == jnp.float16:  # no TPU multiplies it, and its range is too small for logits
        message += f": cast it, {name}.astype(jax.numpy.bfloat16)"
    raise TypeError(message)


def as_integers(name: str, x: Any) -> jax.Array:
    """X as int32, anything that makes an array of integers; TypeError for another dtype.

    64-bit values beyond 32 bits become the nearest that int32 holds.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be of an integer dtype such as int32, got {x.dtype}")
    if x.dtype.itemsize > 4 or x.dtype == jnp.uint32:
        limits = jnp.iinfo(jnp.int32)
        x = jnp.clip(x, max(limits.min, jnp.iinfo(x.dtype).min), limits.max)
    return x.astype(jnp.int32)


def as_size(name: str, value: Any, least: int = 1) -> Any:
    """The value as an int of at least this, or a symbolic dimension; ValueError for another."""
    if jax.export.is_symbolic_dim(value):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return operator.index(value)


def as_dtype(name: str, value: Any, *known: Any) -> Any:
    """The value as one of the known dtypes; TypeError for another, or float64 in 32-bit mode."""
    config: Any = jax.config
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    wide = dtype == jnp.float64 and not config.jax_enable_x64
    if dtype is None or wide or dtype not in known:
        fit = [str(jnp.dtype(d)) for d in known if config.jax_enable_x64 or d != jnp.float64]
        more = ": it wants jax_enable_x64" if wide else ""
        raise TypeError(f"{name} must be {' or '.join(fit)}, got {value!r}{more}")
    return dtype


def as_number(name: str, value: Any) -> float:
    """The value as a finite float; ValueError for anything else."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def match_varying(*arrays: Any) -> tuple[Any, ...]:
    """The same arrays, all varying over the union of their manual mesh axes; None stays None.

    The transpose is a psum, so that an array shared by all devices gets its whole gradient.
    """
    axes = frozenset().union(*(varying_axes(x) for x in arrays if x is not None))
    return tuple(None if x is None else vary_over(x, axes) for x in arrays)


def vary_over(x: jax.Array, axes: Iterable[Any]) -> jax.Array:
    """X as an array that may differ between devices along these manual mesh axes."""
    missing = frozenset(axes) - varying_axes(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def everywhere(x: Any, index: Any = None) -> Any:
    """X, or x[index]; on all devices of its mesh where x is explicitly sharded."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return x if index is None else x[index]
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.reshard(x, whole) if index is None else x.at[index].get(out_sharding=whole)


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """Manual mesh axes over which x differs between devices; none outside `jax.shard_map`."""
    _, kind = _manual_axis_type(x)
    return getattr(kind, "varying", kind)


def result_like(x: jax.Array, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """What a kernel returns: this shape and dtype, differing between devices as x does."""
    name, kind = _manual_axis_type(x)
    make: Any = jax.ShapeDtypeStruct
    return make(tuple(shape), dtype, **{name: kind})


def _manual_axis_type(x: jax.Array) -> tuple[str, Any]:
    """How x differs between devices, and JAX's name for that: `vma` until some 0.10."""
    aval: Any = jax.typeof(x)
    name = "manual_axis_type" if hasattr(aval, "manual_axis_type") else "vma"
    return name, getattr(aval, name)


def zeros_like_all(shape: Sequence[int], dtype: Any, *arrays: jax.Array) -> jax.Array:
    """Zeros that vary between devices as the arrays do: the result where one of them is empty."""
    return match_varying(jnp.zeros(tuple(shape), dtype), *arrays)[0]


def in_hbm(x: jax.Array) -> jax.Array:
    """X as an operand that XLA keeps in HBM, where the kernel's DMAs look for it.

    A BlockSpec alone does not tell XLA, which may choose VMEM or CMEM: jax-ml/jax issue 39744.
    """
    if not isinstance(x, jax.core.Tracer):
        return x  # under `jax.disable_jit` a kernel's operands are where they are
    return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def accumulator(dtype: Any) -> Any:
    """The dtype that sums of `dtype` are kept in: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
