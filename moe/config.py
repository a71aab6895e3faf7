"""What a Mixture-of-Experts layer is: its sizes, how it routes, and what it reports."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax

Routing = Literal["token", "sentence", "task"]
Activation = Literal["relu", "gelu", "silu"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Sizes and routing of one Mixture-of-Experts layer.

    d_model: width D of the tokens.
    d_ff: hidden width F of each expert.
    num_experts: E.
    top_k: experts that each token, sentence or task uses.
    routing: "token" (gate on each token), "sentence" (gate on the mean of a sequence's valid
      tokens) or "task" (gate on a learned embedding of the task), Kudugunta et al. 2021, section 3.
    num_tasks: number of tasks, for routing "task" only.
    capacity_factor: None is dropless; a number c gives each expert room for
      `ceil(c * top_k * S / E)` of the S tokens (or sentences) routed together, as in GShard,
      Algorithm 1, and what does not fit passes by the residual only. Task routing is dropless.
    activation: "relu", "gelu" or "silu"; with `gated`, `act(x w_gate) * (x w_in)`.
    load_balance_weight, z_loss_weight: coefficients of the two auxiliary losses (Lingvo's and
      ST-MoE's by default).

    Raises ValueError that names the field where a value does not fit.
    """

    d_model: int
    d_ff: int
    num_experts: int
    top_k: int = 2
    routing: Routing = "token"
    num_tasks: int = 0
    capacity_factor: float | None = None
    activation: Activation = "relu"
    gated: bool = False
    load_balance_weight: float = 0.01
    z_loss_weight: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}"
            )
        if self.routing not in get_args(Routing):
            raise ValueError(f"routing must be one of {get_args(Routing)}, got {self.routing!r}")
        if self.activation not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {get_args(Activation)}, got {self.activation!r}"
            )
        if (self.routing == "task") != (self.num_tasks > 0):
            raise ValueError(
                "num_tasks must be at least 1 with routing='task' and 0 otherwise, "
                f"got num_tasks={self.num_tasks} with routing={self.routing!r}"
            )
        if self.capacity_factor is not None:
            if self.routing == "task":
                raise ValueError(
                    "capacity_factor must be None with routing='task': a group that holds one task "
                    "would send every token to the same experts and drop nearly all of them"
                )
            if self.capacity_factor <= 0:
                raise ValueError(f"capacity_factor must be above 0, got {self.capacity_factor}")


class Metrics(NamedTuple):
    """What one layer reports about one batch; padding counts nowhere.

    aux_loss: [] f32, the weighted sum of both losses: add it to the training loss.
    load_balance_loss: [] f32, `E * sum_e f_e * m_e` with f the share of first choices and m the
      mean gate probability: 1 when balanced (GShard's l_aux with Lingvo's scale E^2).
    z_loss: [] f32, mean of `logsumexp(logits)^2` (ST-MoE).
    dropped: [] f32, share of the valid assignments that found no room.
    load: [E] f32, share of the valid assignments that went to each expert.
    entropy: [] f32, nats, entropy of the mean gate probabilities (log E when balanced).
    """

    aux_loss: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array
    dropped: jax.Array
    load: jax.Array
    entropy: jax.Array
