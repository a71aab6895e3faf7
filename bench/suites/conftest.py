"""Files of this folder are collected although their names start with bench_; eight host devices."""

from pathlib import Path

import pytest

from taskmoe.bench.serving import systems as serving

serving.use_host_devices(8)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Collect bench_*.py, once: a file that was named on the command line is collected anyway."""
    if not file_path.match("bench_*.py") or parent.session.isinitpath(file_path):
        return None
    module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
    return module
