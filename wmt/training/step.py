"""One step of training: the loss, its gradients, and what the optimiser does with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from taskmoe import moe
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.model.transformer import Params, decode, encode, init
from taskmoe.wmt.text.data import Batch
from taskmoe.wmt.text.tokenizer import PAD
from taskmoe.wmt.training import parallel

Sums = dict[str, jax.Array]


class State(NamedTuple):
    """What a checkpoint holds. step: [] i32, steps taken, those left out included.

    optimizer: counts of steps left out, and in inner_state[1] what `make_optimizer` keeps; the
      place before it is empty and stays, because a checkpoint's names count places.
    """

    params: Params
    optimizer: optax.ApplyIfFiniteState
    step: jax.Array


@functools.cache
def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adafactor or AdamW with linear warm-up and the configured decay, for clipped gradients."""
    peak, warmup = config.learning_rate, config.warmup_steps

    def inverse_sqrt(step: Any) -> Any:
        step = jnp.maximum(step + 1, 1)
        return peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / step))

    rate = (
        inverse_sqrt
        if config.schedule == "inverse_sqrt"
        else optax.warmup_cosine_decay_schedule(
            0.0, peak, min(warmup, config.steps), max(config.steps, warmup + 1)
        )
    )
    if config.optimizer == "adafactor":
        rule = optax.adafactor(rate, momentum=0.9, multiply_by_parameter_scale=True)
        if config.weight_decay:
            # optax's own decay would not be multiplied by the rate, as AdamW's is.
            decay = optax.chain(
                optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(rate)
            )
            rule = _sum_of(rule, decay)
    else:
        rule = optax.adamw(
            rate, b1=0.9, b2=config.beta2, eps=config.epsilon, weight_decay=config.weight_decay
        )
    return rule


def _sum_of(
    first: optax.GradientTransformation, second: optax.GradientTransformation
) -> optax.GradientTransformation:
    """What `first` makes of the gradients plus what `second` makes of none."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        mine, one = first.update(grads, state[0], params)
        more, two = second.update(optax.tree.zeros_like(grads), state[1], params)
        return jax.tree.map(jnp.add, mine, more), (one, two)

    return optax.GradientTransformation(
        lambda params: (first.init(params), second.init(params)), update
    )


def init_state(
    config: ModelConfig, train_config: TrainConfig, mesh: Mesh | None, params: Params | None = None
) -> State:
    """The state before the first step; params: to begin with, else fresh ones from the seed."""
    optimizer = make_optimizer(train_config)

    def make(key: jax.Array, params: Params | None) -> State:
        params = init(key, config) if params is None else params
        kept = optax.EmptyState(), optimizer.init(params)
        counts = optax.ApplyIfFiniteState(jnp.int32(0), jnp.bool_(True), jnp.int32(0), kept)
        return State(params, counts, jnp.int32(0))

    key = jax.random.key(train_config.seed)
    places = parallel.shardings(jax.eval_shape(make, key, params), config.num_experts, mesh)
    state: State = jax.jit(make, out_shardings=places)(key, params)
    return state


def make_objective(
    model_config: ModelConfig,
    config: TrainConfig,
    mesh: Mesh | None = None,
    strategy: str = "auto",
) -> Callable[[Params, Any, jax.Array, jax.Array], tuple[jax.Array, Sums]]:
    """What a step takes the gradient of: (params, batch, target tokens, key) -> (loss, sums).

    mesh, strategy: as in `moe.apply`. sums: as of `make_train_step`, but for the steps left out.
    """
    tables = [model_config.task_table(side) for side in ("encoder", "decoder")]

    def objective(
        params: Params, batch: Any, total: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """A part's share of the batch's loss; total: the batch's target tokens."""
        encoder, decoder = (None if t is None else jnp.asarray(t)[batch.pair] for t in tables)
        valid, wanted = batch.source != PAD, batch.target_out != PAD
        keys = jax.random.split(key)
        options: Any = {"mesh": mesh, "strategy": strategy, "remat": config.remat}
        if config.compute_dtype == "bfloat16":
            params = _in_bfloat16(params)
        memory, first = encode(
            params, model_config, batch.source, valid, encoder, key=keys[0], **options
        )
        logits, second = decode(
            params, model_config, memory, valid, batch.target_in, wanted, decoder, key=keys[1],
            **options,
        )  # fmt: skip
        smoothed, plain = cross_entropy(logits, batch.target_out, config.label_smoothing)
        count = wanted.sum()
        auxiliary = sum((r.aux_loss for r in first + second), start=jnp.float32(0))
        loss = smoothed * (count / total) + auxiliary / config.accumulate
        return loss, {
            "loss": plain * count,
            "tokens": count,
            "positions": valid.sum() + count,
            **_router(first + second),
        }

    return objective


@functools.cache  # runs of one configuration in one process compile once
def make_train_step(
    model_config: ModelConfig,
    config: TrainConfig,
    mesh: Mesh | None = None,
    strategy: str = "auto",
) -> Callable[[State, Batch], tuple[State, Sums]]:
    """A compiled step: (state, batch) -> (new state, sums); the old state is given up.

    mesh, strategy: as in `moe.apply`.

    sums: loss, in nats, over so many target tokens, both 0 where the step was left out; positions,
      source and target tokens; dropped, busiest and entropy [] f32, see `Progress`; load
      [layers, E] f32; skipped and skipped_in_row [] i32, steps left out so far.
    """
    objective = make_objective(model_config, config, mesh, strategy)
    gradients = jax.value_and_grad(objective, has_aux=True)

    def step(state: State, batch: Any) -> tuple[State, Sums]:
        total = jnp.maximum((batch.target_out != PAD).sum(), 1).astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        if config.accumulate == 1:
            (loss, sums), grads = gradients(state.params, batch, total, key)
        else:
            (loss, sums), grads = _accumulated(
                lambda part, i: gradients(state.params, part, total, jax.random.fold_in(key, i)),
                batch,
                config.accumulate,
            )
        state = apply_gradients(config, state, grads, loss)
        counts = state.optimizer
        sums |= {name: jnp.where(counts.last_finite, sums[name], 0) for name in ("loss", "tokens")}
        sums["skipped"] = counts.total_notfinite
        sums["skipped_in_row"] = counts.notfinite_count
        return state, sums

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shapes = jax.eval_shape(lambda: init_state(model_config, config, None))
    places = parallel.shardings(shapes, model_config.num_experts, mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere))


def apply_gradients(config: TrainConfig, state: State, grads: Params, loss: jax.Array) -> State:
    """The state after a step; nothing but counts changes where loss or gradients are not finite.

    grads: as params; clipped to `config.clip_norm` here. Those whose squares' sum is not finite in
    float32 count as not finite.

    One branch clips, moves and adds, so that XLA updates all arrays in place. `apply_if_finite` and
    `clip_by_global_norm` in front of the same rule take three times as long on CPU.
    """
    optimizer, counts = make_optimizer(config), state.optimizer
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    norm = jnp.sqrt(jnp.sum(jnp.stack(squares)))  # not finite where any gradient is not
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    scale = jnp.minimum(1.0, config.clip_norm / norm)

    def take(params: Params, kept: Any, grads: Params) -> tuple[Params, Any]:
        clipped = jax.tree.map(lambda g: g * scale, grads)
        updates, kept = optimizer.update(clipped, kept, params)
        return optax.apply_updates(params, updates), kept

    empty, kept = counts.inner_state
    params, kept = jax.lax.cond(finite, take, lambda p, k, _: (p, k), state.params, kept, grads)
    left_out = jnp.where(finite, 0, 1)
    counts = optax.ApplyIfFiniteState(
        notfinite_count=(counts.notfinite_count + 1) * left_out,
        last_finite=finite,
        total_notfinite=counts.total_notfinite + left_out,
        inner_state=(empty, kept),
    )
    return State(params, counts, state.step + 1)


def cross_entropy(
    logits: jax.Array, target: jax.Array, smoothing: float
) -> tuple[jax.Array, jax.Array]:
    """Mean loss over positions that are not padding: (label-smoothed, plain), nats, f32.

    logits: [B, L, V] f32; target: [B, L] i32. With smoothing e the wanted distribution is
    `(1 - e)` on the target and `e / V` everywhere (Szegedy et al. 2016, section 7).
    """
    valid = target != PAD
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    count = jnp.maximum(valid.sum(), 1)
    plain = jnp.sum(jnp.where(valid, log_total - chosen, 0)) / count
    uniform = jnp.sum(jnp.where(valid, log_total - logits.mean(axis=-1), 0)) / count
    return (1 - smoothing) * plain + smoothing * uniform, plain


def _in_bfloat16(params: Params) -> Params:
    """Matrices as bf16; what gates and norms are made of stays f32 (ST-MoE, section 3)."""

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        routes = getattr(path[-1], "key", None) in ("gate", "task_embedding")
        return leaf if routes or leaf.ndim < 2 else leaf.astype(jnp.bfloat16)

    cast_tree: Params = jax.tree_util.tree_map_with_path(cast, params)
    return cast_tree


def _accumulated(
    run: Callable[[Any, jax.Array], Any], batch: Any, parts: int
) -> tuple[tuple[jax.Array, Sums], Params]:
    """Losses, sums and gradients of all parts, added up; sums of the routers are means."""
    # Part i takes rows i, i + parts, ...: each device's rows stay on it.
    cut = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    first = run(jax.tree.map(lambda x: x[0], cut), jnp.int32(0))

    def add(total: Any, item: tuple[Any, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, run(*item)), None

    rest = jax.tree.map(lambda x: x[1:], cut)
    ((loss, sums), grads), _ = jax.lax.scan(add, first, (rest, jnp.arange(1, parts)))
    added = ("loss", "tokens", "positions")
    means = {name: value / parts for name, value in sums.items() if name not in added}
    return (loss, sums | means), grads


def _router(reports: list[moe.Metrics]) -> Sums:
    """What the mixtures report: means over layers, the busiest expert of all, and every load."""
    if not reports:
        zero = jnp.float32(0)
        return {"dropped": zero, "busiest": zero, "entropy": zero, "load": jnp.zeros((0, 0))}
    load = jnp.stack([r.load for r in reports])
    return {
        "dropped": jnp.stack([r.dropped for r in reports]).mean(),
        "busiest": load.max() * load.shape[1],
        "entropy": jnp.stack([r.entropy for r in reports]).mean(),
        "load": load,
    }
