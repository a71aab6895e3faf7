"""The one way to run a task in a process of its own: questions in, answers out, as JSON lines.

A process of its own, because some settings count only before JAX starts, because a compiler that
crashes takes its process along, and because a process keeps its speed as long as it lives. The
parent holds a `Worker`; the module that it starts ends in `serve`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Died(Exception):
    """A worker ended without an answer; the message is its exit code and the last that it said."""

    def __init__(self, code: int, log: str) -> None:
        said = [line.strip() for line in log.splitlines() if line.strip()]
        self.last = said[-1] if said else "it said nothing"
        super().__init__(f"ended with exit code {code}: {self.last[:300]}")


class Worker(contextlib.AbstractContextManager["Worker"]):
    """A process that answers questions; it is killed when the block ends.

    module: what the process runs, a module that calls `serve`. settings: environment variables, on
    top of this process's; None takes one away. tree: a checkout whose taskmoe the process uses
    instead of this one's.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        settings: Mapping[str, str | None] | None = None,
        tree: Path | None = None,
    ) -> None:
        environment: dict[str, str | None] = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_TRACEBACK_FILTERING": "off",  # so that the last line is the error
            "PYTHONPATH": os.pathsep.join(_paths(tree)),
            **(settings or {}),
        }
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=tree,
            env={name: value for name, value in environment.items() if value is not None},
        )

    def say(self, question: object) -> None:
        """Ask, without waiting for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `hear` tells how it died
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def hear(self) -> Any:
        """The next answer; Died where the process ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self.death()
        return json.loads(line)

    def ask(self, question: object) -> Any:
        """The answer to a question; Died where the process ended over it."""
        self.say(question)
        return self.hear()

    def finish(self) -> None:
        """There is no further question: let the process end by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, seconds: float | None = None) -> int:
        """Wait until the process has ended; its exit code, or subprocess.TimeoutExpired."""
        self.finish()
        return self._process.wait(seconds)

    def death(self) -> Died:
        """How the process ended, once it has."""
        code = self._process.wait()
        self._log.seek(0)
        return Died(code, self._log.read())

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self.end()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


def _paths(tree: Path | None) -> list[str]:
    """Where the process looks for modules: as this one does, or the tree's taskmoe in its stead."""
    paths = [path for path in sys.path if path]
    if tree is None:
        return paths
    return [str(tree / ".types"), *(p for p in paths if not Path(p, "taskmoe").is_dir())]


def serve(answer: Callable[[Any], Iterator[Any]]) -> int:
    """Answer every question on stdin, in order, with what `answer` yields, a line each.

    What libraries print to stdout goes to stderr, so that answers stay apart from it.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            for found in answer(json.loads(line)):
                print(json.dumps(found), file=answers, flush=True)
    return 0
