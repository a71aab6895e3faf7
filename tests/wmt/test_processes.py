"""Runs of one process and of two: alike, stopped by signals, given different things, bereft."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from taskmoe.tests.processes import ended
from taskmoe.tests.wmt import support
from taskmoe.wmt.training import lost_peers

SIZES = ["d_model=16", "d_ff=16", "num_heads=2", "num_experts=4", "vocab_size=330"]
TRAINING = ["batch_tokens=512", "buckets=[16]", "learning_rate=0.01", "checkpoint_every=4"]
#: The processes that a test began.
BEGUN: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _none_goes_on() -> Iterator[None]:
    """A test that fails leaves no process and no open pipe to the next one."""
    yield
    while BEGUN:
        with BEGUN.pop() as process:
            process.kill()


def start(data: Path, workdir: Path, steps: int | str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "taskmoe.wmt", "train", "--data", str(data)]
    command += ["--workdir", str(workdir), "--steps", str(steps), "--encoder", "token"]
    command += ["--cache", str(data / "cache")]
    for item in SIZES + TRAINING:
        command += ["--set", item]
    command += more
    env = os.environ | {"PYTHONPATH": str(support.ROOT / ".types"), "JAX_PLATFORMS": "cpu"}
    # A device for each process, as a process without the tests' settings has.
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    if "--coordinator" in more:
        del env["JAX_COMPILATION_CACHE_DIR"]  # it is not made for two at a time
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    BEGUN.append(process)
    return process


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    return [ended(process, 0)[0] for process in processes]


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Read what the process prints up to a line that begins so."""
    assert process.stdout is not None
    assert any(said.startswith(line) for said in process.stdout), process.communicate()[1]


def ends(process: subprocess.Popen[str], code: int) -> str:
    """The one line on stderr of a process that ends with this code."""
    (line,) = ended(process, code, timeout=60)[1].splitlines()
    return line


def together() -> list[str]:
    """Arguments of two processes up to the number of the process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]


def trained(workdir: Path) -> bytes:
    return (workdir / "model" / "params.safetensors").read_bytes()


def losses(workdir: Path) -> dict[int, float]:
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def test_two_processes_train_as_one_does_and_one_goes_on_from_two(tmp_path: Path) -> None:
    data = support.write_folder(tmp_path / "data")
    shared = ["--expert-parallel", "2", *together()]
    two, one = tmp_path / "two", tmp_path / "one"
    pair = (start(data, two, 8, *shared, str(i)) for i in range(2))
    said, silent, alone = finish(*pair, start(data, one, 12))
    assert "2 devices in 2 processes: data 1 x expert 2" in said
    assert "step 8" in said
    assert "step" not in silent
    # Three processes wanted the text at once, and one prepared it.
    assert len(list(data.glob("cache/sets/[!.]*"))) == 1
    assert (said + alone).count("text prepared in ") <= 1
    assert (said + alone).count("text from ") >= 1
    want = losses(one)
    for step in (4, 8):
        np.testing.assert_allclose(losses(two)[step], want[step], rtol=1e-4)
    # One device goes on with the experts that two processes shared; a fresh start is not that.
    (said,) = finish(start(data, two, 12))
    assert "resuming at step 8 of 12" in said
    np.testing.assert_allclose(losses(two)[12], want[12], rtol=1e-4)
    assert abs(want[4] - want[12]) > 1e-2


SELDOM = ["--set", "checkpoint_every=1000"]


def test_a_signal_at_any_moment_keeps_the_step_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path,
) -> None:
    data = support.write_folder(tmp_path / "data")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    reference = start(data, whole, 60, *SELDOM)
    for moment, told, code in (
        ("vocabulary", signal.SIGTERM, 143),
        ("step 20", signal.SIGTERM, 143),
        ("step 4", signal.SIGINT, 130),
    ):
        process = start(data, stopped, 60, *SELDOM)
        wait_for(process, moment)
        process.send_signal(told)
        said = ends(process, code)
        assert said.startswith("SIGTERM: " if told == signal.SIGTERM else "interrupted: ")
        assert said.endswith("; the same command goes on")
    finish(reference)
    (resumed,) = finish(start(data, stopped, 60, *SELDOM))
    assert "resuming at step 4" in resumed
    assert trained(stopped) == trained(whole)


def test_two_processes_stop_together_whichever_was_told_and_go_on_bit_for_bit(
    tmp_path: Path,
) -> None:
    data = support.write_folder(tmp_path / "data")

    def pair(workdir: Path) -> list[subprocess.Popen[str]]:
        shared = ["--expert-parallel", "2", *SELDOM, *together()]
        return [start(data, workdir, 200, *shared, str(i)) for i in range(2)]

    finish(*pair(tmp_path / "whole"))
    workdir = tmp_path / "stopped"
    for told, moment in ((1, "step 20"), (0, "step 6")):
        processes = pair(workdir)
        wait_for(processes[0], moment)
        processes[told].send_signal(signal.SIGTERM)
        first, second = (ends(process, 143) for process in processes)
        assert first == second
        assert re.match(r"SIGTERM: step \d+ of 200 is kept in ", first)
    processes = pair(workdir)
    wait_for(processes[0], str(data))  # before it takes a step
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes[1], 143).startswith("SIGTERM: ")
    processes[0].communicate(timeout=100)
    assert processes[0].returncode in (1, 143)
    finish(*pair(workdir))
    assert trained(workdir) == trained(tmp_path / "whole")


def runs(script: str) -> tuple[int, str]:
    """The exit code and stderr of a Python that runs these lines."""
    env = os.environ | {"PYTHONPATH": str(support.ROOT / ".types"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=50
    )
    return done.returncode, done.stderr


def test_a_second_signal_ends_at_once() -> None:
    script = (
        "import signal, sys, time\n"
        "from taskmoe.wmt.training.stopping import stopping\n"
        "with stopping() as stop:\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    assert stop() == signal.SIGTERM\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert runs(script) == (143, "told twice: ended at once\n")


@pytest.mark.parametrize("waits", ["time.sleep(60)", "pass", "gc.collect(); time.sleep(60)"])
def test_a_signal_in_a_finaliser_ends_a_run_that_takes_no_steps(waits: str) -> None:
    # A garbage collector's callback, as JAX has one, is where a stopped run met a signal.
    script = (
        "import gc, signal, sys, time\n"
        "from taskmoe.wmt.training.stopping import Stopped, ending_at_once\n"
        "class Told:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "hook = sys.unraisablehook\n"
        "try:\n"
        "    with ending_at_once('all is kept'):\n"
        "        Told()\n"
        f"        {waits}\n"
        "except Stopped as stopped:\n"
        "    assert sys.unraisablehook is hook\n"
        "    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL\n"
        "    time.sleep(0.1)  # no alarm rings behind the block\n"
        "    print(stopped, file=sys.stderr)\n"
        "    sys.exit(stopped.code)\n"
    )
    assert runs(script) == (143, "SIGTERM: all is kept\n")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (["--set", "learning_rate=0.02"], "learning_rate is 0.01 in process 0 and 0.02 in"),
        (["--steps", "9"], "steps is 8 in process 0 and 9 in process 1"),
        (["--data", "{more}"], "text of de-en is '"),
        (["--expert-parallel", "2"], "mesh is [2, 1] in process 0 and [1, 2] in process 1"),
        (["--data", "/nowhere"], "data folder /nowhere is not there"),
    ],
    ids=["rate", "steps", "text", "mesh", "failure"],
)
def test_processes_that_were_given_different_things_end_before_they_train(
    tmp_path: Path, theirs: list[str], message: str
) -> None:
    data = support.write_folder(tmp_path / "data")
    more = support.write_folder(tmp_path / "more")
    for file in more.glob("train.*"):
        file.write_text(file.read_text() + "one more\n")
    theirs = [word.format(more=more) for word in theirs]
    ids, workdir = together(), tmp_path / "w"
    pair = [start(data, workdir, 8, *ids, "0"), start(data, workdir, 8, *ids, "1", *theirs)]
    for process in pair:
        assert message in ends(process, 2)
    assert not workdir.exists()


def test_what_process_0_alone_finds_ends_both(tmp_path: Path) -> None:
    data = support.write_folder(tmp_path / "data")
    small = ["--set", "vocab_size=20", *together()]
    for process in [start(data, tmp_path / "w", 8, *small, str(i)) for i in range(2)]:
        assert "vocab_size=20 does not fit this text" in ends(process, 2)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_loses_the_other_says_so_in_one_line(tmp_path: Path, killed: int) -> None:
    data = support.write_folder(tmp_path / "data")
    shared = ["--expert-parallel", "2", *SELDOM, *together()]
    pair = [start(data, tmp_path / "w", 100_000, *shared, str(i)) for i in range(2)]
    wait_for(pair[0], "step 20")
    pair[killed].kill()
    left = pair[1 - killed]
    _, errors = left.communicate(timeout=200)
    assert left.returncode != 0
    assert errors == lost_peers.SAID + "\n"
    pair[killed].communicate()
