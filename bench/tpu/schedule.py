"""What the TPU compiler's dumps say about a kernel: its main loop's bundles, slots and spills.

libtpu writes, for each kernel, the VLIW bundles with their control targets and how many slots of
each unit every bundle fills. The flags and formats are undocumented: where files are missing or
read otherwise, `ScheduleError` says so in one line, and nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

from taskmoe.bench.tpu import inner_walk, regions
from taskmoe.cli.errors import InputError

#: One bundle: address, what control target it is, if any, and how deep in loops it lies.
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:(LH|LB|LE|PB|PF|CT)\s*)?:\s*((?:>\s*)*)")
_KERNEL_FILE = re.compile(r"^\d+-(?P<kernel>[\w.-]+?)(?:\.\d+)?-\d+-final_bundles\.txt$")
UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"
#: In the optimised HLO: a Mosaic kernel's instruction and the VMEM that it was given.
_CUSTOM_CALL = re.compile(
    r"%(?P<kernel>[\w.-]+?)(?:\.\d+)? = .*custom_call_target=\"tpu_custom_call\""
)
_VMEM = re.compile(
    r"used_scoped_memory_configs\":\[\{\"memory_space\":\"1\"[^}]*\"size\":\"(\d+)\""
)
_CYCLES = re.compile(r"\"estimated_cycles\":\"(\d+)\"")
#: What autodiff puts around the name of a kernel.
_DIFFERENTIATED = re.compile(r"^(?:transpose_|jvp_)+(?P<kernel>.+?)_+$")


#: A kernel without a grid: its blocks pass in a loop of its own, around branches that few take.
WALKS_BY_HAND = "taskmoe_exchange_ffn"
#: The kernel on the scalar unit that finds the visits of the grouped kernels.
VISITS = "taskmoe_visits"


class ScheduleError(InputError):
    """The compiler left no dump that this module can read."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel's schedule.

    kernel: name of the kernel
    bundles: VLIW bundles of the whole kernel
    main_bundles: bundles of its main loop: of the straight runs of bundles inside a loop, the one
      that fills most MXU slots, and the longest where no run fills any. Of a kernel that walks by
      hand, branches end them too
    filled: share of each unit's slots that the main loop fills, by the compiler's unit names
    spills: vector stores and loads in the main loop because registers did not suffice
    regions: of a grouped kernel or one that walks by hand, see `regions`; None for another
    walked: of a kernel of tokamax's that walks its blocks itself, see `inner_walk`
    """

    kernel: str
    bundles: int
    main_bundles: int
    filled: dict[str, float]
    spills: int
    regions: regions.Bundles | None = None
    walked: inner_walk.WalkBundles | None = None


def dump_flags(folder: Path) -> str:
    """What LIBTPU_INIT_ARGS must hold before JAX is imported for dumps to land in this folder."""
    only_last = "--xla_jf_dump_llo_pass_label_regex=final"  # a twentieth of the text
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {only_last}"


def plain_name(kernel: str) -> str:
    """The kernel's name without what autodiff puts around it."""
    match = _DIFFERENTIATED.match(kernel)
    return kernel if match is None else match["kernel"]


def read_schedules(folder: Path, kernels: set[str]) -> list[Schedule]:
    """The schedules of these kernels (their plain names), in compile order.

    Raises ScheduleError where the folder holds none of them, or files of another format.
    """
    found = []
    for path in sorted(folder.glob("*-final_bundles.txt")):
        match = _KERNEL_FILE.match(path.name)
        if match is None or plain_name(match["kernel"]) not in kernels:
            continue
        beside = sorted(folder.glob(f"{path.name.rsplit('-', 2)[0]}-*-{UTILIZATION}"))
        if len(beside) != 1:
            raise ScheduleError(f"the compiler wrote no slot utilization beside {path.name}")
        name = plain_name(match["kernel"])
        found.append(read_schedule(name, path.read_text(), beside[0].read_text()))
    if not found:
        raise ScheduleError(
            f"the compiler wrote no schedule of {', '.join(sorted(kernels)) or 'any kernel'}: "
            "this libtpu may not know the dump flags"
        )
    return found


def read_schedule(kernel: str, bundles: str, utilization: str) -> Schedule:
    """The schedule in the text of a final_bundles file and of its utilization file."""
    units, rows = _utilization(kernel, utilization)
    marks = [match for line in bundles.splitlines() if (match := _BUNDLE.match(line))]
    if len(marks) != len(rows):
        raise ScheduleError(
            f"the dump of {kernel} has {len(marks)} bundles but slots of {len(rows)}: "
            "its format is not the one known"
        )
    by_hand, walks_inside = kernel == WALKS_BY_HAND, inner_walk.is_walked(kernel)
    # Straight runs go from one control target to the next.
    targets = (
        i
        for i in range(1, len(marks))
        if marks[i][2] or (by_hand and "sbr.rel" in marks[i - 1].string)
    )
    runs = [
        range(start, end)
        for start, end in itertools.pairwise([0, *targets, len(marks)])
        if marks[start][3] or marks[end - 1][3]  # inside a loop
    ]
    mxu = list(units).index("MXU")
    whole = range(len(rows))
    main = max(runs or [whole], key=lambda run: (sum(rows[i][mxu] for i in run), len(run)))
    sums = map(sum, zip(*(rows[i] for i in main), strict=True))
    totals = dict(zip(units, sums, strict=True))
    bundle, depth = [], 0
    for mark, row in zip(marks, rows, strict=True):
        if not mark.string.startswith(
            "{}", mark.end()
        ):  # an empty one does not say how deep it lies
            depth = mark[3].count(">")
        bundle.append(regions.Bundle(mark.string, depth, row[mxu]))
    return Schedule(
        kernel=kernel,
        bundles=len(rows),
        main_bundles=len(main),
        filled={name: total / (units[name] * len(main)) for name, total in totals.items()},
        spills=sum(n for name, n in totals.items() if name.endswith((":SPILL", ":FILL"))),
        regions=None if walks_inside else _regions(kernel, bundle, main),
        walked=inner_walk.find(bundle) if walks_inside else None,
    )


def _regions(kernel: str, bundles: list[regions.Bundle], main: range) -> regions.Bundles | None:
    if kernel == VISITS:
        return regions.of_scalars(bundles)
    if kernel == WALKS_BY_HAND:
        return regions.of_loop(bundles, main)
    return regions.find(bundles) or regions.of_steps(bundles)


def _utilization(kernel: str, text: str) -> tuple[dict[str, int], list[list[int]]]:
    """Slots that each unit has, and what each bundle fills of them."""
    lines, broken = (
        text.splitlines(),
        f"the slot utilization of {kernel} is not of the known format",
    )
    try:
        names = [name.strip() for name in lines[1].split(",")]
        units = dict(zip(names, map(int, lines[2].split()), strict=True))
        rows = [list(map(int, line.split())) for line in lines[4:] if line.strip()]
    except (IndexError, ValueError):
        raise ScheduleError(broken) from None
    if "MXU" not in units or any(len(row) != len(names) for row in rows):
        raise ScheduleError(broken)
    return units, rows


def outside_cycles(hlo: str) -> int:
    """Cycles that the compiler estimates for what XLA runs around a program's Mosaic kernels."""
    entry = hlo[hlo.find("\nENTRY ") :]
    around = (line for line in entry.splitlines() if not _CUSTOM_CALL.search(line))
    return sum(int(cycles) for line in around for cycles in _CYCLES.findall(line))


def kernel_vmem_bytes(hlo: str) -> dict[str, int]:
    """VMEM of each Mosaic kernel in a program's optimised HLO; the largest of those of one name."""
    found: dict[str, int] = {}
    for line in hlo.splitlines():
        call, vmem = _CUSTOM_CALL.search(line), _VMEM.search(line)
        if call is not None:
            size = int(vmem[1]) if vmem is not None else 0
            name = plain_name(call["kernel"])
            found[name] = max(size, found.get(name, 0))
    return found
