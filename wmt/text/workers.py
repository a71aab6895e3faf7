"""Work in other processes, a bounded part of it at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")
_AHEAD = 2  # calls that wait for each worker


@contextlib.contextmanager
def workers(
    count: int, begin: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[Callable[[Callable[..., Result], Iterable[tuple[Any, ...]]], Iterator[Result]]]:
    """A function that runs calls in `count` processes and gives their results in order.

    begin: called with the arguments once in each process. The calls are taken from their iterable
    as workers become free, so that what they hold is never in memory all at once. With one worker
    all is done in this process.
    """
    if count == 1:
        begin(*arguments)
        yield lambda call, every: (call(*each) for each in every)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), _begin, (begin, arguments)
    )

    def run(call: Callable[..., Result], every: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        for each in every:
            waiting.append(pool.submit(call, *each))
            if len(waiting) > _AHEAD * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)  # killed, it could not tell its workers

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent answers
    begin(*arguments)
