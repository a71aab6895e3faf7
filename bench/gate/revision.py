"""Another revision of this checkout, in a work tree of its own for as long as it is needed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from taskmoe.bench.harness import machine
from taskmoe.cli.errors import InputError

HERE = Path(__file__).resolve().parent
#: Where the process that times workloads lies in a checkout, now and in older revisions.
WORKERS = {
    "bench/gate/worker.py": "taskmoe.bench.gate.worker",
    "bench/timed_worker.py": "taskmoe.bench.timed_worker",
}


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[tuple[Path, str]]:
    """A folder with the revision's files, and the module there that times workloads.

    The folder is removed at the end, also where the block is interrupted. Raises InputError where
    this is no checkout, or the revision is none of it or has nothing to time.
    """
    root = _git("rev-parse", "--show-toplevel")
    if root is None:
        raise InputError("--against needs a git checkout of taskmoe, which this is not")
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        raise InputError(f"--against: {root} has no revision {revision!r}")
    with tempfile.TemporaryDirectory(prefix="taskmoe-revision-") as folder:
        tree = Path(folder, "tree")
        try:
            if _git("worktree", "add", "--detach", str(tree), commit) is None:
                raise InputError(f"--against: git cannot check {revision!r} out into {tree}")
            modules = [module for path, module in WORKERS.items() if (tree / path).is_file()]
            if not modules:
                raise InputError(f"--against: {revision!r} is older than the workloads of check")
            yield tree, modules[0]
        finally:
            _git("worktree", "remove", "--force", str(tree))
            _git("worktree", "prune")


def _git(*words: str) -> str | None:
    """What git says in this checkout, or None where it fails."""
    return machine.said_by("git", *words, cwd=HERE, seconds=None)
