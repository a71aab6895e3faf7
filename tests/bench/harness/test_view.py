"""A view is the same on the terminal, as Markdown, HTML and PNG; charts are whole or not there."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from taskmoe.bench.harness.view import Chart, Table, View, brief, draw, page, show, whole


def figure() -> Figure:
    found, axes = plt.subplots()
    axes.plot([1, 2, 4])
    return found


TABLE = Table("Speeds", ("way", "ms", "note"), [("a", "1.5", "x"), ("b", "", "y")], "Median.")
VIEW = View("It is fast.", "One size.", [TABLE], [Chart("speed", "Speeds", figure)], ["So."])


def test_the_terminal_has_tables_findings_and_the_answer_last(capsys: Any) -> None:
    show(VIEW, Console(width=80))
    said = capsys.readouterr().out
    assert said.splitlines()[-2:] == ["So.", "It is fast."]
    for word in ("Speeds", "1.5", "Median."):
        assert word in said


def test_markdown_brief_and_whole() -> None:
    assert "![Speeds](there/speed.png)" in brief(VIEW, "there")
    assert "| a | 1.5 | x |" in brief(VIEW, "there")
    assert "So." not in brief(VIEW, "there")
    for words in ("One size.", "It is fast.", "**Speeds**", "Median.", "So.", "(./speed.png)"):
        assert words in whole(VIEW, ".")


def test_columns_and_rows_of_a_table() -> None:
    few = TABLE.only(("ms", "way"), lambda row: row[0] == "a")
    assert (few.headings, few.rows) == (("ms", "way"), [("1.5", "a")])


def test_charts_are_drawn_whole_into_a_folder_that_was_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "of" / "speed.png"
    draw(VIEW, path.parent)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    assert not plt.get_fignums()

    def half_written(self: Figure, file: Any, **_: Any) -> None:
        file.write(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", half_written)
    with pytest.raises(OSError, match="no space"):
        draw(VIEW, path.parent)
    plt.close("all")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["speed.png"]


def test_a_page_has_everything_inside_and_escapes_what_could_be_markup() -> None:
    odd = Table("a < b", ("way", "ms"), [("<b>", "1.5")])
    text = page(View("So & so.", "", [odd], VIEW.charts, ["x > y"]), "Is it <fast>?")
    assert text.count('<img alt="Speeds" src="data:image/png;base64,') == 1
    assert "<title>Is it &lt;fast&gt;?</title>" in text
    assert "<td>&lt;b&gt;</td><td class=number>1.5</td>" in text
    for words in ("So &amp; so.", "<h2>a &lt; b</h2>", "x &gt; y"):
        assert words in text
    assert not plt.get_fignums()
