"""What the layer's tests share: a plain float64 transcription of it, and drawn cases."""

import functools
import math
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from taskmoe import moe

ACTIVATIONS: dict[str, Any] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def make(**fields: Any) -> moe.MoEConfig:
    """A small layer: width 6, 5 hidden units, 4 experts; 3 tasks where it routes by task."""
    fields = {"d_model": 6, "d_ff": 5, "num_experts": 4} | fields
    if fields.get("routing") == "task":
        fields = {"num_tasks": 3} | fields
    return moe.MoEConfig(**fields)


@functools.partial(jax.jit, static_argnums=1)
def extract(weights: Any, config: moe.MoEConfig, task: Any) -> moe.FFNParams:
    return moe.extract(weights, config, task)


run_ffn = jax.jit(moe.ffn)


def params(config: moe.MoEConfig, seed: int = 0) -> Any:
    return jax.tree.map(jnp.asarray, _numbers(config, seed))


@functools.cache
def _numbers(config: moe.MoEConfig, seed: int) -> Any:
    """On the host: arrays that were made under a mesh would stay on its devices."""
    made = jax.jit(moe.init, static_argnums=1)(jax.random.key(seed), config)
    return jax.tree.map(np.asarray, made)


@functools.cache
def compiled(config: moe.MoEConfig, mesh: Any = None) -> Any:
    """`moe.apply` of one configuration, compiled once for each shape."""

    def run(params: Any, x: Any, valid: Any, task: Any, sentence: Any) -> Any:
        return moe.apply(params, config, x, valid=valid, task=task, sentence=sentence, mesh=mesh)

    return jax.jit(run)


def apply(
    config: moe.MoEConfig,
    x: Any,
    valid: Any = None,
    task: Any = None,
    sentence: Any = None,
    *,
    mesh: Any = None,
    weights: Any = None,
) -> tuple[np.ndarray, moe.Metrics]:
    """The layer's output and metrics as NumPy arrays.

    Jitted, and the first time of each configuration and mesh at the prompt as well.
    """
    weights = params(config) if weights is None else weights
    found = jax.tree.map(np.asarray, compiled(config, mesh)(weights, x, valid, task, sentence))
    if (config, mesh) not in called_at_the_prompt:
        called_at_the_prompt.add((config, mesh))
        more: Any = {"valid": valid, "task": task, "sentence": sentence, "mesh": mesh}
        check(moe.apply(weights, config, x, **more), found, 1e-6)
    return found


called_at_the_prompt: set[Any] = set()


def transcription(
    config: moe.MoEConfig, weights: Any, x: Any, valid: Any, task: Any = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """GShard's Algorithm 1 and equations 1 and 2 in float64 and plain loops."""
    p = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    x = np.asarray(x, np.float64)
    batch, length, _ = x.shape
    units: list[tuple[np.ndarray, list[tuple[int, int]]]] = []  # what gates, and its tokens
    for b in range(batch):
        tokens = [(b, s) for s in range(length) if valid[b, s]]
        if config.routing == "token":
            units += [(x[token], [token]) for token in tokens]
        elif tokens and config.routing == "sentence":
            units.append((np.mean([x[token] for token in tokens], axis=0), tokens))
        elif tokens:
            units.append((p["task_embedding"][task[b]], tokens))
    slots = batch * (length if config.routing == "token" else 1)
    room = math.inf
    if config.capacity_factor is not None:
        room = math.ceil(config.capacity_factor * config.top_k * slots / config.num_experts)

    logits = np.array([gate @ p["gate"] for gate, _ in units]).reshape(-1, config.num_experts)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    total = probs.sum(1, keepdims=True)
    lse = np.log(total[:, 0]) + logits.max(1)
    probs /= total
    order = np.argsort(-logits, axis=1, kind="stable")[:, : config.top_k]
    y = np.zeros_like(x)
    queue = np.zeros(config.num_experts, int)
    dropped = 0
    for j in range(config.top_k):  # all first choices before any second
        for u, (_, tokens) in enumerate(units):
            e = order[u, j]
            queue[e] += 1
            if queue[e] > room:
                dropped += 1
                continue
            weight = probs[u, e]
            if config.top_k > 1:
                weight /= probs[u, order[u]].sum()
            for token in tokens:
                y[token] += weight * expert(config, p, e, x[token])
    n = max(len(units), 1)
    first = np.bincount(order[:, 0], minlength=config.num_experts) / n
    mean = probs.sum(0) / n
    return y, {
        "load_balance_loss": config.num_experts * float(first @ mean),
        "z_loss": float((lse**2).sum()) / n,
        "dropped": dropped / (n * config.top_k),
        "load": queue / (n * config.top_k),
        "entropy": -float(sum(m * math.log(m) for m in mean if m > 0)),
    }


def expert(config: moe.MoEConfig, p: Any, e: int, x: np.ndarray) -> np.ndarray:
    act = ACTIVATIONS[config.activation]
    hidden = x @ p["w_in"][e]
    hidden = act(x @ p["w_gate"][e]) * hidden if config.gated else act(hidden)
    return hidden @ p["w_out"][e]


def check(have: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Largest error is at most `tolerance` of the largest wanted value, leaf by leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = dict(jax.tree_util.tree_leaves_with_path(have))[path]
        leaf, got = np.asarray(leaf, np.float64), np.asarray(got, np.float64)
        assert got.shape == leaf.shape
        error = np.max(np.abs(got - leaf), initial=0) / max(np.max(np.abs(leaf), initial=0), 1e-3)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.3g}"


def normal(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@st.composite
def batches(draw: Any, shapes: tuple[tuple[int, int], ...], num_tasks: int = 3) -> Any:
    """(x [B, S, 6], valid [B, S], task [B]): values, holes and tasks of every kind."""
    batch, length = draw(st.sampled_from(shapes))
    x = normal(draw(st.integers(0, 10**6)), batch, length, 6)
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    valid = np.array(draw(st.lists(row, min_size=batch, max_size=batch)), bool)
    ids = st.integers(0, num_tasks - 1)
    task = np.array(draw(st.lists(ids, min_size=batch, max_size=batch)), np.int32)
    return x, valid, task
