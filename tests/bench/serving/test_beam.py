"""The floor counts every byte of a step once; a search that ends early and bad input are told."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.serving.beam import measure as beam
from taskmoe.wmt.config import PRESETS
from taskmoe.wmt.model import transformer
from taskmoe.wmt.text.tokenizer import EOS

SMALL = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "num_heads": 2, "encoder_layers": 2,
         "decoder_layers": 2, "num_experts": 4}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", (SMALL, {}))
    monkeypatch.setattr(beam, "LONG", 12)


def test_bytes_by_hand() -> None:
    config = beam.sub_network_config("tiny")
    params = transformer.init(jax.random.key(0), config)
    attention, ffn, wide = 4 * 16 * 16, 2 * 16 * 16, 2 * 16 * 32
    norms = 3 * 16
    layers = 2 * (attention + attention // 2 + norms) + ffn + wide
    for batch in (1, 3):
        cache = 2 * 2 * 16 * (batch * 4 * 10 + batch * beam.SOURCE)
        want = 4 * (layers + 16 * 64 + cache + 1)  # and the cache's next column
        assert beam.bytes_a_step(params, config, batch, 4) == want


def test_rows_and_picture(tmp_path: Path, capsys: Any) -> None:
    found, picture = tmp_path / "beam.json", tmp_path / "beam.png"
    words = ["beam", "--config", "tiny", "--batches", "2", "--beam", "2", "--rounds", "2"]
    assert main([*words, "--json", str(found), "--png", str(picture)]) == 0
    result = json.loads(found.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    (row,) = result["rows"]
    assert row["batch"] == 2
    assert row["floor_s"]["median"] > 0
    assert result["beam"] == 2
    assert "over the floor" in " ".join(capsys.readouterr().out.split())


def test_a_search_that_ends_early_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = beam.sub_network_config("tiny")
    params = transformer.init(jax.random.key(0), config)

    def ended(*args: Any, **_: Any) -> Any:
        source = args[2]
        return jax.numpy.full((len(source), 12), EOS), jax.numpy.zeros(len(source))

    monkeypatch.setattr(beam, "search", ended)
    with pytest.raises(RuntimeError, match="ended before its last position"):
        beam.one_batch(params, config, 1, 2, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--beam", "1"], "--beam must be at least 2"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batches", "a"], "--batches must be numbers like 64,512, got a"),
        (["--batches", "0"], "--batches must be at least 1, got 0"),
    ],
)
def test_bad_input(capsys: Any, words: list[str], message: str) -> None:
    assert main(["beam", *words]) == 2
    assert message in capsys.readouterr().err
