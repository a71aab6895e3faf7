"""A worker answers in order, keeps what libraries print apart, and dies with a note."""

import sys
from pathlib import Path
from typing import Any

import pytest

from taskmoe.bench.harness.worker import Died, Worker

CHILD = """
import os, sys
from taskmoe.bench.harness.worker import serve

def answer(question):
    print("a library says hello")
    if question == "die":
        print("out of registers", file=sys.stderr)
        os._exit(3)
    yield from question["parts"]
    yield {"flags": os.environ.get("XLA_FLAGS"), "words": sys.argv[1:]}

sys.exit(serve(answer))
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "child_of_test_worker.py").write_text(CHILD)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "child_of_test_worker"


def test_answers_come_in_order_and_the_process_ends_when_it_may(child: str) -> None:
    last: dict[str, Any] = {"flags": None, "words": ["a", "b"]}
    with Worker(child, ["a", "b"], {"XLA_FLAGS": None}) as worker:
        worker.say({"parts": [1, 2]})
        assert [worker.hear() for _ in range(3)] == [1, 2, last]
        assert worker.ask({"parts": []}) == last
        assert worker.end(60) == 0


def test_a_death_is_told_with_its_code_and_last_words(child: str) -> None:
    with Worker(child) as worker:
        with pytest.raises(Died, match=r"^ended with exit code 3: out of registers$"):
            worker.ask("die")
        assert worker.end() == 3
