"""Decoding of all systems on eight devices: tokens agree first, a fault stops it, bad input."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.harness.results import from_json
from taskmoe.bench.serving import systems as serving
from taskmoe.bench.serving.decode import measure as decode
from taskmoe.bench.serving.decode.view import largest
from taskmoe.bench.serving.points import Point, fastest
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import transformer

SMALL = decode.MODEL | {"vocab_size": 64, "d_model": 16, "d_ff": 16, "num_heads": 2,
                        "decoder_layers": 2, "num_experts": 8}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MODEL", SMALL)
    monkeypatch.setattr(decode, "CHECKED", 16)
    monkeypatch.setattr(serving, "POSITIONS", 4)


def test_points_checks_and_picture(tmp_path: Path, capsys: Any) -> None:
    words = ["--batches", "8", "--rounds", "2"]
    found, picture = tmp_path / "decode.json", tmp_path / "decode.png"
    assert main(["decode", *words, "--json", str(found), "--png", str(picture)]) == 0
    result = json.loads(found.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(result["points"]) == 4
    for check in result["checks"].values():
        assert check["error"] <= decode.TOLERANCE
        assert check["identical"] == check["tokens"]
    for point in result["points"]:
        exchanges = point["system"].startswith("token-MoE")
        assert bool(point["collectives"]) == exchanges, point["system"]
        assert (point["transfer_share"] + point["waiting_share"] > 0) == exchanges
        assert point["bytes_per_device"] > 0
    said = capsys.readouterr().out
    assert "1.87" in said
    assert "logits within" in said


def test_no_speed_while_tokens_differ(monkeypatch: Any, capsys: Any) -> None:
    real = serving.expert_parallel

    def kept(params: Any, config: Any, mesh: Any, strategy: str = "all_to_all") -> Any:
        return real(params, config, mesh, "kept")

    monkeypatch.setattr(serving, "expert_parallel", kept)
    assert main(["decode", "--batches", "8", "--rounds", "1"]) == 1
    said = capsys.readouterr().out
    assert "no timing: token-MoE, dropless differs from one device by" in said
    assert "tokens/s" not in said


def test_rows_that_did_not_travel_are_noticed() -> None:
    config = ModelConfig(pairs=("en-de",), encoder="dense", decoder="token", **SMALL)
    params, mesh = serving.random_model(config), serving.device_mesh(4)
    good, bad = (
        serving.agreement(serving.expert_parallel(params, config, mesh, how), params, config, 32)
        for how in ("all_to_all", "kept")
    )
    assert good.tokens == 32 * 4
    assert good.error < decode.TOLERANCE / 10
    assert bad.error > decode.TOLERANCE * 100


def test_a_wrong_sub_network_is_noticed() -> None:
    config = ModelConfig(pairs=("en-de",), encoder="dense", decoder="dense", **SMALL)
    right, wrong = (transformer.init(jax.random.key(seed), config) for seed in (0, 1))
    mesh = serving.device_mesh(4)
    models = [right, right, wrong, right]
    good = serving.agreement(serving.sub_networks([right] * 4, config, mesh), right, config, 8)
    bad = serving.agreement(serving.sub_networks(models, config, mesh), right, config, 8)
    assert good.error < 1e-5
    assert good.identical == good.tokens
    assert bad.error > decode.TOLERANCE
    assert bad.identical < bad.tokens


def test_peaks_and_largest_by_hand() -> None:
    def point(batch: int, speed: float, size: int) -> Point:
        return Point("a", batch, speed, speed, speed, {}, 1.0, 0.0, 0.0, 1, size)

    points = [point(64, 10.0, 1000), point(128, 30.0, 1640), point(256, 20.0, 2920)]
    assert fastest(points)["a"].batch == 128
    stored = Path(__file__).parents[3] / "bench/results/decode.json"
    result = from_json(decode.Decoded, json.loads(stored.read_text()))
    result = dataclasses.replace(result, points=points, ram_bytes=8 * 5480, devices=8)
    assert largest(result) == {"a": 512}
    assert np.isclose((5480 - 1000) / 10 + 64, 512)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "65"], "--devices must be from 1 to 64"),
        (["--devices", "3"], "--devices must divide 8 experts, got 3"),
        (["--batches", "7"], "--batches must be multiples of 8, got 7"),
        (["--batches", "few"], "--batches must be numbers"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--models", "/nowhere"], "is no model folder"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert main(["decode", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
