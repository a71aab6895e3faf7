"""What does not fit is refused by an error that names the argument."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskmoe import moe
from taskmoe.tests.moe import support

FIELDS = [
    ({"d_model": 0}, "d_model must be an int of at least 1, got 0"),
    ({"d_ff": -1}, "d_ff must be an int of at least 1, got -1"),
    ({"num_experts": 0}, "num_experts must be an int of at least 1"),
    ({"top_k": 0}, "top_k must be an int of at least 1"),
    ({"top_k": None}, "top_k must be an int of at least 1, got None"),
    ({"d_model": 6.5}, "d_model must be an int of at least 1, got 6.5"),
    ({"num_tasks": -1}, "num_tasks must be an int of at least 0, got -1"),
    ({"router": 3}, "router must be a Router, None or one of .*, got 3"),
    ({"router": ["mixtral"]}, r"router must be a Router, None .*got \['mixtral'\]"),
    ({"capacity_factor": "1"}, "capacity_factor must be a finite number, got '1'"),
    ({"capacity_factor": float("nan")}, "capacity_factor must be a finite number, got nan"),
    ({"buffer_factor": float("inf")}, "buffer_factor must be a finite number, got inf"),
    ({"jitter": None}, "jitter must be a finite number, got None"),
    ({"z_loss_weight": "a"}, "z_loss_weight must be a finite number, got 'a'"),
    ({"routing": "static", "table": [0, 1]}, r"table must be rows of integers.*got \[0, 1\]"),
    ({"routing": "static", "table": [[0, 1.9]]}, "table must be rows of integers"),
    (
        {"routing": "static", "table": [[0, 1]], "table_weights": [[float("nan"), 1]]},
        "table_weights must be positive",
    ),
    ({"top_k": 5}, "top_k must be at most num_experts=4, got 5"),
    ({"routing": "word"}, "routing must be one of .*'word'"),
    ({"activation": "tanh"}, "activation must be one of .*'tanh'"),
    ({"num_tasks": 2}, "num_tasks must be .* num_tasks=2 with routing='token'"),
    ({"routing": "task", "num_tasks": 0}, "num_tasks must be at least 1 with routing='task'"),
    ({"routing": "task", "capacity_factor": 2.0}, "capacity_factor must be None"),
    ({"capacity_factor": 0.0}, "capacity_factor must be above 0, got 0.0"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS)
def test_a_configuration_names_the_field_that_does_not_fit(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        support.make(**fields)


X = jnp.zeros((2, 3, 6))
TASK: dict[str, Any] = {"routing": "task"}
CALLS: list[tuple[Any, Any, type[Exception], str]] = [
    ({}, {"x": jnp.zeros((2, 6))}, ValueError, r"x must be \[B, S, D\] with D=6, got \[2, 6\]"),
    ({}, {"x": jnp.zeros((2, 3, 5))}, ValueError, r"x must be .* got \[2, 3, 5\]"),
    ({}, {"x": jnp.zeros((0, 3, 6))}, ValueError, "x must not be empty"),
    ({}, {"valid": np.ones((2, 2), bool)}, ValueError, r"valid must be bool \[2, 3\]"),
    ({}, {"valid": np.ones((2, 3), int)}, ValueError, "valid must be bool .*int"),
    (
        {},
        {"task": 0},
        ValueError,
        "task must be given with routing='task' or 'static' and only then",
    ),
    (TASK, {}, ValueError, "task must be given .* not given"),
    (TASK, {"task": np.zeros(3, int)}, ValueError, r"task must be a scalar or \[2\], got \[3\]"),
    (TASK, {"task": np.zeros(2)}, TypeError, "task must be of an integer dtype, got float"),
    (TASK, {"task": 0, "sentence": X[:, 0]}, ValueError, "sentence must be given with routing"),
    ({"routing": "sentence"}, {"sentence": X}, ValueError, r"sentence must have shape \[2, 6\]"),
    ({"routing": "sentence"}, {"sentence": X[:, 0].astype(int)}, TypeError, "sentence must be bf"),
    ({}, {"gate_input": X.astype(np.float16)}, TypeError, "gate_input must be bfloat16 or float32"),
    ({}, {"implementation": "magic"}, ValueError, "implementation"),
    ({}, {"mesh": jax.devices()}, TypeError, "mesh must be a jax.sharding.Mesh or None, got list"),
    ({}, {"axes": "expert"}, TypeError, "axes must be a MeshAxes or None, got str"),
]


@pytest.mark.parametrize(("fields", "call", "error", "message"), CALLS)
def test_a_call_names_the_argument_that_does_not_fit(
    fields: Any, call: Any, error: type[Exception], message: str
) -> None:
    config = support.make(**fields)
    call = {"x": X} | call
    with pytest.raises(error, match=message):
        moe.apply(support.params(config), config, call.pop("x"), **call)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        ("model", (2,), r"mesh must have an axis 'expert' \(axes.expert\), got \('model',\)"),
        ("expert", (3,), "mesh axis 'expert' must divide num_experts=4, got size 3"),
    ],
)
def test_a_mesh_that_does_not_fit(axes: str, shape: tuple[int], message: str) -> None:
    mesh = jax.make_mesh(
        shape,
        (axes,),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[: shape[0]],
    )
    config = support.make()
    with pytest.raises(ValueError, match=message):
        moe.apply(support.params(config), config, X, mesh=mesh)


def test_parameters_have_the_documented_shapes_and_scale() -> None:
    config = support.make(d_model=64, d_ff=128, routing="task", gated=True)
    params = moe.init(jax.random.key(0), config)
    shapes = {name: w.shape for name, w in params.items()}
    assert shapes == {
        "gate": (64, 4),
        "w_in": (4, 64, 128),
        "w_out": (4, 128, 64),
        "w_gate": (4, 64, 128),
        "task_embedding": (3, 64),
    }
    for name, fan_in in (("w_in", 64), ("w_out", 128), ("w_gate", 64)):
        assert abs(float(jnp.std(params[name])) * fan_in**0.5 - 1) < 0.05
    assert moe.init(jax.random.key(0), config, jnp.bfloat16)["w_in"].dtype == jnp.bfloat16


@pytest.mark.parametrize("routing", ["token", "task"])
def test_experts_have_the_dtype_of_x_and_gates_any(routing: Any) -> None:
    config = support.make(routing=routing)
    params, task = support.params(config), 1 if routing == "task" else None
    half = {name: w.astype(jnp.bfloat16) if w.ndim == 3 else w for name, w in params.items()}
    x = X.astype(jnp.bfloat16)
    assert half["gate"].dtype == jnp.float32
    y, _ = moe.apply(half, config, x, task=task)
    want, _ = moe.apply(params, config, X, task=task)
    assert y.dtype == jnp.bfloat16
    support.check(y, np.asarray(want), 0.05)
    message = r"params\['w_in'\] must have the dtype of x.*params\['w_in'\]\.astype\(x\.dtype\)"
    with pytest.raises(TypeError, match=message):
        moe.apply(params, config, x, task=task)
    with pytest.raises(TypeError, match="x must be bfloat16 or float32, got float16: cast it"):
        moe.apply(params, config, X.astype(jnp.float16), task=task)
    quantised = moe.quantize(params)
    assert moe.apply(quantised, config, x, task=task)[0].dtype == jnp.bfloat16


def test_a_capacity_of_a_symbolic_number_of_tokens_is_an_error() -> None:
    config = support.make(capacity_factor=1.25)
    (size,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((size, 3, 6), jnp.float32)
    params = support.params(config)
    run = jax.jit(lambda x: moe.apply(params, config, x)[0])
    with pytest.raises(ValueError, match=r"capacity_factor must be None.*symbolic.*got 1\.25"):
        jax.export.export(run)(x)
