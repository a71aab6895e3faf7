"""One export for TPU, CUDA and CPU, made on a CPU.  Look at the kernels that it holds.

The platform that is lowered for chooses each op's implementation, not the machine that lowers.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax import export

from taskmoe import kernels, moe

config = moe.MoEConfig(d_model=128, d_ff=256, num_experts=8)
params = moe.init(jax.random.key(0), config)
x = jax.random.normal(jax.random.key(1), (2, 16, 128))
layer = jax.jit(lambda params, x: moe.apply(params, config, x)[0])


def kernels_in(platform):
    """Pallas kernels, and products by ragged_dot, in what is lowered for the platform."""
    text = export.export(layer, platforms=[platform])(params, x).mlir_module()
    products = text.count('composite "chlo.ragged_dot"')
    return f"{text.count('tpu_custom_call')} Pallas kernels, {products} products by ragged_dot"


for platform in ("tpu", "cuda", "cpu"):
    print(f"for {platform:>4}: {kernels_in(platform)}")
both = export.export(layer, platforms=["tpu", "cuda", "cpu"])(params, x)
stored = both.serialize()
print(f"for all of {', '.join(both.platforms)}: {len(stored):,} bytes")

# The same program, read back, runs here by what it holds for CPU.
again = export.deserialize(stored)
print(f"runs here, largest difference {abs(again.call(params, x) - layer(params, x)).max():.1e}")

# Tiles are made for TPU v4 and fit all later chips; `for_chip` makes them for another.
shapes = ((4096, 2048), jnp.bfloat16), ((8, 2048, 8192), jnp.bfloat16), ((8,), jnp.int32)
arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
product = export.export(jax.jit(kernels.gmm), platforms=["tpu"])
programs = {}
for chip in ("v4", "v6e"):
    with kernels.for_chip(chip):
        programs[chip] = product(*arguments).serialize()
same = programs["v4"] == programs["v6e"]
print(f"gmm for v6e has other tiles than for v4: {not same}")
