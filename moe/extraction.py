"""Cut one task's sub-network out of a task-routed layer: a plain dense FFN, exact by algebra.

Given the task, its k experts and their gate weights g are constants, and an expert FFN is linear
after its activation, so

    sum_j g_j * act(x W_in[e_j]) W_out[e_j]
      = act(x [W_in[e_1] | ... | W_in[e_k]]) [g_1 W_out[e_1]; ...; g_k W_out[e_k]]

is one dense FFN of width k * d_ff, for every activation and for gated ones (Kudugunta et al. 2021,
section 3.2; the folding is ours). A shared expert lies beside them. The layer itself runs a batch
of one task through the same fold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from taskmoe.kernels import Router
from taskmoe.kernels.checks import as_floats, as_size, everywhere
from taskmoe.kernels.options import Activation, check_activation, hidden_units
from taskmoe.kernels.platforms import with_plain_settings
from taskmoe.kernels.quantized import Quantized, dense, product, quantises_rows
from taskmoe.moe.config import MoEConfig
from taskmoe.moe.gates import gate, task_logits, unscaled_gate
from taskmoe.moe.parameters import EXPERT_PARAMS, SHARED_PARAMS, Params, check_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FFNParams:
    """A dense feed-forward layer that carries its activation.

    w_in: [D, F] bf16|f32, or `taskmoe.kernels.Quantized`
    w_out: [F, D], same dtype, or Quantized
    w_gate: [D, F] or None; with it the layer is `(act(x w_gate) * (x w_in)) w_out`
    b_in, b_out, b_gate: [F], [D], [F] or None, added to the products
    shared_gate: [D, 1] or None; sigmoid(x shared_gate) multiplies the last `shared` hidden units
    shared: how many (static)
    activation: as of the layer (static)
    """

    w_in: jax.Array | Quantized
    w_out: jax.Array | Quantized
    w_gate: jax.Array | Quantized | None = None
    b_in: jax.Array | None = None
    b_out: jax.Array | None = None
    b_gate: jax.Array | None = None
    shared_gate: jax.Array | None = None
    shared: int = dataclasses.field(default=0, metadata={"static": True})
    activation: Activation = dataclasses.field(default="relu", metadata={"static": True})


@jax.jit
def ffn(params: FFNParams, x: jax.Array) -> jax.Array:
    """Apply a dense feed-forward layer: `act(x W_in) W_out`, or gated.

    x: [..., D] bf16|f32. Returns [..., D] in x's dtype. Products accumulate in float32.
    Raises ValueError or TypeError that names the argument where one does not fit.
    """
    if not isinstance(params, FFNParams):
        raise TypeError(f"params must be FFNParams, got {type(params).__name__}")
    check_activation(params.activation, params.w_gate is not None)
    x = as_floats("x", x)
    if x.shape[-1:] != params.w_in.shape[:1]:
        raise ValueError(f"x must be [..., D] with D={params.w_in.shape[0]}, got {list(x.shape)}")
    for name in ("w_in", "w_out", "w_gate"):
        if (w := getattr(params, name)) is not None and not isinstance(w, Quantized):
            as_floats(f"params.{name}", w, ("x", x))
    return dense_ffn(params, x, x.dtype)


@with_plain_settings
def dense_ffn(params: FFNParams, x: jax.Array, out_dtype: Any) -> jax.Array:
    """`ffn` with a result of this dtype."""

    def times(rows: jax.Array, w: Any, bias: jax.Array | None) -> jax.Array:
        found = product(rows, w) if isinstance(w, Quantized) else _matmul(rows, w)
        return found if bias is None else found + bias.astype(jnp.float32)

    gate = None if params.w_gate is None else times(x, params.w_gate, params.b_gate)
    hidden = hidden_units(params.activation, times(x, params.w_in, params.b_in), gate)
    if params.shared_gate is not None:
        ones = jnp.ones((hidden.shape[-1] - params.shared,), bool)
        its = jnp.concatenate([~ones, jnp.ones((params.shared,), bool)])
        hidden = hidden * jnp.where(its, jax.nn.sigmoid(_matmul(x, params.shared_gate)), 1)
    return times(hidden.astype(x.dtype), params.w_out, params.b_out).astype(out_dtype)


def extract(params: Params, config: MoEConfig, task: ArrayLike) -> FFNParams:
    """The dense FFN of width `top_k * d_ff` that equals the layer for one task.

    params: what `init` made for routing "task" or "static".
    task: id of a task, an integer. A traced id out of range clamps.
    Returns FFNParams with w_in [D, k*F] and w_out [k*F, D], gates folded into w_out.
    Raises ValueError or TypeError if the layer does not route by task, a concrete id is out of
    range, or an argument does not fit.
    """
    check_params(params, config)
    return _extract(params, jnp.asarray(_task_id(config, task)), config)


@functools.partial(jax.jit, static_argnames="config")
@with_plain_settings
def _extract(params: Params, task: jax.Array, config: MoEConfig) -> FFNParams:
    params = _gathered(params)
    logits = task_logits(params, config)[jnp.clip(task, 0, config.tasks - 1)]
    gating = gate(config, params, logits[None], jnp.ones(1, bool))
    return fold(params, config, gating.experts[0], gating.weights[0])


@with_plain_settings
def extract_tasks(
    params: Params, config: MoEConfig, tasks: Sequence[int]
) -> tuple[Params, MoEConfig]:
    """A smaller layer for several tasks: the union of their experts, and a table task -> experts.

    params: concrete arrays (not traced: how many experts remain depends on their values).
    tasks: ids, each once, concrete; task i of the result is tasks[i].
    Returns parameters and a configuration with routing "static", for `apply`, `extract` and
    `extract_tasks` again. Outputs equal the whole layer's; there is nothing left to learn in its
    gates. Raises ValueError or TypeError as `extract` does, and where an id is there twice.
    """
    check_params(params, config)
    params = _gathered(params)
    tasks = [int(_task_id(config, task)) for task in tasks]
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must be one or more different ids, got {tuple(tasks)}")
    logits = task_logits(params, config)[jnp.asarray(tasks)]
    gating = unscaled_gate(config, params, logits, jnp.ones(len(tasks), bool))
    kept, table = np.unique(np.asarray(gating.experts), return_inverse=True)
    table = table.reshape(len(tasks), config.top_k)
    weights = np.asarray(gating.weights)
    smaller = dataclasses.replace(
        config,
        routing="static",
        router=Router(weighs="input") if config.chosen_by.weighs == "input" else None,
        gate_bias=False,
        gate_norm=None,
        choice_bias=False,
        num_experts=len(kept),
        num_tasks=0,
        table=tuple(tuple(int(e) for e in row) for row in table),
        table_weights=tuple(tuple(float(w) for w in row) for row in weights),
    )
    return _keep_experts(params, kept), smaller


def prune(
    params: Params, config: MoEConfig, usage: ArrayLike, keep: int
) -> tuple[Params, MoEConfig]:
    """The highest experts of a token-routed layer: the training-free rival of extraction.

    usage: [E] f32, what the experts are ranked by (concrete): the load of each on the text to be
      served, as `Metrics.load` reports it, or another score that is higher for what must stay.
    keep: experts to keep, from top_k to E; ties go to the lower index.
    Returns parameters and a configuration with `keep` experts in their old order, between which
    the gate now chooses. Raises ValueError where an argument does not fit.

    Koishekenov et al. 2022, Memory-efficient NLLB-200 (arXiv 2212.09811).
    """
    check_params(params, config)
    if config.chosen_by.groups > 1:
        raise ValueError("router must have one group to prune: its groups must stay equal")
    if config.by_task or config.routing == "given":
        raise ValueError(
            f"routing must be 'token' or 'sentence' to prune, got {config.routing!r}: extract "
            "cuts out a task's experts exactly"
        )
    load = np.asarray(usage, np.float64)
    if load.shape != (config.num_experts,):
        raise ValueError(f"usage must be [{config.num_experts}], got {list(load.shape)}")
    if not config.top_k <= as_size("keep", keep) <= config.num_experts:
        raise ValueError(f"keep must be in [{config.top_k}, {config.num_experts}], got {keep}")
    kept = np.sort(np.argsort(-load, kind="stable")[:keep])
    return _keep_experts(params, kept), dataclasses.replace(config, num_experts=keep)


def _gathered(params: Params) -> Params:
    """Parameters of which all but the experts' own are on all devices."""
    return {n: w if n in EXPERT_PARAMS else everywhere(w) for n, w in params.items()}


def _keep_experts(params: Params, kept: np.ndarray) -> Params:
    """Parameters with these experts only; a gate keeps their columns, task embeddings go."""
    own = (*EXPERT_PARAMS, "expert_scale")
    held = {name: params[name] for name in own if name in params}
    small: Params = jax.tree.map(lambda w: everywhere(w, kept), held)  # and both parts of Quantized
    small |= {name: params[name] for name in SHARED_PARAMS if name in params}
    if "task_embedding" not in params and "gate" in params:
        small["gate"] = params["gate"][:, kept]
        biases = [name for name in ("gate_bias", "choice_bias") if name in params]
        small |= {name: params[name][kept] for name in biases}
        small |= {name: params[name] for name in ("gate_scale",) if name in params}
    return small


def _task_id(config: MoEConfig, task: Any) -> Any:
    """The id as an array []; raises as `extract` says."""
    if not config.by_task:
        raise ValueError(
            f"routing must be 'task' or 'static' to extract a task, got {config.routing!r}: "
            "the experts of other routings are not constant"
        )
    task = task if isinstance(task, jax.Array) else np.asarray(task)
    if task.shape != () or not jnp.issubdtype(task.dtype, jnp.integer):
        raise TypeError(f"task must be one integer, got {task.dtype} {list(task.shape)}")
    if not isinstance(task, jax.core.Tracer) and not 0 <= int(task) < config.tasks:
        raise ValueError(f"task must be in [0, {config.tasks}), got {int(task)}")
    return task


def fold(params: Params, config: MoEConfig, experts: jax.Array, weights: jax.Array) -> FFNParams:
    """Join the experts [k] i32 with gate weights [k] f32 into one dense FFN of width k*F.

    A shared expert's hidden units come last. Quantised experts stay so where there is none.
    """
    of_input, params = None, {name: _frozen(w) for name, w in params.items()}
    if config.chosen_by.weighs == "input":  # of one expert, which is linear before its activation
        of_input, weights = weights[0], jnp.ones_like(weights)

    def side_by_side(name: str) -> Any:  # [E, D, F] -> [D, k*F]
        def join(w: jax.Array) -> jax.Array:  # so with scales, [E, D/block, 1, F]
            return jnp.moveaxis(everywhere(w, experts), 0, -2).reshape(*w.shape[1:-1], -1)

        joined = jax.tree.map(join, params[name])
        return joined if of_input is None else _times(joined, of_input)

    def flat(name: str) -> jax.Array | None:  # [E, F] -> [k*F]
        return everywhere(params[name], experts).reshape(-1) if name in params else None

    def weighted(w: jax.Array) -> jax.Array:  # [E, D]
        each = weights.reshape(-1, *[1] * (w.ndim - 1))
        return everywhere(w, experts).astype(jnp.float32) * each

    b_out = params.get("b_out")
    chosen = jax.tree.map(lambda w: everywhere(w, experts), params["w_out"])
    w_out = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), _times(chosen, weights))
    routed = FFNParams(
        w_in=side_by_side("w_in"),
        w_out=w_out,
        w_gate=side_by_side("w_gate") if config.gated else None,
        b_in=flat("b_in"),
        b_out=None if b_out is None else weighted(b_out).sum(0).astype(b_out.dtype),
        b_gate=flat("b_gate"),
        activation=config.activation,
    )
    return _joined(routed, shared_ffn(params, config)) if config.shared else routed


def shared_ffn(params: Params, config: MoEConfig) -> FFNParams:
    """The shared expert alone."""
    return FFNParams(
        w_in=params["shared_in"],
        w_out=params["shared_out"],
        w_gate=params.get("shared_gate_in"),
        shared_gate=params.get("shared_gate"),
        shared=params["shared_in"].shape[1],  # on a mesh this device's share
        activation=config.activation,
    )


def _joined(routed: FFNParams, shared: FFNParams) -> FFNParams:
    """Both as one FFN, the shared expert's hidden units last.

    Routed experts that are quantised become arrays of the shared one's dtype.
    """
    if quantises_rows(routed.w_in):
        raise ValueError(
            "params must be quantised without activations to join their experts with a shared one, "
            "whose rows are not quantised"
        )
    its_in: Any = shared.w_in
    none = jnp.zeros(its_in.shape[1:], its_in.dtype)  # its biases

    def beside(a: Any, b: Any, axis: int) -> Any:
        return None if a is None else jnp.concatenate([dense(a, its_in.dtype), b], axis=axis)

    return dataclasses.replace(
        routed,
        w_in=beside(routed.w_in, its_in, 1),
        w_out=beside(routed.w_out, shared.w_out, 0),
        w_gate=beside(routed.w_gate, shared.w_gate, 1),
        b_in=beside(routed.b_in, none, 0),
        b_gate=beside(routed.b_gate, none, 0),
        shared_gate=shared.shared_gate,
        shared=its_in.shape[1],
    )


def _frozen(w: Any) -> Any:
    return jax.tree.map(jax.lax.stop_gradient, w) if isinstance(w, Quantized) else w


def _times(w: Any, weights: jax.Array) -> Any:
    """Matrices [k, ...] times their weights [k], or a matrix times one; in f32, then as they were.

    Weights go into the scales of what is quantised, whose values stay.
    """
    if isinstance(w, Quantized):
        return dataclasses.replace(w, scales=_times(w.scales, weights))
    each = weights.reshape(-1, *[1] * (w.ndim - 1)) if weights.ndim else weights
    return (w.astype(jnp.float32) * each).astype(w.dtype)


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    dims: Any = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
