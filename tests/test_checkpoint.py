"""Checkpoints: complete or not at all, restored anywhere, named by their content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints, params_sha256, restore_params
from jaxchat.config import MeshConfig, load_config
from jaxchat.errors import DataError
from jaxchat.mesh import make_mesh
from jaxchat.optim.groups import make_optimizer
from jaxchat.optim.horizon import resolve
from jaxchat.state import init_state

TINY = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=64",
        "model.seq_len=16", "train.batch_tokens=64", "train.steps=10"]  # fmt: skip


@pytest.fixture(scope="module")
def state():
    config = resolve(load_config("nano", TINY))
    return init_state(config, make_optimizer(config, jnp.float32), make_mesh(MeshConfig(), jax.devices()[:1]))


def test_round_trip_of_everything(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "base", keep_last=2)
    for step in (3, 6, 9):
        checkpoints.save(step, state, {"seconds": 1.5})
    checkpoints.wait()
    assert checkpoints.latest() == 9
    assert sorted(p.name for p in (tmp_path / "base").iterdir() if p.name.isdigit()) == ["6", "9"]
    found, meta = checkpoints.restore(state)
    checkpoints.close()
    assert meta["step"] == 9 and meta["seconds"] == 1.5 and int(found.step) == 9
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, state.opt_state)
    params, meta = restore_params(tmp_path / "base")
    assert meta["step"] == 9
    assert params_sha256(params) == params_sha256(state.params)


def test_an_unfinished_save_does_not_count(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "base")
    checkpoints.save(3, state, {})
    checkpoints.close()
    (tmp_path / "base" / "7.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path / "base")
    assert again.latest() == 3
    again.close()
    assert restore_params(tmp_path / "base")[1]["step"] == 3


def test_nothing_there_is_said(tmp_path, state):
    with pytest.raises(DataError, match="no checkpoint"):
        restore_params(tmp_path / "base")
    checkpoints = Checkpoints(tmp_path / "base")
    with pytest.raises(DataError, match="no complete checkpoint"):
        checkpoints.restore(state)
    checkpoints.close()


def test_missing_files_are_named(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "base")
    checkpoints.save(3, state, {})
    checkpoints.close()
    for path in sorted((tmp_path / "base" / "3" / "params").rglob("*")):
        if path.is_file():
            path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        restore_params(tmp_path / "base")


def test_sha256_is_of_names_shapes_dtypes_and_bytes():
    a = {"x": np.arange(6, dtype=np.float32), "y": {"z": np.ones(2, np.float32)}}
    assert params_sha256(a) == params_sha256({"y": {"z": np.ones(2, np.float32)}, "x": np.arange(6, dtype=np.float32)})
    others = [
        {"x": a["x"].reshape(2, 3), "y": a["y"]},
        {"x": a["x"].astype(np.float64), "y": a["y"]},
        {"w": a["x"], "y": a["y"]},
        {"x": a["x"] + 1e-6, "y": a["y"]},
    ]
    assert len({params_sha256(tree) for tree in [a, *others]}) == 5
