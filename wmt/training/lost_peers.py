"""A run whose other process died says so in one line, instead of by a C++ stack.

JAX ends a process whose peer is gone from a thread of its own, by an abort with a report that no
handler can keep back. So the standard error of a run of several processes goes through a small
process that leaves that report out.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import jax

SAID = (
    "another process of this run ended, so this one ends too; look there for the reason. "
    "Checkpoints are whole: the same commands go on from the newest"
)
#: Seconds that a process with an error waits for the others before it ends without them.
PATIENCE_S = 5.0
#: How the report begins: glog's line of an error or a crash, in one of these files.
_REPORT = (
    r"[WEF]\d{4} .*(coordination_service|distributed_runtime|client\.h:|preemption_sync_\S+ Failed)"
)
#: Of errors that compiled code raises where a peer is gone.
_WORDS = ("gloo", "connection reset", "connection closed", "coordination service", "heartbeat")
_FILTER = f"""
import re, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
report = re.compile({_REPORT!r}.encode())
lost = False
for line in sys.stdin.buffer:
    lost = lost or bool(report.match(line))
    if not lost:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
if lost:
    sys.stderr.write({SAID!r} + "\\n")
"""


def report_in_one_line() -> None:
    """Send what this process and its libraries print to stderr through the filter, from now on."""
    passing = subprocess.Popen([sys.executable, "-S", "-c", _FILTER], stdin=subprocess.PIPE)
    assert passing.stdin is not None
    sys.stderr.flush()
    os.dup2(passing.stdin.fileno(), 2)
    passing.stdin.close()
    # It ends with this process, and is not waited for.
    passing.returncode = 0


@contextlib.contextmanager
def left_at_once() -> Iterator[None]:
    """End the process where what fails in the block is that another process of the run is gone.

    A tidy end would wait for that process.
    """
    try:
        yield
    except Exception as error:
        words = str(error).lower()
        if jax.process_count() > 1 and any(word in words for word in _WORDS):
            print(SAID, file=sys.stderr, flush=True)
            os._exit(1)
        raise


def end_soon(code: int) -> int:
    """The exit code, which the process ends with soon where others keep it from a tidy end.

    JAX ends processes together: one whose error the others do not share would wait for them, and
    they for it.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        ending = threading.Timer(PATIENCE_S, os._exit, (code,))
        ending.daemon = True
        ending.start()
    return code
