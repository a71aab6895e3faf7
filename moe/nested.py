"""`jax.shard_map` inside another one, with gradients.

What the backward pass needs of the forward pass leaves the inner map cut along the axes that the
inner map cuts. JAX (0.10 to 0.12) cuts it along those of the outer map as well, which have been cut
already, and fails to lower that. So the inner map's gradient is written out here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from taskmoe.kernels.checks import varying_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Kept:
    """What the backward pass needs: leaves of a vjp, one more axis in front, and how to read it."""

    leaves: list[jax.Array]
    tree: Any = dataclasses.field(metadata={"static": True})
    specs: tuple[PartitionSpec, ...] = dataclasses.field(metadata={"static": True})


def nested_shard_map(
    local: Callable[..., Any], axes: tuple[str, ...], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over axes of the mesh in use that are not manual yet.

    local: a function of trees of arrays with floating results. in_specs: a tree like its arguments.
    """
    specs = jax.tree.leaves(in_specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def mapped(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes))

    def run(*arguments: Any) -> Any:
        flat, tree = jax.tree.flatten(arguments)
        real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in flat]

        def split(values: list[Any]) -> tuple[list[Any], list[Any]]:
            pairs = list(zip(values, real, strict=True))
            return [v for v, is_real in pairs if is_real], [
                v for v, is_real in pairs if not is_real
            ]

        def joined(reals: list[Any], others: list[Any]) -> Any:
            of = {True: iter(reals), False: iter(others)}
            return local(*jax.tree.unflatten(tree, [next(of[is_real]) for is_real in real]))

        @jax.custom_vjp
        def call(reals: list[Any], others: list[Any]) -> Any:
            return mapped(joined, split(specs), out_specs)(reals, others)

        def forward(reals: list[Any], others: list[Any]) -> tuple[Any, _Kept]:
            kept_specs: list[PartitionSpec] = []
            trees: list[Any] = []

            def keep(reals: list[Any], others: list[Any]) -> tuple[Any, list[jax.Array]]:
                out, pull = jax.vjp(lambda reals: joined(reals, others), reals)
                leaves, pull_tree = jax.tree.flatten(pull)
                cut = [tuple(a for a in axes if a in varying_axes(leaf)) for leaf in leaves]
                kept_specs[:] = [PartitionSpec(names or None) for names in cut]
                trees[:] = [pull_tree]
                return out, [leaf[None] for leaf in leaves]

            def look(reals: list[Any], others: list[Any]) -> Any:  # for the specs that `keep` finds
                return keep(reals, others)[0]

            jax.eval_shape(mapped(look, split(specs), out_specs), reals, others)
            results = (out_specs, list(kept_specs))
            out, leaves = mapped(keep, split(specs), results)(reals, others)
            return out, _Kept(leaves, trees[0], tuple(kept_specs))

        def backward(kept: _Kept, grads: Any) -> tuple[list[jax.Array], None]:
            def pull_back(leaves: list[jax.Array], grads: Any) -> list[jax.Array]:
                (found,) = kept.tree.unflatten([leaf[0] for leaf in leaves])(grads)
                return found

            reals = split(specs)[0]
            return mapped(pull_back, (list(kept.specs), out_specs), reals)(kept.leaves, grads), None

        call.defvjp(forward, backward)
        return call(*split(flat))

    return run
