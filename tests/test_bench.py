"""The benchmarks run for real on tiny shapes, and their last line is the JSON object they promise."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live_service import live
from small_model import write_run

from bench import gpu, trace
from bench.compare import nanochat_config
from bench.decode_compiled import loop_cost
from bench.train_step import batch_shape
from jaxchat.config import load_config
from jaxchat.errors import UsageError
from jaxchat.scaling import resolve

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
    result = run("bench.train_step", *SETS, "--steps", "2")[-1]
    assert result["batch"] == [2, 2, 128] and result["settings"]["model.width"] == 32
    assert {"device", "jax", "jaxlib", "dtype", "malloc", "load_average"} <= result.keys()
    low, high = result["step_seconds_range"]
    assert 0 < low <= result["step_seconds"] <= high
    assert result["tokens_per_second"] == pytest.approx(512 / result["step_seconds"], rel=0.05)
    assert result["compile_seconds"] < result["first_step_seconds"]
    assert 0 < result["share_of_product_rate"] < 1 and result["mfu"] is None  # no peak is known for a CPU
    assert result["loss"] == pytest.approx(4.85, abs=0.3)  # random tokens: ln 128


@pytest.mark.slow
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


@pytest.mark.slow
def test_decoding_is_measured_by_batch_size():
    sizes = ["--prompt", "16", "--tokens", "24", "--batch-sizes", "1,4", "--rounds", "1", "--weights", "auto,int8"]
    *_, result = run("bench.decode", *SETS, "--set", "model.vocab_size=300", *sizes, devices=2)
    assert result["devices"] == 2 and result["model"]["width"] == 32
    for kind in ("auto", "int8"):
        assert [entry["rows"] for entry in result[kind]] == [1, 4]
        for entry in result[kind]:
            assert entry["first_token_seconds"] > 0 and entry["tokens_per_second"] >= entry["with_prompt"] > 0
            limit = entry["rows"] * entry["bandwidth"] / entry["bytes_per_step"]
            assert entry["limit_tokens_per_second"] == pytest.approx(limit, rel=0.01)
    assert result["int8"][0]["bytes_per_step"] < result["auto"][0]["bytes_per_step"]


@pytest.mark.slow
def test_the_time_between_kernels_is_measured_beside_that_in_them():
    sizes = ["--prompt", "16", "--tokens", "24", "--batch-sizes", "2", "--rounds", "1", "--profile"]
    *_, result = run("bench.decode", *SETS, "--set", "model.vocab_size=300", *sizes)
    launches = result["auto"][0]["launches"]
    assert launches["kernels_per_step"] > 2 and launches["busy_seconds"] > 0
    assert launches["step_seconds"] == pytest.approx(2 / result["auto"][0]["tokens_per_second"], abs=1e-6)
    assert launches["gap_seconds"] == pytest.approx(launches["step_seconds"] - launches["busy_seconds"], abs=1e-6)


def gpu_part(code, limit):
    found = []
    error = gpu.run_part([sys.executable, "-c", code], limit, found.append, os.environ)
    return error, found


def test_a_part_that_crashes_raises_or_hangs_is_recorded_and_ends_with_what_it_started(tmp_path):
    """Real processes: what XLA does when it aborts, Python when it raises, a driver when it hangs."""
    first = "import os, sys, time; print('{\"a\": 1}', flush=True); print('no JSON'); "
    assert gpu_part(first, 20) == (None, [{"a": 1}])
    error, found = gpu_part(first + "print('bad address', file=sys.stderr, flush=True); os.abort()", 20)
    assert found == [{"a": 1}] and "SIGABRT" in error and "bad address" in error
    error, found = gpu_part(first + "raise ValueError('too wide')", 20)
    assert found == [{"a": 1}] and "code 1" in error and "too wide" in error
    begin, file = time.monotonic(), tmp_path / "pid"
    child = f"import subprocess; open({str(file)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid)); "
    error, found = gpu_part(first + child + "time.sleep(600)", 2)
    assert "limit of 2 s" in error and found[0] == {"a": 1} and time.monotonic() - begin < 20
    state = Path(f"/proc/{file.read_text()}/stat")  # a killed process is listed until the kernel has ended it

    def alive():
        try:
            return state.read_text().split(")")[1].split()[0] != "Z"
        except OSError:
            return False

    while alive():
        assert time.monotonic() < begin + 30
        time.sleep(0.05)


@pytest.mark.slow
def test_parts_of_the_gpu_run_at_toy_size_and_keep_what_an_earlier_call_found(tmp_path):
    out = tmp_path / "gpu.json"
    last = run("bench.gpu", "--toy", "--out", str(out), "--parts", "products,profile")[-1]
    assert last == {"out": str(out), "parts": 3, "failed": {}}
    parts = json.loads(out.read_text())["parts"]
    assert parts["device"]["findings"][0]["platform"] == "cpu" and parts["device"]["findings"][1]["disagreement"] < 1e-3
    products = parts["products"]["findings"]
    assert len(products) == 25 and all(p["tflops"] >= 0 and "error" not in p for p in products)
    (found,) = parts["profile"]["findings"]
    kinds = found["kinds"]
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1, abs=0.01)
    assert min(kinds[kind]["share"] for kind in ("products", "attention", "elementwise")) > 0.01
    assert kinds["scatter"]["kernels"] >= 1  # the gradient of the embedding
    assert 0 < found["busy_seconds"] <= found["span_seconds"] and "unknown" not in kinds
    run("bench.gpu", "--toy", "--out", str(out), "--parts", "device", "--seconds-per-part", "0.1", code=1)
    again = json.loads(out.read_text())["parts"]
    assert "limit of 0.1 s" in again["device"]["error"] and again["profile"] == parts["profile"]


@pytest.mark.slow
def test_stopped_in_the_middle_the_file_is_whole(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--toy", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)
    assert process.stderr.readline()  # the first finding
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    found = json.loads(out.read_text())
    assert found["stopped"] == found["parts"]["device"]["status"] == "stopped (SIGTERM)"
    assert found["parts"]["device"]["findings"][0]["platform"] == "cpu"


def test_without_an_accelerator_full_size_is_refused_and_unknown_parts_are_named(tmp_path):
    out = ["--out", str(tmp_path / "gpu.json")]
    assert "--toy" in run("bench.gpu", *out, code=2)
    assert "speed" in run("bench.gpu", "--parts", "speed", *out, code=2)


GPU_PROGRAM = """
%fused_scatter (p0: f32[64,32], p1: s32[8,1], p2: f32[8,32]) -> f32[64,32] {
  %p0 = f32[64,32]{1,0} parameter(0)
  %p1 = s32[8,1]{1,0} parameter(1)
  %p2 = f32[8,32]{1,0} parameter(2)
  ROOT %s = f32[64,32]{1,0} scatter(%p0, %p1, %p2), update_window_dims={1}
}

%fused_put (p0.1: f32[64,32], p1.1: f32[1,32], p2.1: s32[]) -> f32[64,32] {
  %p0.1 = f32[64,32]{1,0} parameter(0)
  %p1.1 = f32[1,32]{1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  ROOT %u = f32[64,32]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %p2.1)
}

%fused_norm (p0.2: f32[64,32]) -> f32[64,32] {
  %p0.2 = f32[64,32]{1,0} parameter(0)
  ROOT %m = f32[64,32]{1,0} multiply(%p0.2, %p0.2)
}

%fused_gemm (p0.3: bf16[64,32], p1.3: bf16[32,32]) -> bf16[64,32] {
  %p0.3 = bf16[64,32]{1,0} parameter(0)
  %p1.3 = bf16[32,32]{1,0} parameter(1)
  ROOT %d = bf16[64,32]{1,0} dot(%p0.3, %p1.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[64,32], i: s32[8,1], r: f32[8,32], a: bf16[64,32], b: bf16[32,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  %r = f32[8,32]{1,0} parameter(2)
  %a = bf16[64,32]{1,0} parameter(3)
  %b = bf16[32,32]{1,0} parameter(4)
  %input_scatter_fusion = f32[64,32]{1,0} fusion(%x, %i, %r), kind=kInput, calls=%fused_scatter
  %loop_dynamic_update_slice_fusion.1 = f32[64,32]{1,0} fusion(%x, %r, %i), kind=kLoop, calls=%fused_put
  %loop_multiply_fusion.3 = f32[64,32]{1,0} fusion(%x), kind=kLoop, calls=%fused_norm, metadata={op_name="jit(step)/mul"}
  %loop_multiply_fusion.4 = f32[64,32]{1,0} fusion(%x), kind=kLoop, calls=%fused_norm, metadata={op_name="jit(step)/transpose(jvp(attention))/mul"}
  %gemm_fusion_dot.7 = bf16[64,32]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_gemm, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %custom-call.2 = bf16[64,32]{1,0} custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
  %custom-call.5 = bf16[64,32]{1,0} custom-call(%a, %a, %a), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %copy.9 = f32[64,32]{0,1} copy(%x)
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("kernel", "instruction", "kind"),
    [
        ("input_scatter_fusion", "input_scatter_fusion", "scatter"),
        ("loop_dynamic_update_slice_fusion_1", "", "copies"),  # a CUDA graph's kernels name no instruction
        ("loop_multiply_fusion_3", "loop_multiply_fusion.3", "elementwise"),
        ("loop_multiply_fusion_4", "", "attention"),
        ("gemm_fusion_dot_7", "gemm_fusion_dot.7", "products"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopA_NNT", "custom-call.2", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "custom-call.5", "attention"),
        ("copy_9", "copy.9", "copies"),
        ("nvjet_tst_192x192_64x3_2x1_v_bz_coopA_NNT", "", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "", "attention"),
        ("MemcpyD2D", "", "copies"),
        ("something_else", "", "unknown"),
        ("while.3", "while.3", None),
    ],
)
def test_kernels_are_sorted_by_the_program_that_they_belong_to(kernel, instruction, kind):
    assert trace.Classifier(GPU_PROGRAM)(trace.Kernel(kernel, instruction, 0, 1)) == kind


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
    spans = [(0, 10), (5, 20), (30, 40), (32, 35)]  # kernels that run at once count one time
    assert trace.busy_seconds(trace.Kernel("k", "", *span) for span in spans) == pytest.approx(30e-9)
    assert loop_cost(LOOP) == (2, 2 * (128 + 4 + 128))


@pytest.mark.slow
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
    config = resolve(load_config("nano", [*TINY, "model.recipe=modern"]))
    assert nanochat_config(config)["n_embd"] == 32 and batch_shape(config) == (2, 2, 128)
    for change in ("model.recipe=jaxchat", "model.mlp_factor=3", "model.window_short=64"):
        with pytest.raises(UsageError, match=change.split("=")[0]):
            nanochat_config(resolve(load_config("nano", [*TINY, "model.recipe=modern", change])))


def test_a_folder_that_is_no_nanochat_is_refused(tmp_path):
    assert "no nanochat/gpt.py there" in run("bench.train_step", *SETS, "--compare", "nanochat", str(tmp_path), code=2)


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
