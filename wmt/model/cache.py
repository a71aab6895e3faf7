"""What the decoder keeps of the positions before, while it decodes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of the decoder's layers while decoding, in the order that attention reads.

    self_key, self_value: one [B, H, L*K, D/H] a layer, filled up to the present position, where the
      K hypotheses of a sentence stand side by side. What is there stays where it is, whatever
      becomes of the hypotheses.
    cross_key, cross_value: one [B, H, S, D/H] a layer, of the encoder's output.
    sentence: [B, D], what a sentence-routed decoder gates by; None where it is not sentence-routed.
    ancestors: [B, K, L] i32, at whose place each hypothesis finds each of its positions; None where
      K is 1.
    """

    self_key: tuple[jax.Array, ...]
    self_value: tuple[jax.Array, ...]
    cross_key: tuple[jax.Array, ...]
    cross_value: tuple[jax.Array, ...]
    sentence: jax.Array | None
    ancestors: jax.Array | None = None

    def inherited(self, parents: jax.Array) -> Cache:
        """Of hypotheses that go on from others: parents [B, K] i32."""
        assert self.ancestors is not None  # there are several hypotheses
        ancestors = jnp.take_along_axis(self.ancestors, parents[:, :, None], axis=1)
        return self._replace(ancestors=ancestors)

    def grown(self, length: int) -> Cache:
        """With room for so many positions, no fewer than there are."""
        beam = 1 if self.ancestors is None else self.ancestors.shape[1]
        room = length * beam - self.self_key[0].shape[2]

        def grow(x: jax.Array) -> jax.Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0)))

        ancestors = self.ancestors
        if ancestors is not None:
            ancestors = jnp.pad(ancestors, ((0, 0), (0, 0), (0, room // beam)))
        return self._replace(
            self_key=tuple(map(grow, self.self_key)),
            self_value=tuple(map(grow, self.self_value)),
            ancestors=ancestors,
        )
