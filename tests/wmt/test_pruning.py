"""Pruning keeps the experts that the text needs, and only a token-routed model can be pruned."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.cli.errors import InputError
from taskmoe.tests.kernels.support import planted
from taskmoe.tests.wmt import support
from taskmoe.wmt.model.pruning import expert_saliency, expert_usage, prune
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.transformer import decode, encode
from taskmoe.wmt.model.translation import translate
from taskmoe.wmt.text.tokenizer import BOS

TOKEN = support.model(encoder="token", decoder="token")
TEXT = support.text(10, ("en-de", "de-en"))


def test_usage_is_a_share_and_does_not_depend_on_batches() -> None:
    usage = expert_usage(TOKEN, TEXT)
    assert {side: len(loads) for side, loads in usage.items()} == {"encoder": 1, "decoder": 1}
    by_four = expert_usage(TOKEN, TEXT, batch=4)
    for side, loads in usage.items():
        np.testing.assert_allclose(loads[0].sum(), 1.0, rtol=1e-5)
        assert loads[0].std() > 0.01
        np.testing.assert_allclose(by_four[side][0], loads[0], rtol=1e-4)
    other = expert_usage(TOKEN, {"en-fr": TEXT["de-en"]})
    assert np.abs(other["encoder"][0] - usage["encoder"][0]).max() > 0.01


def test_what_is_kept_is_what_is_used() -> None:
    usage = expert_usage(TOKEN, TEXT)
    small = prune(TOKEN, usage, 2)
    assert small.config.num_experts == 2
    for side in ("encoder", "decoder"):
        kept = np.sort(np.argsort(-usage[side][0])[:2])
        whole = TOKEN.params[side][1]["feed_forward"]["moe"]
        np.testing.assert_array_equal(
            small.params[side][1]["feed_forward"]["moe"]["w_in"], whole["w_in"][kept]
        )
    requests = [("en-de", line) for line in TEXT["en-de"][0]]
    same = prune(TOKEN, usage, 4)
    assert translate(same, requests) == translate(TOKEN, requests)
    assert len(translate(small, requests)) == 10


def test_a_sentence_routed_side_is_pruned_by_sentences() -> None:
    model = support.model(encoder="sentence", decoder="dense")
    usage = expert_usage(model, TEXT)
    assert usage["decoder"] == []
    np.testing.assert_allclose(usage["encoder"][0].sum(), 1.0, rtol=1e-5)
    assert prune(model, usage, 3).config.num_experts == 3


def test_what_cannot_be_pruned_is_named() -> None:
    usage = expert_usage(TOKEN, TEXT)
    with pytest.raises(InputError, match=r"keep must be in \[2, 4\], got 5"):
        prune(TOKEN, usage, 5)
    for encoder, decoder, message in (
        ("token", "target", "extract a task first"),
        ("dense", "dense", "nothing to prune"),
    ):
        config = dataclasses.replace(TOKEN.config, encoder=encoder, decoder=decoder)
        with pytest.raises(InputError, match=message):
            prune(Model(TOKEN.params, config, TOKEN.tokenizer), usage, 2)


def by_hand(model: Model, text: Any) -> dict[str, np.ndarray]:
    """The score of each expert, sentence by sentence without padding and token by token, in f64."""
    sums = {side: np.zeros((2, model.config.num_experts)) for side in ("encoder", "decoder")}

    def watched(side: str) -> Any:
        def layer(params: Any, config: moe.MoEConfig, x: Any, **rest: Any) -> Any:
            by_sentence = config.routing == "sentence"
            w = {name: np.asarray(params[name], np.float64) for name in ("gate", "w_in", "w_out")}
            tokens = np.asarray(x[0], np.float64)
            whole = tokens.mean(axis=0) if rest.get("sentence") is None else rest["sentence"][0]
            for token in tokens:
                logits = np.asarray(whole if by_sentence else token, np.float64) @ w["gate"]
                best = np.argsort(-logits)[: config.top_k]
                weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
                for e, weight in zip(best, weights, strict=True):
                    output = np.maximum(token @ w["w_in"][e], 0) @ w["w_out"][e]
                    sums[side][:, e] += weight * np.sqrt((output**2).sum()), 1
            return moe.apply(params, config, x, **rest)

        return layer

    for pair, sides in text.items():
        for source, target in zip(*sides, strict=True):
            (ids,) = model.tokenizer.encode_source([source], pair[3:])
            (wanted,) = model.tokenizer.encode_target([target])
            ids, given = jnp.array([ids]), jnp.array([[BOS, *wanted[:-1]]])
            here, there = jnp.ones(ids.shape, bool), jnp.ones(given.shape, bool)
            parts = model.params, model.config
            memory, _ = encode(*parts, ids, here, None, layer_fn=watched("encoder"))
            decode(*parts, memory, here, given, there, None, layer_fn=watched("decoder"))
    return {side: found[0] / np.maximum(found[1], 1) for side, found in sums.items()}


@pytest.mark.parametrize(
    ("encoder", "decoder"), [("token", "token"), ("dense", "token"), ("sentence", "sentence")]
)
def test_saliency_is_the_mean_of_weight_times_norm(encoder: str, decoder: str) -> None:
    model = support.model(encoder=encoder, decoder=decoder)
    text = support.text(4, ("en-de", "de-en"))
    want = by_hand(model, text)

    def check(batch: int) -> None:
        found = expert_saliency(model, text, batch=batch)
        for side, routing in (("encoder", encoder), ("decoder", decoder)):
            assert len(found[side]) == (routing != "dense")
            for scores in found[side]:
                assert scores.std() > 0.01
                np.testing.assert_allclose(scores, want[side], rtol=1e-5)

    check(64)
    check(3)  # what fills up the last batch counts nowhere

    def unweighed(*a: Any, **rest: Any) -> Any:
        y, report, *chosen = apply(*a, **rest)
        return (y, report, *(c._replace(weights=jnp.ones_like(c.weights)) for c in chosen))

    def doubled(*a: Any, **rest: Any) -> Any:
        y, report, *chosen = apply(*a, **rest)
        return (y if chosen else 2 * y, report, *chosen)  # of one choice alone, whose norm counts

    apply = moe.apply
    for fault in (unweighed, doubled):
        with planted(moe, "apply", fault), pytest.raises(AssertionError, match="Not equal"):
            check(64)


def test_load_and_saliency_choose_differently() -> None:
    """A busy expert that says nothing has all of the load and none of the saliency."""
    usage = expert_usage(TOKEN, TEXT)
    busiest = int(np.argmax(usage["decoder"][0]))
    layers = [dict(layer) for layer in TOKEN.params["decoder"]]
    mixture = layers[1]["feed_forward"]["moe"]
    quiet = mixture | {"w_out": mixture["w_out"].at[busiest].multiply(1e-3)}
    layers[1]["feed_forward"] = layers[1]["feed_forward"] | {"moe": quiet}
    model = Model(TOKEN.params | {"decoder": layers}, TOKEN.config, TOKEN.tokenizer)

    def kept(scores: Any) -> np.ndarray:
        small = prune(model, scores, 3).params["decoder"][1]["feed_forward"]["moe"]["gate"]
        columns = np.asarray(quiet["gate"]).T
        return np.array([(columns == column).all(axis=1).argmax() for column in small.T])

    by_load, by_saliency = (kept(f(model, TEXT)) for f in (expert_usage, expert_saliency))
    assert busiest in by_load
    assert busiest not in by_saliency
    assert len(by_saliency) == 3


def test_an_expert_without_tokens_has_no_saliency() -> None:
    layers = [dict(layer) for layer in TOKEN.params["decoder"]]
    mixture = layers[1]["feed_forward"]["moe"]
    lone = dict(mixture) | {"gate": jnp.zeros_like(mixture["gate"])}
    layers[1]["feed_forward"] = layers[1]["feed_forward"] | {"moe": lone}
    model = Model(TOKEN.params | {"decoder": layers}, TOKEN.config, TOKEN.tokenizer)
    (scores,) = expert_saliency(model, TEXT)["decoder"]
    assert (scores[:2] > 0).all()  # equal logits go to the first
    np.testing.assert_array_equal(scores[2:], 0)
