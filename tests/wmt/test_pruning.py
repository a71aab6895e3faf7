"""Pruning keeps the experts that the text uses, and only a token-routed model can be pruned."""

import dataclasses

import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.model.pruning import expert_usage, prune
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.model.translation import translate

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
