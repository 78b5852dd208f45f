"""An engine whose slots lie on several devices says what one device says, and nothing moves between them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found():
    environment = dict(os.environ) | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_devices.py")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_several_devices_make_the_tokens_of_one(found):
    assert found["split"]
    assert found["spread"] == found["alone"]
    assert found["alone"][-1][0] > 32  # and the conversation went on from its slot


def test_decoding_moves_nothing_between_devices(found):
    assert "while" in found["text"]
    moved = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", found["text"])
    assert moved == []
