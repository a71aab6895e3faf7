"""How a layer lies on a mesh: which axes carry the batch, the experts, the hidden units of each.

    mesh = jax.make_mesh((2, 2, 2, 2), ("data", "fsdp", "expert", "tensor"))
    axes = moe.MeshAxes(batch=("data", "fsdp"), hidden="tensor")
    y, metrics = moe.apply(params, config, x, mesh=mesh, axes=axes)

Inside the layer sequences are spread over the batch's axes and the experts', experts over theirs,
and hidden units over their own; each device multiplies its share of every hidden activation, and
the partial results are added up. Everything else is the same on all devices.

Inside an outer `jax.shard_map` the axes that are manual there have already been cut: x and the
parameters are what one of its devices holds, and the layer cuts along the other axes only.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from taskmoe.kernels import Quantized
from taskmoe.kernels.platforms import CHIPS
from taskmoe.kernels.quantized import with_scales
from taskmoe.moe.config import MoEConfig

#: The experts' axis unless another is named.
EXPERT_AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """What the axes of a mesh are for; each is a name, several names, or nothing.

    batch: of the sequences, beside the experts' axis, over which they are always spread inside the
      layer. None is every axis but those of `hidden` and those that are manual already.
    expert: one name, the axis over which experts are spread and rows travel.
    hidden: over which the hidden units F of every expert are spread (tensor parallelism).
    """

    batch: str | tuple[str, ...] | None = None
    expert: str | None = EXPERT_AXIS
    hidden: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "hidden"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        named = (*_names(self.batch), *_names(self.hidden))
        if len(set(named)) != len(named) or self.expert in _names(self.hidden):
            raise ValueError(f"axes must name an axis for one purpose only, got {self}")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layer's place on a mesh.

    mesh: for `jax.shard_map`. batch: axes that sequences are spread over, the experts' included.
    expert, hidden: as in `MeshAxes`. free: axes that are not manual yet. platform, kind: of the
    devices.
    """

    mesh: Mesh | AbstractMesh
    batch: tuple[str, ...]
    expert: str | None
    hidden: tuple[str, ...]
    free: tuple[str, ...]
    platform: str
    kind: str

    @property
    def ragged(self) -> bool:
        """Whether the devices have `lax.ragged_all_to_all`."""
        return has_ragged(self.platform, self.kind, self.mesh.size)

    @property
    def peers(self) -> int:
        """Devices that the experts are spread over."""
        return 1 if self.expert is None else self.mesh.shape[self.expert]

    @property
    def batch_parts(self) -> int:
        """Parts that the layer cuts a batch into."""
        return math.prod(self.mesh.shape[name] for name in self._still(self.batch))

    @property
    def explicit(self) -> bool:
        """Whether shardings are part of the types."""
        return AxisType.Explicit in self.mesh.axis_types

    def of_batch(self) -> PartitionSpec:
        """How an array that begins with the batch is cut."""
        return PartitionSpec(self._still(self.batch) or None)

    def of_params(self, params: Any) -> dict[str, Any]:
        """How the parameters are cut."""
        expert = self._still(() if self.expert is None else (self.expert,)) or None
        return _param_specs(params, expert, self._still(self.hidden) or None)

    def _still(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.free)


def has_ragged(platform: str, kind: str, devices: int) -> bool:
    """Whether so many devices have `lax.ragged_all_to_all`.

    CPUs have none, and TPU v5e does not compile it where messages take more than one hop: on slices
    of more than 4 x 4 chips, tried with libtpu 0.0.42.
    """
    return platform != "cpu" and not (kind == CHIPS["v5e"] and devices > 16)


def param_specs(params: Any, axes: MeshAxes | None = None) -> dict[str, Any]:
    """How parameters lie on a mesh: experts over their axis, hidden units over theirs.

    Returns a `PartitionSpec` for each, or a `Quantized` of two.
    """
    axes = axes or MeshAxes()
    return _param_specs(params, axes.expert, _names(axes.hidden) or None)


def _param_specs(params: Any, expert: Any, hidden: Any) -> dict[str, Any]:
    into, out = PartitionSpec(expert, None, hidden), PartitionSpec(expert, hidden)
    if hidden is None:
        into = out = PartitionSpec(expert)
    one = PartitionSpec(expert) if hidden is None else PartitionSpec(expert, hidden)
    cut = {"w_in": into, "w_gate": into, "w_out": out}
    cut |= {"b_in": one, "b_gate": one, "b_out": PartitionSpec(expert)}
    if hidden is not None:  # every device has the shared expert
        into, out = PartitionSpec(None, hidden), PartitionSpec(hidden)
        cut |= {"shared_in": into, "shared_gate_in": into, "shared_out": out}
    specs = {name: cut.get(name, PartitionSpec()) for name in params}
    return {name: _with_scales(params[name], name, spec, hidden) for name, spec in specs.items()}


def _with_scales(w: Any, name: str, spec: PartitionSpec, hidden: Any) -> Any:
    """How a matrix is cut; its scales [E, K/block, 1, N] beside it, where it is quantised."""
    if not isinstance(w, Quantized):
        return spec
    scales = spec
    if hidden is not None and name != "w_out":
        scales = PartitionSpec(spec[0], None, None, hidden)
    elif hidden is not None and w.blocks == 1:  # the hidden units of a column share one
        scales = PartitionSpec(spec[0])
    return with_scales(w, spec, scales)


def find_layout(
    mesh: Mesh | AbstractMesh | None,
    axes: MeshAxes | None,
    config: MoEConfig,
    params: Any,
    x: jax.Array,
) -> Layout | None:
    """Where the layer runs: on this mesh, the one in use, or that of an explicit x; None for none.

    A mesh that nobody gave, with axes that nobody gave, counts only if it has the experts' axis, or
    if x is explicitly sharded on it: then sequences stay where they are, and every device has all
    experts.
    ValueError where the axes do not fit the mesh or the configuration.
    """
    wanted, given = axes or MeshAxes(), mesh is not None
    current = jax.sharding.get_abstract_mesh()
    manual = _manual(current)
    if mesh is None or manual:
        mesh = current
    if mesh.empty and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
        mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return None
    free = tuple(name for name in mesh.axis_names if name not in manual)
    if not given and axes is None and wanted.expert not in mesh.axis_names:
        return _where_x_is(mesh, free, x)
    if not given and wanted.expert in manual and params["w_in"].shape[0] == config.num_experts:
        return None  # inside the caller's own shard_map, and every device has all experts
    _check(mesh, wanted, config)
    hidden = _names(wanted.hidden)
    _check_scales(params["w_out"], math.prod(mesh.shape[name] for name in hidden if name in free))
    batch = _names(wanted.batch)
    if wanted.batch is None:
        batch = tuple(name for name in free if name not in hidden)
    if wanted.expert is not None and wanted.expert not in batch:
        batch = (*batch, wanted.expert)
    return Layout(mesh, batch, wanted.expert, hidden, free, *_devices(mesh))


def check_mesh(mesh: Any, axes: Any) -> None:
    """TypeError unless these are what `apply` takes."""
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}")
    if axes is not None and not isinstance(axes, MeshAxes):
        raise TypeError(f"axes must be a MeshAxes or None, got {type(axes).__name__}")


def cut_already(axes: MeshAxes | None) -> tuple[int, int]:
    """Devices of the caller's own `jax.shard_map` over which experts, and hidden units, lie."""
    wanted, current = axes or MeshAxes(), jax.sharding.get_abstract_mesh()
    manual = _manual(current)
    experts, hidden = (
        math.prod(current.shape[name] for name in _names(names) if name in manual)
        for names in (wanted.expert, wanted.hidden)
    )
    return experts, hidden


def _where_x_is(mesh: Any, free: tuple[str, ...], x: jax.Array) -> Layout | None:
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    batch = _names(sharding.spec[0])
    return Layout(mesh, batch, None, (), free, *_devices(mesh)) if batch else None


def _check(mesh: Any, axes: MeshAxes, config: MoEConfig) -> None:
    for purpose in ("expert", "batch", "hidden"):
        for name in _names(getattr(axes, purpose)):
            if name not in mesh.axis_names:
                raise ValueError(
                    f"mesh must have an axis {name!r} (axes.{purpose}), got {mesh.axis_names}"
                )
    sizes = {"num_experts": axes.expert, "d_ff": axes.hidden, "shared": axes.hidden}
    for field, names in ((field, _names(axis)) for field, axis in sizes.items()):
        size, parts = getattr(config, field), math.prod(mesh.shape[name] for name in names)
        if size % parts:
            wrong = " and ".join(map(repr, names))
            raise ValueError(f"mesh axis {wrong} must divide {field}={size}, got size {parts}")


def _check_scales(w_out: Any, parts: int) -> None:
    if not isinstance(w_out, Quantized) or w_out.blocks % parts == 0:
        return
    if w_out.blocks > 1 or w_out.activations is not None:
        raise ValueError(
            f"axes.hidden cuts hidden units into {parts} parts, which must divide the "
            f"{w_out.blocks} blocks of scales that w_out has: quantize with a smaller block"
        )


def _manual(mesh: Any) -> frozenset[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Manual)


def _names(names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _devices(mesh: Any) -> tuple[str, str]:
    """Platform and kind of a mesh's devices; of the default ones where it is abstract of any."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    device = jax.devices()[0] if device is None else device
    return device.platform, device.device_kind
