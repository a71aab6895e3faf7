"""Training on several devices and processes: a mesh of data x expert, and who holds what on it.

Every device has its own sentences. Expert weights lie over the axis "expert", all else is held
everywhere; XLA adds the gradients up. Process 0 alone writes files, into a folder that all see.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.cli.errors import InputError
from taskmoe.moe.exchange import bytes_sent
from taskmoe.moe.mesh import has_ragged
from taskmoe.moe.parameters import EXPERT_PARAMS
from taskmoe.moe.travel import Peers
from taskmoe.wmt.config import ModelConfig, TrainConfig
from taskmoe.wmt.text.data import Batch
from taskmoe.wmt.training.lost_peers import report_in_one_line

AXES = ("data", "expert")
#: Says in `agree_on` why a process cannot go on.
FAILED = "failed"


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes of a run; call it before any device is used.

    All None: JAX finds them by itself on a cluster that it knows (SLURM, Kubernetes, TPU pods, Open
    MPI). Raises InputError where they cannot be found or joined.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and any(part is not None for part in given):
        raise InputError(
            "--coordinator, --num-processes and --process-id go together, got "
            f"{coordinator}, {num_processes}, {process_id}"
        )
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise InputError(f"--process-id must be in [0, {num_processes}), got {process_id}")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise InputError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"cannot join the other processes: {error}") from None
    report_in_one_line()


def make_mesh(data: int | None = None, expert: int = 1) -> Mesh | None:
    """A mesh of data x expert over all devices of all processes; None where that is one device.

    data: None is as many as there are. Raises InputError where the sizes do not fit the devices; a
    single process may leave devices unused.
    """
    devices = jax.devices()
    if expert < 1 or (data is not None and data < 1):
        raise InputError(f"mesh sizes must be at least 1, got data={data}, expert={expert}")
    if data is None:
        data, left = divmod(len(devices), expert)
        if left or not data:
            raise InputError(f"expert={expert} must divide the number of devices, {len(devices)}")
    size = data * expert
    if size > len(devices) or (size < len(devices) and jax.process_count() > 1):
        raise InputError(
            f"a mesh of data={data} x expert={expert} does not fit {len(devices)} devices"
        )
    if size == 1:
        return None
    return Mesh(np.array(devices[:size]).reshape(data, expert), AXES)


def check_mesh(
    mesh: Mesh | None, model_config: ModelConfig, config: TrainConfig | None = None
) -> None:
    """Raise InputError where experts, or the sentences of a part of a batch, do not divide."""
    if mesh is None:
        return
    expert = mesh.shape["expert"]
    mixtures = any(model_config.moe(side) for side in ("encoder", "decoder"))
    if mixtures and model_config.num_experts % expert:
        raise InputError(
            f"num_experts={model_config.num_experts} must be a multiple of the mesh's "
            f"expert={expert}"
        )
    if config is None:
        return
    counts = [config.batch_rows(length) // config.accumulate for length in config.buckets]
    for count in counts:
        if count % mesh.size:
            words = f"{count} sentences cannot be shared evenly by {mesh.size} devices; "
            words += f"a new run can have row_multiple={mesh.size}"
            fewer = [n for n in range(expert, mesh.size, expert) if math.gcd(*counts) % n == 0]
            if fewer and jax.process_count() == 1:  # several processes leave no device unused
                words += f", and any run --data-parallel {fewer[-1] // expert}"
            raise InputError(words)


def shardings(tree: Any, num_experts: int, mesh: Mesh | None) -> Any:
    """Where each leaf of a training state (arrays or shapes) lies; None without a mesh."""
    if mesh is None:
        return None

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = [getattr(key, "key", None) for key in path]
        of_expert = "moe" in names and any(name in EXPERT_PARAMS for name in names)
        split = of_expert and leaf.ndim > 0 and leaf.shape[0] == num_experts
        return NamedSharding(mesh, P("expert") if split else P())

    return jax.tree_util.tree_map_with_path(place, tree)


def spread_model(params: Any, config: ModelConfig, mesh: Mesh | None) -> Any:
    """A model's parameters on a mesh: the experts over its expert axis, all else everywhere."""
    if mesh is None:
        return params
    return jax.device_put(params, shardings(params, config.num_experts, mesh))


def exchange_table(
    config: ModelConfig, mesh: Mesh | None, strategy: str, batches: Mapping[str, tuple[int, int]]
) -> list[tuple[str, str, str, float]]:
    """(batch, side, strategy taken, MB that a device sends for a layer, there and back).

    batches: name -> (sentences, positions of each). Empty where no rows travel. Gradients travel
    the same way, so that a training step sends twice as much.
    """
    if mesh is None or mesh.shape["expert"] == 1:
        return []
    device = mesh.devices.flat[0]
    ragged = has_ragged(device.platform, device.device_kind, mesh.size)
    peers = Peers(mesh.shape["expert"], ragged)
    found = []
    for name, (sentences, positions) in batches.items():
        for side in ("encoder", "decoder"):
            mixture = config.moe(side)
            if mixture is None:
                continue
            whole = mixture.routing != "token"  # sentences travel, not tokens
            units = -(-sentences * (1 if whole else positions) // mesh.size)
            width = config.d_model * (positions if whole else 1)
            taken, sent = bytes_sent(strategy, mixture, units, peers, 4, width)
            found.append((name, side, taken, sent / 1e6))
    return found


def share(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch on the mesh, from each process's part of its rows."""
    if mesh is None:
        return batch
    by_row = NamedSharding(mesh, P(AXES))
    return Batch(*(jax.make_array_from_process_local_data(by_row, part) for part in batch))


def to_host(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, whole, on every process."""

    def whole(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def is_writer() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Wait until every process is here; what: a name of the place, for error messages."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree_on(settings: Mapping[str, Any]) -> None:
    """Compare what the processes were given; all of them call this before they do anything else.

    settings: name -> what JSON can hold; `{FAILED: message}` of a process that cannot go on. Raises
    InputError on every process that names the first difference, or the failure.
    """
    if jax.process_count() == 1:
        if FAILED in settings:
            raise InputError(settings[FAILED])
        return
    mine = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    every = multihost_utils.process_allgather(padded)
    told = [
        json.loads(row[:size].tobytes()) for row, size in zip(every, sizes.tolist(), strict=True)
    ]
    for number, theirs in enumerate(told):
        if FAILED in theirs:
            mine_too = number == jax.process_index()
            raise InputError(("" if mine_too else f"process {number}: ") + theirs[FAILED])
    for number, theirs in enumerate(told):
        for name in (*told[0], *(theirs.keys() - told[0].keys())):
            a, b = told[0].get(name), theirs.get(name)
            if a != b:
                raise InputError(
                    f"the processes disagree: {name} is {a!r} in process 0 and {b!r} in process "
                    f"{number}; start all of them with the same command, text and version"
                )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Where a block before `agree_on` fails on one process, the others learn of it."""
    try:
        yield
    except (InputError, OSError) as error:
        agree_on({FAILED: str(error)})
        raise AssertionError("agree_on has raised") from error


def agree(value: int) -> int:
    """Process 0's value, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
