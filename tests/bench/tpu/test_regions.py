"""Regions of a grouped kernel's schedule and how often each runs, by hand."""

import itertools

import jax.numpy as jnp
import numpy as np

from taskmoe.bench.tpu import grid_walk, regions, schedule
from taskmoe.bench.tpu.grid_walk import own_blocks
from taskmoe.bench.tpu.regions import Bundle, Bundles, Trips
from taskmoe.kernels import dispatch, gmm
from taskmoe.kernels.group_visits import Visits
from taskmoe.kernels.tiling import Tiling


def plain(count: int, depth: int = 1, mxu: int = 0) -> list[Bundle]:
    return [Bundle("{ nop }", depth, mxu)] * count


def skip(to: int) -> list[Bundle]:
    return [Bundle(f"{{ %1 = sbr.rel (%p1_p2) target = $region{to} }}", 1, 0)]


def label(number: int) -> list[Bundle]:
    return [Bundle(f"{{ nop }} /* Start/End empty region {number} :: Start region 99 */", 1, 0)]


def kernel(extra: int = 0) -> list[Bundle]:
    """Results are set to zero in 40 bundles; a whole block takes 100, of which 50 or 30 run."""
    return [
        *(*plain(5, depth=0), *plain(10)),
        *(*skip(1), *plain(40), *label(1)),
        *(*skip(2), *plain(20, mxu=2), *skip(3), *plain(50, mxu=1), *label(3)),
        *(*skip(4), *plain(30 + extra, mxu=1), *label(4), *label(2)),
        *(*skip(5), *plain(8), *label(5)),
        *(*skip(6), *plain(2), *plain(60, depth=2, mxu=1), *plain(1), *label(6)),
        *plain(7),
    ]


def test_regions_by_hand() -> None:
    found = regions.find(kernel())
    # The whole path: 20, two branches, two labels, and the longer of 50 and 30.
    assert found == Bundles(step=10 + 4 + 4 + 9 + 7 - 1, whole=74, part=60, result=40)
    assert found.run(Trips(10, 3, 5, 2)) == 10 * 33 + 3 * 74 + 5 * 60 + 2 * 40


def test_a_planted_bundle_counts_where_it_is_the_longer_branch() -> None:
    found = regions.find(kernel(extra=19))
    assert found is not None
    assert found.whole == 74
    longer = regions.find(kernel(extra=21))
    assert longer is not None
    assert longer.whole == 75


def test_a_loop_around_the_main_run_by_hand() -> None:
    inner = [*plain(9, depth=2), *plain(50, depth=2, mxu=2), *plain(4, depth=3)]
    inner += [*plain(1, depth=0), *plain(5, depth=2)]
    walk = [*plain(5, depth=0), *plain(3), *inner, *plain(8), *plain(2, depth=2)]
    found = regions.of_loop(walk, range(17, 67))
    assert found == Bundles(step=0, whole=50, part=0, result=9 + 4 + 6)
    assert found.run(Trips(0, 7, 0, 2)) == 7 * 50 + 2 * 19


def test_what_all_of_a_step_lies_in_is_no_region() -> None:
    around = [*skip(7), *kernel()[5:], *label(7)]
    inner, outer = regions.find(kernel()), regions.find(around)
    assert inner is not None
    assert outer is not None
    assert (outer.whole, outer.part, outer.result) == (inner.whole, inner.part, inner.result)


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
    assert found == Bundles(step=9 + 7 + 4 + 3, whole=1 + 20 + 5, part=4, result=0)
    longer = loop(plain(21), visits, plain(5), depth=1)
    assert regions.of_scalars([*whole[:20], *longer, *plain(3, depth=0)]).whole == found.whole + 1


def test_steps_that_start_copies_by_hand() -> None:
    first, every = plain(32, depth=2), plain(91, depth=2)
    schedule = [*plain(4, depth=0), *plain(10), *first, *plain(5), *every, *plain(30)]
    found = regions.of_steps(schedule)
    assert found == Bundles(step=45, whole=0, part=91, result=32)
    assert regions.of_steps([*schedule, *plain(1, mxu=1)]) is None
    assert regions.of_steps([*schedule, *plain(1, depth=3)]) is None


def test_trips_of_dispatch_by_hand() -> None:
    x, rows = jnp.zeros((300, 128), jnp.bfloat16), jnp.arange(600, dtype=jnp.int32).reshape(300, 2)
    with grid_walk.recording("v5e") as calls:
        dispatch(x, rows, 600, implementation="mosaic")
    (call,) = calls
    assert call.steps == 5  # two blocks of 256 tokens and three of rows
    assert call.trips == Trips(step=5, whole=5, part=3 * 256 // 16, result=2 * 256 // 16)


def test_trips_of_rows_that_are_copied_one_by_one_by_hand() -> None:
    x, rows = jnp.zeros((300, 128)), jnp.arange(600, dtype=jnp.int32).reshape(300, 2)
    with grid_walk.recording("v3") as calls:
        dispatch(x, rows, 600, implementation="mosaic")
    (call,) = calls
    assert call.name == "taskmoe_gather_rows"
    assert call.trips == Trips(step=5, whole=5, part=5 * 128 // 8, result=128)


def test_whole_blocks_and_parts_by_hand() -> None:
    # Rows 0..511 in blocks of 256; groups 0..99, 100..255, 256..511.
    walk = Visits(*(np.array(x) for x in ([0, 100, 256], [100, 256, 512])), *map(np.array, (
        [0, 1, 2, 2], [0, 0, 1, 1], [3],
    )))  # fmt: skip
    # 0..99 lies in one sub-block of 128 rows, 100..255 in two.
    assert own_blocks(walk, 256, 128) == (1, 3)
    assert own_blocks(walk, 256, 256) == (1, 2)


def test_trips_of_gmm_by_hand() -> None:
    x, w = jnp.zeros((512, 128), jnp.bfloat16), jnp.zeros((3, 128, 256), jnp.bfloat16)
    sizes = jnp.asarray([100, 156, 256], jnp.int32)
    tiling = Tiling(256, 128, 128)
    with grid_walk.recording("v5e") as calls:
        gmm(x, w, sizes, tiling=tiling, implementation="mosaic")
    visits, call = calls
    assert visits.trips == Trips(step=1, whole=3, part=0, result=0)
    assert call.trips == Trips(step=6, whole=2, part=6, result=4)  # two blocks of width
    assert call.rows_share == (256 + 3 * 128) / 512


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
