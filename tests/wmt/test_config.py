"""Fields that do not fit are named; sizes are the paper's."""

from typing import Any

import jax
import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.config import PRESETS, ModelConfig, TrainConfig, split_pair
from taskmoe.wmt.model import transformer
from taskmoe.wmt.text import cldr

MODEL_FIELDS: list[tuple[Any, str]] = [
    ({"pairs": ()}, "pairs must be one or more different directions"),
    ({"pairs": ("en-de", "en-de")}, "pairs must be one or more different directions"),
    ({"pairs": ("ende",)}, "pair must be two different language codes like 'en-de', got 'ende'"),
    ({"pairs": ["en-de"]}, "pairs must be"),
    ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    ({"d_model": 18}, r"d_model must be a multiple of 2\*num_heads=4, got 18"),
    ({"d_model": "wide"}, "d_model must be int, got 'wide'"),
    ({"num_experts": True}, "num_experts must be int, got True"),
    ({"num_experts": 1}, "top_k must be at most num_experts=1, got 2"),
    ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
    ({"encoder": "word"}, "encoder must be one of dense, .*'word'"),
    ({"decoder": None}, "decoder must be one of dense, .*None"),
    ({"encoder_wide_d_ff": -1}, "encoder_wide_d_ff must be at least 1 or None, got -1"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": float("nan")}, "dropout must be float, got nan"),
    ({"encoder": "token", "capacity_factor": -1.0}, "capacity_factor must be above 0"),
    ({"tie_embeddings": 1}, "tie_embeddings must be bool, got 1"),
]
TRAIN_FIELDS: list[tuple[Any, str]] = [
    ({"steps": -1}, "steps must be at least 0, got -1"),
    ({"batch_tokens": 16}, "batch_tokens must hold one pair of the longest bucket, 32, got 16"),
    ({"buckets": (16, 8)}, "buckets must be rising lengths"),
    ({"buckets": (0, 8)}, "buckets must be rising lengths"),
    ({"buckets": 16}, "buckets must be"),
    ({"temperature": 0.0}, "temperature must be at least 0.05, got 0.0"),
    ({"optimizer": "sgd"}, "optimizer must be one of adafactor, adamw, got 'sgd'"),
    ({"schedule": "flat"}, "schedule must be one of inverse_sqrt, cosine, got 'flat'"),
    ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
    ({"learning_rate": -1.0}, "learning_rate must be above 0"),
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
    ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"compute_dtype": "float16"}, "compute_dtype must be one of float32, bfloat16"),
    ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
]


@pytest.mark.parametrize(("fields", "message"), MODEL_FIELDS)
def test_a_model_field_that_does_not_fit_is_named(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        support.model_config(**fields)


@pytest.mark.parametrize(("fields", "message"), TRAIN_FIELDS)
def test_a_training_field_that_does_not_fit_is_named(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        support.train_config(**fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_configurations_and_survive_json(preset: str) -> None:
    import json

    sizes, training = PRESETS[preset]
    model, train = ModelConfig(pairs=cldr.PAIRS, **sizes), TrainConfig(**training)
    assert ModelConfig.from_dict(json.loads(model.to_json())) == model
    assert TrainConfig.from_dict(json.loads(train.to_json())) == train
    with pytest.raises(ValueError, match="ModelConfig has no field 'width'"):
        ModelConfig.from_dict({"width": 3})


@pytest.mark.parametrize("pair", ["", "en", "en-", "-de", "en-en", "en-de-fr", "-"])
def test_what_is_no_direction(pair: str) -> None:
    with pytest.raises(ValueError, match="pair must be two different language codes"):
        split_pair(pair)


def test_tasks_of_each_level() -> None:
    config = support.model_config(encoder="source", decoder="target")
    assert config.tasks("encoder") == ("en", "de")
    assert config.tasks("decoder") == ("de", "en", "fr")
    np.testing.assert_array_equal(config.task_table("encoder"), [0, 1, 0])
    np.testing.assert_array_equal(config.task_table("decoder"), [0, 1, 2])
    pair = support.model_config(encoder="pair", decoder="token")
    assert pair.tasks("encoder") == support.PAIRS
    assert pair.tasks("decoder") == ()
    assert pair.task_table("decoder") is None


def count(**fields: Any) -> dict[str, float]:
    """Millions of parameters of the paper's model, in all and by stack."""
    config = ModelConfig(pairs=cldr.PAIRS, **(PRESETS["base"][0] | fields))
    shapes = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    stacks = {name: transformer.param_count(part) / 1e6 for name, part in shapes.items()}
    return stacks | {"all": sum(stacks.values())}


def test_parameter_counts_are_the_papers() -> None:
    dense = count(encoder="dense", decoder="dense")
    assert 142 <= dense["all"] <= 143
    assert [round(dense[x]) for x in ("embedding", "encoder", "decoder")] == [33, 19, 25]
    assert abs(dense["target_embedding"] + dense["softmax"] - 65) < 1

    token = count(encoder="token", decoder="token")
    assert abs(token["all"] - 533) < 1
    assert [round(token[x]) for x in ("encoder", "decoder")] == [214, 220]
    target = count(encoder="target", decoder="target")
    assert abs(target["all"] - 533) < 1

    # What `extract` leaves: dense layers of width 2 * 2048 where the mixtures were.
    wide = {"encoder_wide_d_ff": None, "decoder_wide_d_ff": None}
    small = count(encoder="dense", decoder="dense", **wide)
    assert abs(small["all"] - 155) < 0.5
    assert abs(small["decoder"] - 31.5) < 0.1
    assert abs(target["decoder"] / small["decoder"] - 7.0) < 0.05
    one_side = count(encoder="token", decoder="dense", **wide)
    assert abs(one_side["all"] - 344) < 0.5


def test_another_size_is_noticed() -> None:
    assert not 142 <= count(encoder="dense", decoder="dense", d_ff=4096)["all"] <= 143
    assert abs(count(num_experts=16)["all"] - 533) > 100
