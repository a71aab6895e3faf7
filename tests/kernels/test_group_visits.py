"""The walk of the grouped kernels: every row once, empty groups free, matrices read once."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from taskmoe.kernels import (
    block_products,
    ffn_backward_tiling,
    ffn_tiling,
    product_tiling,
    tiling,
)
from taskmoe.kernels.ffn_tiling import FFNSizes
from taskmoe.kernels.group_visits import (
    Visit,
    Visits,
    mixed_rows,
    part_sizes,
    visit_blocks,
    visit_groups,
)
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.tests.kernels import support

V5E = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def visits_of(groups: Groups, held: int, m: int, block: int, kind: str) -> Visits:
    if kind == "groups":
        return visit_groups(groups, held, m, block)
    return visit_blocks(groups, held, m, block, every_group=kind == "both")


def walk_of(sizes: list[int], offset: int, held: int, m: int, block: int, kind: str) -> list:
    groups = Groups(jnp.asarray(sizes, jnp.int32), jnp.int32(offset))
    with support.running("mosaic"):
        visits = jax.tree.map(np.asarray, visits_of(groups, held, m, block, kind))
    for have, want in zip(visits[:2], group_bounds(groups, held, m), strict=True):
        np.testing.assert_array_equal(have, want)
    num = int(visits.num[0])
    assert num < visits.group.shape[0]
    # The place behind the last may be looked at, and holds what is there already.
    assert visits.group[num] == visits.group[num - 1]
    assert visits.block[num] == visits.block[num - 1]
    return list(zip(visits.group[:num], visits.block[:num], strict=True))


@pytest.mark.parametrize("kind", ["blocks", "groups", "both"])
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    sizes=support.group_patterns(61, 6),
    offset=st.integers(-2, 7),
    block=st.sampled_from([8, 16, 24]),
)
def test_every_meeting_of_block_and_group_once_and_in_order(
    kind: str, sizes: list[int], offset: int, block: int
) -> None:
    held = 4
    visits = walk_of(sizes, offset, held, 61, block, kind)
    ends = np.cumsum(sizes)
    meetings = []
    for e in range(held):
        if 0 <= e + offset < len(sizes):
            rows = range(ends[e + offset] - sizes[e + offset], ends[e + offset])
            meetings += [(e, b) for b in sorted({row // block for row in rows})]
    assert [v for v in visits if v in set(meetings)] == meetings
    groups, blocks = [g for g, _ in visits], [b for _, b in visits]
    assert all(0 <= g < held for g in groups)
    assert all(0 <= b < -(-61 // block) for b in blocks)
    if kind != "blocks":  # each group's result is written in one stay
        assert [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g] == [*range(held)]
    if kind != "groups":
        assert [b for i, b in enumerate(blocks) if i == 0 or blocks[i - 1] != b] == [
            *range(-(-61 // block))
        ]
    if kind == "blocks" and meetings:
        assert set(groups) == {e for e, _ in meetings}


def fetches(indices: list) -> int:
    """Blocks that the pipeline reads: one each time the index changes."""
    return sum(i == 0 or indices[i - 1] != index for i, index in enumerate(indices))


def parts_of(
    low: int, high: int, rows: int, unit: int, tallest: int, often: int | None = None
) -> np.ndarray:
    """How often `Visit.work` works on each row of a block; low..high - 1 are the visit's.

    In the second column, of how many rows the part is that begins there.
    """

    def kernel(walk: Visits, out_ref: Any) -> None:
        def count(start: Any, size: int) -> None:
            out_ref[pl.ds(start, size), :128] += 1
            out_ref[pl.ds(start, 1), 128:] = jnp.full((1, 128), size, jnp.int32)

        out_ref[...] = jnp.zeros_like(out_ref)
        Visit(walk, 0, rows).work(count, unit, tallest, often)

    walk = Visits(*(jnp.asarray([x], jnp.int32) for x in (low, high, 0, 0, 1)))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(1,),
        in_specs=[],
        out_specs=pl.BlockSpec((rows, 256), lambda i, walk: (0, 0)),
    )
    call = pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((rows, 256), jnp.int32),
        interpret=support.INTERPRET,
    )
    return np.asarray(jax.jit(call)(walk))[:, ::128]


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    rows=st.sampled_from([16, 48, 128, 384, 640, 1024]),
    unit=st.sampled_from([8, 16]),
    sizes=st.sampled_from([(256, None), (512, None), (640, None), (640, 512)]),
    data=st.data(),
)
def test_parts_hold_each_row_of_a_visit_once(
    rows: int, unit: int, sizes: tuple[int, int | None], data: st.DataObject
) -> None:
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
    tallest, often = sizes
    worked, begun = parts_of(low, high, rows, unit, tallest, often).T
    assert set(begun[begun > 0]) <= set(part_sizes(rows, tallest, often))
    assert (worked[low:high] == 1).all()
    assert (worked <= 1).all()
    # No more than it takes to begin at a register's first row and end with a part.
    least = part_sizes(rows, tallest)[-1]
    needed = high - low // unit * unit if high > low else 0
    assert worked.sum() == (rows * bool(needed) if least == rows else -(-needed // least) * least)
    if high > low:
        assert low - worked.argmax() < mixed_rows(rows, unit, tallest)


def test_parts_of_a_few_rows_more_than_one() -> None:
    worked = parts_of(250, 780, 1024, 16, 512)[:, 0]  # 530 rows from 250, of 640 from 240
    assert (worked[240:880] == 1).all()
    assert worked.sum() == 640
    worked = parts_of(500, 1024, 1024, 16, 512)[:, 0]  # 640 rows end with the block
    assert (worked[384:] == 1).all()


@pytest.mark.parametrize(
    ("rows", "parts"),
    [(500, [512]), (530, [640]), (700, [512, 256]), (1024, [512, 512]), (1100, [512, 640])],
)
def test_a_part_that_is_not_repeated_may_be_taller(rows: int, parts: list[int]) -> None:
    begun = parts_of(0, rows, 2048, 16, 640, 512)[:, 1]
    assert list(begun[begun > 0]) == parts


def test_rows_of_other_groups_in_a_part_are_as_many_as_is_said() -> None:
    # 144 rows from a register on, so 256 from 768 on.
    worked = parts_of(895, 1024, 1024, 16, 640)[:, 0]
    assert 895 - worked.argmax() == 127
    assert mixed_rows(1024, 16) == 144


@pytest.mark.parametrize("rows", [64, 256, 1024, 16384])
@pytest.mark.parametrize("pattern", ["even", "random", "one expert", "few"])
def test_expert_ffn_moves_hardly_more_than_it_must(rows: int, pattern: str) -> None:
    d, f, e, itemsize = 512, 2048, 32, 2
    weights = {"one expert": [1.0] + [0.0] * 31, "few": [0.25] * 4 + [0.0] * 28}
    share = np.asarray(weights.get(pattern, [1 / 32] * 32))
    if pattern == "even":
        sizes = [rows // e] * e
    else:
        sizes = np.random.default_rng(0).multinomial(rows, share).tolist()
    t = ffn_tiling.ffn_tiling(FFNSizes(rows, d, f, e, 2, itemsize, V5E))
    assert t.n == f
    visits = walk_of(sizes, 0, e, rows, t.m, "blocks")
    matrices = fetches([g for g, _ in visits]) * 2 * d * f * itemsize
    moved = matrices + 2 * fetches([b for _, b in visits]) * t.m * d * itemsize
    floor = np.count_nonzero(sizes) * 2 * d * f * itemsize + 2 * rows * d * itemsize
    assert moved <= 1.15 * floor


@pytest.mark.parametrize("version", ["v3", "v4", "v5e", "v5p", "v6e", "7x"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    ("m", "k", "n", "e"), [(16384, 512, 2048, 32), (64, 512, 2048, 32), (7, 5, 3, 2)]
)
def test_chosen_blocks_fit(version: str, itemsize: int, m: int, k: int, n: int, e: int) -> None:
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1)
    budget = tiling.vmem_budget_bytes(info)
    product = product_tiling.ProductSizes(m, k, n, e, itemsize, itemsize, info)
    t = product_tiling.gmm_tiling(product)
    assert product_tiling.gmm_vmem_bytes(t, product) <= budget
    t = product_tiling.tgmm_tiling(product)
    assert product_tiling.tgmm_vmem_bytes(t, product) <= budget
    for matrices in (2, 3):
        sizes = FFNSizes(m, k, n, e, matrices, itemsize, info)
        t = ffn_tiling.ffn_tiling(sizes)
        assert ffn_tiling.ffn_vmem_bytes(t, sizes) <= budget
        t = ffn_backward_tiling.ffn_backward_tiling(sizes)
        needed = ffn_backward_tiling.ffn_backward_vmem_bytes(t, sizes)
        assert needed <= info.vmem_capacity_bytes
        t, with_dx = ffn_backward_tiling.hidden_gradients_tiling(sizes)
        needed = ffn_backward_tiling.hidden_gradients_vmem_bytes(t, sizes, with_dx)
        assert needed <= budget


@pytest.mark.parametrize("version", ["v3", "v4"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sizes", [(32768, 2048, 768, 128), (16384, 2880, 2880, 128)])
def test_wide_experts_fit_where_vmem_is_small(version: str, itemsize: int, sizes: Any) -> None:
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1)
    network = FFNSizes(*sizes, 3, itemsize, info)
    t = ffn_tiling.ffn_tiling(network)
    assert ffn_tiling.ffn_vmem_bytes(t, network) <= tiling.vmem_budget_bytes(info)


@pytest.mark.parametrize(
    ("version", "sizes", "split"),
    [
        ("7x", (16384, 4096, 14336, 8), True),  # VMEM holds few hidden units of such experts
        ("v4", (32768, 2048, 1024, 64), True),
        ("v5e", (16384, 4096, 14336, 8), False),
        ("v6e", (32768, 2048, 768, 128), False),  # bytes count, and one kernel moves least
        ("7x", (64, 512, 2048, 32), False),
    ],
)
def test_the_backward_is_split_where_that_is_faster(
    version: str, sizes: tuple[int, int, int, int], split: bool
) -> None:
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(version), 1)
    assert ffn_backward_tiling.is_split(FFNSizes(*sizes, 3, 2, info)) == split


def test_sizes_below_zero_and_beyond_the_rows_are_cut_off() -> None:
    most = 2**31 - 1
    sizes = [-3, 20, -most, most, 5, most]
    assert walk_of(sizes, 1, 4, 61, 16, "blocks") == [(0, 0), (0, 1), (2, 1), (2, 2), (2, 3)]
    groups = [(0, 0), (0, 1), (1, 1), (2, 1), (2, 2), (2, 3), (3, 3)]
    assert walk_of(sizes, 1, 4, 61, 16, "both") == groups


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    size=st.integers(1, 4096), piece=st.sampled_from([32, 64, 128, 256]), most=st.integers(0, 20)
)
def test_passes_hold_each_piece_once_and_begin_at_a_register(
    size: int, piece: int, most: int
) -> None:
    parts = block_products.pieces(size, piece)
    count = block_products.passes(parts, most)
    found: list[tuple[int, int]] = []
    with jax.disable_jit():
        block_products.each(parts, count, lambda part: found.append((int(part.start), part.size)))
    assert found == [(part.start, part.size) for part in parts]
    if count == 1:
        return
    even = sum(part.size == parts[0].size for part in parts)
    written = even // count
    assert written * parts[0].size % 128 == 0
    assert even - count * written < written
    # No fewer passes would do: the next fewer takes more than are wanted, or begins elsewhere.
    assert all(
        even // n > most or even // n * piece % 128
        for n in range(1, count)
        if even // (even // n) == n
    )


def test_passes_by_hand() -> None:
    halves = block_products.pieces(512, 64)
    assert block_products.passes(halves, 8) == 1
    assert block_products.passes(halves, 1) == 4  # one piece of 64 columns is half a register
    assert block_products.passes(block_products.pieces(192, 64), 1) == 1
    assert block_products.passes(block_products.pieces(1792, 256), 3) == 2  # and one left over
    assert block_products.passes(block_products.pieces(1792, 256), 1) == 7
    assert block_products.passes(block_products.pieces(896, 256), 1) == 3  # and half a piece
    assert block_products.passes(block_products.pieces(1000, 256), 1) == 1
