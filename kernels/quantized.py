"""Matrices of 8 bits with scales: half the bytes of bfloat16 to read, and to hold.

    w[k, n] = values[k, n] * scales[k // block, n]

A column has one scale ("per channel") or one for each block of its rows. Rows that meet such a
matrix stay in bfloat16 or float32; with activations="int8" each row is quantised on the way, a
scale for each block that the matrix has, so that both sides of the product are int8.

Matrices are frozen: gradients reach the rows as if the matrix were what it stands for ("straight
through"), and neither values nor scales.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import as_dtype, as_floats, as_size
from taskmoe.kernels.platforms import with_plain_settings

#: Dtypes of values, and the largest that is used of each.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
#: Blocks of several scales a column are multiples of this many rows, as kernels cut matrices.
BLOCK_MULTIPLE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Matrices [..., K, N] as values and scales; a pytree, made by `quantize`.

    values: [..., K, N] int8|float8_e4m3fn
    scales: [..., K/block, 1, N] f32; block is K, or a multiple of 128 that divides it
    activations: "int8" where the rows that are multiplied with it are quantised too, or None
      (static)
    """

    values: jax.Array
    scales: jax.Array
    activations: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, N]."""
        return self.values.shape

    @property
    def blocks(self) -> int:
        """Scales of a column."""
        return self.scales.shape[-3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Rows that meet a `Quantized` on the way: values [M, K] int8, scales [M, K/block] f32.

    A row, or its part in a block, that is all zeros has scale 0.
    """

    values: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[M, K]."""
        return self.values.shape


@with_plain_settings
def quantize(
    w: jax.Array, dtype: Any = "int8", block: int | None = None, activations: str | None = None
) -> Quantized:
    """Matrices in 8 bits: a column's largest value, or each block's, becomes the largest there is.

    w: [..., K, N] bf16|f32.
    dtype: "int8" (-127 to 127, rounded to the nearest) or "float8_e4m3fn" (-448 to 448).
    block: rows that share a scale, a multiple of 128 that divides K; None is all K ("per channel").
    activations: None, or "int8" to quantise rows too where they meet these matrices (int8 only).

    Returns a `Quantized`; columns of zeros have scale 0. Raises ValueError or TypeError where an
    argument does not fit.
    """
    w = as_floats("w", w)
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(f"w must be matrices [..., K, N] that are not empty, got {list(w.shape)}")
    depth, width = w.shape[-2:]
    kind = as_dtype("dtype", dtype, *LARGEST)
    block = depth if block is None else as_size("block", block)
    if depth % block or (block != depth and block % BLOCK_MULTIPLE):
        raise ValueError(
            f"block must be K={depth} or a multiple of {BLOCK_MULTIPLE} that divides it, "
            f"got {block}"
        )
    _check_activations("activations", activations, kind)
    cut = w.astype(jnp.float32).reshape(*w.shape[:-2], depth // block, block, width)
    scales = jnp.max(jnp.abs(cut), axis=-2, keepdims=True) / LARGEST[kind]
    return Quantized(_to_values(cut, scales, kind).reshape(w.shape), scales, activations)


@with_plain_settings
def dequantize(w: Quantized, dtype: Any = jnp.float32) -> jax.Array:
    """The matrices [..., K, N] that a `Quantized` stands for, in this dtype of floats.

    Raises TypeError for another w or dtype.
    """
    if not isinstance(w, Quantized):
        raise TypeError(f"w must be Quantized, got {type(w).__name__}")
    dtype = as_dtype("dtype", dtype, jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
    exact = jnp.promote_types(dtype, jnp.float32)
    cut = w.values.reshape(*w.shape[:-2], w.blocks, -1, w.shape[-1])
    return (cut.astype(exact) * w.scales.astype(exact)).astype(dtype).reshape(w.shape)


def dense(w: Any, dtype: Any) -> Any:
    """W itself, or what it stands for where it is `Quantized`."""
    return dequantize(w, dtype) if isinstance(w, Quantized) else w


def quantises_rows(*matrices: Any) -> bool:
    """Whether one of these, which may be arrays or None, wants `QuantizedRows`."""
    return any(isinstance(w, Quantized) and w.activations is not None for w in matrices)


@with_plain_settings
def rows_to_meet(w: Any, rows: jax.Array) -> Any:
    """Rows [M, K] as they are multiplied with w: `QuantizedRows` where w wants them so."""
    if not quantises_rows(w):
        return rows
    exact = jnp.promote_types(rows.dtype, jnp.float32)
    cut = rows.astype(exact).reshape(rows.shape[0], w.blocks, -1)
    scales = jnp.max(jnp.abs(cut), axis=2, keepdims=True) / LARGEST[jnp.dtype(jnp.int8)]
    values = _to_values(cut, scales, jnp.dtype(jnp.int8)).reshape(rows.shape)
    return QuantizedRows(values, scales[..., 0].astype(jnp.float32))


@with_plain_settings
def both_dense(rows: Any, w: Any) -> tuple[jax.Array, jax.Array]:
    """Rows and w as arrays of one dtype, where nothing multiplies 8 bits."""
    if isinstance(rows, QuantizedRows):
        cut = rows.values.reshape(*rows.scales.shape, -1).astype(jnp.float32)
        rows = (cut * rows.scales[..., None]).reshape(rows.shape)
    return rows, dense(w, rows.dtype)


def product(x: jax.Array, w: Quantized) -> jax.Array:
    """x [..., K] bf16|f32 times a `Quantized` matrix [K, N]: [..., N] f32.

    With activations="int8" and a scale a column, both sides of the product are int8 and its sums
    int32; else what the matrix and the rows stand for is multiplied in x's dtype. Gradients reach
    x, as if nothing had rounded it, and the scales.
    """
    flat = x.reshape(-1, x.shape[-1])
    w = dataclasses.replace(w, values=jax.lax.stop_gradient(w.values))
    of_bytes = quantises_rows(w) and w.blocks == 1
    found = _of_bytes(flat, w) if of_bytes else _of_floats(flat, w)
    return found.reshape(*x.shape[:-1], -1)


@with_plain_settings
def _of_floats(rows: jax.Array, w: Quantized) -> jax.Array:
    """What rounds the rows, if it does, has slope 1."""
    met, held = both_dense(rows_to_meet(w, rows), w)
    if quantises_rows(w):
        exact = rows.astype(met.dtype)
        met = exact + jax.lax.stop_gradient(met - exact)
    return jnp.matmul(met, held, preferred_element_type=jnp.float32)


#: XLA's CPU code multiplies fewer int8 rows ten times slower than so many.
_FEWEST_ROWS = 4


@jax.custom_jvp
@with_plain_settings
def _of_bytes(rows: jax.Array, w: Quantized) -> jax.Array:
    met = rows_to_meet(w, rows)
    count = rows.shape[0]
    # How many there are is not known where a program is exported for any number.
    missing = _FEWEST_ROWS if jax.export.is_symbolic_dim(count) else max(0, _FEWEST_ROWS - count)
    values = jnp.pad(met.values, ((0, missing), (0, 0)))
    found = jnp.matmul(values, w.values, preferred_element_type=jnp.int32)[:count]
    return found.astype(jnp.float32) * met.scales * w.scales[0]


@_of_bytes.defjvp
def _of_bytes_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _of_bytes(*primals), jax.jvp(_of_floats, primals, tangents)[1]


def itemsize(w: Any) -> int:
    """Bytes of a value of w, an array or quantised."""
    values = w.values if isinstance(w, Quantized | QuantizedRows) else w
    return values.dtype.itemsize


def nbytes(*trees: Any) -> int:
    """Bytes of all arrays in these."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


def with_scales(w: Any, of_values: Any, of_scales: Any) -> Any:
    """What stands for w: `of_values`, beside `of_scales` where w is quantised."""
    if not isinstance(w, Quantized | QuantizedRows):
        return of_values
    return dataclasses.replace(w, values=of_values, scales=of_scales)


def as_weights(name: str, w: Any, like: tuple[str, jax.Array]) -> Any:
    """W as an array of the dtype of `like` (name, array), or a `Quantized` whose parts fit."""
    if not isinstance(w, Quantized):
        return as_floats(name, w, like)
    w = jax.tree.map(jnp.asarray, w)
    if w.values.dtype not in LARGEST:
        raise TypeError(f"{name}.values must be int8 or float8_e4m3fn, got {w.values.dtype}")
    if w.scales.dtype != jnp.float32:
        raise TypeError(f"{name}.scales must be float32, got {w.scales.dtype}")
    shape, scales = w.values.shape, w.scales.shape
    fits = len(shape) >= 2 and len(scales) == len(shape) + 1 and scales[-2:] == (1, shape[-1])
    blocks = scales[-3] if fits else 0
    block = shape[-2] // blocks if blocks else 0
    fits = fits and scales[:-3] == shape[:-2] and block * blocks == shape[-2]
    if not fits or (blocks > 1 and block % BLOCK_MULTIPLE):
        raise ValueError(
            f"{name}.scales must be {[*shape[:-2], 'K/block', 1, shape[-1]]} with a block of "
            f"K={shape[-2]} or a multiple of {BLOCK_MULTIPLE} that divides it, got {list(scales)}"
        )
    _check_activations(f"{name}.activations", w.activations, w.values.dtype)
    return w


def _check_activations(name: str, activations: Any, kind: Any) -> None:
    if activations not in (None, "int8"):
        raise ValueError(f"{name} must be None or 'int8', got {activations!r}")
    if activations is not None and kind != jnp.int8:
        raise ValueError(f"{name} must be None for matrices of {kind}, got {activations!r}")


def _to_values(x: jax.Array, scales: jax.Array, kind: Any) -> jax.Array:
    """X over its scales as values of this dtype; 0 where the scale is 0."""
    found = jnp.where(scales > 0, x / jnp.where(scales > 0, scales, 1), 0)
    found = jnp.clip(found, -LARGEST[kind], LARGEST[kind])
    return (jnp.round(found) if kind == jnp.int8 else found).astype(kind)
