"""`bench text`: exactly what is planted is left out, and what it costs is carried over."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from taskmoe.bench.harness.results import from_json
from taskmoe.bench.text import measure, spec
from taskmoe.bench.text.measure import Prepared, Stage
from taskmoe.bench.text.view import view
from taskmoe.wmt.text import cleaning


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PRESET", "tiny")
    monkeypatch.setattr(measure, "BATCHES_S", 0.05)


def test_text_is_prepared_and_what_is_planted_is_noticed(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = measure.measure(spec.Spec(spec.FEWEST, 1, tmp_path / "work"))
    assert result.planted_left == result.lost == 0
    assert 0.85 < result.kept / result.pairs < 0.9
    names = ["reading", "judging", "vocabulary", "encoding", "merging"]
    assert [stage.name for stage in result.stages] == names
    assert 0 < result.set_bytes < result.part_bytes
    assert from_json(Prepared, result.to_json()) == result
    assert view(result).code == 0
    assert "Exactly the planted" in view(result).findings[0]

    monkeypatch.setattr(cleaning, "first_of_each", lambda key: np.ones(len(key), bool))
    again = measure.measure(spec.Spec(spec.FEWEST, 1, None))
    assert again.planted_left > 400
    assert view(again).code == 1
    assert "planted lines were kept" in view(again).findings[0]


def test_what_is_carried_over_grows_with_the_pairs_and_not_below_one_readers_speed() -> None:
    stages = [("reading", 60.0), ("judging", 1.0), ("vocabulary", 30.0), ("encoding", 90.0)]
    found = Prepared(
        {}, 4_310_000, 4_000_000, 0, 0, 2, [Stage(*x) for x in [*stages, ("merging", 2.0)]],
        20.0, 10**9, 5 * 10**8, 2 * 10**9, 10**9, 0.5, 300.0, 1e6, 0.2,
    )  # fmt: skip
    rows = {row[0]: row[1:] for row in view(found).tables[0].rows}
    assert rows["text, GB"][:2] == ("1.00", "100.00")
    assert rows["the set, GB"][1] == "50.00"
    hours = (153 * 100 + 30) / 3600
    assert rows["hours"][1] == f"{hours:.1f}"
    # 64 workers share (60 * 2 - 20 + 90 * 2) s; one process still needs 20 s to read.
    assert rows["hours"][2] == f"{(23 * 100 + 30) / 3600:.1f}"
    slow = dataclasses.replace(found, reading=50.0)
    assert view(slow).tables[0].rows[2][3] == f"{(53 * 100 + 30) / 3600:.1f}"
