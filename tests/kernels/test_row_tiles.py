"""Tiles of rows: every row of every group once, whatever sizes groups and tiles have."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe.kernels import row_tiles
from taskmoe.kernels.groups import Groups, group_bounds
from taskmoe.kernels.row_tiles import Tiles, choose_tiles, for_each_tile
from taskmoe.tests.kernels import support


def visits(sizes: list[int], num_rows: int, tiles: Tiles) -> tuple[Any, Any, Any]:
    """How often each row is visited, how often each group is done, and the rows of its sum."""
    groups = jnp.asarray(sizes, jnp.int32)
    bounds = group_bounds(Groups(groups, jnp.int32(0)), len(sizes), num_rows)

    def body(_: Any, tile: row_tiles.Tile, state: Any) -> tuple[Any, Any]:
        seen, done, rows = state
        mine = jnp.where(row_tiles.take(jnp.ones((num_rows, 1), jnp.int32), tile) > 0, 1, 0)
        return (
            row_tiles.put(seen, tile, row_tiles.take(seen, tile) + mine),
            done,
            rows,
        ), mine.sum()

    def finish(group: Any, total: Any, state: Any) -> Any:
        seen, done, rows = state
        return seen, done.at[group].add(1), rows.at[group].add(total)

    zeros = jnp.zeros(len(sizes), jnp.int32)
    init = (jnp.zeros((num_rows, 1), jnp.int32), zeros, zeros)
    seen, done, rows = for_each_tile(bounds, tiles, num_rows, body, finish, init)
    return np.asarray(seen)[:, 0], np.asarray(done), np.asarray(rows)


def check(sizes: list[int], num_rows: int, tiles: Tiles) -> None:
    seen, done, rows = visits(sizes, num_rows, tiles)
    np.testing.assert_array_equal(seen, np.arange(num_rows) < sum(sizes))
    np.testing.assert_array_equal(done, np.array(sizes) > 0)
    np.testing.assert_array_equal(rows, sizes)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    data=st.data(), tiles=st.sampled_from([Tiles(8), Tiles(8, (12, 16)), Tiles(3, (20,))])
)
def test_every_row_once_in_any_groups(data: st.DataObject, tiles: Tiles) -> None:
    check(data.draw(support.group_patterns(61, 5)), 61, tiles)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 12, 13, 16, 17, 33])
def test_every_row_once_at_the_edges_of_the_sizes(size: int) -> None:
    check([size, 3, size], 80, Tiles(8, (12, 16)))


@pytest.mark.parametrize("size", [5, 10, 40])
def test_a_forgotten_group_is_caught(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    over = row_tiles._over

    def short(chosen: Any, body: Any, state: Any) -> Any:
        return over(chosen.at[2].set(False), body, state)

    monkeypatch.setattr(row_tiles, "_over", short)
    with pytest.raises(AssertionError):
        check([size, 3, size], 90, Tiles(8, (12, 16)))


@pytest.mark.parametrize("mean", [1, 8, 16, 31, 64, 100, 256, 512, 5000])
def test_sizes_rise_and_fit(mean: int) -> None:
    tiles = choose_tiles(mean * 4, 4, 512, 2048)
    sizes = (tiles.rows, *tiles.whole)
    assert list(sizes) == sorted(set(sizes))
    assert all(0 < n <= mean * 4 for n in sizes)
