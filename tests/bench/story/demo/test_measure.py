"""`make demo` at its smallest: the report, its charts and its JSON."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from taskmoe.bench.story.demo import measure as demo
from taskmoe.bench.story.demo.spec import Spec
from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.config import TrainConfig
from taskmoe.wmt.model.saved import Model
from taskmoe.wmt.text.data import TrainingData
from taskmoe.wmt.text.tokenizer import Tokenizer
from taskmoe.wmt.training.loop import Progress


def test_the_demo_tells_its_story_with_charts_and_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "taskmoe.bench", "demo", "--quick", "--steps", "8"]
    command += ["--sentences", "1", "--out", str(tmp_path), "--json", str(tmp_path / "demo.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["machine"]["jax"]
    report = (tmp_path / "report.md").read_text()
    assert "translations identical" in report
    assert "BLEU lost by extraction" in report
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page  # it needs nothing else
    assert "token-MoE over dense of equal compute" in page
    charts = sorted(tmp_path.rglob("*.png"))
    assert charts
    for chart in charts:
        with Image.open(chart) as picture:
            assert picture.width > 300
            assert len(picture.getcolors(1 << 24) or []) > 10  # not an empty sheet


TEXT = {pair: (["one two"] * 9, ["eins zwei"] * 9) for pair in demo.PAIRS}


def vocabulary() -> Tokenizer:
    return support.tokenizer().with_languages([*demo.LANGUAGES, "en"])


def test_other_steps_in_a_folder_are_refused_with_a_flag_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "corpus", lambda *_: (TEXT, TEXT, vocabulary()))
    monkeypatch.setattr(demo.serving, "use_host_devices", lambda _: None)
    run = tmp_path / "work" / "narrow"
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "config.json").write_text('{"train": {"steps": 60}}')
    with pytest.raises(InputError, match=r"is 60 there and 4 here; name another --out$"):
        demo.measure(Spec(tmp_path, 4, 1, (8,)))


def test_seconds_are_those_of_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two runs that trained a model; and one that finds it trained."""

    def trained(work: Path, *_: Any, report: Callable[[Progress], None], **__: Any) -> Model:
        work.mkdir(exist_ok=True)
        (work / "log.jsonl").write_text('{"step": 2, "seconds": 90}\n{"step": 4, "seconds": 9.5}\n')
        if session == 2:
            report(Progress(4, 4, 2.0, 8, 95, 9.5, 10.0, 0.0, 0.0, 0.0, 1.0, 0.0, [], 0))
        return support.model()

    monkeypatch.setattr(demo, "train", trained)
    config = TrainConfig(steps=4, **demo.TRAIN)
    data = TrainingData.encoded(TEXT, vocabulary(), config)
    for session, seconds, loss in ((2, 99.5, 2.0), (3, 0.0, None)):  # noqa: B007 - `trained` does
        _, facts = demo._train("narrow", tmp_path, config, data, vocabulary())
        assert (facts.seconds, facts.loss) == (seconds, loss)
