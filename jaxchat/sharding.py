"""The device mesh, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxchat.config import Config, MeshConfig, ModelConfig
from jaxchat.errors import UsageError, command_line, first_line
from jaxchat.sizes import Parameter, mlp_width, padded_vocab

# To reshard the model is to edit this table. `data` never appears: weights are replicated over it while they are used;
# between steps their masters are split over it too (`master_sharding`).
LOGICAL_TO_MESH: dict[str, str | None] = {
    "layer": None,  # stacked and scanned over
    "embed": "fsdp",  # model width D
    "heads": "tensor",  # H * N, query heads side by side
    "kv_heads": "tensor",  # K * N and K
    "mlp": "tensor",  # F
    "vocab": "tensor",  # V
    "table": "fsdp",  # rows of a value-embedding table
    "gate": None,  # the few channels that gates read
}
BATCH_AXES = ("data", "fsdp")  # a batch's rows are split over both
SMALL = 4096  # values; splitting fewer is not worth a collective


def require_devices(doctor: bool = False) -> None:
    """Raise `UsageError` where JAX was told to use a platform (JAX_PLATFORMS) that it cannot start here.

    `doctor`: the command `doctor` asks, and is not recommended.
    """
    asked = getattr(jax.config, "jax_platforms", None)
    try:
        jax.local_devices()
    except Exception as error:  # of any kind; without a plugin an assertion without a word
        if not asked:
            raise
        reason = f" ({first_line(error).partition(' (set JAX_PLATFORMS')[0]})" if str(error) else ""
        more = "" if doctor else f"; {command_line('doctor')} says what to install for more"
        advice = f"unset it to take what is here{more}"
        raise UsageError(f"JAX_PLATFORMS={asked}: JAX finds no such device here{reason}; {advice}") from None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a (data, fsdp, tensor) mesh over all devices; one -1 fills with what is left.

    Raises `UsageError` with the numbers if the axes do not multiply to the device count.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, count = dataclasses.asdict(config), len(devices)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    filled = {name: count // fixed if size == -1 and fixed else size for name, size in sizes.items()}
    if min(filled.values()) < 1 or math.prod(filled.values()) != count:
        text = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise UsageError(f"{text}: must multiply to the {count} devices there are; set one of them to -1 to fill")
    if devices[0].platform == "tpu":  # neighbours on the mesh should be neighbours in the slice's torus
        grid = mesh_utils.create_device_mesh(tuple(filled.values()), devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices).reshape(*filled.values())
    return Mesh(grid, tuple(filled), axis_types=(AxisType.Auto,) * 3)


def check_mesh(config: ModelConfig, fsdp: int, tensor: int) -> None:
    """Raise `UsageError` with the shapes that a mesh axis does not divide."""
    heads = {"heads": config.n_heads, "kv heads": config.n_kv_heads}
    by_tensor = heads | {"MLP width": mlp_width(config), "padded vocabulary": padded_vocab(config)}
    for axis, size, shapes in (("tensor", tensor, by_tensor), ("fsdp", fsdp, {"width": config.width})):
        if odd := [f"{name} {n}" for name, n in shapes.items() if n % size]:
            raise UsageError(f"mesh.{axis}={size}: must divide this model's {' and '.join(odd)}")


def parameter_sharding(mesh: Mesh, p: Parameter) -> NamedSharding:
    """Return where a parameter lies; an axis that its mesh axis does not divide stays whole on every device."""
    spec: list[Any] = []
    for size, axis in zip(p.shape, p.axes, strict=True):
        name = LOGICAL_TO_MESH[axis]
        spec.append(name if name and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def master_sharding(mesh: Mesh, p: Parameter) -> NamedSharding:
    """Return where a parameter's float32 master, gradient and moments lie: also split over `data` (ZeRO, 1910.02054).

    The split is over the dimension before the last, or the last where that does not divide; small arrays stay whole.
    """
    spec = list(parameter_sharding(mesh, p).spec)
    if mesh.shape["data"] > 1 and len(p.shape) > 1 and math.prod(p.shape) >= SMALL:
        for i in (-2, -1):
            axes = (*((spec[i],) if spec[i] else ()), "data")
            if p.shape[i] % math.prod(mesh.shape[axis] for axis in axes) == 0:
                spec[i] = axes
                break
    return NamedSharding(mesh, PartitionSpec(*spec))


def gathered_sharding(mesh: Mesh, p: Parameter) -> NamedSharding:
    """Return how a weight lies when it is used in products: whole but for `tensor`."""
    spec = parameter_sharding(mesh, p).spec
    return NamedSharding(mesh, PartitionSpec(*(axis if axis == "tensor" else None for axis in spec)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return how a batch (A, B, T) lies: rows B over data and fsdp, micro-batches A and positions T whole."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def platform(mesh: Mesh) -> str:
    """Return "cpu", "gpu" or "tpu" of the mesh's devices, which can be those of a dry run."""
    name = mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def batch_devices(mesh: Mesh) -> int:
    """Return how many devices share a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def micro_batch(config: Config, devices: int) -> tuple[int, int]:
    """Return (rows per micro-batch over all devices, micro-batches per step), from the batch in tokens.

    Takes the most rows a device that `train.device_batch_rows` allows and the batch can be divided into.
    Raises `UsageError` if the batch has no whole row for every device.
    """
    tokens, T = config.train.batch_tokens, config.model.seq_len
    if (tokens // T) % devices:
        nearest = max(1, round(tokens // T / devices)) * devices * T
        raise UsageError(f"train.batch_tokens: {tokens} are rows that {devices} devices cannot share; take {nearest}")
    per_device = tokens // T // devices
    fitting = max(n for n in range(1, per_device + 1) if per_device % n == 0 and n <= config.train.device_batch_rows)
    return fitting * devices, per_device // fitting
