"""Collectives, products and recomputation read from real compiled programs whose numbers are known by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.hlo import ATTENTION_SHARE, BANDWIDTH_SHARE, PRODUCT_SHARE, Totals, analyse, step_seconds
from train.hlo import shape_bytes
from train.targets import parse_target

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def programs():
    command = [sys.executable, str(HERE / "hlo_programs.py")]
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment = os.environ | devices | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "expected", "sent"), [
    # a row of 64 floats a device; the ring sends 2 x 7/8 of it in every one of 5 iterations
    ("reduce_in_scan", {"all-reduce": {"count": 5, "bytes": 5 * 256}}, 5 * 2 * 7 / 8 * 256),
    # 3 x 4 iterations, four rows gathered in each
    ("gather_in_nested_scans", {"all-gather": {"count": 12, "bytes": 12 * 4 * 256}}, 12 * 3 / 4 * 4 * 256),
    ("scatter_exchange_shift", {
        "reduce-scatter": {"count": 6, "bytes": 6 * 256},
        "all-to-all": {"count": 6, "bytes": 6 * 256},
        "collective-permute": {"count": 6, "bytes": 6 * 256},
    }, 6 * (3 / 4 + 3 / 4 + 1) * 256),
])  # fmt: skip
def test_collectives_count_with_the_trips_of_their_loops(programs, name, expected, sent):
    found = programs[name]
    assert found["collectives"] == expected
    assert found["without_notes"] == expected, "trip counts from the loop's condition"
    assert found["sent"] == pytest.approx(sent)
    assert found["unknown_loops"] == [0, 0]


def test_groups_of_devices(programs):
    assert programs["reduce_in_scan"]["groups"] == [["all-reduce", list(range(8))]]
    assert programs["gather_in_nested_scans"]["groups"] == [["all-gather", [0, 1, 2, 3]]]


def test_products(programs):
    one = 2 * 32 * 48 * 48
    assert programs["products_in_scan"]["flops"] == [7 * one, 7 * one]
    # two products forward, both again for the backward pass, and two of its own
    assert programs["recomputed"]["flops"][0] == 7 * 6 * one
    assert programs["recomputed"]["recomputed"] == 7 * 2 * one
    assert ["f32", [7, 32, 48]] in programs["recomputed"]["buffers"], "the saved inputs of the layers"


@pytest.mark.parametrize(("notation", "group"), [
    ("replica_groups={{0,2},{1,3}}", (0, 2)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
    ("replica_groups={}", tuple(range(8))),
])  # fmt: skip
def test_every_notation_of_groups(notation, group):
    text = f"""ENTRY %main (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %r = f32[16]{{0}} all-reduce(%p), channel_id=1, {notation}, use_global_device_ids=true, to_apply=%add
}}
"""
    (found,) = analyse(text, 8).collectives
    assert found.group == group and found.bytes == 64


def test_products_that_the_tpu_compiler_writes_as_convolutions():
    """Lines of a program compiled for v6e: scores of 4 rows x 6 heads, and heads side by side in one product."""
    text = (
        """ENTRY %main (a: bf16[4,2048,6,128], b: bf16[4,2048,6,128]) -> f32[4,6,2048,2048] {
  %a = bf16[4,2048,6,128]{1,3,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[4,2048,6,128]{1,3,2,0:T(8,128)(2,1)S(1)} parameter(1)
  %x = bf16[2048,4,768]{1,3,2,0:T(8,128)(2,1)} parameter(2)
  %w = bf16[6,128,768]{1,3,2,0:T(8,128)(2,1)} parameter(3)
  ROOT %s = f32[4,6,2048,2048]{2,3,1,0:T(8,128)} convolution(%a, %b), window={size=4x6 stride=3x5 lhs_dilate=4x6}, """
        """dim_labels=0b1f_0o1i->01bf
}
"""
    )
    assert analyse(text).product_flops == 2 * 4 * 6 * 2048 * 2048 * 128


def test_bytes_of_shapes():
    assert shape_bytes("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 2048
    assert shape_bytes("(f32[2]{0}, /*index=1*/s8[3]{0}, f8e4m3fn[5]{0}, pred[])") == 8 + 3 + 5 + 1
    assert shape_bytes("token[]") == 0


HEAD = "ENTRY %main (p: f32[8,16]) -> f32[8,16] {\n  %p = f32[8,16]{1,0} parameter(0)\n"
TABLE = (
    "  %t = bf16[100,16]{1,0} parameter(1)\n  %i = s32[4,1]{1,0} parameter(2)\n  %u = bf16[4,16]{1,0} parameter(3)\n"
)


@pytest.mark.parametrize(("lines", "moved"), [
    ("%r = f32[8,16]{1,0} copy(%p)", 512 + 512),
    ("%r = f32[8,16]{1,0} add(%p, %p)", 512 + 512),  # named twice, read once
    ("%r = f32[2,16]{1,0} slice(%p), slice={[0:2], [0:16]}", 128 + 128),
    ("%r = f32[16,8]{0,1} bitcast(%p)", 0),
    ("%r = (f32[8,16]{1,0}, f32[8,16]{1,0}) tuple(%p, %p)", 0),
    # rows of a table: four of them, four numbers that name them, four written
    (TABLE + "  %r = bf16[4,16]{1,0} gather(%t, %i), offset_dims={1}, slice_sizes={1,16}", 128 + 16 + 128),
    # a sum in place: rows read, what is added to them, their numbers, rows written
    (TABLE + "  %r = bf16[100,16]{1,0} scatter(%t, %i, %u), to_apply=%add", 128 + 128 + 16 + 128),
    ("%z = s32[] constant(0)\n  %s = f32[1,16]{1,0} parameter(1)\n"
     "  %r = f32[8,16]{1,0} dynamic-update-slice(%p, %s, %z, %z)", 64 + 64 + 4),
    # the kernel's workspace is no array of the program
    ('%r = (f32[8,8]{1,0}, s8[4096]{0}) custom-call(%p, %p), custom_call_target="__cublas$gemm"', 512 + 256),
])  # fmt: skip
def test_bytes_of_one_instruction(lines, moved):
    """Arrays of f32[8,16] are 512 bytes."""
    assert analyse(f"{HEAD}  {lines}\n}}\n").bytes.total() == moved


IN_PLACE = """%cut (a: f32[8,16], b: s32[]) -> bf16[1,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %z = s32[] constant(0)
  %c = bf16[8,16]{1,0} convert(%a)
  ROOT %d = bf16[1,16]{1,0} dynamic-slice(%c, %b, %z), dynamic_slice_sizes={1,16}
}
%put (a: f32[8,16], b: bf16[1,16], c: s32[]) -> (f32[8,16], f32[1]) {
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[1,16]{1,0} parameter(1)
  %c = s32[] parameter(2)
  %z = s32[] constant(0)
  %f = f32[1,16]{1,0} convert(%b)
  %s = f32[] constant(0)
  %d = f32[8,16]{1,0} dynamic-update-slice(%a, %f, %c, %z)
  %e = f32[1]{0} reduce(%f, %s), dimensions={1}, to_apply=%add
  ROOT %t = (f32[8,16]{1,0}, f32[1]{0}) tuple(%d, %e)
}
%body (s: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s = (s32[], f32[8,16]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%s), index=1
  %cut.1 = bf16[1,16]{1,0} fusion(%x, %n), kind=kLoop, calls=%cut
  %put.1 = (f32[8,16]{1,0}, f32[1]{0}) fusion(%x, %cut.1, %n), kind=kInput, calls=%put, metadata={op_name="jit(f)/put"}
  %y = f32[8,16]{1,0} get-tuple-element(%put.1), index=0
  ROOT %r = (s32[], f32[8,16]{1,0}) tuple(%n, %y)
}
ENTRY %main (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,16]{1,0}) while(%p), condition=%none, body=%body, """ + (
    'backend_config={"known_trip_count":{"n":"6"}}\n}\n'
)


def test_bytes_of_slices_and_updates_inside_fusions_and_loops():
    """A row of 16 is cut out of 8 and put back: no kernel touches the other seven."""
    cut, put = 64 + 4 + 32, 32 + 4 + 64 + 4
    assert +analyse(IN_PLACE).bytes == {"other": 6 * (cut + put)}


def test_bytes_of_compiled_loops(programs):
    """tanh(x w) seven times: the product reads both and writes x, tanh reads it and writes it; no more than copies of
    the start are around it."""
    x, w = 4 * 32 * 48, 4 * 48 * 48
    found = programs["products_in_scan"]["bytes"]
    assert found["products"] == 7 * (x + w + x)
    assert 7 * 2 * x <= found["other"] <= 7 * 2 * x + 4 * x
    assert programs["reduce_in_scan"]["bytes"]["collectives"] == 5 * 2 * 256


def test_the_time_of_a_compiled_step_follows_from_products_attention_and_bytes():
    """A second of bf16 products, as many 8-bit FLOPs in half of it, a tenth of attention, 120 GB of the rest."""
    target, product = parse_target("h100:1"), PRODUCT_SHARE * 989e12
    totals = Totals(product_flops=2 * product, attention_flops=0.1 * ATTENTION_SHARE * 989e12)
    totals.product_types.update({"bf16 x bf16": int(product), "f8e4m3fn x f8e4m3fn": int(product)})
    totals.bytes.update({"products": int(35e9), "other": int(120e9)})
    seconds = step_seconds(target, totals)
    assert seconds["products"] == pytest.approx(1.5) and seconds["attention"] == pytest.approx(0.1)
    assert seconds["other"] == pytest.approx(120e9 / (BANDWIDTH_SHARE * 3.35e12))
    assert step_seconds(parse_target("v6e:2x4"), totals) == {}
