"""Groups of rows: rows sorted by expert, an expert's rows behind those of the one before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import accumulator, as_integers, check_shape


class Groups(NamedTuple):
    """Which rows belong to whom.

    sizes: [G] i32, rows of each group. offset: [] i32, the group that is the first local one.
    """

    sizes: jax.Array
    offset: jax.Array


def check_groups(group_sizes: Any, group_offset: Any, num_groups: int, source: str) -> Groups:
    """The groups, if sizes and offset are integers that fit num_groups = `source`."""
    sizes = as_integers("group_sizes", group_sizes)
    check_shape("group_sizes", sizes, ("G",))
    if group_offset is None and num_groups != sizes.shape[0]:
        raise ValueError(
            f"group_sizes must have {source}={num_groups} entries, got {sizes.shape[0]}; "
            "with group_offset it may have more"
        )
    offset = as_integers("group_offset", 0 if group_offset is None else group_offset)
    check_shape("group_offset", offset, ())
    if group_offset is not None:  # beyond these there is no group, and sums could pass 2^31
        offset = jnp.clip(offset, -num_groups, sizes.shape[0])
    return Groups(sizes, offset)


def group_bounds(groups: Groups, num_groups: int, num_rows: Any) -> tuple[jax.Array, jax.Array]:
    """First and one past the last row, [num_groups] i32 each, of the local groups; both ascend.

    Negative sizes count as 0, rows past num_rows are cut off, and groups that sizes does not have
    are empty.
    """
    last = groups.sizes.shape[0]
    sizes = jnp.clip(groups.sizes, 0, num_rows)
    if isinstance(num_rows, int) and last * num_rows < 1 << 31:
        ends = jnp.minimum(jax.lax.cumsum(sizes), num_rows)
    else:  # the sum may pass 2^31; cut off at num_rows as it goes, it cannot
        ends = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, num_rows), sizes)
    bounds = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    index = groups.offset + jnp.arange(num_groups, dtype=jnp.int32)
    return bounds[jnp.clip(index, 0, last)], bounds[jnp.clip(index + 1, 0, last)]


def of_each_row(values: jax.Array, groups: Groups, num_rows: Any) -> jax.Array:
    """[M, N]: the row of values [E, N] that belongs to each row's group; zeros where none does."""
    starts, ends = group_bounds(groups, values.shape[0], num_rows)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.sum(row[:, None] >= ends, axis=1)
    picked = values[jnp.minimum(group, values.shape[0] - 1)]
    return jnp.where(((row >= starts[0]) & (row < ends[-1]))[:, None], picked, 0)


def sum_of_each_group(rows: jax.Array, groups: Groups, num_groups: int) -> jax.Array:
    """[E, N]: sums of rows [M, N] over each group, whatever rows of none hold."""
    starts, ends = group_bounds(groups, num_groups, rows.shape[0])
    row = jnp.arange(rows.shape[0], dtype=jnp.int32)
    own = (row >= starts[0]) & (row < ends[-1])
    group = jnp.where(own, jnp.sum(row[:, None] >= ends, axis=1), num_groups)
    sums = jnp.zeros((num_groups, rows.shape[1]), accumulator(rows.dtype))
    return sums.at[group].add(jnp.where(own[:, None], rows, 0).astype(sums.dtype), mode="drop")
