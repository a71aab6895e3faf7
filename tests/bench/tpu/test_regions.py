"""Regions of a grouped kernel's schedule and how often each runs, by hand."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.bench.tpu import grid_walk, regions, schedule
from taskmoe.bench.tpu.grid_walk import own_parts
from taskmoe.bench.tpu.regions import Bundle, Bundles, Trips
from taskmoe.kernels import dispatch, gmm, tgmm, top_k_gating
from taskmoe.kernels.group_visits import Visits
from taskmoe.kernels.tiling import Tiling


def plain(count: int, depth: int = 1, mxu: int = 0) -> list[Bundle]:
    return [Bundle("{ nop }", depth, mxu)] * count


def skip(to: int, depth: int = 1) -> list[Bundle]:
    return [Bundle(f"{{ %1 = sbr.rel (%p1_p2) target = $region{to} }}", depth, 0)]


def label(number: int) -> list[Bundle]:
    return [Bundle(f"{{ nop }} /* Start/End empty region {number} :: Start region 99 */", 1, 0)]


def kernel(extra: int = 0) -> list[Bundle]:
    """Results are set to zero in 40 bundles. The first part is in a loop, in one of two paths.

    The other part has a loop inside, of 60 bundles.
    """
    return [
        *(*plain(5, depth=0), *plain(10)),
        *(*skip(1), *plain(40), *label(1)),
        *(*skip(2), *plain(20, 2, mxu=2), *skip(3, 2), *plain(50, 2, mxu=1), *label(3)),
        *(*skip(4, 2), *plain(30 + extra, 2, mxu=1), *label(4), *label(2)),
        *(*skip(5), *plain(8), *label(5)),
        *(*skip(6), *plain(2), *plain(60, depth=2, mxu=1), *plain(1), *label(6)),
        *plain(7),
    ]


def test_regions_by_hand() -> None:
    found = regions.find(kernel())
    # The first part: 20, and two branches, and the longer of 50 and 30.
    assert found == Bundles(step=10 + 4 + 4 + 9 + 7 - 1, result=40, parts=[72, 3], inner=[0, 60])
    assert found.run(Trips(10, 2, [3, 5], [1, 7])) == 10 * 33 + 2 * 40 + 3 * 72 + 5 * (3 + 7 * 60)


def test_a_planted_bundle_counts_where_it_is_the_longer_branch() -> None:
    found = regions.find(kernel(extra=19))
    assert found is not None
    assert found.parts == [72, 3]
    longer = regions.find(kernel(extra=21))
    assert longer is not None
    assert longer.parts == [73, 3]


def test_a_loop_around_the_main_run_by_hand() -> None:
    inner = [*plain(9, depth=2), *plain(50, depth=2, mxu=2), *plain(4, depth=3)]
    inner += [*plain(1, depth=0), *plain(5, depth=2)]
    walk = [*plain(5, depth=0), *plain(3), *inner, *plain(8), *plain(2, depth=2)]
    found = regions.of_loop(walk, range(17, 67))
    assert found == Bundles(step=0, result=9 + 4 + 6, parts=[50], inner=[0])
    assert found.run(Trips(0, 2, [7], [1])) == 7 * 50 + 2 * 19


def test_what_all_of_a_step_lies_in_is_no_region() -> None:
    around = [*skip(7), *kernel()[5:], *label(7)]
    inner, outer = regions.find(kernel()), regions.find(around)
    assert inner is not None
    assert outer is not None
    assert (outer.parts, outer.inner, outer.result) == (inner.parts, inner.inner, inner.result)


def test_other_kernels_have_none() -> None:
    assert regions.find(plain(9)) is None


def loop(*inside: list[Bundle], depth: int) -> list[Bundle]:
    """Those bundles behind the first of a loop."""
    return [Bundle("  0x1 LB: > { nop }", depth, 0), *itertools.chain(*inside)]


def test_loops_over_groups_and_visits_by_hand() -> None:
    before, visits = loop(plain(6), depth=1), loop(plain(3, depth=2), depth=2)
    groups = loop(plain(20), visits, plain(5), depth=1)
    whole = [*plain(9, depth=0), *before, *plain(4, depth=0), *groups, *plain(3, depth=0)]
    found = regions.of_scalars(whole)
    assert found == Bundles(step=9 + 7 + 4 + 3, result=1 + 20 + 5, parts=[4], inner=[0])
    longer = loop(plain(21), visits, plain(5), depth=1)
    more = regions.of_scalars([*whole[:20], *longer, *plain(3, depth=0)])
    assert more.result == found.result + 1
    assert regions.of_scalars(before) == Bundles(step=7, result=0, parts=[0], inner=[0])


def test_steps_that_start_copies_by_hand() -> None:
    first, every = plain(32, depth=2), plain(91, depth=2)
    schedule = [*plain(4, depth=0), *plain(10), *first, *plain(5), *every, *plain(30)]
    found = regions.of_steps(schedule)
    assert found == Bundles(step=45, result=32, parts=[91], inner=[0])
    assert regions.of_steps([*schedule, *plain(1, mxu=1)]) is None
    assert regions.of_steps([*schedule, *plain(1, depth=3)]) is None


def test_what_branches_skip_in_gating_is_rare_by_hand() -> None:
    schedule = [*plain(9, mxu=1), *skip(1), *plain(40), *label(1), *plain(5), *skip(2), *plain(7)]
    found = regions.of_steps([*plain(3, depth=0), *schedule, *label(2)])
    # The 7 are too few to count apart: they are part of every step.
    assert found == Bundles(step=9 + 1 + 1 + 5 + 1 + 7 + 1, result=40, parts=[0], inner=[0])
    with grid_walk.recording("v5e") as calls:
        top_k_gating(jnp.zeros((1300, 16)), 2, implementation="mosaic")
    gating, slots = calls
    assert (gating.trips.step, gating.trips.result) == (3, 1)
    assert found.run(gating.trips) == 3 * found.step + 40
    assert slots.steps == 1
    loops = [*plain(9, mxu=1), *plain(4, depth=2)]
    assert regions.of_steps(loops) is None  # nothing says how often they run


def test_trips_of_dispatch_by_hand() -> None:
    x, rows = jnp.zeros((300, 128), jnp.bfloat16), jnp.arange(600, dtype=jnp.int32).reshape(300, 2)
    with grid_walk.recording("v5e") as calls:
        dispatch(x, rows, 600, implementation="mosaic")
    (call,) = calls
    assert call.steps == 5  # two blocks of 256 tokens and three of rows
    assert call.trips == Trips(5, result=2 * 256 // 16, parts=[3 * 256 // 16], passes=[1])


def test_trips_of_rows_that_are_copied_one_by_one_by_hand() -> None:
    x, rows = jnp.zeros((300, 128)), jnp.arange(600, dtype=jnp.int32).reshape(300, 2)
    with grid_walk.recording("v3") as calls:
        dispatch(x, rows, 600, implementation="mosaic")
    (call,) = calls
    assert call.name == "taskmoe_gather_rows"
    assert call.trips == Trips(5, result=128, parts=[5 * 128 // 8], passes=[1])


def test_parts_of_visits_by_hand() -> None:
    # Rows 0..1023 in blocks of 1024; groups 0..99, 100..799, 800..1023.
    walk = Visits(*(np.array(x) for x in ([0, 100, 800], [100, 800, 1024])), *map(np.array, (
        [0, 1, 2], [0, 0, 0], [3],
    )))  # fmt: skip
    # 100 rows; 700 that begin at 96; 224.
    assert own_parts(walk, 1024, [512, 384, 256, 128], 16) == [1, 0, 2, 1]
    assert own_parts(walk, 1024, [512, 384, 256, 128], 128) == [1, 1, 1, 1]
    assert own_parts(walk, 1024, [256, 128], 16) == [4, 1]
    assert own_parts(walk, 1024, [1024], 16) == [3]
    sizes = [512, 640, 384, 256, 128]
    assert own_parts(walk, 1024, sizes, 16) == [1, 0, 0, 2, 1]
    # 600 rows are one part, not 512 and 128; 424 that begin at 592.
    two = walk._replace(starts=np.array([0, 600]), ends=np.array([600, 1024]), num=np.array([2]))
    assert own_parts(two, 1024, sizes, 16) == [1, 1, 0, 0, 0]


def test_trips_of_gmm_by_hand() -> None:
    x, w = jnp.zeros((512, 128), jnp.bfloat16), jnp.zeros((3, 128, 256), jnp.bfloat16)
    sizes = jnp.asarray([100, 156, 256], jnp.int32)
    tiling = Tiling(256, 128, 128)
    with grid_walk.recording("v5e") as calls:
        gmm(x, w, sizes, tiling=tiling, implementation="mosaic")
    visits, call = calls
    assert visits.trips == Trips(step=1, result=3, parts=[0], passes=[1])
    # Two blocks of width; parts of 256 and 128 rows; every row is some group's.
    assert call.trips == Trips(step=6, result=0, parts=[4, 2], passes=[1, 1])
    assert call.rows_share == (2 * 256 + 128) / 512


@pytest.mark.parametrize(
    ("sizes", "offset", "zeroed"),
    [
        ([100, 156, 250], 0, 1),  # rows after the last group
        ([100, 156, 256], 1, 1),  # rows before the first local one
        ([300, 100, 112], 1, 2),  # a block of others, and the rest of the next
        ([0, 0, 100], 0, 2),  # a block without rows behind one with some
    ],
)
def test_blocks_of_gmm_with_rows_of_nobody_are_zeroed(
    sizes: list[int], offset: int, zeroed: int
) -> None:
    x = jnp.zeros((512, 128), jnp.bfloat16)
    w = jnp.zeros((3 - offset, 128, 128), jnp.bfloat16)
    groups = jnp.asarray(sizes, jnp.int32)
    with grid_walk.recording("v5e") as calls:
        gmm(
            x, w, groups, group_offset=offset, tiling=Tiling(256, 128, 128), implementation="mosaic"
        )
    assert calls[1].trips is not None
    assert calls[1].trips.result == zeroed


def test_passes_and_empty_groups_of_tgmm_by_hand() -> None:
    x, grad = jnp.zeros((512, 2048), jnp.bfloat16), jnp.zeros((512, 4096), jnp.bfloat16)
    sizes = jnp.asarray([512, 0], jnp.int32)
    tiling = Tiling(512, 2048, 4096)
    with grid_walk.recording("v6e") as calls:
        tgmm(x, grad, sizes, tiling=tiling, implementation="mosaic")
    (call,) = [call for call in calls if call.name == "taskmoe_tgmm"]
    # One part of 512 rows, whose 8 x 16 x 2 products are written out half at a time.
    assert call.trips == Trips(step=2, result=1, parts=[1, 0, 0, 0], passes=[2, 2, 1, 1])


def test_cycles_outside_kernels() -> None:
    hlo = (
        '%fused (x: f32[]) -> f32[] {\n a = f32[] add(x), "estimated_cycles":"7"\n}\n'
        '\nENTRY %main {\n %a.1 = f32[] add(%x), backend_config={"estimated_cycles":"100"}\n'
        ' %k.1 = f32[] custom-call(%a), custom_call_target="tpu_custom_call", '
        'backend_config={"estimated_cycles":"900"}\n'
        ' %b.1 = f32[] add(%k), backend_config={"estimated_cycles":"20"}\n}\n'
    )
    assert schedule.outside_cycles(hlo) == 120
    assert schedule.outside_cycles(hlo.replace('"20"', '"21"')) == 121
