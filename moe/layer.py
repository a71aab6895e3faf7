"""The Mixture-of-Experts layer: `y_s = sum_e G[s, e] * FFN_e(x_s)` (GShard, equations 1 and 2).

All levels of routing share one path; they differ only in what is routed as one unit. With "token"
the units are the B*S tokens; with the others they are the B sequences, so that queues, row plan and
row movement work on B rows of width S*D and no token is looked at.
A scalar task goes further: the layer folds the task's experts into one dense FFN.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from taskmoe.kernels import combine, dispatch, expert_ffn, top_k_gating
from taskmoe.moe.config import Metrics, MoEConfig
from taskmoe.moe.exchange import STRATEGIES
from taskmoe.moe.expert_parallel import exchange_apply
from taskmoe.moe.extraction import ffn, fold
from taskmoe.moe.routing import Params, assign, draw_noise, metrics, task_logits, unit_logits


def init(key: jax.Array, config: MoEConfig, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters of one layer.

    Returns gate [D, E] (not with routing "static"), w_in [E, D, F], w_out [E, F, D]; with `gated`
    w_gate [E, D, F]; with routing "task" task_embedding [num_tasks, D]. Experts are drawn with
    variance 1/fan_in.
    """
    names = ["gate", "w_in", "w_out", "w_gate", "task_embedding"]
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    d, f, e = config.d_model, config.d_ff, config.num_experts
    shapes = {"gate": (d, e), "w_in": (e, d, f), "w_out": (e, f, d)}
    if config.routing == "static":
        del shapes["gate"]
    if config.gated:
        shapes["w_gate"] = (e, d, f)
    params = {
        name: jax.random.normal(keys[name], shape, dtype) * (shape[-2] ** -0.5)
        for name, shape in shapes.items()
    }
    if config.routing == "task":
        # Unit variance gives gate logits of unit variance, as normalised tokens have.
        shape = (config.num_tasks, d)
        params["task_embedding"] = jax.random.normal(keys["task_embedding"], shape, dtype)
    return params


def apply(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    *,
    valid: jax.Array | None = None,
    task: ArrayLike | None = None,
    sentence: jax.Array | None = None,
    mesh: jax.sharding.Mesh | None = None,
    strategy: str = "all_to_all",
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Metrics]:
    """Apply the layer to a batch of sequences.

    x: [B, S, D] bf16|f32.
    valid: [B, S] bool, False at padding; None means all valid. Padding is routed nowhere, its
      output is 0, and it counts in no queue, loss or statistic.
    task: [B] i32, the task of each sequence, or a scalar for a batch of one task, which costs what
      a dense FFN of width top_k*F costs. Only with routing "task" and "static"; ids out of range
      clamp.
    sentence: [B, D], what stands for each sequence at the gate, only with routing "sentence"; None
      is the mean of its valid tokens. A causal decoder must not look at tokens to come: it gives
      the mean of the encoder's output.
    mesh: a mesh with an axis "expert": expert weights are sharded over that axis, sequences over
      all axes, and rows travel between the devices of that axis. None runs on one device.
    strategy: how they travel: "all_to_all", "ragged", "all_gather", "mosaic" (remote DMA by Pallas
      TPU kernels), or "auto", which sends the fewest bytes; see `taskmoe.moe.exchange`. Results are
      the same but for the order of sums.
    key: while training, where second_policy or jitter draw from; None routes without noise.
    implementation: of the kernels; None chooses by platform.

    Returns y [B, S, D] in x's dtype, without the residual, and Metrics. Rows that found no room
    (with a capacity factor) contribute 0: they pass by the residual.
    Raises ValueError or TypeError that names the argument where one does not fit.
    """
    task = None if task is None else jnp.asarray(task)
    _check(config, x, valid, task, sentence, mesh)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if valid is not None:  # sequences travel whole; zero rows give zero rows
        valid = jnp.asarray(valid)
        x = jnp.where(valid[..., None], x, 0)
    if task is not None and task.ndim == 0:
        return _apply_one_task(params, config, x, valid, task, implementation)
    noise = draw_noise(config, key, *x.shape[:2])
    if mesh is not None:
        return exchange_apply(
            params, config, x, valid, task, sentence, noise, mesh, strategy, implementation
        )
    logits, unit_valid = unit_logits(params, config, x, valid, task, sentence, noise)
    gating, plan, balance = assign(config, logits, unit_valid, noise, implementation)
    units = logits.shape[0]
    width = x.shape[1] if units == x.shape[0] else 1  # tokens a unit
    rows = dispatch(
        x.reshape(units, -1), plan.rows, plan.num_rows, implementation=implementation
    ).reshape(-1, config.d_model)
    out = expert_ffn(
        rows,
        params["w_in"],
        params["w_out"],
        plan.group_sizes * width,
        activation=config.activation,
        w_gate=params.get("w_gate"),
        implementation=implementation,
    )
    y = combine(
        out.reshape(plan.num_rows, -1), plan.rows, gating.weights, implementation=implementation
    ).reshape(x.shape)
    placed = jnp.sum(plan.rows < plan.num_rows)
    return y, metrics(config, gating, jnp.sum(unit_valid), placed, balance)


def _apply_one_task(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    valid: jax.Array | None,
    task: jax.Array,
    implementation: str | None,
) -> tuple[jax.Array, Metrics]:
    some = jnp.ones(1, bool) if valid is None else valid.any()[None]  # only padding counts nowhere
    logits = task_logits(params, config)[task][None]
    gating = top_k_gating(logits, config.top_k, valid=some, implementation=implementation)
    y = ffn(fold(params, config, gating.experts[0], gating.weights[0]), x)
    return y, metrics(config, gating, jnp.sum(some), config.top_k * jnp.sum(some))


def _check(
    config: MoEConfig,
    x: jax.Array,
    valid: jax.Array | None,
    task: jax.Array | None,
    sentence: jax.Array | None,
    mesh: jax.sharding.Mesh | None,
) -> None:
    if x.ndim != 3 or x.shape[2] != config.d_model:
        raise ValueError(f"x must be [B, S, D] with D={config.d_model}, got {list(x.shape)}")
    if x.size == 0:
        raise ValueError(f"x must not be empty, got {list(x.shape)}")
    if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != jnp.bool_):
        raise ValueError(
            f"valid must be bool {list(x.shape[:2])}, got {valid.dtype} {list(valid.shape)}"
        )
    if config.by_task != (task is not None):
        raise ValueError(
            "task must be given with routing='task' or 'static' and only then; routing is "
            f"{config.routing!r} and task is {'not given' if task is None else 'given'}"
        )
    if task is not None:
        if task.shape not in ((), (x.shape[0],)):
            raise ValueError(f"task must be a scalar or [{x.shape[0]}], got {list(task.shape)}")
        if not jnp.issubdtype(task.dtype, jnp.integer):
            raise TypeError(f"task must be of an integer dtype, got {task.dtype}")
    if sentence is not None:
        if config.routing != "sentence":
            raise ValueError(
                f"sentence must be given with routing='sentence' only, got {config.routing!r}"
            )
        if sentence.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"sentence must be {[x.shape[0], x.shape[2]]}, got {list(sentence.shape)}"
            )
    if mesh is not None:
        if "expert" not in mesh.axis_names:
            raise ValueError(f"mesh must have an axis 'expert', got axes {mesh.axis_names}")
        if config.num_experts % mesh.shape["expert"]:
            raise ValueError(
                f"mesh axis 'expert' must divide num_experts={config.num_experts}, "
                f"got size {mesh.shape['expert']}"
            )
        if x.shape[0] % mesh.size:
            raise ValueError(
                f"x must have a batch that the mesh's {mesh.size} devices divide, got {x.shape[0]}"
            )
