"""The layer on a mesh of eight host devices, against one device.  Look at what is exchanged.

A token-routed layer exchanges rows between devices.  A task's sub-network exchanges nothing.
"""

import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"  # both count before JAX starts
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
from jax.sharding import NamedSharding, PartitionSpec

from taskmoe import moe

kinds = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=kinds)
x = jax.random.normal(jax.random.key(1), (16, 8, 64))


def collectives(function, *arguments):
    """Names of the collectives in the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    names = r"\b(all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute)\("
    return sorted(set(re.findall(names, text)))


config = moe.MoEConfig(d_model=64, d_ff=128, num_experts=8)
params = moe.init(jax.random.key(0), config)
alone, _ = moe.apply(params, config, x)
specs = moe.param_specs(params)
spread = {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in params.items()}
print(f"{mesh.size} devices, {mesh.shape['data']} x {mesh.shape['expert']} (data x expert)")
for strategy in ("auto", "all_to_all", "all_gather", "ragged"):

    def layer(params, x, strategy=strategy):
        """The layer on the mesh."""
        return moe.apply(params, config, x, mesh=mesh, strategy=strategy)[0]

    difference = abs(jax.jit(layer)(spread, x) - alone).max()
    found = ", ".join(collectives(layer, spread, x))
    print(f"{strategy:>10}: largest difference to one device {difference:.1e}; {found}")

config = moe.MoEConfig(d_model=64, d_ff=128, num_experts=8, routing="task", num_tasks=4)
small = moe.extract(moe.init(jax.random.key(0), config), config, task=2)
rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "expert"))))
found = ", ".join(collectives(moe.ffn, small, rows)) or "no collectives"
print(f"sub-network: {found}")
