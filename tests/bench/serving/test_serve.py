"""`bench serve`: engines agree before they are timed, numbers add up, and bad input is told."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskmoe.bench.__main__ import main
from taskmoe.bench.harness.results import Spread, from_json
from taskmoe.bench.serving.serve import engines, measure, spec, worker
from taskmoe.bench.serving.serve.engines import OURS, THEIRS, Batch
from taskmoe.bench.serving.serve.measure import Served
from taskmoe.bench.serving.serve.view import view
from taskmoe.bench.serving.serve.worker import Engine
from taskmoe.tests.wmt import support
from taskmoe.wmt.config import PRESETS
from taskmoe.wmt.model.saved import save_model
from taskmoe.wmt.model.subnetwork import extract

SMALL = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "num_heads": 2, "encoder_layers": 2,
         "decoder_layers": 2, "num_experts": 4}  # fmt: skip
HERE = engines.ctranslate2_version() is not None


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", (SMALL, {}))
    monkeypatch.setattr(measure, "TARGET", 10)
    monkeypatch.setattr(measure, "LATENCIES", 3)
    monkeypatch.setattr(measure, "QUIET_S", 0.0)


def small_spec(**fields: Any) -> spec.Spec:
    sizes: dict[str, Any] = {"model": None, "pair": None, "text": None, "config": "tiny"}
    sizes |= {"batches": (1, 2), "beams": (1, 2), "sentences": 9, "rounds": 2}
    return spec.Spec(**(sizes | fields))


@pytest.fixture
def served(tmp_path: Path) -> spec.Spec:
    """A sub-network's folder and text."""
    save_model(extract(support.model(tie_embeddings=False), "de"), tmp_path / "small")
    (tmp_path / "text.en").write_text("\n".join([*support.sentences("en", 12), ""]))
    case: Any = {"batches": (2,), "beams": (2,)}
    return small_spec(model=tmp_path / "small", text=tmp_path / "text.en", **case)


def check(result: Served, cases: list[tuple[int, int]]) -> None:
    """cases: beam and batch."""
    systems = [*OURS, *THEIRS] if HERE else [*OURS]
    assert [(r.beam, r.batch, r.system) for r in result.rows] == [
        (*case, system) for case in cases for system in systems
    ]
    for row in result.rows:
        assert row.tokens_per_s.median >= row.sentences_per_s.median > 0
        assert (row.latency_ms is not None) == (row.batch == 1)
        if row.system.endswith("float32"):
            assert row.identical >= measure.ALIKE
        assert (row.over is not None) == HERE
        if row.system in THEIRS and row.over is not None:
            assert row.over.median == 1
        assert row.memory_bytes is not None
        assert row.memory_bytes > 0 or row.system in THEIRS  # a small model among large libraries
    assert from_json(Served, json.loads(json.dumps(result.to_json()))) == result
    told = view(result)
    assert ("CTranslate2 is not installed" in told.answer) != HERE
    assert (f"With {result.source}, taskmoe makes in float32 " in told.answer) == HERE
    assert (" and in int8 " in told.answer) == HERE
    assert any("in int8, times CTranslate2's tokens" in line for line in told.findings) == HERE


def test_a_small_network_is_timed_for_a_while_without_its_first_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[float] = []

    def translate(batch: Batch, beam: int) -> list[list[int]]:
        calls.append(0.001 if calls else 0.1)
        time.sleep(calls[-1])
        return []

    monkeypatch.setattr(worker, "LEAST_S", 0.12)
    (seconds,) = worker.seconds(translate, [Batch([], 1, 1)], 1)
    assert len(calls) > 2
    assert seconds < 0.1
    calls.clear()
    monkeypatch.setattr(worker, "LEAST_S", 0.05)
    (seconds,) = worker.seconds(translate, [Batch([], 1, 1)], 1)
    assert len(calls) == 1
    assert seconds >= 0.1  # one turn is long enough


def test_random_weights_by_the_command(tmp_path: Path, capsys: Any) -> None:
    found, picture = tmp_path / "serve.json", tmp_path / "serve.png"
    words = ["serve", "--config", "tiny", "--batches", "1,2", "--beams", "1,2", "--rounds", "2"]
    assert main([*words, "--json", str(found), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in capsys.readouterr().out
    result = from_json(Served, json.loads(found.read_text()))
    check(result, [(1, 1), (1, 2), (2, 1), (2, 2)])
    for row in result.rows:
        ratio = row.tokens_per_s.median / row.sentences_per_s.median
        assert ratio == pytest.approx(measure.TARGET)


def test_engines_look_at_the_same_few_words() -> None:
    result = measure.measure(small_spec(batches=(2,), beams=(1,), words=20))
    check(result, [(1, 2)])
    assert result.source.endswith("20 of 64 words")
    whole = measure.random_workload(small_spec())
    few = measure.random_workload(small_spec(words=20))
    assert whole.words is None
    assert few.words is not None
    assert few.words == sorted(set(few.words))
    assert few.words[:4] == [0, 1, 2, 3]
    found = {
        name: engines.ours(work.params, work.config, words)(measure.batches(work, 2)[0], 1)
        for name, work, words in (
            ("whole", whole, None),
            ("few", few, np.array(few.words, np.int32)),
        )
    }
    assert found["whole"] != found["few"]
    assert {i for row in found["few"] for i in row} <= set(few.words)


def test_a_model_and_its_text(served: spec.Spec) -> None:
    result = measure.measure(served)
    check(result, [(2, 2)])
    assert result.source == "small, en-de, 9 sentences of text.en"


def test_several_results_have_a_table_and_a_chart_each() -> None:
    sources = (
        "random weights of the tiny model's sub-network, 32 random tokens",
        "random weights of the tiny model's sub-network, 32 random tokens, 20 of 64 words",
        "small, en-de, 9 sentences of text.en",
    )
    row = measure.Row("taskmoe, float32", 1, 2, Spread(2, 1, 3), Spread(20, 10, 30), 1.0)
    told = view(*(Served({}, source, 10, 3, [row]) for source in sources))
    assert [chart.name for chart in told.charts] == ["serve", "serve-words", "serve-text"]
    assert [table.title.split(", 10 param")[0] for table in told.tables] == [*sources]
    assert told.short is not None
    assert len(told.short.rows) == 1


def test_without_ctranslate2_ours_alone_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ctranslate2_version", lambda: None)
    result = measure.measure(small_spec(batches=(1,), beams=(1,)))
    assert [r.system for r in result.rows] == [*OURS]
    assert "pip install 'taskmoe[ctranslate2]'" in view(result).answer


def test_another_translation_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def planted(self: Engine, batches: list[Batch], beam: int) -> Any:
        found = asked(self, batches, beam)
        if self in others:
            found["found"] = [[7] * measure.TARGET for _ in found["found"]]
        return found

    def named(self: Engine, name: str, folder: Path) -> None:
        if name in THEIRS:
            others.append(self)
            name = next(iter(OURS))
        made(self, name, folder)

    asked, made = Engine.translate, Engine.__init__
    others: list[Engine] = []
    monkeypatch.setattr(engines, "ctranslate2_version", lambda: "planted")
    monkeypatch.setattr(worker, "specification", lambda *_: _Saved())
    monkeypatch.setattr(Engine, "translate", planted)
    monkeypatch.setattr(Engine, "__init__", named)
    assert main(["serve", "--config", "tiny", "--batches", "2", "--beams", "1"]) == 2
    assert "nothing is timed below 90%" in capsys.readouterr().err


class _Saved:
    def save(self, folder: str) -> None:
        assert Path(folder).parent.is_dir()


def test_batches_hold_every_sentence_once_in_order_of_length() -> None:
    ids = [list(range(4, 4 + n)) for n in (20, 3, 5, 17, 4)]
    work = measure.Workload({}, None, [], ids, "", ends=True)  # type: ignore[arg-type]
    found = measure.batches(work, 2)
    assert [len(row) for b in found for row in b.sentences] == [3, 4, 5, 17, 20]
    assert [b.max_length for b in found] == [48, 80, 80]
    assert [b.rows for b in found] == [2, 2, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "x"], "--model and --text go together"),
        (["--pair", "en-de"], "--pair is a direction of --model, which is not given"),
        (["--words", "0"], "--words must be at least 1, got 0"),
        (["--words", "4"], "--words must be above 4, which are special, and at most"),
        (["--words", "9", "--model", "x", "--text", "x"], "--words is for random weights"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--batches", "a"], "--batches must be numbers like 64,512, got a"),
        (["--model", "nowhere", "--text", "x"], "nowhere is no model folder"),
    ],
)
def test_bad_input(capsys: Any, words: list[str], message: str) -> None:
    assert main(["serve", *words]) == 2
    assert message in capsys.readouterr().err
