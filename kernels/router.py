"""How gate logits become a choice of experts and their weights: the routers of known models.

With z the logits of a token and b a bias of each expert that may be given:

    s = softmax(z), sigmoid(z) or sqrt(softplus(z))
    choice: the k largest of s + b, of all experts or of the best groups of them
    w = s[chosen];  w / sum(w) if normalised;  times a scale

The bias takes part in the choice alone and gets no gradient. Softmax scores, normalised, are the
softmax over the chosen logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from taskmoe.kernels.checks import as_number, as_size

Scores = Literal["softmax", "sigmoid", "sqrt_softplus"]
GroupScore = Literal["max", "top2"]
#: Added to the sum that weights are divided by, as DeepSeek does.
TINY = 1e-20


@dataclasses.dataclass(frozen=True)
class Router:
    """From gate logits to experts and weights; see the module for the equations.

    scores: of each expert.
    normalise: whether the weights of a token's experts sum to `scale`.
    scale: what weights are multiplied by.
    groups: of experts that lie behind one another, of the same size. A token chooses among the
      experts of its best `kept_groups`.
    group_score: what a group is judged by: its largest score, or the sum of its two largest with
      the bias.
    weighs: what a layer multiplies by the weight: an expert's "output", or its "input".

    Raises ValueError that names the field where a value does not fit.
    """

    scores: Scores = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_score: GroupScore = "max"
    weighs: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        for name, kind in (("scores", Scores), ("group_score", GroupScore)):
            if getattr(self, name) not in get_args(kind):
                found = getattr(self, name)
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {found!r}")
        if self.weighs not in ("output", "input"):
            raise ValueError(f"weighs must be 'output' or 'input', got {self.weighs!r}")
        as_size("groups", self.groups)
        as_size("kept_groups", self.kept_groups)
        if not as_number("scale", self.scale) > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")
        if not 1 <= self.kept_groups <= self.groups:
            raise ValueError(
                f"kept_groups must be in [1, groups={self.groups}], got {self.kept_groups}"
            )

    def check(self, num_experts: int, top_k: int) -> None:
        """ValueError unless it can choose top_k of so many experts."""
        if num_experts % self.groups:
            raise ValueError(
                f"groups must divide the {num_experts} experts, got groups={self.groups}"
            )
        size = num_experts // self.groups
        if self.kept_groups * size < top_k:
            raise ValueError(
                f"kept_groups must hold top_k={top_k} experts, got {self.kept_groups} groups of "
                f"{size}"
            )
        if self.group_score == "top2" and size < 2:
            raise ValueError(f"group_score='top2' needs groups of two experts or more, got {size}")


#: Routers of models, by the names that transformers gives to their architectures.
ROUTERS = {
    "mixtral": Router(),
    "granite": Router(),
    "gpt_oss": Router(),
    "qwen2_moe": Router(normalise=False),
    "qwen3_moe": Router(),
    "olmoe": Router(normalise=False),
    "jamba": Router(normalise=False),
    "switch": Router(normalise=False),
    "nllb_moe": Router(),
    "gemma4": Router(),
    "llama4": Router("sigmoid", normalise=False, weighs="input"),
    "deepseek_v2": Router(normalise=False, scale=16.0, groups=8, kept_groups=3),
    "deepseek_v3": Router(
        "sigmoid", scale=2.5, groups=8, kept_groups=4, group_score="top2"
    ),
    "kimi_k2": Router("sigmoid", scale=2.827),
    "deepseek_v4": Router("sqrt_softplus", scale=1.5),
}  # fmt: skip


def softplus(z: jax.Array) -> jax.Array:
    """log(1 + exp(z)), in operations that Mosaic has."""
    return jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))


class Denominator(NamedTuple):
    """Of a token's softmax: exp(z - largest) / total."""

    largest: Any
    total: Any


def denominator(z: jax.Array, axis: int) -> Denominator:
    """Of the softmax of logits along the experts' axis, which is kept."""
    largest = jnp.max(z, axis=axis, keepdims=True)
    return Denominator(largest, jnp.sum(jnp.exp(z - largest), axis=axis, keepdims=True))


def score(router: Router, z: jax.Array, softmax: Denominator) -> jax.Array:
    """Scores of logits, of some or all experts."""
    if router.scores == "softmax":
        return jnp.exp(z - softmax.largest) / softmax.total
    return jax.nn.sigmoid(z) if router.scores == "sigmoid" else jnp.sqrt(softplus(z))


def slope(router: Router, z: jax.Array) -> Any:
    """d log(score) / dz of each expert's own logit, without softmax's denominator."""
    if router.scores == "softmax":
        return jnp.ones_like(z)
    if router.scores == "sigmoid":
        return 1 - jax.nn.sigmoid(z)
    small = z < -30  # where both vanish alike
    return jnp.where(small, 0.5, jax.nn.sigmoid(z) / (2 * softplus(jnp.where(small, 0.0, z))))


def limit_to_groups(router: Router, choice: jax.Array, axis: int) -> jax.Array:
    """Choice scores [.., E, ..] with -inf outside of a token's best groups.

    Ties go to the lower group. No score is NaN or -inf.
    """
    if router.kept_groups == router.groups:
        return choice
    index = jax.lax.broadcasted_iota(jnp.int32, choice.shape, axis)
    group = index // (choice.shape[axis] // router.groups)
    judged = []
    for g in range(router.groups):
        inside = jnp.where(group == g, choice, -jnp.inf)
        best = jnp.max(inside, axis=axis, keepdims=True)
        if router.group_score == "top2":
            first = jnp.where(inside == best, index, choice.shape[axis])
            first = jnp.min(first, axis=axis, keepdims=True)
            second = jnp.max(jnp.where(index == first, -jnp.inf, inside), axis, keepdims=True)
            best = jnp.maximum(best + second, jnp.finfo(choice.dtype).min)
        judged.append(best)
    kept = jnp.zeros(choice.shape, jnp.bool_)
    for _ in range(router.kept_groups):
        best, chosen = judged[0], jnp.zeros(judged[0].shape, jnp.int32)
        for g, value in enumerate(judged[1:], 1):
            chosen = jnp.where(value > best, g, chosen)
            best = jnp.maximum(best, value)
        kept |= group == chosen
        judged = [jnp.where(chosen == g, -jnp.inf, value) for g, value in enumerate(judged)]
    return jnp.where(kept, choice, -jnp.inf)


def by_logit(router: Router, bias: Any) -> bool:
    """Whether experts can be chosen by their logits, which are ordered as the scores are."""
    return bias is None and (router.group_score == "max" or router.kept_groups == router.groups)


def choice_scores(router: Router, z: jax.Array, softmax: Denominator, bias: Any) -> jax.Array:
    """What experts are chosen by, groups apart; logits have NaN replaced by the lowest number.

    A bias of -inf counts as the lowest number, which lies above the mark of those already chosen.
    """
    choice = z if by_logit(router, bias) else score(router, z, softmax)
    return choice if bias is None else jnp.maximum(choice + bias, jnp.finfo(choice.dtype).min)


def weigh(router: Router, chosen: list[jax.Array], softmax: Denominator) -> list[jax.Array]:
    """Weights of a token's chosen logits, best first."""
    if router.scores == "softmax" and router.normalise:  # no small score is divided by another
        largest = chosen[0]
        for z in chosen[1:]:
            largest = jnp.maximum(largest, z)
        odds = [jnp.exp(z - largest) for z in chosen]
        total: Any = sum(odds)
    else:
        odds = [score(router, z, softmax) for z in chosen]
        total = sum(odds) + TINY if router.normalise else 1.0
    return [router.scale * odd / total for odd in odds]


def weight_gradient(
    router: Router, weights: jax.Array, d_weights: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """What weights' gradients come to at the chosen experts' logits, but for their slope.

    axis: that the k choices lie along. Also <w, dw>, which softmax that is not normalised takes
    from every expert's logit in the share of its score.
    """
    dot = jnp.sum(weights * d_weights, axis=axis, keepdims=True)
    if router.normalise:
        return weights * (d_weights - dot / router.scale), jnp.zeros_like(dot)
    return weights * d_weights, dot if router.scores == "softmax" else jnp.zeros_like(dot)
