"""One of several processes with two devices each: `process_worker.py PORT PROCESSES I [die]`.

Checks every strategy against one device, forward and backward, and prints what it found; with
"die" it then exchanges for ever, until the last process kills itself.
"""

import os
import signal
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(  # see below
    flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe import moe

port, processes, process = (int(word) for word in sys.argv[1:4])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(
    f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=10, initialization_timeout=60
)
mesh = Mesh(np.array(jax.devices()), ("expert",), axis_types=(AxisType.Auto,))
config = moe.MoEConfig(d_model=6, d_ff=5, num_experts=8)
params = jax.tree.map(np.asarray, moe.init(jax.random.key(0), config))
x = np.random.default_rng(0).standard_normal((8, 3, 6)).astype(np.float32)


def place(leaf: Any, spec: Any) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda i: leaf[i])


def run(strategy: str | None) -> Any:
    def loss(params: Any, x: Any) -> Any:
        where: Any = {} if strategy is None else {"mesh": mesh, "strategy": strategy}
        y, report = moe.apply(params, config, x, **where)
        return jnp.sum(jnp.sin(y)) + report.aux_loss, y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


alone = run(None)(params, x)
specs = moe.param_specs(params)
sharded = {name: place(w, specs[name]) for name, w in params.items()}, place(x, P("expert"))
for strategy in ("all_to_all", "ragged", "all_gather"):
    found = run(strategy)(*sharded)
    error = 0.0
    for have, want in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        for shard in have.addressable_shards:
            part = np.asarray(want)[shard.index]
            scale = np.abs(np.asarray(want)).max()
            error = max(error, float(np.abs(np.asarray(shard.data) - part).max() / scale))
    print(f"{strategy} {error:.3g}", flush=True)

if sys.argv[4:] == ["die"]:
    step = run("all_to_all")
    for count in range(10**9):
        jax.block_until_ready(step(*sharded))
        if count == 20 and process == processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)
