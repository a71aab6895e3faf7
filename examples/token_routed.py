"""A token-routed layer learns a few steps.  Look at the loss, and at the load of the experts.

The auxiliary loss keeps experts equally busy: without it few of them do all the work.
"""

import functools

import jax
import jax.numpy as jnp

from taskmoe import moe

EXPERTS, STEPS = 8, 40
config = moe.MoEConfig(d_model=32, d_ff=64, num_experts=EXPERTS, gated=True, activation="silu")


def batch(key):
    """Tokens of eight kinds; each kind is to be turned by a matrix of its own."""
    kinds, noise, turn = jax.random.key(1), *jax.random.split(key)
    centres = jax.random.normal(kinds, (8, 32))
    matrices = jax.random.normal(kinds, (8, 32, 32)) * 32**-0.5
    kind = jax.random.randint(turn, (8, 32), 0, 8)
    x = centres[kind] + 0.1 * jax.random.normal(noise, (8, 32, 32))
    return x, jnp.einsum("bsd,bsde->bse", x, matrices[kind])


@functools.partial(jax.jit, donate_argnums=0)
def step(params, key):
    """One step of plain gradient descent."""
    x, target = batch(key)

    def loss(params):
        y, metrics = moe.apply(params, config, x)
        return jnp.mean((y - target) ** 2) + metrics.aux_loss, metrics

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 2.0 * g, params, gradients), value, metrics


params = moe.init(jax.random.key(0), config)
for number, key in enumerate(jax.random.split(jax.random.key(2), STEPS)):
    params, loss, metrics = step(params, key)
    if number in (0, STEPS // 2, STEPS - 1):
        load = " ".join(f"{share:.2f}" for share in metrics.load)
        print(f"step {number + 1:3d}  loss {loss:.3f}  load of the experts {load}")
print("Look: the loss falls, and no expert has nothing to do.")
