"""Parameters that are put row-major keep their values, shardings and places in jitted functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.moe import support
from taskmoe.tests.moe.test_meshes import mesh_of


def test_parameters_and_what_a_step_returns_lie_row_major() -> None:
    config = support.make()
    params = support.params(config)
    formats = moe.row_major(params)
    placed = jax.device_put(params, formats)
    x = support.normal(0, 2, 5, 6)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(moe.apply(params, config, x)[0] ** 2)

    step = jax.jit(jax.grad(loss), out_shardings=formats)
    for name, grad in step(placed).items():
        assert grad.format.layout.major_to_minor == tuple(range(grad.ndim))
        np.testing.assert_array_equal(placed[name], params[name])
        np.testing.assert_allclose(grad, jax.grad(loss)(params)[name], rtol=1e-5, atol=1e-6)


def test_shardings_are_kept_and_quantised_experts_are_trees() -> None:
    mesh = mesh_of(("expert", 2))
    config = support.make()
    specs = moe.param_specs(support.params(config))
    params = {
        name: jax.device_put(w, jax.sharding.NamedSharding(mesh, specs[name]))
        for name, w in support.params(config).items()
    }
    for name, found in moe.row_major(params).items():
        assert found.sharding == params[name].sharding
    frozen = moe.row_major(moe.quantize(support.params(config)))
    assert frozen["w_in"].values.layout.major_to_minor == (0, 1, 2)


def test_a_shape_without_a_sharding_is_named() -> None:
    shapes = jax.eval_shape(lambda: moe.init(jax.random.key(0), support.make()))
    with pytest.raises(ValueError, match=r"params\['gate'\] must have a sharding, got Shape"):
        moe.row_major(shapes)
