"""A task's sub-network translates as the full model does, and is a model like any other."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.model import translation
from taskmoe.wmt.model.continuous import search_many
from taskmoe.wmt.model.saved import Model, load_model, save_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.transformer import param_count
from taskmoe.wmt.model.translation import Decoding, task_ids, translate

FULL = support.model(tie_embeddings=False)
REQUESTS = [("en-de", line) for line in support.sentences("en", 6, seed=3)] + [("en-de", "  ")]
MIXED = Decoding(beam=2, max_length=12, mixed_tasks=True)
ALONE = Decoding(beam=2, max_length=12)


def test_translations_are_those_of_the_full_model() -> None:
    full = translate(FULL, REQUESTS, MIXED)  # rows of any task: routed expert by expert
    assert len(set(full)) > 3
    assert full[-1] == ""
    small = extract(FULL, "de")
    assert translate(small, REQUESTS, ALONE) == full
    assert translate(FULL, REQUESTS, ALONE) == full
    wrong = extract(FULL, "fr")
    as_de = Model(wrong.params, small.config, small.tokenizer)
    assert translate(as_de, REQUESTS, ALONE) != full


def test_order_batches_and_progress() -> None:
    small = extract(FULL, "de")
    seen: list[tuple[int, int]] = []
    whole = translate(small, REQUESTS, ALONE, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (6, 6)
    by_two = Decoding(beam=2, max_length=12, batch=2)
    assert translate(small, REQUESTS[::-1], by_two) == whole[::-1]


def test_long_sentences_have_fewer_rows_and_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    small, said = extract(FULL, "de"), list[str]()
    seen: list[tuple[int, int]] = []

    def watched(*args: Any) -> Any:
        seen.append((args[-1].rows, len(args[-2].ids)))
        return search_many(*args)

    monkeypatch.setattr(translation, "search_many", watched)
    long = " ".join(support.sentences("en", 90, seed=3))
    requests = [("en-de", f"{long} {word}") for word in ("one", "two", "six")] + REQUESTS
    how = Decoding(max_length=4, batch=4, max_source=256)
    found = translate(small, requests, how, note=said.append)
    assert seen == [(4, 6), (2, 3)]  # short ones first; of 256 tokens half as many at once
    assert found[3:] == translate(small, REQUESTS, how)
    assert [line.split(":")[0] for line in said] == [f"en-de, line {n}" for n in (1, 2, 3)]
    assert found[0] == found[1] == found[2]  # they differ in what was cut off


def test_a_sub_network_is_dense_and_knows_its_directions() -> None:
    small = extract(FULL, "en")
    assert small.config.pairs == ("de-en",)
    assert (small.config.encoder, small.config.decoder) == ("dense", "dense")
    assert small.config.wide_d_ff("encoder") == 2 * FULL.config.d_ff
    assert param_count(small.params) < param_count(FULL.params)
    with pytest.raises(InputError, match="pair en-de: the model knows only de-en"):
        translate(small, [("en-de", "one")])
    with pytest.raises(InputError, match="nothing to extract: no side of the model is task-routed"):
        extract(small, "en")


def test_one_routed_side_leaves_the_other() -> None:
    model = support.model(encoder="token", decoder="target")
    small = extract(model, "fr")
    assert (small.config.encoder, small.config.decoder) == ("token", "dense")
    assert small.params["encoder"] is model.params["encoder"]
    by_pair = extract(support.model(encoder="pair", decoder="target"), "en-de")
    assert by_pair.config.pairs == ("en-de",)


@pytest.mark.parametrize(
    ("fields", "task", "message"),
    [
        ({}, "xx", "task 'xx' is not the model's; it has de, en, fr"),
        ({}, "en-xx", "task 'en-xx' is not the model's"),
        ({}, "en-en", "pair must be two different language codes"),
        ({"encoder": "source"}, "de", "task 'de' leaves a side open .*name a direction: en-de"),
        ({"encoder": "token", "decoder": "token"}, "de", "nothing to extract"),
    ],
)
def test_a_task_that_does_not_fit(fields: Any, task: str, message: str) -> None:
    model = Model({}, support.model_config(**fields), support.tokenizer())
    with pytest.raises(InputError, match=message):
        extract(model, task)


def test_directions_and_their_tasks() -> None:
    config = support.model_config(encoder="source", decoder="target")
    assert task_ids(config, "en-fr") == (0, 2)
    assert task_ids(config, "de-fr") == (1, 2)  # never trained, yet both sides were seen
    for pair in ("en-xx", "xx-en"):
        with pytest.raises(InputError, match=f"pair {pair}: the model knows only"):
            task_ids(config, pair)
    with pytest.raises(InputError, match="the model's encoder has no task fr, only en, de"):
        task_ids(config, "fr-en")


def test_a_model_folder_holds_the_whole_model(tmp_path: Path) -> None:
    small = extract(FULL, "de")
    save_model(small, tmp_path / "de")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "config.json", "de", "params.safetensors", "spm.model",
    ]  # fmt: skip
    loaded = load_model(tmp_path / "de")
    assert loaded.config == small.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, small.params)
    assert loaded.tokenizer.model == small.tokenizer.model
    with pytest.raises(InputError, match="already holds something; name a new folder"):
        save_model(small, tmp_path / "de")
    save_model(FULL, tmp_path / "de", replace=True)
    assert load_model(tmp_path / "de").config == FULL.config
    assert [p.name for p in tmp_path.iterdir()] == ["de"]


@pytest.mark.parametrize("name", ["config.json", "params.safetensors", "spm.model"])
def test_a_damaged_model_folder_is_named(tmp_path: Path, name: str) -> None:
    save_model(extract(FULL, "de"), tmp_path / "de")
    path = tmp_path / "de" / name
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=name):
        load_model(tmp_path / "de")
    path.unlink()
    with pytest.raises(InputError, match=f"is no model folder: it has no {name}"):
        load_model(tmp_path / "de")


def test_parameters_of_another_size_are_named(tmp_path: Path) -> None:
    small = extract(FULL, "de")
    save_model(small, tmp_path / "de")
    config = (tmp_path / "de" / "config.json").read_text()
    (tmp_path / "de" / "config.json").write_text(config.replace('"d_ff": 16', '"d_ff": 17'))
    with pytest.raises(InputError, match=r"should be \[16, 17\], is \[16, 16\]"):
        load_model(tmp_path / "de")
