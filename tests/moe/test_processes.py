"""Expert parallelism over two processes: equal to one device, and no waiting for the dead."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from taskmoe.tests.processes import ended

WORKER = Path(__file__).with_name("process_worker.py")
#: A process whose peer has died ends with an error within this time.
STATED_SECONDS = 60


def start(*words: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ.copy()
    del env["JAX_COMPILATION_CACHE_DIR"]  # it is not made for two at a time
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(port), "2", str(i), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(2)
    ]


def errors(printed: str) -> dict[str, float]:
    return {name: float(e) for name, e in re.findall(r"^(\w+) ([\d.e+-]+)$", printed, re.MULTILINE)}


def test_two_processes_equal_one_device() -> None:
    for worker in start():
        printed, said = ended(worker, 0)
        found = errors(printed)
        assert set(found) == {"all_to_all", "ragged", "all_gather"}, printed + said
        assert max(found.values()) < 1e-5, found


def test_a_process_whose_peer_is_killed_ends_with_an_error_that_says_which() -> None:
    left, killed = start("die")
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    began = time.monotonic()
    _, said = left.communicate(timeout=STATED_SECONDS)
    assert left.returncode != 0
    assert time.monotonic() - began < STATED_SECONDS
    # Which of JAX's two notices comes first is chance: the broken connection or the missed beats.
    assert re.search(r"Task 1 heartbeat timeout|stopped sending heartbeats\):\s+1\b", said), said
