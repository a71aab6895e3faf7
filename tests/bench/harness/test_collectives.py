"""Counting collectives in HLO and telling waiting from moving in a profile."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from taskmoe.bench.harness.collectives import (
    _Event,
    count_collectives,
    is_collective,
    profile_communication,
    summarise,
)

HLO = """
  %all-to-all.3 = f32[8]{0} all-to-all(%x), dimensions={0}
  %ag = f32[8]{0} all-gather-start(%y)
  %agd = f32[8]{0} all-gather-done(%ag)
  %r = f32[8]{0} ragged-all-to-all(%y, %z)
  %fusion = f32[8]{0} fusion(%all-to-all.3), metadata={op_name="all_to_all"}
"""


def test_each_collective_counts_once() -> None:
    assert count_collectives(HLO) == {"all-to-all": 1, "ragged-all-to-all": 1, "all-gather": 1}
    assert count_collectives("%fusion = f32[8] fusion(%all-to-all.3)") == {}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("all-to-all.12", True),
        ("all-reduce-start.1", True),
        ("reduce-scatter", True),
        ("all_gather_fusion", False),
        ("dot.3", False),
    ],
)
def test_collectives_are_known_by_name(name: str, known: bool) -> None:
    assert is_collective(name) == known


def runs(second_arrives: float) -> Any:
    """Two devices whose steps take 100; they exchange from their arrival on until 60."""
    return {
        0: {
            0: [_Event("dot.1", 0, 20), _Event("all-to-all.1", 20, 60), _Event("dot.2", 60, 100)],
            1: [
                _Event("dot.1", 0, second_arrives),
                _Event("all-to-all.1", second_arrives, 60),
                _Event("dot.2", 60, 100),
            ],
        }
    }


def test_waiting_ends_when_the_last_device_has_arrived() -> None:
    told = summarise(runs(second_arrives=50))
    assert told.waiting_share == pytest.approx(30 / 200)
    assert told.transfer_share == pytest.approx(20 / 200)
    together = summarise(runs(second_arrives=20))
    assert together.waiting_share == 0
    assert together.transfer_share == pytest.approx(80 / 200)


def test_no_instruction_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no instruction"):
        summarise({})


def test_a_real_exchange_is_seen_and_a_local_product_is_none() -> None:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def exchange(x: Any) -> Any:
        parts = jnp.tanh(x @ x.T).reshape(4, -1, 64)
        return jax.lax.all_to_all(parts, "x", 0, 0).reshape(-1, 64)

    def local(x: Any) -> Any:
        return jnp.tanh(x @ x.T)

    x = jax.device_put(np.ones((256, 64), np.float32), NamedSharding(mesh, P("x")))
    shares = {}
    for f in (exchange, local):
        mapped = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        compiled = jax.jit(mapped).lower(x).compile()
        told = profile_communication(lambda c=compiled: c(x))
        counted = count_collectives(compiled.as_text() or "")
        shares[f.__name__] = told.transfer_share + told.waiting_share
        assert bool(counted) == (f is exchange)
    assert shares["exchange"] > 0
    assert shares["local"] == 0
