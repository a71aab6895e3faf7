"""What a policy of `jax.checkpoint` keeps of a layer between forward and backward.

Look at the columns: what is not kept takes no memory, and is computed again.  To spare the experts
their second run, keep both what comes before their activation and their results.
"""

import functools
import re

import jax

from taskmoe import moe

config = moe.MoEConfig(d_model=64, d_ff=256, num_experts=8, activation="silu", gated=True)
params = moe.init(jax.random.key(0), config)
x = jax.random.normal(jax.random.key(1), (8, 64, 64))

GATED, ROWS = "taskmoe_gated", "taskmoe_dispatched"
EXPERTS = ("taskmoe_expert_hidden", "taskmoe_expert_out")
names = jax.checkpoint_policies.save_only_these_names
POLICIES = {
    "all": jax.checkpoint_policies.everything_saveable,
    "gating, rows, experts": names(GATED, ROWS, *EXPERTS),
    "gating, experts": names(GATED, *EXPERTS),
    "gating": names(GATED),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


def loss(params, x):
    """Of one layer."""
    y, metrics = moe.apply(params, config, x)
    return (y**2).mean() + metrics.aux_loss


def runs(jaxpr, op):
    """How often an op runs forward in a program."""
    return len(re.findall(rf"op=taskmoe_{op}(_keeping)?\b", jaxpr))


def kept(layer):
    """KiB that the forward pass hands to the backward pass, beside parameters and x."""
    jaxpr = jax.make_jaxpr(lambda *given: jax.vjp(layer, *given)[1])(params, x).jaxpr
    made = set(jaxpr.outvars) - set(jaxpr.invars)
    return sum(v.aval.size * v.aval.dtype.itemsize for v in made) / 1024


print(f"{'kept':>21} {'KiB':>6}  gating  experts   (times they run forward)")
for name, policy in POLICIES.items():
    layer = functools.partial(jax.checkpoint, policy=policy)(loss)
    jaxpr = str(jax.make_jaxpr(jax.grad(layer))(params, x))
    gating, experts = runs(jaxpr, "top_k_gating"), runs(jaxpr, "expert_ffn")
    print(f"{name:>21} {kept(layer):6,.0f} {gating:7} {experts:8}")

plain = jax.jit(jax.grad(loss))(params, x)
again = jax.jit(jax.grad(layer))(params, x)  # of the last, which keeps nothing
difference = max(abs(again[w] - plain[w]).max() for w in plain)
print(f"largest difference of gradients, nothing kept: {difference:.1e}")
