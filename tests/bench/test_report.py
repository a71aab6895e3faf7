"""Sections are filled from JSON, twice alike; the demo's report and charts from its JSON."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from taskmoe.bench import report
from taskmoe.bench.__main__ import main
from taskmoe.bench.harness.results import RESULTS, from_json
from taskmoe.bench.harness.view import draw, markdown, paragraph, whole
from taskmoe.bench.story.demo.measure import Demo
from taskmoe.bench.story.demo.view import TASK, TOKEN, claims, view
from taskmoe.cli.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def demo_result() -> dict[str, Any]:
    """What the demo writes, with made-up numbers."""

    def bleu(level: float) -> dict[str, Any]:
        return {
            "averages": {"all": level, "en→xx": level - 1, "xx→en": level + 1},
            "directions": {"en-de": level - 1, "de-en": level + 1},
            "signatures": ["nrefs:1|tok:intl"],
        }

    def point(system: str, batch: int, speed: float, moving: float) -> dict[str, Any]:
        return {
            "system": system, "batch": batch, "tokens_per_s": speed, "step_ms": 1.0,
            "tokens_per_s_p10": speed * 0.9, "tokens_per_s_p90": speed * 1.1,
            "collectives": {"all-to-all": 6} if moving else {}, "params_per_device": 1000,
            "transfer_share": moving, "waiting_share": moving / 2,
        }  # fmt: skip

    models = {
        name: {"parameters": 3000, "decoder_parameters": 900, "seconds": 1.0, "bleu": bleu(level)}
        for name, level in (("narrow", 20.0), ("dense", 21.0), ("token", 22.0), ("task", 25.0))
    }
    systems = ((TOKEN, 0.3), ("token-MoE, capacity 2", 0.2), (TASK, 0.0))
    return {
        "seconds": 61.0,
        "machine": {
            "cpu": "a CPU", "cores": "2", "os": "Linux", "python": "3.11", "jax": "0.10",
            "numpy": "2", "commit": "abc",
        },
        "corpus": {"train": {"en-de": 10, "de-en": 10}, "test": {"en-de": 2, "de-en": 2}},
        "model": {"num_experts": 16},
        "training": {"steps": 5},
        "models": models,
        "extraction": {
            "tasks": ["de", "en"], "translations": 4, "identical": 4, "bleu": bleu(25.0),
            "largest_logit_difference": 1e-6, "parameters": 1000, "decoder_parameters": 300,
        },
        "serving": {
            "devices": 8,
            "positions": 16,
            "points": [
                point(name, batch, 1000.0 * batch * (1 if moving else 2), moving)
                for batch in (8, 32)
                for name, moving in systems
            ],
        },
    }  # fmt: skip


def test_the_demos_report_says_what_its_json_says(tmp_path: Path) -> None:
    found = view(from_json(Demo, demo_result()))
    draw(found, tmp_path)
    text = whole(found, ".")
    assert "| BLEU, task-MoE over the paper's dense | +2.31 | +5.00 | same order |" in text
    assert "| BLEU, task-MoE over dense of equal compute | not there | +4.00 |" in text
    assert "| peak decoding throughput, task over token | 1.87 | 2.00 |" in text
    assert "45.0% (30.0% moving, 15.0% waiting)" in text
    for name in ("bleu", "throughput", "step_time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(./{name}.png)" in text


def test_another_result_gives_another_report() -> None:
    result = demo_result()
    result["models"]["task"]["bleu"]["averages"]["all"] = 10.0
    rows = {claim: (here, remark) for claim, _, here, remark in claims(from_json(Demo, result))}
    assert rows["BLEU, task-MoE over the paper's dense"] == ("-10.00", "opposite order")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / RESULTS).mkdir(parents=True)
    (tmp_path / RESULTS / "demo.json").write_text(json.dumps(demo_result()))
    (tmp_path / "README.md").write_text(
        "before\n<!-- begin demo -->\nstale words\n<!-- end demo -->\nafter\n"
    )
    (tmp_path / "BENCHMARKS.md").write_text("nothing to fill\n")
    return tmp_path


def test_filling_in_twice_changes_nothing(project: Path) -> None:
    assert main(["report", "--root", str(project)]) == 0
    files = {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}
    text = (project / "README.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale words" not in text
    assert "+5.00" in text
    assert main(["report", "--root", str(project)]) == 0
    assert files == {p: p.read_bytes() for p in project.rglob("*") if p.is_file()}


def test_what_cannot_be_filled_in_is_one_line(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in (
        ("<!-- begin speed -->\n<!-- end speed -->", "section 'speed' is unknown"),
        ("<!-- begin demo -->\n", "section 'demo' has no"),
    ):
        with pytest.raises(InputError, match=message):
            report.fill(text, project)
    (project / RESULTS / "demo.json").write_text("{")
    assert main(["report", "--root", str(project)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "demo.json is damaged" in said
    assert main(["report", "--root", str(project / "nowhere")]) == 2


def test_the_project_says_what_its_stored_results_say(tmp_path: Path) -> None:
    (tmp_path / RESULTS).mkdir(parents=True)
    for path in (ROOT / RESULTS).glob("*.json"):
        (tmp_path / RESULTS / path.name).write_bytes(path.read_bytes())
    for name in report.FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        filled, sections = report.fill(text, tmp_path)
        assert filled == text, f"{name}: run python -m taskmoe.bench report"
        for picture in re.findall(r"\]\((bench/results/[\w-]+\.png)\)", filled):
            assert (tmp_path / picture).is_file()
            assert (ROOT / picture).is_file()
        if name == "BENCHMARKS.md":
            assert set(sections) == {"overview", "provenance", *report.BENCHMARKS}


def test_tables_and_paragraphs() -> None:
    table = markdown(("name", "value"), [("a", "1.5"), ("b", "")])
    assert table.splitlines()[1] == "| --- | ---: |"
    assert markdown(("name",), [("x",)]).splitlines()[1] == "| --- |"
    assert paragraph("one", "two  three") == "one two three"
    assert max(map(len, paragraph("word " * 100).splitlines())) <= 100
