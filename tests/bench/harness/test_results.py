"""Results come back from JSON as they went, and what does not fit is one line."""

import dataclasses
import json
from pathlib import Path

import pytest

from taskmoe.bench import report
from taskmoe.bench.harness.results import Result, Spread, from_json, load
from taskmoe.cli.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    error: float | None
    speed: Spread | None = None
    rounds: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Found(Result):
    rows: list[Row]
    by_name: dict[str, Row]


def test_there_and_back() -> None:
    row = Row("a", None, Spread.of([1.0, 2.0, 3.0]), (1.0, 2.0))
    found = Found([row, Row("b", 0.5)], {"a": row})
    told = json.loads(json.dumps(found.to_json()))
    assert told["version"] == 1
    assert told["rows"][1] == {"name": "b", "error": 0.5, "rounds": []}
    assert told["rows"][0]["error"] is None
    assert from_json(Found, told) == found


def test_spread_in_words() -> None:
    assert Spread(0.0015, 0.001, 0.002).words(".1f", 1e3) == "1.5 (1.0 to 2.0)"


def test_every_stored_result_comes_back_as_it_was() -> None:
    for name in report.BENCHMARKS:
        for stem, result in report.Sections(ROOT)._results(name).items():
            stored = json.loads((ROOT / f"bench/results/{stem}.json").read_text("utf-8"))
            told = json.loads(json.dumps(result.to_json()))
            assert set(stored) <= set(told), stem


@pytest.mark.parametrize("text", ["{", "{}", '{"rows": [1], "by_name": {}}'])
def test_a_damaged_file_is_told_with_the_command_that_makes_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "found.json"
    with pytest.raises(InputError, match=r"is not there; make it with: make it"):
        load(Found, path, "make it")
    path.write_text(text)
    with pytest.raises(InputError, match=r"is damaged .*; make it again with: make it"):
        load(Found, path, "make it")
