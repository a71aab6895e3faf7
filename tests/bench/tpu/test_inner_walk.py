"""Bundles of kernels that walk their blocks themselves, by hand."""

import pytest

from taskmoe.bench.tpu import inner_walk
from taskmoe.bench.tpu.inner_walk import WalkBundles
from taskmoe.bench.tpu.regions import Bundle

NAME = "gmm_v2-g_3-m_400-k_512-act_None-n_2048-tm_256-tk_512-tn_1024"
SIZES = [100, 0, 300]


def loop(number: int, depth: int, *inside: list[Bundle]) -> list[Bundle]:
    """A loop: a label, what is in it, and the branch back; what is behind is a target as well."""
    body = [bundle for part in inside for bundle in part]
    start = Bundle(f"  0x1 LH: > {{ nop }} /* Start region {number} */", depth, 0)
    back = Bundle(f"  0x2   : > {{ sbr.rel (!%p1_p2) target = $region{number} }}", depth, 0)
    return [start, *body, back, Bundle("  0x3 PF: { nop }", depth - 1, 0)]


def plain(count: int, depth: int, mxu: int = 0) -> list[Bundle]:
    return [Bundle("  0x4   : { nop }", depth, mxu)] * count


def product(number: int, length: int) -> list[Bundle]:
    skip = Bundle(f"  0x5   : {{ sbr.rel (%p1_p2) target = $region{number} }}", 1, 0)
    end = Bundle(f"  0x6   : {{ nop }} /* Start/End empty region {number} */", 1, 0)
    return [skip, *plain(length, 1, mxu=1), end]


def kernel(longest: int = 70) -> list[Bundle]:
    zeros, blocks = loop(1, 1, plain(10, 1)), loop(3, 2, plain(5, 2))
    notes = loop(2, 1, plain(20, 1), blocks)
    products = loop(5, 1, plain(30, 1), product(6, longest), product(7, 40))
    return [*plain(50, 0), *zeros, *notes, *products, *plain(9, 0)]


def test_parts_by_hand() -> None:
    found = inner_walk.find(kernel())
    # A loop has a label and a branch back, and a bundle behind it that is no part of it.
    assert found.products == [70, 40]
    assert found.visit == 5 + 2
    assert found.group == (10 + 2) + (20 + 1 + 2)
    assert found.step == 30 + 2 * 2 + 2
    assert found.once == 50 + 9 + 3
    assert inner_walk.find(kernel(longest=71)).products == [71, 40]


def test_a_walk_by_hand() -> None:
    bundles = WalkBundles(once=1000, group=10, visit=5, step=100, products=[70, 40])
    # Blocks of 100, 256 and 48 rows, the second group's from row 96 on; products of 256 and of 128.
    blocks = 3 * 100 + 70 + 2 * 40
    assert inner_walk.run(NAME, bundles, SIZES, 16) == 1000 + 3 * 10 + 3 * 5 + 2 * blocks
    assert inner_walk.run(NAME, bundles, [100, 0, 301], 16) == 1000 + 3 * 10 + 3 * 5 + 2 * blocks
    more = inner_walk.run(NAME, bundles, [100, 1, 299], 16)
    assert more == 1000 + 3 * 10 + 4 * 5 + 2 * (blocks + 100 + 40)


def test_a_walk_of_tgmm_by_hand() -> None:
    name = "t" + NAME.replace("tn_1024", "tn_2048")
    # Of each size: alone, a group's first, its last, another.
    bundles = WalkBundles(0, 0, 0, 0, [1, 20, 300, 4000, 50000, 6, 7, 8])
    assert inner_walk.run(name, bundles, SIZES, 16) == 50000 + 20 + 7


def test_what_is_not_known_is_refused() -> None:
    bundles = WalkBundles(0, 0, 0, 0, [1, 2, 3])
    with pytest.raises(ValueError, match="has 3 products"):
        inner_walk.run(NAME, bundles, SIZES, 16)
    with pytest.raises(ValueError, match="does not walk in a way that is known"):
        inner_walk.run("gmm_v3", bundles, SIZES, 16)
    assert inner_walk.is_walked(NAME)
    assert not inner_walk.is_walked("taskmoe_gmm")
