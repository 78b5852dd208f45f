"""The device mesh, and the one table from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxchat.config import MeshConfig
from jaxchat.errors import UsageError

# Resharding the model is an edit of this table. `data` never appears: parameters are replicated over it.
LOGICAL_TO_MESH: dict[str, str | None] = {
    "layer": None,  # stacked and scanned over
    "embed": "fsdp",  # model width D
    "heads": "tensor",  # H * N, query heads side by side
    "kv_heads": "tensor",  # K * N and K
    "mlp": "tensor",  # F
    "vocab": "tensor",  # V
    "table": None,  # rows of a value-embedding table, whose columns are split
    "gate": None,  # the few channels that gates read
}
BATCH_AXES = ("data", "fsdp")  # a batch's rows are spread over both


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one -1 fills with what is left.

    Raises `UsageError` with the numbers if the axes do not multiply to the device count.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
        raise UsageError(f"{text}: sizes are at least 1, and at most one may be -1 (fills)")
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UsageError(f"{text}: does not divide the {len(devices)} devices; set one axis to -1 to fill")
    if free:
        sizes[free[0]] = len(devices) // fixed
    grid = np.array(devices).reshape(*sizes.values())
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...], logical_axes: tuple[str, ...]) -> NamedSharding:
    """Where one parameter lies; an axis that its mesh axis does not divide stays whole on every device."""
    spec: list[Any] = []
    for size, axis in zip(shape, logical_axes, strict=True):
        name = LOGICAL_TO_MESH[axis]
        spec.append(name if name and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch `(A, B, T)`: rows B over data and fsdp, micro-batches A and positions T whole."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_devices(mesh: Mesh) -> int:
    """How many devices share a batch's rows."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
