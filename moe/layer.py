"""The Mixture-of-Experts layer: `y_s = sum_e G[s, e] * FFN_e(x_s)` (GShard, equations 1 and 2).

All levels of routing share one path; they differ only in what is routed as one unit. With "token"
the units are the B*S tokens; with the others they are the B sequences, so that queues, row plan and
row movement work on B rows of width S*D and no token is looked at.
A scalar task goes further: the layer folds the task's experts into one dense FFN.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from taskmoe.kernels.checks import as_floats, check_shape
from taskmoe.kernels.platforms import check_implementation, with_plain_settings
from taskmoe.kernels.quantized import as_weights
from taskmoe.moe.config import MoEConfig
from taskmoe.moe.exchange import STRATEGIES
from taskmoe.moe.expert_parallel import Batch, apply_here, apply_on_mesh, apply_one_task
from taskmoe.moe.gates import Told
from taskmoe.moe.mesh import MeshAxes, check_mesh, cut_already, find_layout
from taskmoe.moe.parameters import EXPERT_PARAMS, Params, check_params
from taskmoe.moe.routing import draw_noise


def apply(
    params: Params,
    config: MoEConfig,
    x: jax.Array,
    *,
    valid: jax.Array | None = None,
    task: ArrayLike | None = None,
    sentence: jax.Array | None = None,
    experts: jax.Array | None = None,
    weights: jax.Array | None = None,
    gate_input: jax.Array | None = None,
    return_chosen: bool = False,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    axes: MeshAxes | None = None,
    strategy: str = "auto",
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> Any:
    """Apply the layer to a batch of sequences.

    x: [B, S, D] bf16|f32, the dtype of the experts' matrices or any where they are quantised; the
      gate and task embeddings may have another.
    valid: [B, S] bool, False at padding; None means all valid. Padding is routed nowhere, its
      output is 0, and it counts in no queue, loss or statistic.
    task: [B] i32, the task of each sequence, or a scalar for a batch of one task, which costs what
      a dense FFN of width top_k*F costs. Only with routing "task" and "static"; ids out of range
      clamp.
    sentence: [B, D], what stands for each sequence at the gate, only with routing "sentence"; None
      is the mean of its valid tokens. A causal decoder must not look at tokens to come: it gives
      the mean of the encoder's output.
    experts, weights: [B, S, k] i32 and floats, of the caller's own router, only with routing
      "given"; an expert outside of [0, E) is no assignment, and those of a token are different
      ones. Gradients reach the weights.
      With routing "token" experts may be given alone: the gate weighs them as if it had chosen
      them, for choices that come from a table (DeepSeek-V4's first layers) or are replayed.
    gate_input: [B, S, D], what the gate sees in place of x, only with routing "token".
    return_chosen: whether to return what was chosen too.
    mesh: experts are spread over its axis "expert", sequences over all its axes, and rows travel
      between the devices of that axis. A batch that it does not divide is padded by sequences that
      count nowhere. None is the mesh of `jax.set_mesh` or of an outer `jax.shard_map` where that
      has such an axis or `axes` are given, and one device where not. In an outer `jax.shard_map`
      that cuts the experts' axis, `params` hold the device's own experts; where they hold all,
      nothing travels.
    axes: a `MeshAxes`, where the mesh's axes have other names or purposes: which carry the batch,
      the experts, and the hidden units of each expert.
    strategy: how rows travel: "all_to_all", "ragged", "all_gather", "mosaic" (remote DMA by Pallas
      TPU kernels), or "auto", which sends and holds the fewest rows; see `taskmoe.moe.exchange`.
      Results are the same but for the order of sums.
    key: while training, where second_policy or jitter draw from; None routes without noise.
    implementation: of the kernels; None chooses by platform.

    Returns y [B, S, D] in x's dtype, without the residual, and Metrics; with `return_chosen` also
    `Chosen`: experts [B, S, k] i32, best first, and weights [B, S, k] f32, before any capacity; [B,
    k] where sequences are routed as one. Rows that found no room (with a capacity factor)
    contribute 0: they pass by the residual.
    Raises ValueError or TypeError that names the argument where one does not fit.
    """
    x = as_floats("x", x)
    valid = jnp.ones(x.shape[:2], bool) if valid is None else jnp.asarray(valid)
    task = None if task is None else jnp.asarray(task)
    sentence = None if sentence is None else as_floats("sentence", sentence)
    experts = None if experts is None else jnp.asarray(experts)
    weights = None if weights is None else as_floats("weights", weights)
    gate_input = None if gate_input is None else as_floats("gate_input", gate_input)
    _check(config, x, valid, task, sentence)
    _check_chosen(config, x, experts, weights)
    if gate_input is not None:
        _check_gate_input(config, x, gate_input)
    chosen = None if experts is None else Told(experts, weights)
    check_implementation(implementation)
    check_mesh(mesh, axes)
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be one of auto, {', '.join(STRATEGIES)}, got {strategy!r}")
    batch = Batch(x, valid, task, sentence, told=chosen, gate_input=gate_input)
    options = Options(config, mesh, axes, strategy, implementation, return_chosen)
    return _apply(params, batch, key, options)


class Options(NamedTuple):
    """What is fixed when `apply` is traced; as its arguments."""

    config: MoEConfig
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None
    axes: MeshAxes | None
    strategy: str
    implementation: str | None
    return_chosen: bool


@functools.partial(jax.jit, static_argnames="options")
@with_plain_settings
def _apply(params: Params, batch: Batch, key: jax.Array | None, options: Options) -> Any:
    """`apply`, validated; jitted, so that calls at a prompt compile once."""
    config, implementation = options.config, options.implementation
    check_params(params, config, *cut_already(options.axes))
    for name in (*EXPERT_PARAMS, "shared_in", "shared_gate_in", "shared_out"):
        if name in params:
            as_weights(f"params[{name!r}]", params[name], ("x", batch.x))
    x = jnp.where(batch.valid[..., None], batch.x, 0)  # sequences travel whole; zeros give zeros
    task = None if batch.task is None else jnp.clip(batch.task, 0, config.tasks - 1)
    noise = draw_noise(config, key, *x.shape[:2])
    batch = batch._replace(x=x, task=task, noise=noise)
    if batch.gate_input is not None:  # or what padding holds reaches the gate's gradient
        seen = jnp.where(batch.valid[..., None], batch.gate_input, 0)
        batch = batch._replace(gate_input=seen)
    layout = find_layout(options.mesh, options.axes, config, params, x)
    if layout is not None:
        found = apply_on_mesh(params, config, batch, implementation, options.strategy, layout)
    elif task is not None and task.ndim == 0:
        found = apply_one_task(params, config, batch, implementation)
    else:
        found = apply_here(params, config, batch, implementation)
    y, report, chosen = found
    if config.biases or callable(config.activation):  # then zeros need not give zeros
        y = jnp.where(batch.valid[..., None], y, 0)
    return (y, report, chosen) if options.return_chosen else (y, report)


def _check(
    config: MoEConfig,
    x: jax.Array,
    valid: jax.Array,
    task: jax.Array | None,
    sentence: jax.Array | None,
) -> None:
    if x.ndim != 3 or x.shape[2] != config.d_model:
        raise ValueError(f"x must be [B, S, D] with D={config.d_model}, got {list(x.shape)}")
    if x.size == 0:
        raise ValueError(f"x must not be empty, got {list(x.shape)}")
    if valid.shape != x.shape[:2] or valid.dtype != jnp.bool_:
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
        check_shape("sentence", sentence, (x.shape[0], x.shape[2]))


def _check_gate_input(config: MoEConfig, x: jax.Array, gate_input: jax.Array) -> None:
    if config.routing != "token":
        raise ValueError(
            f"gate_input must be given with routing='token' only, got {config.routing!r}"
        )
    check_shape("gate_input", gate_input, x.shape)


def _check_chosen(
    config: MoEConfig, x: jax.Array, experts: jax.Array | None, weights: jax.Array | None
) -> None:
    given = experts is not None, weights is not None
    allowed = {"given": [(True, True)], "token": [(False, False), (True, False)]}
    if given not in allowed.get(config.routing, [(False, False)]):
        raise ValueError(
            "experts and weights must be given with routing='given' and only then, or experts "
            f"alone with 'token'; routing is {config.routing!r}, experts are "
            f"{'' if given[0] else 'not '}given and weights are {'' if given[1] else 'not '}given"
        )
    function = config.router_function is not None
    if given == (True, False) and (function or config.second_policy == "sampling"):
        raise ValueError(
            "experts must not be given alone with a router that is a function or with "
            "second_policy='sampling', which have no weights for them"
        )
    for name, value, kind in (
        ("experts", experts, jnp.integer),
        ("weights", weights, jnp.floating),
    ):
        if value is None:
            continue
        if value.shape != (*x.shape[:2], config.top_k):
            raise ValueError(
                f"{name} must be [B, S, k] = {[*x.shape[:2], config.top_k]}, got "
                f"{list(value.shape)}"
            )
        if not jnp.issubdtype(value.dtype, kind):
            raise TypeError(f"{name} must be of a dtype {kind.__name__}, got {value.dtype}")
