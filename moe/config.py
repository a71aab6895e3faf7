"""What a Mixture-of-Experts layer is: its sizes, how it routes, and what it reports."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax

from taskmoe.kernels import ROUTERS, Router
from taskmoe.kernels.checks import as_number, as_size
from taskmoe.kernels.options import Activation, check_activation
from taskmoe.moe.routers import ROUTER_FUNCTIONS, RouterFunction

Routing = Literal["token", "sentence", "task", "static", "given"]
SecondPolicy = Literal["all", "random", "sampling"]
Balance = Literal["first", "all", "sequence"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Sizes and routing of one Mixture-of-Experts layer.

    d_model: width D of the tokens.
    d_ff: hidden width F of each expert.
    num_experts: E.
    top_k: experts that each token, sentence or task uses.
    routing: "token" (gate on each token), "sentence" (gate on the mean of a sequence's valid
      tokens), "task" (gate on a learned embedding of the task) or "static" (the experts of each
      task are given), Kudugunta et al. 2021, section 3; or "given" (`apply` is told the experts and
      weights of each token).
    router: how gate logits become experts and weights: a `taskmoe.kernels.Router`, or the name of a
      model in `taskmoe.kernels.ROUTERS`, or "phimoe". None is softmax over the chosen logits; with
      top_k=1, where that is always 1 and the gate would learn nothing from the task, it is the
      probability, as in Switch Transformer. Or a function of logits [U, E] f32 and top_k that
      returns experts [U, k] i32, different ones for a unit, and weights [U, k].
    gate_bias: whether the gate has a learned bias.
    gate_norm: None, or the epsilon of a root mean square norm of what the gate sees, which is then
      divided by sqrt(D) and multiplied by a learned scale [D], as in Gemma 4.
    choice_bias: whether experts have a bias where they are chosen, which has no gradient:
      `balance_bias` moves it.
    expert_scale: whether an expert's weights are multiplied by a learned scale of its own, as in
      Gemma 4.
    num_tasks: number of tasks, for routing "task" only.
    table: the top_k different experts of each task, for routing "static" only.
    table_weights: their gate weights, positive; None is 1/top_k each.
    capacity_factor: None is dropless; a number c gives each expert room for
      `ceil(c * top_k * S / E)` of the S tokens (or sentences) of a group, as in GShard, Algorithm
      1, and what does not fit passes by the residual only. Routing by task is dropless.
    group_size: S, units (tokens, or sentences) that share one capacity, in order; None is all that
      are routed together (on a mesh: on one device). Only with a capacity factor.
    second_policy: what happens to choices after the first while training (when `apply` is given a
      key): "all" are used; "random" uses one with probability min(1, 2 g), g its gate weight
      (GShard); "sampling" draws them from the gate's probabilities without replacement (Lingvo).
    renormalise: with a capacity factor, whether the weights of a unit's choices that found room are
      brought to the sum that all had: NLLB's normalisation after dropping.
    jitter: while training, what the gate sees is multiplied by uniform noise from
      [1 - jitter, 1 + jitter] (Switch Transformer, section 2.4).
    buffer_factor: None gives each device of a mesh room for all rows that can come to it, which is
      `min(devices, E / top_k)` times what comes when the experts are equally busy; a number f gives
      it room for f times that, and what comes beyond it is dropped and counted as with a capacity.
      Only without a capacity factor; the strategies "ragged", "all_gather" and "mosaic" heed it.
    activation: "relu", "gelu" or "silu"; with `gated`, `act(x w_gate) * (x w_in)`, or "gpt_oss" or
      "deepseek_v4"; or a function, as in `taskmoe.kernels.expert_ffn`.
    biases: whether experts add biases to each of their products.
    shared: hidden width of an expert that every token passes beside those it is routed to, without
      biases, of the same activation; 0 is none. DeepSeekMoE's several shared experts are one of
      their joint width.
    shared_gate: whether the shared expert's output is multiplied by sigmoid(x w), w [D, 1] learned.
    balance: what the load-balance loss counts: "first" choices (GShard); "all" choices, which is
      top_k where balanced (Mixtral and its kin); or "sequence", all choices and probabilities in
      each sequence alone, which is 1 where balanced (DeepSeek-V3, equations 17 to 20).
    load_balance_weight, z_loss_weight: coefficients of the two auxiliary losses (Lingvo's and
      ST-MoE's by default).

    Raises ValueError that names the field where a value does not fit.
    """

    d_model: int
    d_ff: int
    num_experts: int
    top_k: int = 2
    routing: Routing = "token"
    router: Router | str | RouterFunction | None = None
    gate_bias: bool = False
    gate_norm: float | None = None
    choice_bias: bool = False
    expert_scale: bool = False
    num_tasks: int = 0
    table: tuple[tuple[int, ...], ...] | None = None
    table_weights: tuple[tuple[float, ...], ...] | None = None
    capacity_factor: float | None = None
    group_size: int | None = None
    buffer_factor: float | None = None
    second_policy: SecondPolicy = "all"
    renormalise: bool = False
    jitter: float = 0.0
    activation: Activation = "relu"
    gated: bool = False
    biases: bool = False
    shared: int = 0
    shared_gate: bool = False
    balance: Balance = "first"
    load_balance_weight: float = 0.01
    z_loss_weight: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "num_experts", "top_k"):
            as_size(name, getattr(self, name))
        for name in ("num_tasks", "shared"):
            as_size(name, getattr(self, name), least=0)
        if self.group_size is not None:
            as_size("group_size", self.group_size)
        for name in ("capacity_factor", "buffer_factor", "gate_norm"):
            if getattr(self, name) is not None:
                as_number(name, getattr(self, name))
        for name in ("jitter", "load_balance_weight", "z_loss_weight"):
            as_number(name, getattr(self, name))
        for name, kind in (("table", operator.index), ("table_weights", float)):
            object.__setattr__(self, name, _rows(name, getattr(self, name), kind))
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}"
            )
        if self.routing not in get_args(Routing):
            raise ValueError(f"routing must be one of {get_args(Routing)}, got {self.routing!r}")
        known = (*ROUTERS, *ROUTER_FUNCTIONS)
        named = self.router in known if isinstance(self.router, str) else callable(self.router)
        if not (named or self.router is None or isinstance(self.router, Router)):
            raise ValueError(
                f"router must be a Router, None or one of {', '.join(known)}, or a function, "
                f"got {self.router!r}"
            )
        if self.chosen_by.weighs == "input" and self.top_k > 1:
            raise ValueError(f"router weighs inputs, which wants top_k=1, got {self.top_k}")
        if self.routing in ("static", "given"):
            for name in ("router", "gate_bias", "gate_norm", "choice_bias"):
                if getattr(self, name) and getattr(self, name) != Router(weighs="input"):
                    raise ValueError(
                        f"{name} must not be given with routing={self.routing!r}, which has no gate"
                    )
        self.chosen_by.check(self.num_experts, self.top_k)
        self._check_extras()
        check_activation(self.activation, self.gated)
        if (self.routing == "task") != (self.num_tasks > 0):
            raise ValueError(
                "num_tasks must be at least 1 with routing='task' and 0 otherwise, "
                f"got num_tasks={self.num_tasks} with routing={self.routing!r}"
            )
        self._check_table()
        if self.capacity_factor is not None:
            if self.by_task:
                raise ValueError(
                    f"capacity_factor must be None with routing={self.routing!r}: a group that "
                    "holds one task would send every token to the same experts and drop nearly all"
                )
            if self.capacity_factor <= 0:
                raise ValueError(f"capacity_factor must be above 0, got {self.capacity_factor}")
        if self.buffer_factor is not None and (
            self.buffer_factor <= 0 or self.capacity_factor is not None
        ):
            raise ValueError(
                "buffer_factor must be above 0 without a capacity_factor and None with one, got "
                f"{self.buffer_factor} with capacity_factor={self.capacity_factor}"
            )
        if self.group_size is not None and self.capacity_factor is None:
            raise ValueError(
                f"group_size must be None without a capacity_factor, got {self.group_size}"
            )
        if self.second_policy not in get_args(SecondPolicy):
            raise ValueError(
                f"second_policy must be one of {get_args(SecondPolicy)}, got {self.second_policy!r}"
            )
        if self.second_policy != "all" and self.by_task:
            raise ValueError(f"second_policy must be 'all' with routing={self.routing!r}")
        if self.second_policy == "sampling" and (self.router or self.choice_bias):
            raise ValueError("second_policy 'sampling' draws by softmax: give no router or bias")
        if self.second_policy == "random" and self.capacity_factor is None:
            raise ValueError("second_policy 'random' drops choices: give a capacity_factor")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}")
        if self.jitter and (self.by_task or self.routing == "given"):
            raise ValueError(f"jitter must be 0 with routing={self.routing!r}, got {self.jitter}")

    @property
    def router_function(self) -> RouterFunction | None:
        """The router, where it is a function."""
        if isinstance(self.router, str):
            return ROUTER_FUNCTIONS.get(self.router)
        return self.router if callable(self.router) else None

    @property
    def chosen_by(self) -> Router:
        """The router itself; where it is a function, one that weighs outputs as it does."""
        if callable(self.router) or self.router in ROUTER_FUNCTIONS:
            return Router()
        if self.routing == "static":  # any positive weights are scores of some logits
            weighs = self.router.weighs if isinstance(self.router, Router) else "output"
            return Router("sqrt_softplus", normalise=False, weighs=weighs)
        if self.router is None:
            return Router(normalise=self.top_k > 1)
        return ROUTERS[self.router] if isinstance(self.router, str) else self.router

    @property
    def by_task(self) -> bool:
        """Whether sequences go to experts by their task, learned or given."""
        return self.routing in ("task", "static")

    @property
    def tasks(self) -> int:
        """Number of tasks that `apply` and `extract` know; 0 where routing is not by task."""
        return self.num_tasks if self.table is None else len(self.table)

    def _check_extras(self) -> None:
        if self.router_function is not None and self.choice_bias:
            raise ValueError("choice_bias must be False with a router that is a function")
        if self.gate_norm is not None and not self.gate_norm > 0:
            raise ValueError(f"gate_norm must be None or above 0, got {self.gate_norm}")
        if self.expert_scale and self.routing == "given":
            raise ValueError("expert_scale must be False with routing='given': scale the weights")
        if self.renormalise and self.capacity_factor is None:
            raise ValueError("renormalise must be False without a capacity_factor")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate must be False without a shared expert (shared=0)")
        if self.balance not in get_args(Balance):
            raise ValueError(f"balance must be one of {get_args(Balance)}, got {self.balance!r}")
        if self.balance == "sequence" and self.routing != "token":
            raise ValueError(f"balance 'sequence' wants routing='token', got {self.routing!r}")

    def _check_table(self) -> None:
        if (self.routing == "static") != (self.table is not None):
            raise ValueError(
                f"table must be given with routing='static' and only then, got {self.table} with "
                f"routing={self.routing!r}"
            )
        if self.table is None:
            if self.table_weights is not None:
                raise ValueError("table_weights must be None without a table")
            return
        if not self.table:
            raise ValueError("table must have a row for each task, got none")
        for row in self.table:
            if len(row) != self.top_k or len(set(row)) != self.top_k:
                raise ValueError(f"table must name top_k={self.top_k} different experts, got {row}")
            if not all(0 <= e < self.num_experts for e in row):
                raise ValueError(f"table must name experts in [0, {self.num_experts}), got {row}")
        weights = self.table_weights
        if weights is None:
            return
        if len(weights) != len(self.table) or any(len(row) != self.top_k for row in weights):
            raise ValueError("table_weights must have the table's shape")
        if not all(0 < weight < math.inf for row in weights for weight in row):
            raise ValueError(f"table_weights must be positive, got {weights}")


def _rows(name: str, rows: Any, kind: Callable[[Any], Any]) -> Any:
    """Rows as tuples of tuples, for lists have no hash; None stays None."""
    if rows is None:
        return None
    try:
        return tuple(tuple(kind(value) for value in row) for row in rows)
    except (TypeError, ValueError):
        what = "integers" if name == "table" else "numbers"
        raise ValueError(f"{name} must be rows of {what}, a row a task, got {rows!r}") from None


class Metrics(NamedTuple):
    """What one layer reports about one batch; padding counts nowhere.

    aux_loss: [] f32, the weighted sum of both losses: add it to the training loss.
    load_balance_loss: [] f32, `E * sum_e f_e * m_e` with f the share of first choices and m the
      mean gate probability: 1 when balanced (GShard's l_aux with Lingvo's scale E^2); with a
      group_size the mean over groups; or as `MoEConfig.balance` says. 0 with routing "static",
      where nothing is to be learned, and so is the z-loss.
    z_loss: [] f32, mean of `logsumexp(logits)^2` (ST-MoE).
    dropped: [] f32, share of the valid assignments that found no room, with their expert or (with a
      buffer_factor) on its device.
    load: [E] f32, share of the valid assignments that went to each expert.
    entropy: [] f32, nats, entropy of the mean gate probabilities (log E when balanced).
    """

    aux_loss: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array
    dropped: jax.Array
    load: jax.Array
    entropy: jax.Array
