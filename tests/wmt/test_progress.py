"""A bar on a terminal, and lines beside it."""

import io
import re
import sys

import pytest

from taskmoe.cli.progress import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, stdout: io.StringIO) -> Terminal:
    """stderr, a terminal, beside what is given as stdout."""
    made = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(sys, "stdout", stdout)
    return made


def steps() -> None:
    with bar("training", "steps", total=60) as move:
        move(20, 60, "loss 3.125  900 tokens/s")
        move.print("step 20 [/of] 60")
        move(40, 60, "loss 2.250  900 tokens/s")


def test_lines_stand_above_the_bar_on_one_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    terminal = on_a_terminal(monkeypatch, out)
    steps()
    assert out.getvalue() == ""
    shown = terminal.getvalue()
    assert "training" in shown
    assert "40/60" in shown
    assert "loss 2.250  900 tokens/s" in shown
    assert "steps/s" not in shown.rpartition("40/60")[2]
    # The bar is wiped (ESC[2K) before the line is written in its place.
    before, line, _ = shown.partition("step 20 [/of] 60")
    assert line
    assert before.rindex("\x1b[2K") > before.rindex("training")


def test_lines_go_to_a_file_where_stdout_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = on_a_terminal(monkeypatch, out)
    steps()
    assert out.getvalue() == "step 20 [/of] 60\n"
    assert "step 20" not in terminal.getvalue()


def test_where_a_run_goes_on_is_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch, Terminal())
    with bar("training", "steps", total=5000) as move:
        move(4000, 5000)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "4000/5000 - steps/s" in shown
    assert not re.search(r"\d steps/s", shown)
