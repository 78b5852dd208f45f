"""An engine whose slots lie on several devices says what one device says, and nothing moves between them."""

import re

import pytest
from whole_run import on_devices


@pytest.fixture(scope="module")
def found():
    return on_devices(4, "engine_devices.py")


def test_several_devices_make_the_tokens_of_one(found):
    assert found["split"]
    assert found["spread"] == found["alone"]
    assert found["alone"][-1][0] > 32  # and the conversation went on from its slot


def test_decoding_moves_nothing_between_devices(found):
    assert "while" in found["text"]
    moved = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", found["text"])
    assert moved == []
