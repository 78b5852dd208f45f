"""The real steps compiled: for 8 simulated devices always, for GPUs and TPUs where the extra is installed.

Every plan runs in a process of its own: the devices must be chosen before JAX starts.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxchat.config import load_config
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from train.compiled import largest_rows

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["model.depth=2", "model.width=128", "model.head_width=64", "model.vocab_size=512", "model.seq_len=256",
         "train.batch_tokens=16384", "train.device_batch_rows=4", "train.steps=10",
         "serve.slots=4"]  # fmt: skip


def run(target, *sets, flags=("--plan",), code=0):
    words = [f"--set={s}" for s in (*SMALL, *sets)]
    command = [sys.executable, "launch.py", *flags, "--target", target, "--json", *words]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        return done.stderr
    assert len(done.stdout.splitlines()) == 1, "one object and nothing else"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def on_cpu():
    return run("cpu:8")


def test_the_step_for_eight_devices(on_cpu):
    assert on_cpu["method"] == "compiled" and on_cpu["devices"] == 8 and on_cpu["fits"]
    assert on_cpu["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert on_cpu["device_batch_rows"] * on_cpu["grad_accum"] * 8 * 256 == 16384
    assert set(on_cpu["collectives"]) >= {"all-gather", "all-reduce"}
    assert on_cpu["bytes_per_step_per_device"] == sum(on_cpu["bytes_by_kind"].values()) > 0 < on_cpu["memory_seconds"]


def test_memory_adds_up(on_cpu):
    memory = on_cpu["memory"]
    state = memory["parameters"] + memory["optimizer"] + memory["batch"]
    assert on_cpu["argument_bytes"] == pytest.approx(state, abs=4096)
    assert memory["parameters"] > 4 * on_cpu["params"] / 8
    assert on_cpu["peak_bytes_per_device"] >= on_cpu["argument_bytes"] + on_cpu["temp_bytes"]


def test_all_rows_fit_and_fewer_where_memory_is_short(on_cpu):
    assert on_cpu["largest_device_batch_rows"] == 8


@pytest.mark.parametrize(("fixed", "per_row", "expected"), [(10, 1, 32), (10, 4, 16), (10, 40, 2), (100, 1, 0)])
def test_search_for_the_largest_batch(fixed, per_row, expected):
    """92 usable bytes; few compiles, and never one beyond what the batch divides into."""
    tried = []

    def peak_of(rows):
        tried.append(rows)
        return fixed + per_row * rows

    config = resolve(load_config("nano", [*SMALL, "train.batch_tokens=8192"]))
    one_device = make_mesh(config.mesh, jax.devices()[:1])
    assert largest_rows(config, one_device, 100, peak_of) == expected
    assert len(tried) == len(set(tried)) <= 5


def test_a_mesh_that_does_not_divide():
    assert "mesh.tensor=3" in run("cpu:8", "mesh.tensor=3", code=2)


def test_money_and_time():
    found = run("h100:8", "model.width=-1", "model.head_width=-1", "train.batch_tokens=-1", "train.steps=-1",
                "train.token_ratio=0.01", flags=("--budget", "1usd", "--hours", "0.2", "--tier", "d12"))  # fmt: skip
    assert found["usd_estimate"] <= 1 and found["hours_estimate"] <= 0.2
    assert f"model.depth={found['depth']}" in found["command"]


needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None, reason="compiling for GPUs needs the extra plan-cuda"
)
needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs the extra plan-tpu"
)


@needs_cuda
@pytest.mark.parametrize("target", ["h100:8", "a100:2", "h200:16"])
def test_gpus_that_are_not_here(target):
    found = run(target)
    assert found["method"] == "compiled" and found["devices"] == int(target.split(":")[1])
    assert found["collectives"] and found["memory"]["temporaries"] == found["temp_bytes"] > 0


@needs_cuda
@pytest.mark.parametrize("target", ["h100:8", "a100:2"])
def test_what_a_step_for_gpus_does(target):
    words = [part for change in SMALL for part in ("--set", change)]
    command = [sys.executable, "-m", "bench.hlo", "--tier", "nano", "--target", target, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels"]["__cudnn$fmhaSoftmax"] == 2 * found["grad_accum"]
    assert found["kernels"]["__cudnn$fmhaSoftmaxBackward"] == 2 * found["grad_accum"]
    assert found["float32_logits"] == [] and found["loops_of_unknown_length"] == 0
    assert found["product_flops"].keys() >= {"bf16 x bf16", "attention kernels"}
    assert found["bytes"]["attention"] > 0 < found["bytes"]["products"] and 0 < found["mfu"] < 0.66
    assert 0.95 < found["flops_of_formula"] * (1 - found["update_flops_share"]) < 1.15


@needs_cuda
def test_a_plugin_of_another_version(tmp_path):
    for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt"):
        folder = tmp_path / f"{name.replace('-', '_')}-0.1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.2\n")
    command = [sys.executable, "launch.py", "--plan", "--target", "h100:8"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "jax-cuda13-plugin is 0.1.2 and jax is" in done.stderr.splitlines()[-1]


@needs_tpu
@pytest.mark.parametrize("target", ["v6e:2x4", "v5p:2x2x1"])
def test_tpu_slices_that_are_not_here(target):
    found = run(target)
    assert found["method"] == "compiled"
    assert found["collectives"] and found["memory"]["temporaries"] > 0
