"""Meshes: filled, checked, and one table for all parameters."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import MeshConfig, ModelConfig
from jaxchat.errors import UsageError
from jaxchat.scaling import resolve_model
from jaxchat.sharding import (
    batch_devices,
    batch_sharding,
    check_mesh,
    gathered_sharding,
    make_mesh,
    master_sharding,
    parameter_sharding,
)
from jaxchat.sizes import Parameter

KERNEL = ("layer", "embed", "heads")


def declared(shape, axes):
    return Parameter(shape, axes, ("constant", 0.0), "matrix")


def mesh_of(count, **axes):
    return make_mesh(MeshConfig(**axes), [jax.devices()[0]] * count)


def test_minus_one_fills():
    assert dict(mesh_of(8).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh_of(8, data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "axes", [{"data": 3}, {"fsdp": 3}, {"data": 2, "fsdp": 2, "tensor": 1}, {"data": -1, "fsdp": -1}, {"data": 0}]
)
def test_impossible_meshes_name_the_numbers(axes):
    with pytest.raises(UsageError, match="mesh.data="):
        mesh_of(8, **axes)


def test_parameters_and_batches_have_their_places():
    mesh = make_mesh(MeshConfig())
    spec = parameter_sharding(mesh, declared((4, 64, 128), KERNEL)).spec
    assert all(axis is None for axis in spec)  # on one device everything is whole
    assert batch_sharding(mesh).spec[1] == ("data", "fsdp")
    assert batch_devices(mesh) == int(np.prod(list(mesh.shape.values())))


@pytest.mark.parametrize(
    ("fsdp", "tensor", "message"),
    [
        (1, 3, r"mesh.tensor=3: must divide this model's heads 10 and kv heads 10"),
        (1, 8, r"mesh.tensor=8: .* heads 10"),
        (3, 1, r"mesh.fsdp=3: .* width 1280"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(fsdp, tensor, message):
    model = resolve_model(ModelConfig(depth=20))
    check_mesh(model, 8, 2)
    with pytest.raises(UsageError, match=message):
        check_mesh(model, fsdp, tensor)


def test_masters_are_split_over_data_too():
    mesh = AbstractMesh((4, 2, 1), ("data", "fsdp", "tensor"))
    tall = ("layer", "heads", "embed")
    assert master_sharding(mesh, declared((6, 1280, 1280), KERNEL)).spec == P(None, ("fsdp", "data"), None)
    assert master_sharding(mesh, declared((6, 1280, 1280), tall)).spec == P(None, ("data",), "fsdp")
    assert master_sharding(mesh, declared((6, 1282, 1280), KERNEL)).spec == P(None, "fsdp", ("data",))  # 1282 = 2 x 641
    assert master_sharding(mesh, declared((6,), ("layer",))).spec == P(
        None,
    )  # too small to be worth it
    assert gathered_sharding(mesh, declared((6, 1280, 1280), KERNEL)).spec == P(None, None, None)
