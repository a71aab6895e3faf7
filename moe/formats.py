"""Where parameters lie in a device's memory, so that kernels read them in place."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.layout import Format, Layout


def row_major(params: Any) -> Any:
    """Formats in which the kernels read parameters in place, for `jax.device_put` and `jax.jit`.

        params = jax.device_put(params, row_major(params))
        step = jax.jit(step, out_shardings=(jax.tree.map(lambda x: x.format, params), ...))

    Without it XLA lays out a program's arguments so that they take the least padding. On TPU that
    puts the experts last where their widths are no multiples of 128, like GPT-OSS's 2,880, and then
    every matrix is copied before each call, which by the compile lab's model takes longer than the
    products themselves. A jitted function takes arrays as they lie; what it returns it lays out
    anew, unless it is told.

    params: a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings.

    Returns a tree of `jax.experimental.layout.Format`, with the shardings that the arrays have.
    Raises ValueError that names a leaf without sharding.
    """

    def one(path: Any, x: Any) -> Format:
        if getattr(x, "sharding", None) is None:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"params{name} must have a sharding, got {type(x).__name__} without")
        return Format(Layout(tuple(range(x.ndim))), x.sharding)

    return jax.tree_util.tree_map_with_path(one, params)
