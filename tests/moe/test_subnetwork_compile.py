"""A task's sub-network, compiled ahead of time for whole TPU slices, exchanges nothing."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe
from taskmoe.bench.harness.collectives import count_collectives

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
TASK = moe.MoEConfig(d_model=256, d_ff=512, num_experts=64, routing="task", num_tasks=16)


def collectives(topology: str, f: Any, params: Any, specs: Any) -> dict[str, int]:
    """Collectives of f(params, x) with x spread over all devices of a slice."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))

    def shape(leaf: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((2 * mesh.size, 1, TASK.d_model), jnp.float32)
        arguments = jax.tree.map(shape, params, specs), shape(x, P("expert"))
        compiled = jax.jit(lambda p, x: f(p, x, mesh)).lower(*arguments)
        return count_collectives(compiled.compile().as_text() or "")


@pytest.mark.parametrize("topology", ["v3:4x8", "v5e:8x8"])
def test_sub_networks_need_no_exchange_and_token_routing_does(topology: str) -> None:
    params = jax.eval_shape(lambda key: moe.init(key, TASK), jax.random.key(0))
    small = jax.eval_shape(lambda p: moe.extract(p, TASK, 3), params)
    everywhere = jax.tree.map(lambda _: P(), small)
    assert collectives(topology, lambda p, x, _: moe.ffn(p, x), small, everywhere) == {}

    token = moe.MoEConfig(TASK.d_model, TASK.d_ff, TASK.num_experts, capacity_factor=1.25)
    params = jax.eval_shape(lambda key: moe.init(key, token), jax.random.key(0))
    found = collectives(
        topology,
        lambda p, x, mesh: moe.apply(p, token, x, mesh=mesh)[0],
        params,
        moe.param_specs(params),
    )
    assert sum(n for kind, n in found.items() if "all-to-all" in kind) >= 2
