"""`--doctor`: what it says is true here, and what is broken is said instead of raised."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from jaxchat import attention
from jaxchat.config import load_config
from jaxchat.scaling import resolve
from jaxchat.tools import sandbox
from train import doctor

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "launch.py", "--doctor", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=300, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return resolve(load_config("nano"))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    place = tmp_path_factory.mktemp("here")
    done = command("--json", "--run-dir", str(place / "not" / "yet"), JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"place": place}


def test_one_json_object_that_tells_the_truth(found):
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"]["platform"] == "cpu" and found["devices"]["compute_dtype"] == "float32"
    assert 0 < found["devices"]["host_memory_available_bytes"] < found["devices"]["host_memory_bytes"]
    assert found["disk"]["path"] == str(found["place"]) and found["disk"]["writable"]
    assert found["disk"]["free_bytes"] == pytest.approx(shutil.disk_usage(found["place"]).free, rel=0.2)
    assert found["network"] == {"loopback": True, "outside": "not tested"}
    assert not [line for line in found["advice"] if "error" in line or "fails" in line]


def test_attention_is_compared_with_the_reference(found):
    part = found["attention"]
    assert part["chosen"] == "blocked" and part["why"] == ""
    assert 0 < part["difference"] <= part["tolerance"]  # it did run: other order of sums


def test_a_wrong_backend_is_named(config, monkeypatch):
    right = attention._blocked
    monkeypatch.setattr(attention, "_blocked", lambda *args: right(*args) * 1.01)
    values, advice = doctor.check_attention(config)
    assert values["difference"] > values["tolerance"]
    assert len(advice) == 1 and "blocked attention fails" in advice[0]


def test_a_driver_that_does_not_start_is_said_and_the_rest_is_told():
    done = command(JAX_PLATFORMS="cuda")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    text = " ".join(done.stdout.split())
    assert "JAX_PLATFORMS=cuda" in done.stderr.splitlines()[-1]
    assert "doctor" not in done.stderr  # advice that was followed already
    for part in ("disk path", "free bytes", "sandbox level", "loopback: yes", f"jax: {jax.__version__}", "extras"):
        assert part in text, part


def test_extras_are_those_of_the_project_and_the_missing_ones_come_with_their_command(found, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(doctor.EXTRAS) == list(project["optional-dependencies"])
    assert set(found["extras"]) == set(doctor.EXTRAS)
    monkeypatch.chdir(ROOT)
    assert doctor.install_command("tpu") == "pip install -e '.[tpu]'"
    monkeypatch.chdir("/")
    assert doctor.install_command("tpu") == f"pip install -e '{ROOT}[tpu]'"
    monkeypatch.setattr("jaxchat.errors.ROOT", ROOT / "configs")  # no clone
    assert doctor.install_command("tpu") == "pip install 'jaxchat[tpu]'"


def test_the_sandbox_is_tried(found):
    part = found["sandbox"]
    assert part["level"] >= 1  # a child with limits, on every Linux that runs this
    assert part["level"] == sandbox.probe().level and part["missing"] == list(sandbox.probe().missing)
    if part["level"] >= 2:
        assert part["seccomp"] and (part["landlock_abi"] or part["bubblewrap"])
    assert (part["bubblewrap"] is None) == (shutil.which("bwrap") is None)
    assert len(part["missing"]) >= 3 - part["level"]
    assert ("bubblewrap" in " ".join(found["advice"])) == (part["bubblewrap"] is None)


GPU = {"dev/nvidia0": "", "dev/nvidiactl": ""}
PCI = "sys/bus/pci/devices/0000:00:04.0"


def machine(root, files):
    """A file system with these files; a text that begins with #! is a program."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    return root


def smi(line):
    return {"usr/bin/nvidia-smi": f"#!/bin/sh\necho '{line}'\n"}


@pytest.mark.parametrize(("files", "name", "extra"), [
    (GPU, "NVIDIA GPU", "[cuda]"),
    ({"dev/nvidia3": ""}, "NVIDIA GPU", "[cuda]"),  # one of a node's, in a container
    (GPU | smi("NVIDIA H100 80GB HBM3, 580.65.06, 9.0"), "NVIDIA H100 80GB HBM3", "[cuda]"),
    (smi("NVIDIA GeForce RTX 4090, 566.14, 8.9"), "NVIDIA GeForce RTX 4090", "[cuda12]"),  # as on WSL: no /dev/nvidia0
    (GPU | smi("Tesla P100-PCIE-16GB, 580.65.06, 6.0"), "Tesla P100-PCIE-16GB", "[cuda12]"),
    (GPU | {"usr/bin/nvidia-smi": "#!/bin/sh\nexit 9\n"}, "NVIDIA GPU", "[cuda]"),
    ({"dev/kfd": ""}, "AMD GPU", "rocm7-local"),
    ({"dev/accel0": ""}, "TPU", "[tpu]"),
    ({"dev/vfio/0": "", f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x006f\n"}, "TPU", "[tpu]"),  # v6e
])  # fmt: skip
def test_devices_without_jax(tmp_path, files, name, extra):
    ((found, install, _),) = doctor.accelerators(machine(tmp_path, files))
    assert found == name and extra in install


@pytest.mark.parametrize("files", [
    {"dev/null": ""},
    {"dev/nvidiactl": "", "usr/bin/nvidia-smi": "#!/bin/sh\nexit 6\n"},  # a driver without a card
    {"dev/accel/accel0": ""},  # a laptop's NPU
    {"dev/vfio/0": "", f"{PCI}/vendor": "0x1ae0\n", f"{PCI}/device": "0x0042\n"},  # Google's network card
])  # fmt: skip
def test_what_is_no_device(tmp_path, files):
    assert doctor.accelerators(machine(tmp_path, files)) == []


def test_the_line_comes_where_jax_is_on_the_cpu_and_was_not_told_to_be(tmp_path):
    machine(tmp_path, GPU)
    code = "from train.doctor import unused_accelerator as u; from pathlib import Path; import sys\n"
    code += "print(u(Path(sys.argv[1])))"
    said = {}
    for platforms in ("", "cpu"):
        env = os.environ | {"JAX_PLATFORMS": platforms}
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[platforms] = done.stdout.strip()
    assert said["cpu"] == "None" and "pip install" in said[""] and "\n" not in said[""]
