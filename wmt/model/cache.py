"""What the decoder keeps of the positions before, while it decodes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of the decoder's layers while decoding, in the order that attention reads.

    self_key, self_value: one [B, H, L*K, D/H] a layer, where the K hypotheses of a sentence stand
      side by side. The L columns are a ring: each step fills the next one, of all sentences, so
      that those at position p find theirs in the last p + 1 columns. What is there stays where it
      is, whatever becomes of the hypotheses.
    cross_key, cross_value: one [B, H, S, D/H] a layer, of the encoder's output.
    sentence: [B, D], what a sentence-routed decoder gates by; None where it is not sentence-routed.
    column: the one that the next step fills, a scalar i32.
    ancestors: [B, K, L] i32, at whose place each hypothesis finds what is in each column; None
      where K is 1.
    """

    self_key: tuple[jax.Array, ...]
    self_value: tuple[jax.Array, ...]
    cross_key: tuple[jax.Array, ...]
    cross_value: tuple[jax.Array, ...]
    sentence: jax.Array | None
    column: jax.Array
    ancestors: jax.Array | None = None

    @property
    def beam(self) -> int:
        """Hypotheses of a sentence."""
        return 1 if self.ancestors is None else self.ancestors.shape[1]

    @property
    def room(self) -> int:
        """Columns that there are."""
        return self.self_key[0].shape[2] // self.beam

    def seen(self, position: jax.Array) -> jax.Array:
        """[B or 1, 1, 1, L] bool: the columns of a sentence at position, [B] or a scalar i32."""
        age = (self.column - jnp.arange(self.room)) % self.room
        return age <= position.reshape(-1, 1, 1, 1)

    def inherited(self, parents: jax.Array) -> Cache:
        """Of hypotheses that go on from others: parents [B, K] i32."""
        assert self.ancestors is not None  # there are several hypotheses
        ancestors = jnp.take_along_axis(self.ancestors, parents[:, :, None], axis=1)
        return self._replace(ancestors=ancestors)

    def resized(self, room: int) -> Cache:
        """With so many columns, the last ones of these."""
        last = min(self.room, room)
        # The oldest first. Behind the newest there may be anything: no step reads it.
        kept = (self.column - last + jnp.arange(room)) % self.room

        def fit(x: jax.Array) -> jax.Array:
            columns = x.reshape(*x.shape[:2], self.room, self.beam, x.shape[3])
            return columns[:, :, kept].reshape(*x.shape[:2], room * self.beam, x.shape[3])

        return self._replace(
            self_key=tuple(map(fit, self.self_key)),
            self_value=tuple(map(fit, self.self_value)),
            column=jnp.int32(last % room),
            ancestors=None if self.ancestors is None else self.ancestors[:, :, kept],
        )
