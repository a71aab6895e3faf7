"""Top-k gating: who goes to which expert, with what weight, and which place in its queue.

    experts, weights: by a `Router`; ties to the lower index
    slots: number of earlier assignments to the same expert, all first choices before any second

GShard, Algorithm 1 (Lepikhin et al. 2020, arXiv 2006.16668); z-loss of ST-MoE (arXiv 2202.08906).
The statistics that the auxiliary losses need come from the same pass.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from taskmoe.kernels.checks import (
    accumulator,
    as_floats,
    as_integers,
    as_size,
    check_shape,
    everywhere,
    match_varying,
    zeros_like_all,
)
from taskmoe.kernels.gating_kernel import gating_backward_mosaic, gating_mosaic
from taskmoe.kernels.platforms import (
    Op,
    check_implementation,
    chip,
    plain_settings,
    with_plain_settings,
)
from taskmoe.kernels.queue_kernel import LOOKS_UP, MOST_TOKENS
from taskmoe.kernels.queues import queue_places
from taskmoe.kernels.router import (
    TINY,
    Denominator,
    Router,
    by_logit,
    choice_scores,
    denominator,
    limit_to_groups,
    score,
    slope,
    softplus,
    weigh,
    weight_gradient,
)

#: What a policy of `jax.checkpoint` calls all that gating found.
GATED = "taskmoe_gated"


class Gating(NamedTuple):
    """What `top_k_gating` found out about T tokens and E experts.

    experts: [T, k] i32, chosen experts, best first; 0..k-1 where a token is not valid
    weights: [T, k] f32, of the chosen, by the router; 0 where not valid
    slots: [T, k] i32, place in the expert's queue, first choices first; -1 where not valid
    counts: [k, E] i32, valid tokens whose j-th choice is e, before any capacity
    mean_probs: [E] f32, mean over valid tokens of the scores, which for other than softmax are
      divided by their sum; 0 when there are none
    z_loss: [] f32, mean of logsumexp(logits)**2 over valid tokens; 0 when there are none
    """

    experts: jax.Array
    weights: jax.Array
    slots: jax.Array
    counts: jax.Array
    mean_probs: jax.Array
    z_loss: jax.Array


def all_valid(logits: jax.Array) -> jax.Array:
    """What None stands for where valid tokens are told: [T] of True."""
    return jnp.ones(logits.shape[:1], jnp.bool_)


@with_plain_settings
def top_k_gating_reference(
    logits: jax.Array, top_k: int, valid: jax.Array | None, router: Router, bias: jax.Array | None
) -> Gating:
    """The definition of `top_k_gating`."""
    num_experts, valid = logits.shape[1], all_valid(logits) if valid is None else valid
    logits = jnp.where(valid[:, None], logits.astype(accumulator(logits.dtype)), 0)
    lowest = jnp.finfo(logits.dtype).min
    known = jnp.where(logits >= lowest, logits, lowest)  # NaN comes last
    scores = {
        "softmax": lambda z: jax.nn.softmax(z, axis=1),
        "sigmoid": jax.nn.sigmoid,
        "sqrt_softplus": lambda z: jnp.sqrt(softplus(z)),
    }[router.scores]
    choice = known if by_logit(router, bias) else scores(known)
    choice = choice if bias is None else jnp.maximum(choice + bias, lowest)
    grouped = choice.reshape(-1, router.groups, num_experts // router.groups)
    best = jnp.sort(grouped, axis=2)[:, :, ::-1]
    judged = best[:, :, 0] if router.group_score == "max" else best[:, :, :2].sum(2)
    place = jnp.argsort(jnp.argsort(-judged, axis=1, stable=True), axis=1)
    choice = jnp.where(place[..., None] < router.kept_groups, grouped, -jnp.inf)
    choice = choice.reshape(-1, num_experts)
    experts = jnp.argsort(-choice, axis=1, stable=True)[:, :top_k].astype(jnp.int32)
    probs = scores(logits)
    chosen = jnp.take_along_axis(scores(known), experts, axis=1)
    if router.normalise and router.scores == "softmax":
        chosen = jax.nn.softmax(jnp.take_along_axis(known, experts, axis=1), axis=1)
    elif router.normalise:
        chosen = chosen / (jnp.sum(chosen, axis=1, keepdims=True) + TINY)
    weights = jnp.where(valid[:, None], router.scale * chosen, 0)
    probs = probs / jnp.sum(probs, axis=1, keepdims=True)
    probs = jnp.where(valid[:, None], probs, 0)
    assigned = jax.nn.one_hot(experts.T, num_experts, dtype=jnp.int32) * valid[None, :, None]
    queue = assigned.reshape(-1, num_experts)  # all first choices, then all second choices
    before = (jnp.cumsum(queue, axis=0) - queue).reshape(assigned.shape)
    slots = jnp.where(valid[:, None], jnp.sum(before * assigned, axis=2).T, -1)
    lse = jnp.where(valid, jax.nn.logsumexp(logits, axis=1), 0)
    num_valid = jnp.maximum(jnp.sum(valid), 1)
    return Gating(
        experts=experts,
        weights=weights,
        slots=slots.astype(jnp.int32),
        counts=jnp.sum(assigned, axis=1, dtype=jnp.int32),
        mean_probs=jnp.sum(probs, axis=0) / num_valid,
        z_loss=jnp.sum(lse**2) / num_valid,
    )


@dataclasses.dataclass(frozen=True)
class GatingOptions:
    """What is fixed when gating is traced."""

    top_k: int
    router: Router
    implementation: str | None


def _gating_mosaic(
    options: GatingOptions, logits: jax.Array, valid: jax.Array | None, bias: jax.Array | None
) -> Gating:
    if chip().generation < LOOKS_UP or logits.shape[0] > MOST_TOKENS:
        return _gating_xla(options, logits, valid, bias)
    return Gating(*gating_mosaic(logits, options.top_k, valid, options.router, bias))


def _gating_xla(
    options: GatingOptions, logits: jax.Array, valid: jax.Array | None, bias: jax.Array | None
) -> Gating:
    router, valid = options.router, all_valid(logits) if valid is None else valid
    x = jnp.where(valid[:, None], logits.astype(accumulator(logits.dtype)), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    largest = jnp.max(x, axis=1, keepdims=True)
    shifted = jnp.exp(x - largest)
    total = jnp.sum(shifted, axis=1, keepdims=True)
    # NaN comes last, and all lie above the mark of those already chosen.
    known = jnp.where(x >= jnp.finfo(x.dtype).min, x, jnp.finfo(x.dtype).min)
    of_known = denominator(known, 1) if router.scores == "softmax" else Denominator(0, 1)
    # An expert is found by equality with a maximum, so both must see the same numbers. XLA may
    # compute them twice, rounded otherwise: on GPU it did so with the gate's product itself.
    choice = jax.lax.optimization_barrier(choice_scores(router, known, of_known, bias))
    open_ = limit_to_groups(router, choice, 1)
    experts, chosen = [], []
    for _ in range(options.top_k):
        best = jnp.max(open_, axis=1, keepdims=True)
        expert = jnp.min(jnp.where(open_ == best, lane, x.shape[1] - 1), axis=1, keepdims=True)
        experts.append(expert)
        if not by_logit(router, bias):
            best = jnp.sum(jnp.where(lane == expert, known, 0), axis=1, keepdims=True)
        chosen.append(best)
        open_ = jnp.where(lane == expert, -jnp.inf, open_)
    weights = jnp.concatenate(weigh(router, chosen, of_known), axis=1)
    if router.scores == "softmax":
        probs = shifted / total
    else:
        probs = score(router, x, Denominator(largest, total))
        probs = probs / jnp.sum(probs, axis=1, keepdims=True)
    slots, counts = queue_places(experts, valid, x.shape[1])
    lse = jnp.where(valid[:, None], jnp.log(total) + largest, 0)
    num_valid = jnp.maximum(jnp.sum(valid), 1)
    return Gating(
        experts=jnp.concatenate(experts, axis=1),
        weights=jnp.where(valid[:, None], weights, 0),
        slots=jnp.where(valid[:, None], slots, -1),
        counts=counts,
        mean_probs=jnp.sum(jnp.where(valid[:, None], probs, 0), axis=0) / num_valid,
        z_loss=jnp.sum(lse**2) / num_valid,
    )


def gating_gradient(
    router: Router,
    logits: jax.Array,
    valid: jax.Array | None,
    experts: jax.Array,
    weights: jax.Array,
    d_weights: jax.Array,
    d_probs: jax.Array,
    d_z: jax.Array,
) -> jax.Array:
    """Gradient of the logits [T, E] from those of weights, mean_probs and z_loss.

    With r = d log(s) / dz, which is 1 for softmax, and p the scores divided by their sum:

        d logits = scatter(r * w * (dw - <w, dw> / scale))          if normalised, else
                   scatter(r * w * dw) - softmax * <w, dw>          the latter for softmax alone
                 + (r * p * (dm - <p, dm>) + 2 * lse * softmax * dz) / valid tokens
    """
    valid = all_valid(logits) if valid is None else valid
    x = jnp.where(valid[:, None], logits.astype(weights.dtype), 0)
    softmax = jax.nn.softmax(x, axis=1)
    lse = jax.nn.logsumexp(x, axis=1, keepdims=True)
    probs, inner = softmax, slope(router, x)
    if router.scores != "softmax":
        probs = score(router, x, Denominator(0, 1))
        probs = probs / jnp.sum(probs, axis=1, keepdims=True)
    num_valid = jnp.maximum(jnp.sum(valid), 1)
    centred = d_probs - probs @ d_probs[:, None]
    dense = (probs * inner * centred + 2 * lse * softmax * d_z) / num_valid
    chosen, taken = weight_gradient(router, weights, d_weights, 1)
    dense = dense - softmax * taken
    for j in range(experts.shape[1]):
        hit = experts[:, j, None] == jnp.arange(logits.shape[1])
        dense = dense + jnp.where(hit, chosen[:, j, None] * inner, 0)
    return jnp.where(valid[:, None], dense, 0).astype(logits.dtype)


def _gradient_xla(options: GatingOptions, *operands: Any) -> jax.Array:
    logits, valid, experts, weights, *grads = operands
    return gating_gradient(options.router, logits, valid, experts, weights, *grads)


def _gradient_mosaic(options: GatingOptions, *operands: Any) -> jax.Array:
    return gating_backward_mosaic(options.router, *operands)


GATING = Op("top_k_gating", xla=_gating_xla, mosaic=_gating_mosaic)
GATING_BACKWARD = Op("top_k_gating_backward", xla=_gradient_xla, mosaic=_gradient_mosaic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gating(
    logits: jax.Array, valid: jax.Array | None, bias: jax.Array | None, options: GatingOptions
) -> Gating:
    (tokens, num_experts), k = logits.shape, options.top_k
    real, whole = accumulator(logits.dtype), jnp.int32
    result: Any = jax.ShapeDtypeStruct
    results = Gating(
        experts=result((tokens, k), whole),
        weights=result((tokens, k), real),
        slots=result((tokens, k), whole),
        counts=result((k, num_experts), whole),
        mean_probs=result((num_experts,), real),
        z_loss=result((), real),
    )
    return GATING(options, options.implementation, results, logits, valid, bias)


def _gating_forward(
    logits: jax.Array, valid: jax.Array | None, bias: jax.Array | None, options: GatingOptions
) -> tuple[Gating, tuple[Any, ...]]:
    gating = checkpoint_name(_gating(logits, valid, bias, options), GATED)
    return gating, (logits, valid, gating.experts, gating.weights, bias)


def _gating_backward(
    options: GatingOptions, residuals: tuple[Any, ...], grads: Gating
) -> tuple[Any, ...]:
    *saved, bias = residuals
    logits = saved[0]
    result = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    floats = grads.weights, grads.mean_probs, grads.z_loss
    d_logits = GATING_BACKWARD(options, options.implementation, result, *saved, *floats)
    return d_logits, None, None if bias is None else jnp.zeros_like(bias)


_gating.defvjp(_gating_forward, _gating_backward)


def given_gating(
    experts: jax.Array,
    weights: jax.Array,
    num_experts: int,
    *,
    valid: jax.Array | None = None,
) -> Gating:
    """What `top_k_gating` returns, for experts and weights that the caller has chosen.

    experts: [T, k] i32, different ones for a token; what is not in [0, num_experts) is no
      assignment: it has weight 0 and joins no queue.
    weights: [T, k] bf16|f32, of any size.
    num_experts: E.
    valid: [T] bool, False at padding. None means all valid.

    Returns `Gating`, whose mean_probs are the mean weights of each expert and whose z_loss is 0;
    weights and mean_probs carry gradients. Raises ValueError or TypeError that names the argument
    that does not fit.
    """
    experts = as_integers("experts", experts)
    check_shape("experts", experts, ("T", "k"))
    weights = as_floats("weights", weights)
    check_shape("weights", weights, experts.shape)
    num_experts = as_size("num_experts", num_experts)
    tokens, top_k = experts.shape
    if top_k == 0:
        raise ValueError(f"experts must be [T, k] with k of at least 1, got {list(experts.shape)}")
    valid = jnp.ones((tokens,), jnp.bool_) if valid is None else _as_valid(valid, tokens)
    experts, weights, valid = map(everywhere, match_varying(experts, weights, valid))
    with plain_settings():
        held = valid[:, None] & (experts >= 0) & (experts < num_experts)
        chosen = jnp.where(held, experts, 0)
        kept = jnp.where(held, weights, 0).astype(accumulator(weights.dtype))
        columns = [jnp.where(held, experts, -1)[:, j, None] for j in range(top_k)]
        slots, counts = queue_places(columns, valid, num_experts)
        sums = jnp.zeros((num_experts,), kept.dtype).at[chosen].add(kept)
        return Gating(
            experts=chosen,
            weights=kept,
            slots=jnp.where(held, slots, -1),
            counts=counts,
            mean_probs=sums / jnp.maximum(jnp.sum(valid), 1),
            z_loss=zeros_like_all((), kept.dtype, sums),
        )


def _as_valid(valid: Any, tokens: Any) -> jax.Array:
    valid = jnp.asarray(valid)
    check_shape("valid", valid, (tokens,))
    if valid.dtype != jnp.bool_:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    return valid


def top_k_gating(
    logits: jax.Array,
    top_k: int = 2,
    *,
    valid: jax.Array | None = None,
    router: Router | None = None,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> Gating:
    """Choose top_k experts a token and count each assignment into its expert's queue.

        p = softmax(logits);  weights_j = p[experts_j] / sum_i p[experts_i]

    or by another `Router`.

    logits: [T, E] bf16|f32, gate logits; scores are taken in f32. More than 2**24 tokens are gated
      by XLA, on TPU too.
    top_k: experts a token, 1 <= top_k <= E. Ties go to the lower expert index.
    valid: [T] bool, False at padding, which gets weight 0, joins no queue and counts nowhere;
      what its logits hold, NaN included, is never looked at. None means all valid.
      NaN at a valid token is chosen last; mean_probs and z_loss are then NaN.
    router: how logits become a choice and weights. None is `Router()`: softmax over the chosen
      logits. With top_k=1 its weight is always 1, and has no gradient: a `Router` that does not
      normalise, such as `ROUTERS["switch"]`, gives it one.
    bias: [E] f32, added to the scores where experts are chosen, and nowhere else: for balancing
      without a loss. It gets no gradient. -inf: chosen last, the lower index first.
    implementation: "mosaic" (Pallas TPU), "xla", "reference" or None (by the platform that is
      lowered for).

    Returns `Gating`; weights, mean_probs and z_loss carry gradients to the logits.
    Raises ValueError or TypeError that names the argument that does not fit.

    Lepikhin et al. 2020, GShard (arXiv 2006.16668), Algorithm 1, without its capacity: `row_plan`
    applies that. DeepSeek-AI 2024, DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    logits = as_floats("logits", logits)
    check_shape("logits", logits, ("T", "E"))
    num_tokens, num_experts = logits.shape
    top_k = as_size("top_k", top_k)
    if top_k > num_experts:
        raise ValueError(f"top_k must be an int in [1, E={num_experts}], got {top_k!r}")
    router = Router() if router is None else router
    if not isinstance(router, Router):
        raise TypeError(f"router must be a Router or None, got {type(router).__name__}")
    router.check(num_experts, top_k)
    if bias is not None:
        bias = as_floats("bias", bias).astype(accumulator(logits.dtype))
        check_shape("bias", bias, (num_experts,))
    if valid is not None:
        valid = _as_valid(valid, num_tokens)
    check_implementation(implementation)
    logits, valid, bias = match_varying(logits, valid, bias)
    if implementation == "reference" or num_tokens == 0:
        fixed = None if bias is None else jax.lax.stop_gradient(bias)
        return top_k_gating_reference(logits, top_k, valid, router, fixed)
    return _gating(logits, valid, bias, GatingOptions(top_k, router, implementation))
