"""Cut one task's sub-network out of a task-routed layer: a plain dense FFN, exact by algebra.

Given the task, its k experts and their gate weights g are constants, and an expert FFN is linear
after its activation, so

    sum_j g_j * act(x W_in[e_j]) W_out[e_j]
      = act(x [W_in[e_1] | ... | W_in[e_k]]) [g_1 W_out[e_1]; ...; g_k W_out[e_k]]

is one dense FFN of width k * d_ff, for every activation and for gated ones (Kudugunta et al. 2021,
section 3.2; the folding is ours). The layer itself runs a batch of one task through the same fold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from taskmoe.kernels import top_k_gating
from taskmoe.moe.config import Activation, MoEConfig
from taskmoe.moe.routing import Params, task_logits

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FFNParams:
    """A dense feed-forward layer that carries its activation.

    w_in: [D, F] bf16|f32
    w_out: [F, D], same dtype
    w_gate: [D, F] or None; with it the layer is `(act(x w_gate) * (x w_in)) w_out`
    activation: "relu", "gelu" or "silu" (static)
    """

    w_in: jax.Array
    w_out: jax.Array
    w_gate: jax.Array | None = None
    activation: Activation = dataclasses.field(default="relu", metadata={"static": True})


def ffn(params: FFNParams, x: jax.Array) -> jax.Array:
    """Apply a dense feed-forward layer: `act(x W_in) W_out`, or gated.

    x: [..., D] bf16|f32. Returns [..., D] in x's dtype. Products accumulate in float32.
    """
    act = ACTIVATIONS[params.activation]
    hidden = _matmul(x, params.w_in)
    hidden = act(hidden) if params.w_gate is None else act(_matmul(x, params.w_gate)) * hidden
    return _matmul(hidden.astype(x.dtype), params.w_out).astype(x.dtype)


def extract(params: Params, config: MoEConfig, task: ArrayLike) -> FFNParams:
    """The dense FFN of width `top_k * d_ff` that equals the layer for one task.

    params: what `init` made for routing "task".
    task: id in [0, num_tasks). A traced id out of range clamps.
    Returns FFNParams with w_in [D, k*F] and w_out [k*F, D], gates folded into w_out.
    Raises ValueError if the layer is not task-routed or a concrete id is out of range.
    """
    if config.routing != "task":
        raise ValueError(
            f"routing must be 'task' to extract a task, got {config.routing!r}: "
            "the experts of other routings are not constant"
        )
    if isinstance(task, int | np.integer) and not 0 <= task < config.num_tasks:
        raise ValueError(f"task must be in [0, {config.num_tasks}), got {task}")
    gating = top_k_gating(task_logits(params)[jnp.asarray(task)][None], config.top_k)
    return fold(params, config, gating.experts[0], gating.weights[0])


def fold(params: Params, config: MoEConfig, experts: jax.Array, weights: jax.Array) -> FFNParams:
    """Join the experts [k] i32 with gate weights [k] f32 into one dense FFN of width k*F."""

    def side_by_side(w: jax.Array) -> jax.Array:  # [E, D, F] -> [D, k*F]
        return jnp.moveaxis(w[experts], 0, 1).reshape(w.shape[1], -1)

    w_out = params["w_out"]
    gated = w_out[experts].astype(jnp.float32) * weights[:, None, None]
    return FFNParams(
        w_in=side_by_side(params["w_in"]),
        w_out=gated.astype(w_out.dtype).reshape(-1, w_out.shape[2]),
        w_gate=side_by_side(params["w_gate"]) if config.gated else None,
        activation=config.activation,
    )


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    dims: Any = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
