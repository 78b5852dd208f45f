"""Checkpoints: complete or not at all, restored anywhere, named by their content."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints, params_sha256, restore_params
from jaxchat.config import MeshConfig, load_config
from jaxchat.errors import DataError
from jaxchat.optimizer import make_optimizer
from jaxchat.run_dir import damage
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.train_state import init_state

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


def test_every_so_many_steps_one_is_kept_for_good(tmp_path, state):
    for step in (3, 4, 6, 8, 9):  # a process each, as after as many stops
        checkpoints = Checkpoints(tmp_path / "base", keep_last=1, keep_every=4)
        checkpoints.save(step, state, {})
        checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "base").iterdir() if p.name.isdigit()) == [4, 8, 9]


def test_an_unfinished_save_does_not_count(tmp_path, state):
    checkpoints = Checkpoints(tmp_path / "base")
    checkpoints.save(3, state, {})
    checkpoints.close()
    (tmp_path / "base" / "7.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path / "base")
    assert again.latest() == 3
    again.close()
    assert restore_params(tmp_path / "base")[1]["step"] == 3


def saved(folder, state, *steps):
    checkpoints = Checkpoints(folder, keep_last=9)
    for step in steps:
        checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step)), {"of": step})
    checkpoints.close()
    return folder


def restored(folder, like, **options):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(like, **options)
    finally:
        checkpoints.close()


NO_CONTENT = ("SHA256SUMS", "commit_success.txt", "_CHECKPOINT_METADATA")


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in NO_CONTENT)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


DAMAGE = {
    "a bit flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": lambda path: path.unlink(),
}


def test_checksums_come_with_the_checkpoint_and_cover_it(tmp_path, state):
    folder = saved(tmp_path / "base", state, 3) / "3"
    named = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert {p.relative_to(folder).as_posix() for p in files_of(folder)} <= named
    assert any(name.startswith("opt_state/") for name in named) and any(name.startswith("meta/") for name in named)
    assert damage(folder) is None


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(tmp_path, state, how, capsys):
    saved(tmp_path / "whole", state, 3, 6)
    names = [p.relative_to(tmp_path / "whole") for p in files_of(tmp_path / "whole" / "6")]
    for i, name in enumerate(names[:: max(1, len(names) // 6)]):
        folder = tmp_path / f"run{i}"
        shutil.copytree(tmp_path / "whole", folder)
        DAMAGE[how](folder / name)
        with pytest.raises(DataError, match=r"/6: .* (is gone|is damaged)"):
            restored(folder, state, go_back=False)
        found, meta = restored(folder, state)
        assert meta["step"] == 3 and meta["of"] == 3 and int(found.step) == 3
        assert "renamed to damaged_6, going on from 3" in capsys.readouterr().err
        assert (folder / "damaged_6").is_dir() and not (folder / "6").exists()
        saved(folder, state, 6)  # the same step can be saved again
        assert restored(folder, state)[1]["step"] == 6


def test_where_all_are_damaged_nothing_starts_anew_in_silence(tmp_path, state):
    folder = saved(tmp_path / "base", state, 3, 6)
    for step in (3, 6):
        flip(files_of(folder / str(step) / "params")[-1])
    for _ in range(2):
        with pytest.raises(DataError, match=r"/6: .*, and there is no whole one before it"):
            restored(folder, state)
    assert sorted(p.name for p in folder.iterdir()) == ["3", "6"]


def test_reading_parameters_looks_at_their_files(tmp_path, state):
    folder = saved(tmp_path / "base", state, 3)
    flip(files_of(folder / "3" / "opt_state")[-1])
    assert restore_params(folder)[1]["step"] == 3
    flip(files_of(folder / "3" / "params")[-1])
    with pytest.raises(DataError, match="is damaged"):
        restore_params(folder)


def test_missing_files_are_named(tmp_path, state):
    folder = saved(tmp_path / "base", state, 3)
    for path in files_of(folder / "3" / "params"):
        path.unlink()
    with pytest.raises(DataError, match="is gone"):
        restore_params(folder)
    (folder / "3" / "SHA256SUMS").unlink()  # as older versions left it
    with pytest.raises(DataError, match="Orbax failed"):
        restore_params(folder)


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
