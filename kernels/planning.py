"""The row plan: where each assignment's row goes, packed by expert or padded to a capacity.

With queue places known from gating this is a counting sort, without sorting:

    packed:   row = (rows of lower experts) + slot
    capacity: row = expert * C + slot, dropped where slot >= C
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import as_size
from taskmoe.kernels.gating import Gating
from taskmoe.kernels.platforms import with_plain_settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Where rows go.

    rows: [T, k] i32, destination row of each assignment; num_rows where dropped or not valid
    group_sizes: [E] i32, rows of each expert, in order, as `gmm` and `expert_ffn` take them
    num_rows: rows of the destination buffer (static)
    """

    rows: jax.Array
    group_sizes: jax.Array
    num_rows: int = dataclasses.field(metadata={"static": True})


@with_plain_settings
def row_plan(gating: Gating, *, capacity: int | None = None) -> RowPlan:
    """Lay assignments out as rows sorted by expert.

    gating: from `top_k_gating`.
    capacity: rows C an expert has room for. None packs every assignment: num_rows = T*k,
      group_sizes = gating.counts.sum(0), which sums to less than T*k where tokens are not valid.
      With C the buffer is [E*C] whatever the counts are, assignments with slot >= C are dropped,
      and group_sizes is C for every expert: what `dispatch` left zero is multiplied like the rest
      and gives zero rows.

    Returns `RowPlan`. Raises ValueError or TypeError where an argument does not fit.

    Lepikhin et al. 2020, GShard (arXiv 2006.16668), Algorithm 1.
    """
    if not isinstance(gating, Gating):
        raise TypeError(f"gating must be a Gating, got {type(gating).__name__}")
    num_experts = gating.counts.shape[1]
    if capacity is None:
        num_rows = gating.experts.size
        group_sizes = gating.counts.sum(0, dtype=jnp.int32)
        start = jnp.cumsum(group_sizes, dtype=jnp.int32) - group_sizes
        placed = gating.slots >= 0
        rows = start[gating.experts] + gating.slots
    else:
        capacity = as_size("capacity", capacity)
        num_rows = num_experts * capacity
        group_sizes = jnp.full((num_experts,), capacity, jnp.int32)
        placed = (gating.slots >= 0) & (gating.slots < capacity)
        rows = gating.experts * capacity + gating.slots
    return RowPlan(jnp.where(placed, rows, num_rows).astype(jnp.int32), group_sizes, num_rows)
