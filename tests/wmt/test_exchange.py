"""Training and translating on a mesh: the same whatever way rows travel to their experts."""

import json
from pathlib import Path

import numpy as np
import pytest

from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main

WAYS = ("auto", "all_to_all", "ragged", "all_gather")
SIZES = ("d_model=16", "d_ff=16", "num_heads=2", "num_experts=8", "vocab_size=330",
         "batch_tokens=512", "buckets=[16]", "row_multiple=8")  # fmt: skip


def train(tmp_path: Path, name: str, *more: str) -> list[str]:
    words = ["train", "--data", str(tmp_path / "data"), "--workdir", str(tmp_path / name)]
    words += ["--steps", "6", "--cache", str(tmp_path / "cache"), "--encoder", "token"]
    words += ["--decoder", "token", "--pairs", "en-de,de-en"]
    for item in SIZES:
        words += ["--set", item]
    return [*words, *more]


def loss(workdir: Path) -> float:
    (line,) = (workdir / "log.jsonl").read_text().splitlines()
    return float(json.loads(line)["loss"])


def test_losses_and_translations_are_the_same_by_every_way(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    support.write_folder(tmp_path / "data")
    assert main(train(tmp_path, "one", "--data-parallel", "1")) == 0
    assert "exchange" not in capfd.readouterr().out
    for way in WAYS:
        spread = ["--expert-parallel", "8", "--exchange", way]
        assert main(train(tmp_path, way, *spread)) == 0
        (line,) = (x for x in capfd.readouterr().out.splitlines() if "exchange, decoder" in x)
        begin, taken, sent, unit = line.rsplit(maxsplit=3)
        assert begin == "exchange, decoder, a layer and device: length 16"
        assert taken in ((way,) if way != "auto" else WAYS)
        assert 0 < float(sent) < 0.1
        assert unit == "MB"
        assert loss(tmp_path / way) == pytest.approx(loss(tmp_path / "one"), rel=1e-4)
    assert main(train(tmp_path, "more", "--data-parallel", "1", "--set", "learning_rate=1e-2")) == 0
    assert abs(loss(tmp_path / "more") - loss(tmp_path / "one")) > 1e-2

    (tmp_path / "lines").write_text("one two\n\nthree four five\n")
    asked = ["translate", "--model", str(tmp_path / "one"), "--pair", "en-de"]
    asked += ["--input", str(tmp_path / "lines"), "--beam", "2"]
    capfd.readouterr()
    assert main(asked) == 0
    want = capfd.readouterr()
    assert want.err == ""
    for way in ("auto", "ragged"):
        assert main([*asked, "--expert-parallel", "4", "--exchange", way]) == 0
        found = capfd.readouterr()
        assert found.out == want.out
        assert "exchange, decoder, a layer and device: 64 sentences" in found.err
    scores = []
    for more in ([], ["--expert-parallel", "4"]):
        out = tmp_path / "scores.json"
        words = ["evaluate", "--model", str(tmp_path / "one"), "--data", str(tmp_path / "data")]
        assert main([*words, "--limit", "4", "--json", str(out), *more]) == 0
        scores.append(json.loads(out.read_text())["averages_chrf"]["all"])
    np.testing.assert_allclose(*scores)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--expert-parallel", "3"], "must be a multiple of the mesh's expert=3"),
        (["--expert-parallel", "16"], "does not fit 8 devices"),
        (["--exchange", "post"], "invalid choice: 'post'"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    from taskmoe.wmt.model.saved import save_model

    save_model(support.model(num_experts=8), tmp_path / "model")
    asked = ["translate", "--model", str(tmp_path / "model"), "--pair", "en-de", *more]
    try:
        code = main(asked)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
