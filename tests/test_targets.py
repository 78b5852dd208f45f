"""Targets: what exists, what does not and what is near, and devices to compile for."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxchat.errors import UsageError
from jaxchat.sizes import peak_flops
from train.targets import CHIPS, NoCompiler, chip_of, parse_target, target_devices

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("text", "name", "devices"), [
    ("h100:8", "h100", 8), ("h100:64", "h100", 64), ("a100:2", "a100-80g", 2), ("h200", "h200", 1),
    ("rtx4090:2", "rtx4090", 2), ("mi300x:16", "mi300x", 16),
    ("v6e:2x4", "v6e", 8), ("v6e:4x2", "v6e", 8), ("v5e:1x1", "v5e", 1), ("v5p:2x2x1", "v5p", 4),
    ("cpu:8", "cpu", 8),
])  # fmt: skip
def test_targets(text, name, devices):
    found = parse_target(text)
    assert (found.chip.name, found.devices) == (name, devices)


@pytest.mark.parametrize(("text", "message"), [
    ("b300:8", "take auto, cpu:N, or a number of h100"),
    ("h100:eight", "unknown"),
    ("h100:12", "take a multiple of 8"),
    ("h100:2x4", "h100 counts devices, as in h100:8"),
    ("cpu:2x4", "cpu counts devices, as in cpu:8"),
    ("v6e:3x5", "v6e has 1x1, 2x2"),
    ("v5p:2x2", "v5p has 2x2x1"),
    ("v5e:8", "v5e has 1x1"),
    ("v5e", "v5e has 1x1"),
    ("cpu:0", "unknown"),
])  # fmt: skip
def test_what_does_not_exist_names_what_does(text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        parse_target(text)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--target {text}: ")


def test_simulated_devices_share_the_machine():
    one, four = parse_target("cpu:1").chip, parse_target("cpu:4").chip
    assert four.device_bytes == one.device_bytes // 4 and four.peak == one.peak / 4


def test_every_chip_has_figures_and_slices_that_exist():
    for name, chip in CHIPS.items():
        assert chip.peak == peak_flops(chip.kind) > 1e13 and chip_of(chip.kind) == chip
        assert (chip.platform == "tpu") == bool(chip.slices) and (chip.platform == "cuda") == bool(chip.xla)
        for shape in chip.slices:
            assert parse_target(f"{name}:{shape}").devices == math.prod(map(int, shape.split("x")))


@pytest.mark.parametrize(("kind", "name"), [
    ("NVIDIA GH200 480GB", "h200"), ("NVIDIA H100 PCIe", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-80g"),
    ("TPU v5e", "v5e"), ("TPU v5p", "v5p"), ("TPU v6e", "v6e"),
])  # fmt: skip
def test_other_names_of_the_same_chips(kind, name):
    assert chip_of(kind).name == name


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
