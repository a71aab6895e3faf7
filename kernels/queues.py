"""Places in the queues of experts, without a sort: prefix sums over tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

#: Tokens whose queue places are counted by one small matmul.
QUEUE_BLOCK = 64


def queue_places(
    experts: list[jax.Array], valid: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """Slots [T, k] and counts [k, E], i32, of k choices [T, 1] each.

    Prefix sums over tokens: inside blocks by a triangular matmul, which is exact in f32, and over
    the blocks' totals. One choice after the other, so that what each takes, [T, E], is used again.
    """
    tokens = valid.shape[0]
    blocks = -(-tokens // QUEUE_BLOCK)
    earlier = jnp.tri(QUEUE_BLOCK, k=-1, dtype=jnp.float32)
    ahead = jnp.zeros((num_experts,), jnp.int32)
    slots, counts = [], []
    for expert in experts:
        hit = (expert == jnp.arange(num_experts)) & valid[:, None]
        ones = jnp.pad(hit, ((0, blocks * QUEUE_BLOCK - tokens), (0, 0)))
        ones = ones.reshape(blocks, QUEUE_BLOCK, num_experts).astype(jnp.float32)
        inside = jnp.einsum("ts,bse->bte", earlier, ones, precision="highest")
        totals = jnp.sum(ones, axis=1).astype(jnp.int32)
        # Not `jnp.cumsum`, which is a jit: where several platforms are lowered for, JAX 0.12 gives
        # the CPU what it lowered for CUDA, and XLA's CPU compiler dies of it.
        before = jax.lax.cumsum(totals, axis=0) - totals + ahead
        places = jnp.sum((inside.astype(jnp.int32) + before[:, None]) * ones.astype(jnp.int32), 2)
        slots.append(places.reshape(-1)[:tokens])
        counts.append(jnp.sum(totals, axis=0))
        ahead = ahead + counts[-1]
    return jnp.stack(slots, axis=1), jnp.stack(counts)
