"""A task-routed layer learns, then each task's network is cut out of it.  Outputs are the same.

The experts of a task and their weights are constants, so they fold into one dense layer: it has no
gate, and no other task's experts.
"""

import functools

import jax
import jax.numpy as jnp

from taskmoe import moe

TASKS, STEPS = 4, 60
config = moe.MoEConfig(d_model=32, d_ff=64, num_experts=16, routing="task", num_tasks=TASKS)
task = jnp.arange(16) % TASKS  # of each sequence
matrices = jax.random.normal(jax.random.key(1), (TASKS, 32, 32)) * 32**-0.5


@functools.partial(jax.jit, donate_argnums=0)
def step(params, key):
    """One step of plain gradient descent: each task is to learn a matrix of its own."""
    x = jax.random.normal(key, (16, 20, 32))
    target = jnp.einsum("bsd,bde->bse", x, matrices[task])

    def loss(params):
        y, metrics = moe.apply(params, config, x, task=task)
        return jnp.mean((y - target) ** 2) + metrics.aux_loss

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 2.0 * g, params, gradients), value


params = moe.init(jax.random.key(0), config)
losses = []
for key in jax.random.split(jax.random.key(2), STEPS):
    params, loss = step(params, key)
    losses.append(float(loss))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")

x = jax.random.normal(jax.random.key(3), (5, 20, 32))
whole = sum(w.size for w in jax.tree.leaves(params))
for t in range(TASKS):
    small = moe.extract(params, config, task=t)
    size = sum(w.size for w in jax.tree.leaves(small))
    layer = moe.apply(params, config, x, task=t)[0]  # a batch of one task
    mixed = moe.apply(params, config, x, task=jnp.full(5, t))[0]  # the same through the experts
    print(
        f"task {t}: {size:,} of {whole:,} parameters, "
        f"identical to the layer: {bool((moe.ffn(small, x) == layer).all())}, "
        f"largest difference to the routed layer {abs(moe.ffn(small, x) - mixed).max():.1e}"
    )
print("Look: a task takes an eighth of the parameters and loses nothing.")
