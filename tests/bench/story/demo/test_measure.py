"""`make demo` at its smallest: the report, its charts and its JSON."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image


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
