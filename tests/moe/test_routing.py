"""Each level of routing against a plain float64 transcription; padding counts nowhere."""

import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.moe import gates
from taskmoe.tests.moe import support

SHAPES = ((1, 1), (3, 4))
LEVELS: dict[str, Any] = {
    "token": {"routing": "token"},
    "one expert": {"routing": "token", "top_k": 1},
    "three experts": {"routing": "token", "top_k": 3},
    "token, room for few": {"routing": "token", "capacity_factor": 0.6},
    "token, room for all": {"routing": "token", "capacity_factor": 4.0},
    "sentence": {"routing": "sentence", "activation": "gelu"},
    "sentence, room for few": {"routing": "sentence", "capacity_factor": 0.7},
    "task": {"routing": "task", "activation": "silu", "gated": True},
}


def as_transcribed(config: moe.MoEConfig, x: Any, valid: Any, task: Any, weights: Any) -> None:
    """Fails where output or metrics differ from the transcription with `weights`."""
    task = task if config.routing == "task" else None
    y, report = support.apply(config, x, valid, task)
    want, facts = support.transcription(config, weights, x, valid, task)
    support.check(y, want)
    for name, value in facts.items():
        support.check(getattr(report, name), value)
    aux = config.load_balance_weight * facts["load_balance_loss"]
    support.check(report.aux_loss, aux + config.z_loss_weight * facts["z_loss"])
    assert not y[~valid].any()


@pytest.mark.parametrize("level", LEVELS)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(batch=support.batches(SHAPES))
def test_the_layer_is_as_transcribed(level: str, batch: Any) -> None:
    config = support.make(**LEVELS[level])
    as_transcribed(config, *batch, support.params(config))


def choose_as_logits_say(dtype: Any, implementation: str | None, turned: int = 0) -> None:
    """Fails where a token whose best logits lie apart goes elsewhere."""
    config = moe.MoEConfig(d_model=512, d_ff=8, num_experts=32, top_k=2)
    weights = moe.init(jax.random.key(1), config, dtype)
    x = jax.random.normal(jax.random.key(0), (1, 1024, 512)).astype(dtype)
    logits = np.asarray(x[0], np.float64) @ np.asarray(weights["gate"], np.float64)
    falling = -np.sort(-logits, axis=1)
    clear = (falling[:, :2] - falling[:, 1:3]).min(axis=1) > 0.02
    assert clear.mean() > 0.5
    weights = weights | {"gate": jnp.roll(weights["gate"], turned, axis=1)}
    options: Any = {"implementation": implementation, "return_chosen": True}
    chosen = jax.jit(lambda w, x: moe.apply(w, config, x, **options)[2].experts[0])(weights, x)
    np.testing.assert_array_equal(chosen[clear], np.argsort(-logits, axis=1)[clear, :2])


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_many_tokens_go_where_their_logits_say(dtype: Any, implementation: str | None) -> None:
    """An expert is found by comparing logits, which XLA may compute twice and round otherwise."""
    choose_as_logits_say(dtype, implementation)


def test_other_logits_are_noticed() -> None:
    with pytest.raises(AssertionError):
        choose_as_logits_say(jnp.float32, None, turned=1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["gate", "w_in", "w_out"])
def test_another_weight_is_noticed(level: str, name: str) -> None:
    config = support.make(**LEVELS[level])
    weights = dict(support.params(config))
    weights[name] = weights[name] * 1.001
    x, task = support.normal(0, 3, 4, 6), np.array([0, 2, 1], np.int32)
    with pytest.raises(AssertionError, match="relative error"):
        as_transcribed(config, x, np.ones((3, 4), bool), task, weights)


@pytest.mark.parametrize("level", LEVELS)
def test_what_padding_holds_reaches_nothing(level: str) -> None:
    config = support.make(**LEVELS[level])
    valid = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    task = np.array([0, 1, 2], np.int32) if config.routing == "task" else None
    x = support.normal(1, 3, 4, 6)
    poisoned = jnp.where(valid[..., None], x, jnp.nan)

    def loss(weights: Any, x: Any) -> Any:
        y, report = moe.apply(weights, config, x, valid=valid, task=task)
        return jnp.sum(y**2) + report.aux_loss, (y, report)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    clean = gradient(support.params(config), x)
    poisoned_result = gradient(support.params(config), poisoned)
    jax.tree.map(np.testing.assert_array_equal, poisoned_result, clean)
    assert not np.asarray(clean[0][1])[~valid].any()


@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_of_only_padding_gives_zeros(level: str) -> None:
    config = support.make(**LEVELS[level])
    valid, task = np.zeros((3, 4), bool), np.zeros(3, np.int32)
    ids: list[Any] = [task, np.int32(1)] if config.routing == "task" else [None]
    for task in ids:
        y, report = support.apply(config, support.normal(0, 3, 4, 6), valid, task)
        assert not y.any()
        assert not any(np.asarray(leaf).any() for leaf in report)


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(batch=support.batches(SHAPES), task=st.integers(0, 2))
def test_a_scalar_task_is_a_batch_of_that_task(batch: Any, task: int) -> None:
    config = support.make(routing="task", gated=True)
    x, valid, _ = batch
    each = support.apply(config, x, valid, np.full(len(x), task, np.int32))
    support.check(support.apply(config, x, valid, np.int32(task)), each)


def test_another_scalar_task_is_noticed() -> None:
    config = support.make(routing="task", gated=True)
    x, valid = support.normal(0, 3, 4, 6), np.ones((3, 4), bool)
    each = support.apply(config, x, valid, np.full(3, 1, np.int32))
    with pytest.raises(AssertionError, match="relative error"):
        support.check(support.apply(config, x, valid, np.int32(2)), each)


def test_task_ids_out_of_range_clamp() -> None:
    config = support.make(routing="task")
    x = support.normal(0, 2, 3, 6)
    want = support.apply(config, x, None, np.array([0, 2], np.int32))[0]
    for low, high in ((-7, 3), (0, 99)):
        got = support.apply(config, x, None, np.array([low, high], np.int32))[0]
        np.testing.assert_array_equal(got[1], want[1])
    with_scalar = support.apply(config, x, None, np.int32(99))[0]
    support.check(with_scalar[1], want[1])


def test_a_given_sentence_gates_instead_of_the_mean() -> None:
    config = support.make(routing="sentence")
    x, valid = support.normal(0, 3, 4, 6), np.ones((3, 4), bool)
    mean = jnp.mean(x, axis=1)
    support.check(
        support.apply(config, x, valid, sentence=mean)[0], support.apply(config, x, valid)[0]
    )
    # The gate sees nothing of x: each token goes the same way whatever stands beside it.
    other = support.normal(5, 3, 6)
    whole = support.apply(config, x, valid, sentence=other)[0]
    alone = support.apply(config, x[:, 2:3], valid[:, 2:3], sentence=other)[0]
    support.check(whole[:, 2:3], alone)
    assert np.abs(whole - support.apply(config, x, valid)[0]).max() > 1e-3


@pytest.mark.parametrize("routing", ["token", "sentence", "task"])
def test_gradients_are_those_of_every_expert_weighted_by_its_gate(routing: Any) -> None:
    config = support.make(routing=routing, activation="gelu", gated=True)
    weights, x = support.params(config), support.normal(0, 3, 4, 6)
    valid = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]], bool)
    task = np.array([2, 0, 1], np.int32) if routing == "task" else None

    def ours(weights: Any, x: Any) -> Any:
        y, report = moe.apply(weights, config, x, valid=valid, task=task)
        return jnp.sum(jnp.sin(y)) + report.aux_loss

    def plain(weights: Any, x: Any) -> Any:
        gate_input = x
        if routing == "sentence":
            total = jnp.where(valid[..., None], x, 0).sum(1, keepdims=True)
            gate_input = jnp.broadcast_to(total / valid.sum(1)[:, None, None], x.shape)
        elif routing == "task":
            gate_input = jnp.broadcast_to(weights["task_embedding"][task][:, None], x.shape)
        logits = gate_input @ weights["gate"]
        probs = jax.nn.softmax(logits)
        top = probs >= jnp.sort(probs)[..., -2:-1]
        gates = jnp.where(top, probs, 0)
        gates = gates / gates.sum(-1, keepdims=True)
        up = jnp.einsum("bsd,edf->bsef", x, weights["w_in"])
        gate = jax.nn.gelu(jnp.einsum("bsd,edf->bsef", x, weights["w_gate"]))
        y = jnp.einsum("bsef,efd,bse->bsd", gate * up, weights["w_out"], gates)
        y = jnp.where(valid[..., None], y, 0)
        # One unit a token, sentence by sentence weighted by its tokens where units are sentences.
        share = valid / (valid.sum() if routing == "token" else 3 * valid.sum(1, keepdims=True))
        first = jax.nn.one_hot(jnp.argmax(logits, -1), 4)
        balance = 4 * jnp.sum(
            jnp.einsum("bse,bs->e", first, share) * jnp.einsum("bse,bs->e", probs, share)
        )
        z = jnp.sum(share * jax.nn.logsumexp(logits, axis=-1) ** 2)
        return jnp.sum(jnp.sin(y)) + 0.01 * balance + 1e-3 * z

    have = jax.jit(jax.grad(ours, argnums=(0, 1)))(weights, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (weights, x))
        want = jax.tree.map(np.asarray, jax.jit(jax.grad(plain, argnums=(0, 1)))(*wide))
    support.check(have, want)
    want[0]["gate"] = want[0]["gate"] * 1.001
    with pytest.raises(AssertionError, match="gate"):
        support.check(have, want)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    ("dtypes", "asked", "precision"),
    [
        (("float32", "float32"), None, "HIGHEST"),
        (("float32", "bfloat16"), None, "HIGHEST"),
        (("bfloat16", "bfloat16"), None, "DEFAULT"),
        (("bfloat16", "float32"), None, "DEFAULT"),
        (("float32", "float32"), "bfloat16", "DEFAULT"),
    ],
)
def test_the_gates_product_is_not_rounded(
    platform: str, dtypes: tuple[str, str], asked: str | None, precision: str
) -> None:
    config = moe.MoEConfig(d_model=24, d_ff=8, num_experts=48)

    def loss(gate: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(gates.gate_logits({"gate": gate}, config, x)))

    x, gate = (
        jax.ShapeDtypeStruct(s, d) for s, d in zip(((40, 24), (24, 48)), dtypes, strict=True)
    )
    with jax.default_matmul_precision(asked):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(gate, x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"stablehlo.dot_general .*precision = \[(.*?)\]", text)
    assert found == 3 * [f"{precision}, {precision}"]  # logits, and the gradients of x and gate
