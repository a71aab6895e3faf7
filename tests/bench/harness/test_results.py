"""Results and charts are kept whole: written beside their place, then renamed there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from taskmoe.bench.harness.results import keep, save_figure

PNG = b"\x89PNG"


def _chart(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots()
    axes.plot(result["values"])
    return figure


def _files(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(json=folder / "of" / "result.json", png=folder / "of" / "result.png")


def test_keep_writes_both_files_into_a_folder_that_was_not_there(tmp_path: Path) -> None:
    a = _files(tmp_path)
    keep({"values": [1, 2, 4]}, _chart, a)
    assert json.loads(a.json.read_text()) == {"values": [1, 2, 4]}
    assert a.png.read_bytes().startswith(PNG)
    assert sorted(p.name for p in a.json.parent.iterdir()) == ["result.json", "result.png"]
    assert not plt.get_fignums()


def test_keep_writes_nothing_unasked(tmp_path: Path) -> None:
    keep({"values": [1]}, _chart, argparse.Namespace(json=None, png=None))
    assert not list(tmp_path.iterdir())


def test_a_chart_that_cannot_be_drawn_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = _files(tmp_path)
    keep({"values": [1, 2, 4]}, _chart, a)
    before = a.png.read_bytes()

    def half_written(self: Figure, file: Any, **_: Any) -> None:
        file.write(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", half_written)
    figure = _chart({"values": [3]})
    with pytest.raises(OSError, match="no space"):
        save_figure(figure, a.png)
    plt.close(figure)
    assert a.png.read_bytes() == before
    assert sorted(p.name for p in a.png.parent.iterdir()) == ["result.json", "result.png"]
