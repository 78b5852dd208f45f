"""The benchmarks run for real on tiny shapes, and their last line is the JSON object they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from live_service import live
from small_model import write_run

from bench.compare import nanochat_config
from bench.decode_compiled import loop_cost
from bench.train_step import draw_shape
from jaxchat.config import load_config
from jaxchat.errors import UsageError
from jaxchat.optim.horizon import resolve

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=128",
        "model.seq_len=128", "train.batch_tokens=512", "train.device_batch_rows=2"]  # fmt: skip
SETS = [part for change in TINY for part in ("--set", change)]


def run(*arguments, code=0, devices=1):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else [json.loads(line) for line in done.stdout.splitlines()]


def test_the_step_says_what_it_measured_and_with_which_settings():
    result = run("bench.train_step", *SETS, "--steps", "4")[-1]
    assert result["batch"] == [2, 2, 128] and result["settings"]["model.width"] == 32
    assert {"device", "jax", "jaxlib", "dtype", "malloc", "load_average"} <= result.keys()
    low, high = result["step_seconds_range"]
    assert 0 < low <= result["step_seconds"] <= high
    assert result["tokens_per_second"] == pytest.approx(512 / result["step_seconds"], rel=0.05)
    assert result["compile_seconds"] < result["first_step_seconds"]
    assert 0 < result["share_of_product_rate"] < 1 and result["mfu"] is None  # no peak is known for a CPU
    assert result["loss"] == pytest.approx(4.85, abs=0.3)  # random tokens: ln 128


def test_variants_are_every_combination_and_one_that_fails_stops_no_other():
    axes = ["--variants", "train.remat=none,full", "--variants", "model.n_kv_heads=2,3"]
    *lines, last = run("bench.train_step", *SETS, "--steps", "1", *axes)
    assert last["variants"] == lines and len(lines) == 4
    for line in lines:
        assert ("n_kv_heads" in line["error"]) if line["variant"][1].endswith("=3") else line["step_seconds"] > 0


def test_the_input_pipeline_is_measured_to_the_host_and_to_the_device():
    (result,) = run("bench.data", "--tokens", "100_000", "--seq-len", "128", "--rows", "16", "--repeats", "2")
    assert result["tokens"] == 99_968 and result["goal"] == 104_000_000
    assert result["host_range"][0] <= result["host_tokens_per_second"] <= result["host_range"][1]
    assert result["device_tokens_per_second"] > 0
    assert result["share_of_goal"] == pytest.approx(result["host_tokens_per_second"] / 104e6, abs=1e-3)


@pytest.mark.parametrize("devices", [2])
def test_decoding_is_measured_by_batch_size(devices):
    sizes = ["--prompt", "16", "--tokens", "24", "--batch-sizes", "1,4", "--rounds", "1", "--weights", "auto,int8"]
    *_, result = run("bench.decode", *SETS, "--set", "model.vocab_size=300", *sizes, devices=devices)
    assert result["devices"] == devices and result["model"]["width"] == 32
    for kind in ("auto", "int8"):
        assert [entry["rows"] for entry in result[kind]] == [1, 4]
        for entry in result[kind]:
            assert entry["first_token_seconds"] > 0 and entry["tokens_per_second"] >= entry["with_prompt"] > 0
            limit = entry["rows"] * entry["bandwidth"] / entry["bytes_per_step"]
            assert entry["limit_tokens_per_second"] == pytest.approx(limit, rel=0.01)
    assert result["int8"][0]["bytes_per_step"] < result["auto"][0]["bytes_per_step"]
    assert "more than the context of 128" in run("bench.decode", *SETS, "--prompt", "120", "--tokens", "24", code=2)


LOOP = """
%cut (p0: f32[64,32], p1: s32[]) -> f32[1,32] {
  %p0 = f32[64,32]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = f32[1,32]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,32}
}

%put (p0.1: f32[64,32], p1.1: f32[1,32], p2.1: s32[]) -> f32[64,32] {
  %p0.1 = f32[64,32]{1,0} parameter(0)
  %p1.1 = f32[1,32]{1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  ROOT %update = f32[64,32]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %p2.1)
}

%body (state: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %state = (s32[], f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[64,32]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,32]{1,0} fusion(%table, %i), kind=kLoop, calls=%cut
  %next = f32[64,32]{1,0} fusion(%table, %row, %i), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[64,32]{1,0}) tuple(%i, %next)
}

%condition (state.1: (s32[], f32[64,32])) -> pred[] {
  %state.1 = (s32[], f32[64,32]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (table.1: f32[64,32]) -> f32[64,32] {
  %table.1 = f32[64,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64,32]{1,0}) tuple(%zero, %table.1)
  %loop = (s32[], f32[64,32]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_compiled_step_counts_its_kernels_and_what_they_move():
    """A row cut out of a table and put back in place: each reads it and the index, and writes it."""
    assert loop_cost(LOOP) == (2, 2 * (128 + 4 + 128))


def test_a_service_is_measured_over_http(tmp_path):
    own = write_run(tmp_path)
    with live(requests_per_minute=0) as service:
        load = ["--clients", "4", "--requests", "16", "--max-tokens", "12", "--prompt", "8", "--repeats", "1"]
        (result,) = run("bench.serve", "--url", service.url, *load, "--engine", str(own.root))
    for kind, count in (("closed", 16), ("sequential", 4), ("open", 16)):
        found = result["service"][kind]
        assert (found["requests"], found["failures"]) == (count, {})
        assert 0 < found["first_token_seconds"]["p50"] <= found["latency_seconds"]["p99"]
        assert found["tokens_per_second"] > 0
    shares = result["share_of_engine"]
    closed, rows = result["service"]["closed"]["tokens_per_second"], result["engine"]["rows"]
    assert shares["clients"] == pytest.approx(closed / rows, abs=1e-3) and shares["one_client"] > 0
    assert "launch.py --serve" in run("bench.serve", "--url", "http://127.0.0.1:9", code=3)


def test_a_model_that_nanochat_cannot_be_is_refused():
    config = resolve(load_config("nano", TINY))
    assert nanochat_config(config)["n_embd"] == 32 and draw_shape(config) == (2, 2, 128)
    for change in ("model.recipe=classic", "model.mlp_factor=3", "model.window_short=64"):
        with pytest.raises(UsageError, match=change.split("=")[0]):
            nanochat_config(resolve(load_config("nano", [*TINY, change])))


def test_a_folder_that_is_no_nanochat_and_an_interpreter_that_cannot_run_it_are_named(tmp_path):
    compare = ["bench.train_step", *SETS, "--compare", "nanochat", str(tmp_path)]
    assert "no nanochat/gpt.py there" in run(*compare, code=2)
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat/gpt.py").touch()
    (tmp_path / "nanochat/common.py").write_text("raise ImportError('No module named torch')")
    assert "--python names an interpreter with torch" in run(*compare, code=2)
    assert "show one only" in run(*compare, code=2, devices=2)


def test_nanochat_runs_in_turns_with_ours():
    """NANOCHAT_DIR: a checkout of karpathy/nanochat; NANOCHAT_PYTHON: an interpreter with torch and filelock."""
    checkout, python = os.environ.get("NANOCHAT_DIR"), os.environ.get("NANOCHAT_PYTHON")
    if not checkout or not python:
        pytest.skip("needs NANOCHAT_DIR and NANOCHAT_PYTHON")
    sides = ["--compare", "nanochat", checkout, "--python", python, "--steps", "4", "--block", "2"]
    result = run("bench.train_step", *SETS, "--full-attention", *sides)[-1]
    ours, theirs = result["jaxchat"], result["nanochat"]
    assert ours["parameters"] == theirs["parameters"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.2)
    ratio = result["times_faster"]
    assert ratio["tokens_per_second"] == pytest.approx(theirs["step_seconds"] / ours["step_seconds"], rel=0.05)
    assert ratio["wall_seconds"] == pytest.approx(theirs["wall_seconds"] / ours["wall_seconds"], rel=0.02)
    assert len(ratio["blocks"]) == 2 and theirs["attention"] and result["settings"]["model.window_pattern"] == "L"
