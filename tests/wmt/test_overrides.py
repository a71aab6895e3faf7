"""Whatever --set is given, the command line answers in one line and harms nothing on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.commands import train as command
from taskmoe.wmt.config import ModelConfig, TrainConfig

FIELDS = [f.name for c in (ModelConfig, TrainConfig) for f in dataclasses.fields(c)]
# Sizes that fit are small: what is asked here is how words are read, not how much memory there is.
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([-(10**30), 10**30, 10**400, 2**63, 1e308, 5e-324, 0.5, -0.0]),
    st.floats(allow_nan=True, allow_infinity=True),
)
VALUES = st.one_of(
    NUMBERS.map(str),
    st.sampled_from(["true", "null", "[]", "{}", '""', "[1, [2]]", "NaN", "-Infinity", "[" * 5000]),
    st.lists(NUMBERS, max_size=3).map(json.dumps),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["adamw", "cosine", "bfloat16", "static", "dense", "float64"]),
)
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(FIELDS), VALUES).map("=".join),
    st.tuples(st.text(max_size=6).filter(lambda t: "\0" not in t), VALUES).map("=".join),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=10),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return support.write_folder(tmp_path_factory.mktemp("overrides") / "data", 40)


class Reached(InputError):
    """Training would begin now."""


@pytest.mark.parametrize("more", [[], ["--steps", "0"]])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
def test_any_override(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
    more: list[str],
    overrides: list[str],
) -> None:
    def begin(*_: Any, **__: Any) -> Any:
        raise Reached("training would begin")

    monkeypatch.setattr(command, "train", begin)
    words = ["train", "--data", str(folder), "--workdir", str(tmp_path / "work"), "--config"]
    words += ["tiny", "--set", "vocab_size=330", "--cache", str(tmp_path / "cache"), *more]
    words += [f"--set={item}" for item in overrides]
    capfd.readouterr()
    assert main(words) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("python -m taskmoe.wmt train: error: ")


def test_an_override_that_fits_reaches_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def begin(workdir: Path, model: ModelConfig, config: TrainConfig, *_: Any, **__: Any) -> Any:
        seen.append((model.d_ff, config.learning_rate, config.optimizer, config.buckets))
        raise Reached("training would begin")

    monkeypatch.setattr(command, "train", begin)
    words = ["train", "--data", str(folder), "--workdir", str(tmp_path / "work")]
    for item in ("vocab_size=330", "d_ff=48", "learning_rate=1e-2", "optimizer=adafactor"):
        words += ["--set", item]
    assert main([*words, "--set", "buckets=[8, 16]"]) == 2
    assert seen == [(48, 1e-2, "adafactor", (8, 16))]


def test_sizes_that_no_memory_holds(folder: Path, tmp_path: Path, capfd: Any) -> None:
    words = ["train", "--data", str(folder), "--workdir", str(tmp_path / "work"), "--steps", "1"]
    for item, message in (
        ("num_experts=2000000", "out of memory"),  # told by XLA, asked for 262 GB
        ("d_model=1073741824", "below 2^40 once multiplied by d_model"),
        ("encoder_layers=2000000000", "encoder_layers must be at most 1000"),
        ("batch_tokens=4294967296", "batch_tokens must be int below 2^31"),
        ("temperature=1e-9", "temperature must be at least 0.05"),
    ):
        assert main([*words, "--set", "vocab_size=330", "--set", item]) == 2, item
        said = capfd.readouterr().err.strip().splitlines()[-1]
        assert message in said
