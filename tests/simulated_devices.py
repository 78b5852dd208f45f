"""Run in a process of its own with 8 simulated devices: 20 losses on one device and on three meshes, as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import MeshConfig, load_config
from jaxchat.mesh import batch_sharding, make_mesh
from jaxchat.optim.groups import make_optimizer
from jaxchat.optim.horizon import resolve
from jaxchat.state import init_state, make_train_step

SMALL = ["model.depth=4", "model.width=64", "model.n_heads=4", "model.head_width=16", "model.vocab_size=256",
         "model.seq_len=32", "train.batch_tokens=512", "train.steps=20", "train.compute_dtype='float32'"]  # fmt: skip
# (data, fsdp, tensor) and micro-batches per step
LAYOUTS = {"one": ((1, 1, 1), 1), "accumulated": ((1, 1, 1), 4), "data": ((8, 1, 1), 1), "mixed": ((2, 2, 2), 2)}


def losses(layout: tuple[int, int, int], accumulate: int) -> list[float]:
    config = resolve(load_config("nano", SMALL))
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    optimizer = make_optimizer(config, jnp.float32)
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


if __name__ == "__main__":
    assert jax.device_count() == 8
    print(json.dumps({name: losses(*arguments) for name, arguments in LAYOUTS.items()}))
