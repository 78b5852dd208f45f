"""`--doctor`: what it says is true here, and what is broken is said instead of raised."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
import types
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
    assert part["chosen"] == "blocked" and set(part["checks"]) == {"blocked", "xla"}
    for check in part["checks"].values():
        assert check["ok"] and 0 <= check["difference"] <= part["tolerance"]
    assert part["checks"]["blocked"]["difference"] > 0  # it did run: other order of sums


def test_a_wrong_backend_is_named(config, monkeypatch):
    right = attention._blocked
    monkeypatch.setattr(attention, "_blocked", lambda *args: right(*args) * 1.01)
    part = doctor.attention(config)
    assert part["chosen"] == "xla" and not part["checks"]["blocked"]["ok"]
    lines = doctor.advice({"devices": {}, "attention": part, "disk": {}, "network": {}, "sandbox": {}}, [])
    assert len(lines) == 1 and "blocked attention fails" in lines[0]


def test_a_driver_that_does_not_start_is_said_and_the_rest_is_told(config):
    done = command(JAX_PLATFORMS="cuda")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    text = " ".join(done.stdout.split())
    assert "JAX_PLATFORMS=cuda: unset it" in text
    assert "loopback works" in text and "GiB free at" in text


def test_the_table_has_every_part(found, capsys):
    doctor.show({key: value for key, value in found.items() if key != "place"})
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "devices 1 x",
        "attention blocked",
        "right: differs",
        "disk",
        "sandbox level",
        "loopback works",
        "extras",
    ):
        assert part in text, part
    assert f"jax {jax.__version__}" in text


def test_extras_are_those_of_the_project_and_the_missing_ones_come_with_their_command(found, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert list(doctor.EXTRAS) == list(project["optional-dependencies"])
    assert set(found["extras"]) == set(doctor.EXTRAS)
    monkeypatch.chdir(ROOT)
    assert doctor.install_command("tpu") == "pip install -e '.[tpu]'"
    monkeypatch.chdir("/")
    assert doctor.install_command("tpu") == "pip install 'jaxchat[tpu]'"


def test_the_sandbox_is_tried(found):
    part = found["sandbox"]
    assert part["level"] >= 1  # a child with limits, on every Linux that runs this
    assert part["level"] == sandbox.probe().level and part["missing"] == list(sandbox.probe().missing)
    if part["level"] >= 2:
        assert part["seccomp"] and (part["landlock_abi"] or part["bubblewrap"])
    assert (part["bubblewrap"] is None) == (shutil.which("bwrap") is None)
    assert len(part["missing"]) >= 3 - part["level"]
    told = doctor._sandbox(part | {"level": 1, "bubblewrap": False, "missing": ["level 2: so", "level 3: not so"]})
    assert told["sandbox"].startswith("level 1 of 3") and "blocked here" in told["sandbox"]
    assert list(told.values())[1:] == ["level 2: so\nlevel 3: not so"]
    parts = {"devices": {}, "attention": {}, "disk": {}, "network": {}, "sandbox": part | {"bubblewrap": None}}
    assert ["apt install bubblewrap" in line for line in doctor.advice(parts, [])] == [True]


def test_what_jax_says_of_a_missing_plugin_is_said_once_by_us_and_the_rest_is_passed_on(monkeypatch):
    def look_for_devices():
        logging.getLogger("jax.backends").warning("An NVIDIA GPU may be present on this machine, but no plugin is.")
        logging.getLogger("jax.backends").warning("the driver is too old")
        return "cpu"

    unset = types.SimpleNamespace(jax_platforms=None)
    monkeypatch.setattr(doctor, "jax", types.SimpleNamespace(config=unset, default_backend=look_for_devices))
    with doctor._jax_log() as records:
        doctor.unused_accelerator()
    assert [record.getMessage() for record in records] == ["the driver is too old"]
