"""Targets: what exists, what does not and what is near, and devices to compile for."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxchat.errors import UsageError
from jaxchat.sizes import peak_flops
from train.targets import CHIPS, SLICES, NoCompiler, chip_of, parse_target, target_devices

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("text", "name", "devices", "hosts"), [
    ("h100:8", "h100", 8, 1), ("h100:64", "h100", 64, 8), ("a100:2", "a100-80g", 2, 1), ("h200", "h200", 1, 1),
    ("rtx4090:2", "rtx4090", 2, 1), ("mi300x:16", "mi300x", 16, 2),
    ("v6e:2x4", "v6e", 8, 1), ("v6e:4x2", "v6e", 8, 1), ("v5e:1x1", "v5e", 1, 1), ("v5p:2x2x1", "v5p", 4, 1),
    ("cpu:8", "cpu", 8, 1),
])  # fmt: skip
def test_targets(text, name, devices, hosts):
    found = parse_target(text)
    assert (found.chip.name, found.devices, found.hosts) == (name, devices, hosts)


@pytest.mark.parametrize(("text", "message"), [
    ("b300:8", "take one of auto, cpu:N, h100:N"),
    ("h100:eight", "take one of"),
    ("h100:12", "hosts have 8 GPUs, 12 are no whole number of hosts; take h100:8 or h100:16"),
    ("h100:2x4", "take h100:8"),
    ("v6e:3x5", "no such slice of 15 chips; take v6e:4x4 or v6e:2x4"),
    ("v5p:2x2", "take v5p:2x2x1"),
    ("v5e:8", "take v5e:2x4"),
    ("v5e", "name the slice, for example v5e:2x4"),
    ("v5e:100x100", "take v5e:16x16"),
    ("cpu:0", "take one of"),
])  # fmt: skip
def test_what_does_not_exist_names_the_nearest_that_does(text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        parse_target(text)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--target {text}: ")


def test_every_slice_named_as_near_exists():
    for name, shapes in SLICES.items():
        for shape in shapes:
            assert parse_target(f"{name}:{'x'.join(map(str, shape))}").shape == shape


def test_simulated_devices_share_the_machine():
    one, four = parse_target("cpu:1").chip, parse_target("cpu:4").chip
    assert four.device_bytes == one.device_bytes // 4 and four.peak == one.peak / 4


def test_peaks_are_those_that_mfu_is_counted_with():
    kinds = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200", "a100-80g": "NVIDIA A100-SXM4-80GB",
             "rtx3090": "NVIDIA GeForce RTX 3090", "rtx4090": "NVIDIA GeForce RTX 4090",
             "rtx5090": "NVIDIA GeForce RTX 5090", "a6000": "NVIDIA RTX A6000", "l4": "NVIDIA L4",
             "l40s": "NVIDIA L40S", "t4": "Tesla T4", "mi300x": "AMD Instinct MI300X",
             "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}  # fmt: skip
    assert {name: chip.peak for name, chip in CHIPS.items()} == {n: peak_flops(kind) for n, kind in kinds.items()}

    assert {name: chip_of(kind).name for name, kind in kinds.items()} == {name: name for name in kinds}


@pytest.mark.parametrize("kind", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T400", "NVIDIA L40", "NVIDIA A10"])
def test_cards_with_a_like_name_have_no_figures(kind):
    assert chip_of(kind) is None


def test_mi300x_is_arithmetic_alone():
    with pytest.raises(NoCompiler):
        target_devices(parse_target("mi300x:8"))


@pytest.mark.parametrize(("target", "extra", "module"), [
    ("h100:8", "plan-cuda", "jax_plugins"), ("v6e:2x4", "plan-tpu", "libtpu")
])  # fmt: skip
def test_a_missing_extra_is_named_and_arithmetic_answers(target, extra, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"the extra {extra} is installed")
    with pytest.raises(NoCompiler, match=f"needs the extra {extra}: pip install"):
        target_devices(parse_target(target))
    command = [sys.executable, "launch.py", "--plan", "--target", target, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and '"method": "analytic"' in done.stdout
    assert len(done.stderr.splitlines()) == 1 and extra in done.stderr


@pytest.mark.parametrize(("target", "module"), [("h200:16", "jax_plugins"), ("v5p:2x2x1", "libtpu")])
def test_devices_that_are_not_here(target, module):
    if not importlib.util.find_spec(module):
        pytest.skip("needs the extra plan-cuda or plan-tpu")
    code = f"import launch; launch.prepare_plan('{target}')\n"
    code += "from train.targets import parse_target, target_devices\n"
    code += f"d = target_devices(parse_target('{target}')); print(len(d), d[0].device_kind, d[-1].process_index)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() in ("16 NVIDIA H200 1", "4 TPU v5 0"), done.stderr
