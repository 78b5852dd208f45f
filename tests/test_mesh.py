"""Meshes: filled, checked, and one table for all parameters."""

import jax
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.errors import UsageError
from jaxchat.mesh import batch_devices, batch_sharding, make_mesh, parameter_sharding


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
    spec = parameter_sharding(mesh, (4, 64, 128), ("layer", "embed", "heads")).spec
    assert all(axis is None for axis in spec)  # on one device everything is whole
    assert batch_sharding(mesh).spec[1] == ("data", "fsdp")
    assert batch_devices(mesh) == int(np.prod(list(mesh.shape.values())))
