"""The compilation cache: the user's alone, whole after a kill, shared by several processes, never a reason to stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from launch import open_cache

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from launch import keep_programs
keep_programs(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
x = jax.random.normal(jax.random.key(0), (64, 64))
for _ in range(3):
    x = jax.jit(lambda x: jnp.tanh(x @ x) + jnp.sort(x, axis=0))(x)
print(len(hits), float(x.sum()).hex())
"""


def start(cache):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(cache)], env=env, text=True, **pipes)


def end(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    hits, value = out.split()
    return int(hits), value, err


def test_several_processes_share_it_and_read_the_same_bits(tmp_path):
    cold = [end(process) for process in [start(tmp_path), start(tmp_path)]]
    warm = end(start(tmp_path))
    assert warm[0] > 0 and {value for _, value, _ in [*cold, warm]} == {warm[1]}
    assert [err for _, _, err in [*cold, warm]] == ["", "", ""]


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = open_cache(str(tmp_path))
    assert folder.stat().st_mode & 0o077 == 0
    for name in ("whole-cache", "whole-atime", "torn-cache", "gone-atime"):
        (folder / name).write_bytes(b"12345678")
    assert open_cache(str(tmp_path)) == folder
    assert {path.name for path in folder.glob("*-*")} == {"whole-cache", "whole-atime"}


def test_the_oldest_go_first(tmp_path, monkeypatch):
    folder = open_cache(str(tmp_path))
    for age in range(5):
        for kind in ("cache", "atime"):
            path = folder / f"{age}-{kind}"
            path.write_bytes(b"12345678")
            os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(launch, "CACHE_PROGRAMS", 2)
    open_cache(str(tmp_path))
    assert {path.name for path in folder.glob("*-cache")} == {"0-cache", "1-cache"}


@pytest.mark.parametrize("fault", ["file", "others"])
def test_a_folder_that_cannot_be_used_costs_one_line(tmp_path, monkeypatch, fault, capsys):
    import jax

    before = jax.config.jax_compilation_cache_dir
    cache = tmp_path / "cache"
    if fault == "file":
        cache.write_text("no folder")
    else:
        open_cache(str(cache)).chmod(0o777)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    launch.keep_programs(str(cache))
    assert not capsys.readouterr().err, "JAX was told of a cache"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    launch.keep_programs(str(cache))
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and str(cache) in err
    assert jax.config.jax_compilation_cache_dir == before
