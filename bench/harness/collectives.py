"""What a compiled step exchanges between devices, counted in its HLO and timed by the profiler.

Counting is static: instructions of the optimised HLO. Timing reads a profiler trace, in which each
device's thread reports each instruction it ran. A collective starts on every device when that
device arrives and ends when the data are there, so its time has two parts:

    waiting    until the last device has arrived: devices that are out of step, or share cores
    transfer   from then on: what the exchange itself takes
"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

COLLECTIVES = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)

#: Bytes of an element of what may travel.
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVE = re.compile(
    rf"= (?P<result>.+?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<form>-start|-done|)\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """An instruction of an optimised HLO text. form: "-start", "-done" or ""; result: its shape."""

    kind: str
    form: str
    result: str
    line: str

    @property
    def bytes(self) -> int:
        """Of what it returns on one device; ValueError for an element of unknown width."""
        size = 0
        for dtype, shape in _ARRAY.findall(self.result):
            if dtype not in WIDTHS:
                raise ValueError(f"element of unknown width in a collective: {self.line[:200]}")
            size += WIDTHS[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        return size


def collectives(hlo: str) -> list[Collective]:
    """All of an optimised HLO text."""
    matches = ((_COLLECTIVE.search(line), line.strip()) for line in hlo.splitlines())
    return [Collective(m["kind"], m["form"], m["result"], line) for m, line in matches if m]


def count_collectives(hlo: str) -> dict[str, int]:
    """Instructions of each kind of collective in an optimised HLO text; those that occur only.

    An asynchronous pair (start and done) counts once.
    """
    found = Counter(one.kind for one in collectives(hlo) if one.form != "-done")
    return {kind: found[kind] for kind in COLLECTIVES if kind in found}


def collective_bytes(hlo: str) -> dict[str, int]:
    """Bytes of what each kind of collective returns on one device, those that occur only.

    Of an asynchronous pair, what its end returns. Raises ValueError as `Collective.bytes`.
    """
    found: Counter[str] = Counter()
    for one in collectives(hlo):
        if one.form != "-start":
            found[one.kind] += one.bytes
    return dict(found)


class Communication(NamedTuple):
    """Where a step's time went, means over devices and runs.

    step_ms: from a device's first instruction to its last.
    transfer_share, waiting_share: of that, in [0, 1].
    """

    step_ms: float
    transfer_share: float
    waiting_share: float


class _Event(NamedTuple):
    name: str
    start: float
    end: float


def profile_communication(run: Callable[[], Any]) -> Communication:
    """Run a compiled step under the profiler and add up its collectives.

    run: starts one step; called once before and three times under the profiler, one at a time.
    Raises RuntimeError where the profiler saw no instruction of any device.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(run())
        traces = sorted(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(traces[0]))
    with warnings.catch_warnings():
        # Python 3.13 warns of jaxlib's iterators; made an error, that would end the process.
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        return summarise(_device_events(data))


def _device_events(data: Any) -> dict[Any, dict[int, list[_Event]]]:
    """Run -> device -> instructions in order of time, in nanoseconds."""
    found: dict[Any, dict[int, list[_Event]]] = defaultdict(lambda: defaultdict(list))
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats, end = dict(event.stats), event.start_ns + event.duration_ns
                if "hlo_op" in stats and "device_ordinal" in stats:
                    events = found[stats["run_id"]][int(stats["device_ordinal"])]
                    events.append(_Event(str(stats["hlo_op"]), event.start_ns, end))
    for devices in found.values():
        for events in devices.values():
            events.sort(key=lambda e: e.start)
    return found


def summarise(runs: dict[Any, dict[int, list[_Event]]]) -> Communication:
    """Add up the collectives of all runs.

    The i-th time that an instruction ran on one device met the i-th time on every other.
    Raises RuntimeError where there is no run.
    """
    whole = waiting = transfer = 0.0
    steps = 0
    for devices in runs.values():
        meetings: dict[tuple[str, int], list[_Event]] = defaultdict(list)
        for events in devices.values():
            whole += max(e.end for e in events) - min(e.start for e in events)
            steps += 1
            seen: dict[str, int] = defaultdict(int)
            for event in events:
                if is_collective(event.name):
                    meetings[event.name, seen[event.name]].append(event)
                    seen[event.name] += 1
        for events in meetings.values():
            last = max(e.start for e in events)
            for event in events:
                pause = min(last, event.end) - event.start
                waiting += pause
                transfer += event.end - event.start - pause
    if not whole:
        raise RuntimeError("the profiler reported no instruction of any device")
    return Communication(whole / steps / 1e6, transfer / whole, waiting / whole)


def is_collective(instruction: str) -> bool:
    """Whether an HLO instruction's name, such as `all-to-all.3`, tells of a collective."""
    name = re.sub(r"[.\d]+$", "", instruction).removesuffix("-start").removesuffix("-done")
    return name.replace("_", "-") in COLLECTIVES
