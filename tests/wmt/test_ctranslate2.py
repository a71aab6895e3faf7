"""CTranslate2 translates an exported sub-network as this library does."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.__main__ import main
from taskmoe.wmt.config import ModelConfig
from taskmoe.wmt.model import ctranslate2_export as exporting
from taskmoe.wmt.model import shortlist
from taskmoe.wmt.model.decoding import length_limit
from taskmoe.wmt.model.saved import Model, save_model
from taskmoe.wmt.model.subnetwork import extract
from taskmoe.wmt.model.translation import Decoding, translate, translate_n_best

ctranslate2 = pytest.importorskip("ctranslate2", reason="the extra [ctranslate2] is not installed")

LINES = list(dict.fromkeys(support.sentences("en", 40, seed=3)))
TRAINER = (support.ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
_, PROGRAM = re.findall(r"```py\n(.*?)```", TRAINER, re.DOTALL)
ALONE = 'assert not any(name.split(".")[0] in ("taskmoe", "jax") for name in sys.modules)'
MODELS = {
    "untied sub-network": {"tie_embeddings": False},
    "tied sub-network": {"encoder": "source", "decoder": "pair"},
    "dense, three widths": {"encoder": "dense", "decoder": "dense", "decoder_wide_d_ff": 24},
    "dense, odd layers": {"encoder": "dense", "decoder": "dense", "encoder_layers": 3},
}


@functools.cache
def model(name: str, seed: int = 0) -> Model:
    config: ModelConfig = support.model_config(**MODELS[name])
    made = Model(support.params(config, seed), config, support.tokenizer())
    return made if config.encoder == "dense" else extract(made, "en-de")


def theirs(
    folder: Path, small: Model, beam: int, use_vmap: bool = False
) -> list[tuple[str, float]]:
    """CTranslate2's translations of LINES, with their scores."""
    translator = ctranslate2.Translator(str(folder), intra_threads=1)
    pieces, found = small.tokenizer.pieces(), []
    for ids in small.tokenizer.encode_source(LINES, "de"):
        (best,) = translator.translate_batch(
            [[pieces[i] for i in ids]], beam_size=beam, length_penalty=0, min_decoding_length=0,
            max_decoding_length=length_limit(len(ids)), return_scores=True, use_vmap=use_vmap,
        )  # fmt: skip
        ids = [small.tokenizer.piece_id(piece) for piece in best.hypotheses[0]]
        found.append((small.tokenizer.decode([ids])[0], best.scores[0]))
    return found


def differing(folder: Path, small: Model, beam: int) -> int:
    """Sentences of LINES with another score, or another translation of a score that is no tie."""
    requests = [("en-de", line) for line in LINES]
    ours = translate_n_best(small, requests, Decoding(beam=beam, alpha=0.0))
    found = 0
    for (best,), (text, score) in zip(ours, theirs(folder, small, beam), strict=True):
        apart = abs(best.score - score)
        found += apart > 1e-4 or (best.text != text and apart > 1e-5)
    return found


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_translations_and_scores_are_ours(tmp_path: Path, name: str, beam: int) -> None:
    small = model(name)
    size = exporting.export_ctranslate2(small, tmp_path / "m", length=40)
    assert size == (tmp_path / "m" / "model.bin").stat().st_size
    assert differing(tmp_path / "m", small, beam) == 0
    assert len({text for text, _ in theirs(tmp_path / "m", small, beam)}) > 2


def test_with_a_shortlist_both_look_at_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = model("untied sub-network")
    size = small.tokenizer.vocab_size
    monkeypatch.setattr(shortlist, "MULTIPLE", 1)
    starts = 3 * np.maximum(np.arange(size + 1) - 4, 0)  # none for the special ones
    words = np.random.default_rng(0).integers(4, size, starts[-1]).astype(np.int32)
    own = shortlist.Candidates(np.array([40, 41], np.int32), starts, words)
    short = shortlist.shortlist_of({"en-de": own}, small.tokenizer)
    exporting.export_ctranslate2(small, tmp_path / "m", length=40, shortlist=short)
    # One at a time, as a batch's words are those of all its sentences.
    how = Decoding(beam=1, alpha=0.0, shortlist=short)
    ours = [translate(small, [("en-de", line)], how)[0] for line in LINES]
    assert ours == [text for text, _ in theirs(tmp_path / "m", small, 1, use_vmap=True)]
    assert ours != [text for text, _ in theirs(tmp_path / "m", small, 1)]
    save_model(small, tmp_path / "small")
    short.save(tmp_path / "words.npz")
    asked = ["export", "--model", str(tmp_path / "small"), "--out", str(tmp_path / "n")]
    asked += ["--shortlist", str(tmp_path / "words.npz")]
    assert main(asked) == 2
    assert main([*asked, "--format", "ctranslate2"]) == 0
    other = shortlist.shortlist_of({"en-fr": own}, small.tokenizer)
    with pytest.raises(InputError, match="the shortlist has no direction en-de, only en-fr"):
        exporting.export_ctranslate2(small, tmp_path / "o", shortlist=other)
    assert not (tmp_path / "o").exists()
    maps = [(tmp_path / name / exporting.VOCABULARY_MAP).read_text() for name in ("m", "n")]
    assert maps[0] == maps[1]


def test_a_wrong_position_or_epsilon_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = model("untied sub-network")
    right = exporting.position_waves
    with monkeypatch.context() as fault:
        fault.setattr(exporting, "position_waves", lambda at, width: right(at + 1, width))
        exporting.export_ctranslate2(small, tmp_path / "position")
    with monkeypatch.context() as fault:
        fault.setattr(exporting, "EPSILON", 1e-2)
        exporting.export_ctranslate2(small, tmp_path / "epsilon")
    for folder in ("position", "epsilon"):
        assert differing(tmp_path / folder, small, 1) > len(LINES) // 2


def test_a_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    small = model("tied sub-network")
    size = exporting.export_ctranslate2(small, tmp_path / "m", length=40)
    weights = sum(x.nbytes for x in jax.tree.leaves(small.params))
    positions = 4 * small.config.d_model * length_limit(40)
    assert weights + positions < size < weights + positions + 8000


@pytest.mark.parametrize("beam", [1, 4])
def test_the_program_of_the_documentation_translates_as_we_do(tmp_path: Path, beam: int) -> None:
    small = model("untied sub-network")
    exporting.export_ctranslate2(small, tmp_path / "m", length=40)
    lines = [*LINES[:4], "", " one", " ".join(LINES[:12])]  # the last is cut
    program = PROGRAM.replace('"beam_size": 4', f'"beam_size": {beam}') + ALONE
    command = [sys.executable, "-c", program, str(tmp_path / "m"), "de", *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    how = Decoding(beam=beam, alpha=0.0, max_source=40)
    want = translate(small, [("en-de", line) for line in lines], how)
    assert json.loads(done.stdout) == want
    assert want[4] == ""
    assert len(set(want)) > 4


def test_what_cannot_be_exported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    with pytest.raises(InputError, match=r"no mixtures \(encoder is target, .*extract a task"):
        exporting.export_ctranslate2(support.model(), out)
    small = model("tied sub-network")
    with pytest.raises(InputError, match="length must be at least 1, got 0"):
        exporting.export_ctranslate2(small, out, length=0)
    save_model(small, tmp_path / "small")
    words = ["export", "--format", "ctranslate2", "--model", str(tmp_path / "small")]
    assert main([*words, "--out", str(out), "--beam", "4"]) == 2
    assert "--beam fits --format stablehlo" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    assert main([*words, "--out", str(out)]) == 2
    assert "pip install 'taskmoe[ctranslate2]'" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.undo()
    assert main([*words, "--out", str(out)]) == 0
    assert "bytes in float32, up to 512 source ids" in capsys.readouterr().out
