"""Run in a process of its own with 8 simulated devices: 30 losses on one device and on other meshes, as JSON.

Also: how Muon's orthogonalization compiles there.
"""

import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat import model as gpt
from jaxchat.config import MeshConfig, load_config
from jaxchat.muon import muon
from jaxchat.optimizer import make_optimizer
from jaxchat.scaling import resolve
from jaxchat.sharding import SMALL as SMALL_SIZE
from jaxchat.sharding import batch_sharding, make_mesh
from jaxchat.train_state import compute_dtype, init_state, make_eval_step, make_train_step, state_sharding

SMALL = ["model.depth=4", "model.width=64", "model.n_heads=4", "model.head_width=16", "model.vocab_size=200",
         "model.seq_len=32", "model.window_short=5", "train.batch_tokens=512", "train.steps=30",
         "train.compute_dtype='float32'", "optim.lr_scale=0.1"]  # fmt: skip
# (data, fsdp, tensor) and micro-batches per step
LAYOUTS = {
    "one": ((1, 1, 1), 1),
    "accumulated": ((1, 1, 1), 4),
    "data": ((8, 1, 1), 1),
    "data and fsdp, accumulated": ((2, 4, 1), 2),
    "fsdp and tensor": ((1, 2, 4), 1),
    "all three, accumulated": ((2, 2, 2), 2),
}


DEEP = ["model.recipe=jaxchat", "model.depth=8", "train.scan_unroll=1", "train.remat=names", "model.n_kv_heads=2",
        "train.steps=6"]  # fmt: skip
HALF = ["model.recipe=jaxchat", "train.compute_dtype='bfloat16'", "train.steps=6"]
OTHERS = {  # (first, second layout that must agree), settings
    "scanned, saved by name, grouped heads": (((1, 1, 1), 1), ((2, 2, 2), 2), DEEP),
    "fsdp alone, nothing saved": (((1, 1, 1), 1), ((1, 8, 1), 1), ["train.steps=6", "model.recipe=classic"]),
    "bfloat16": (((1, 1, 1), 1), ((2, 2, 2), 2), HALF),
}


def losses(layout: tuple[int, int, int], accumulate: int, extra: Sequence[str] = ()) -> list[float]:
    config = resolve(load_config("nano", [*SMALL, *extra]))
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    state, step = init_state(config, optimizer, mesh), make_train_step(config, optimizer, mesh)
    draw, found = np.random.default_rng(0), []
    for _ in range(config.train.steps):
        tokens = (draw.integers(0, 200, (16, 1)) + draw.integers(1, 4, (16, 33)).cumsum(1)) % 200
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": draw.random((16, 32)) < 0.9}
        batch = {k: v.astype(np.float32 if k == "weights" else np.int32) for k, v in batch.items()}
        batch = {k: v.reshape(accumulate, 16 // accumulate, 32) for k, v in batch.items()}
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        found.append(float(metrics["loss"]))
    return found


def evaluation(layout: tuple[int, int, int]) -> dict[str, float]:
    """Sums of the evaluation step over one batch, fresh but noisy parameters."""
    config = resolve(load_config("nano", [*SMALL, "model.recipe=classic"]))
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: int(np.prod(layout))])
    optimizer = make_optimizer(config, jnp.float32, mesh)
    draw = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: (0.1 * draw.standard_normal(p.shape)).astype(np.float32),
        init_state(config, optimizer, mesh).params,
    )
    params = jax.device_put(params, state_sharding(config, optimizer, mesh).params)
    tokens = draw.integers(0, 200, (1, 16, 33)).astype(np.int32)
    batch = {"inputs": tokens[..., :-1], "targets": tokens[..., 1:], "weights": np.ones((1, 16, 32), np.float32)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    sums = make_eval_step(config, mesh)(params, batch, jnp.asarray(np.arange(256) % 5, jnp.int32))
    return {name: float(value.sum()) for name, value in sums.items()}


def split_moments() -> dict[str, bool]:
    """For each large kernel and table on (8, 1, 1): whether every moment lies split, just as its master does."""
    config = resolve(load_config("nano", SMALL))
    mesh = make_mesh(MeshConfig(), jax.devices())
    state = init_state(config, make_optimizer(config, jnp.float32, mesh), mesh)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    masters = {path: leaf for path, leaf in leaves if leaf.size >= SMALL_SIZE}
    found = {jax.tree_util.keystr(path): False for path in masters}
    for path, moment in jax.tree_util.tree_leaves_with_path(state.opt_state):
        for master_path, master in masters.items():
            if path[-len(master_path) :] == master_path and moment.shape == master.shape:
                split = moment.addressable_shards[0].data.size * 8 == master.size
                found[jax.tree_util.keystr(master_path)] = split and moment.sharding == master.sharding
    return found


def muon_program() -> str:
    """The compiled text of Muon alone on (8, 1, 1)."""
    config = resolve(load_config("nano", SMALL))
    mesh = make_mesh(MeshConfig(), jax.devices())
    shardings = state_sharding(config, make_optimizer(config, jnp.float32, mesh), mesh).params["blocks"]
    kernels = {k: v for k, v in gpt.abstract_params(config.model)["blocks"].items() if v.ndim == 3 and k != "ve_gate"}
    kernels = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=shardings[k]) for k, v in kernels.items()}
    optimizer = muon(mesh=mesh)
    state = jax.eval_shape(optimizer.init, kernels)
    momentum = state[0].momentum | kernels  # the same shapes, placed
    state = (state[0]._replace(momentum=momentum), *state[1:])
    return jax.jit(optimizer.update).lower(kernels, state, kernels).compile().as_text()


if __name__ == "__main__":
    assert jax.device_count() == 8
    found = {name: losses(*arguments) for name, arguments in LAYOUTS.items()}
    others = {name: [losses(*a, extra), losses(*b, extra)] for name, (a, b, extra) in OTHERS.items()}
    sums = [evaluation(layout) for layout in ((1, 1, 1), (2, 2, 2), (1, 2, 4))]
    print(
        json.dumps({"losses": found, "others": others, "sums": sums, "muon": muon_program(), "split": split_moments()})
    )
