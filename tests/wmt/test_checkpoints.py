"""Checkpoints are whole or passed over, whatever happens to their files or to the process."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from taskmoe.cli.command_line import write_text
from taskmoe.cli.errors import InputError
from taskmoe.tests.wmt import support
from taskmoe.wmt.training.checkpoints import Checkpoints


def state(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "w": [jax.numpy.asarray(rng.standard_normal((5, 3)), np.float32)],
        "step": jax.numpy.int32(step),
    }


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def assert_restores(checkpoints: Checkpoints, step: int, notes: int) -> list[str]:
    found, restored, said = checkpoints.restore(state(0))
    assert found == step
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    assert len(said) == notes
    return said


def test_the_newest_is_restored_and_only_some_are_kept(three: Checkpoints) -> None:
    assert_restores(three, 3, notes=0)
    three.save(4, state(4))
    three.wait()
    assert three.steps() == [2, 3, 4]
    assert_restores(three, 4, notes=0)
    names = sorted(path.name for path in three.folder.iterdir())
    assert names == ["2", "2.crc", "3", "3.crc", "4", "4.crc"]


def test_an_empty_folder_gives_the_template_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new", keep=1)
    assert_restores(checkpoints, 0, notes=0)
    checkpoints.close()


def test_truncating_any_file_falls_back_and_says_so(three: Checkpoints) -> None:
    newest = three.folder / "3"
    tried = 0
    while True:  # names of the parts are other ones each time, and there may be one more or less
        three.save(3, state(3))
        three.wait()
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        if tried >= len(files):
            break
        path, tried = files[tried], tried + 1
        file = path.relative_to(newest)
        size = path.stat().st_size
        with path.open("r+b") as handle:
            handle.truncate(size // 2)
        (note,) = assert_restores(three, 2, notes=1)
        assert f"{three.folder}/3 is damaged ({file} has {size // 2} bytes, should have" in note
        assert (three.folder / "3.damaged").is_dir()
        assert three.steps() == [1, 2]
    assert tried > 3


def test_a_changed_byte_and_a_missing_file_are_noticed(three: Checkpoints) -> None:
    largest = max((three.folder / "3").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    next(path for path in (three.folder / "2").rglob("*") if path.is_file()).unlink()
    changed, missing = assert_restores(three, 1, notes=2)
    assert "has changed since it was written" in changed
    assert "is missing" in missing


def test_a_damaged_list_of_checksums_is_noticed(three: Checkpoints) -> None:
    (three.folder / "3.crc").write_text("{")
    (note,) = assert_restores(three, 2, notes=1)
    assert "3.crc is unreadable" in note


def test_a_checkpoint_without_checksums_never_finished(three: Checkpoints) -> None:
    (three.folder / "3.crc").unlink()
    (three.folder / "4.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(three.folder, keep=3)
    (note,) = assert_restores(again, 2, notes=1)
    assert "its writing was interrupted" in note
    assert not list(three.folder.glob("*tmp*"))
    again.close()


WRITER = """
import sys
from pathlib import Path
import numpy as np
from taskmoe.wmt.training.checkpoints import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
step = 0
while True:
    step += 1
    checkpoints.save(step, {"w": np.full((400, 1000), step, np.float32)})
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(support.ROOT / ".types")}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            finished = int(process.stdout.readline())
        time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
        finished = int((process.stdout.read().split() or [finished])[-1])
    checkpoints = Checkpoints(tmp_path, keep=2)
    step, restored, _ = checkpoints.restore({"w": np.zeros((400, 1000), np.float32)})
    checkpoints.close()
    assert step in (finished - 1, finished, finished + 1)  # writing goes on behind `save`
    np.testing.assert_array_equal(restored["w"], np.full((400, 1000), step))


def test_a_full_disk_is_one_line_and_leaves_what_is_whole(
    three: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(three.folder)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    words = r"step 4 cannot be written into .*: No space left on device; that of step 3 is whole"
    with pytest.raises(InputError, match=words):
        three.save(4, state(4))
    assert_restores(three, 3, notes=0)
    names = sorted(path.name for path in three.folder.iterdir())
    assert names == ["1", "1.crc", "2", "2.crc", "3", "3.crc"]


def test_a_write_that_fails_on_the_way_leaves_nothing_of_it(
    three: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: ... [os_error_code='28'] No space left on device")

    monkeypatch.setattr(three._checkpointer, "wait_until_finished", fail)
    with pytest.raises(InputError, match="No space left on device; that of step 3 is whole"):
        three.save(4, state(4))
    assert three.steps() == [1, 2, 3]
    assert not list(three.folder.glob("4*"))


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*file"):
            write_text(path, "new" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
