"""Run in a process of its own with 8 simulated devices: 30 losses on one device and on other meshes, as JSON.

Also: how Muon's orthogonalization compiles there.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import MeshConfig, load_config
from jaxchat.mesh import batch_sharding, make_mesh
from jaxchat.model import gpt
from jaxchat.optim.groups import make_optimizer
from jaxchat.optim.horizon import resolve
from jaxchat.optim.muon import muon
from jaxchat.state import init_state, make_train_step, state_sharding

SMALL = ["model.depth=4", "model.width=64", "model.n_heads=4", "model.head_width=16", "model.vocab_size=256",
         "model.seq_len=32", "train.batch_tokens=512", "train.steps=30", "train.compute_dtype='float32'"]  # fmt: skip
# (data, fsdp, tensor) and micro-batches per step
LAYOUTS = {
    "one": ((1, 1, 1), 1),
    "accumulated": ((1, 1, 1), 4),
    "data": ((8, 1, 1), 1),
    "data and fsdp, accumulated": ((2, 4, 1), 2),
    "fsdp and tensor": ((1, 2, 4), 1),
    "all three, accumulated": ((2, 2, 2), 2),
}


def losses(layout: tuple[int, int, int], accumulate: int) -> list[float]:
    config = resolve(load_config("nano", SMALL))
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    optimizer = make_optimizer(config, jnp.float32, mesh)
    state, step = init_state(config, optimizer, mesh), make_train_step(config, optimizer, mesh)
    draw, found = np.random.default_rng(0), []
    for _ in range(config.train.steps):
        tokens = (draw.integers(0, 256, (16, 1)) + draw.integers(1, 4, (16, 33)).cumsum(1)) % 256
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": draw.random((16, 32)) < 0.9}
        batch = {k: v.astype(np.float32 if k == "weights" else np.int32) for k, v in batch.items()}
        batch = {k: v.reshape(accumulate, 16 // accumulate, 32) for k, v in batch.items()}
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        found.append(float(metrics["loss"]))
    return found


def muon_program() -> str:
    """The compiled text of Muon alone on (8, 1, 1)."""
    config = resolve(load_config("nano", SMALL))
    mesh = make_mesh(MeshConfig(), jax.devices())
    shardings = state_sharding(config, make_optimizer(config, jnp.float32, mesh), mesh).params["blocks"]
    kernels = {
        k: v for k, v in gpt.abstract_params(config.model)[0]["blocks"].items() if v.ndim == 3 and k != "ve_gate"
    }
    kernels = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[k]) for k, v in kernels.items()}
    optimizer = muon(mesh=mesh)
    state = jax.eval_shape(optimizer.init, kernels)
    momentum = state[0].momentum | kernels  # the same shapes, placed
    state = (state[0]._replace(momentum=momentum), *state[1:])
    return jax.jit(optimizer.update).lower(kernels, state, kernels).compile().as_text()


if __name__ == "__main__":
    assert jax.device_count() == 8
    found = {name: losses(*arguments) for name, arguments in LAYOUTS.items()}
    print(json.dumps({"losses": found, "muon": muon_program()}))
