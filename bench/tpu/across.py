"""The kernels that exchange rows, as the compile lab looks at them: compiled for eight chips.

Every chip routes as many tokens as the shape says; experts are all of the model's, an eighth a
chip. Bytes and work are those of the chip that has most to do, when tokens choose at random. What
travels between chips takes no time in the model.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.bench.tpu.cases import CHIPS, DTYPES, SHAPES, Case, chip_info, routed
from taskmoe.bench.tpu.grid_walk import KernelCall
from taskmoe.bench.tpu.regions import Trips
from taskmoe.kernels import exchange_kernel
from taskmoe.kernels.exchange_ffn_kernel import cost, exchange_ffn
from taskmoe.kernels.exchange_tiling import ExchangeTiling, exchange_tiling, moved_bytes, row_bytes

DEVICES = 8
#: Topologies with eight devices, where those of one chip's kernels have fewer.
TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
#: Experts of all chips, where a shape has those of one.
EXPERTS = {"deepseek-v3": 256}


class Sizes:
    """Rows m that a chip sends, [m, d] through `own` of `experts` experts of width f."""

    def __init__(self, case: Case) -> None:
        """case: of an op of `cases.EXCHANGES`."""
        s = SHAPES[case.shape]
        self.top_k, self.tokens, self.d, self.f = s.top_k, s.tokens, s.d_model, s.d_ff
        experts = EXPERTS.get(case.shape, s.experts)
        self.own = -(-experts // DEVICES)
        self.experts, self.m = self.own * DEVICES, s.tokens * s.top_k
        self.room = min(s.top_k, self.own) * DEVICES * s.tokens
        self.matrices = 3 if case.op.endswith("gated") else 2
        self.dtype = jnp.dtype(DTYPES[case.dtype])

    def tiling(self, chip: str) -> ExchangeTiling | None:
        """Blocks that exchange_ffn takes there."""
        rows, itemsize = min(self.m, self.room), self.dtype.itemsize
        info = chip_info(chip)
        return exchange_tiling(rows, self.d, self.f, self.own, self.matrices, itemsize, info)

    def busiest(self) -> list[int]:
        """Rows of each expert of the chip that gets most, over all chips' tokens."""
        sizes = routed(self.tokens * DEVICES, self.experts, self.top_k)
        chips = [list(sizes[i : i + self.own]) for i in range(0, self.experts, self.own)]
        return max(chips, key=sum)


def mesh(chip: str) -> Mesh:
    """Eight devices in a row."""
    name = TOPOLOGIES.get(chip, CHIPS[chip][0])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    axes: Any = {"axis_types": (AxisType.Auto,)}
    return Mesh(np.array(devices[:DEVICES]), ("expert",), **axes)


def program(case: Case, on: Mesh) -> tuple[Any, list[Any]]:
    """A jitted function over the mesh, and its arguments.

    Experts lie row-major, as `moe.row_major` puts them; rows as the compiler wants them.
    """
    s, own = Sizes(case), P("expert")

    def array(shape: tuple[int, ...], dtype: Any = s.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def rows(x: Any, counts: Any) -> Any:
        return exchange_kernel.exchange_rows(x, counts, s.room)

    def network(x: Any, counts: Any, w_in: Any, w_out: Any, *w_gate: Any) -> Any:
        gate: Any = {"w_gate": w_gate[0], "activation": "silu"} if w_gate else {}
        return exchange_ffn(x, counts, w_in, w_out, s.room, **gate)

    arguments = [array((DEVICES * s.m, s.d)), array((DEVICES, s.experts), jnp.int32)]
    if case.op != "exchange_rows":
        up, down = (s.experts, s.d, s.f), (s.experts, s.f, s.d)
        arguments += [array(shape) for shape in (up, down, up)[: s.matrices]]
    function = rows if case.op == "exchange_rows" else network
    specs = tuple(P() if a.dtype == jnp.int32 else own for a in arguments)
    mapped = jax.shard_map(function, mesh=on, in_specs=specs, out_specs=own)

    def laid_out(ndim: int, spec: P) -> Any:
        layout = Layout(tuple(range(ndim))) if ndim > 2 else Layout.AUTO
        return Format(layout, NamedSharding(on, spec))

    formats = tuple(laid_out(a.ndim, spec) for a, spec in zip(arguments, specs, strict=True))
    return jax.jit(mapped, in_shardings=formats, out_shardings=laid_out(2, own)), arguments


def held_bytes(case: Case) -> int:
    """HBM of one chip that arguments, results and rows on their way take."""
    s = Sizes(case)
    sent = s.m * s.d * s.dtype.itemsize
    arrived = s.room * row_bytes(s.d, s.dtype.itemsize)
    if case.op == "exchange_rows":
        return sent + 2 * arrived
    return 2 * sent + 2 * arrived + s.own * s.matrices * s.d * s.f * s.dtype.itemsize


def walk(case: Case) -> tuple[list[KernelCall], int]:
    """Kernel calls on the busiest chip, and the least bytes: arguments and results once."""
    s = Sizes(case)
    itemsize, words = s.dtype.itemsize, row_bytes(s.d, s.dtype.itemsize)
    rows = s.m * s.d * itemsize

    def laid_out(kernel: str, m: int) -> KernelCall:
        name = f"taskmoe_{kernel}_rows"
        return KernelCall(name, None, 1, m * (s.d * itemsize + words), copies_by_hand=False)

    if case.op == "exchange_rows":
        work = exchange_kernel.cost(s.m, s.room, words // 4, DEVICES)
        moved = int(work.bytes_accessed)
        call = KernelCall("taskmoe_exchange_rows", None, 1, moved, copies_by_hand=False)
        calls = [laid_out("pack", s.m), call, laid_out("unpack", s.room)]
        return calls, rows + s.room * s.d * itemsize
    t, sizes = s.tiling(case.chip), s.busiest()
    if t is None:
        raise ValueError(f"no blocks of {case} fit")
    blocks, cuts = sum(-(-size // t.rows) for size in sizes), t.cuts(s.f)
    main = blocks * (cuts - (s.f % t.hidden > 0))
    call = KernelCall(
        "taskmoe_exchange_ffn",
        cost(sum(sizes), s.d, s.f, s.own, s.matrices, itemsize, t),
        steps=main,
        walked_bytes=moved_bytes(t, sizes, s.d, s.f, s.matrices, itemsize),
        copies_by_hand=False,
        trips=Trips(step=0, result=blocks, parts=[main], passes=[1]),
        rows_share=blocks * t.rows / sum(sizes),
    )
    touched = sum(size > 0 for size in sizes)
    floor = 2 * rows + touched * s.matrices * s.d * s.f * itemsize
    return [laid_out("pack", s.m), call, laid_out("unpack", s.m)], floor
