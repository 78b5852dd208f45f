"""Two real processes with four simulated devices each: train, stop, resume on other counts, examine, fail together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from whole_run import ROOT, records

import launch
from jaxchat import hosts
from jaxchat.data.batches import Batches, own_columns, place, val_batches
from jaxchat.data.rows import Rows, finish_rows, write_rows
from jaxchat.errors import UsageError
from jaxchat.log import read_metrics
from train import machine

STEPS = 10
TINY = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=300",
        "model.seq_len=32", "train.batch_tokens=256", f"train.steps={STEPS}", "train.eval_every=5",
        "train.checkpoint_every=5", "train.keep_last=9", "train.sample_every=5", "eval.max_per_task=2", "eval.rows=16",
        "train.eval_rows=8", "eval.sample_tokens=2", "sft.batch_tokens=256", 'sft.mixture=["identity:30"]',
        "data.val_fraction=0.05"]  # fmt: skip


def start(corpus, run_dir, devices, process=None, port=None, *more):
    """launch.py as a process; `process` of two, or alone."""
    arguments = [part for override in TINY for part in ("--set", override)]
    arguments += ["--tier", "nano", "--data", f"files:{corpus}/*.txt", "--run-dir", str(run_dir), *more]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if process is not None:
        arguments += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(process)]
    return subprocess.Popen(
        [sys.executable, ROOT / "launch.py", *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def start_two(corpus, run_dir, *more, devices=(4, 4), second=()):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        start(corpus, run_dir, devices[0], 0, port, *more),
        start(corpus, run_dir, devices[1], 1, port, *more, *second),
    ]


def finish(processes, timeout=240):
    """(exit code, what it said) of each; none outlives the test."""
    try:
        found = [(process, process.communicate(timeout=timeout)[1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in found]


def losses(run_dir, stage="base"):
    found = read_metrics(run_dir / stage / "metrics.jsonl")
    assert [r["step"] for r in found] == list(range(len(found)))
    return [r["loss"] for r in found]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """One process with one device."""
    run_dir = tmp_path_factory.mktemp("hosts") / "alone"
    [(code, error)] = finish([start(corpus, run_dir, 1, None, None, "--stages", "pretrain")])
    assert code == 0, error
    return run_dir


@pytest.fixture(scope="module")
def together(corpus, alone, tmp_path_factory):
    """Two processes go on from the one process's middle checkpoint, to the report."""
    run_dir = tmp_path_factory.mktemp("hosts") / "together"
    shutil.copytree(alone, run_dir)
    shutil.rmtree(run_dir / "base" / str(STEPS))
    record = records(run_dir)
    record["pretrain"]["status"] = "running"  # as a killed run leaves it
    (run_dir / "stages.json").write_text(json.dumps(record))
    return run_dir, finish(start_two(corpus, run_dir))


def test_two_processes_go_on_from_the_checkpoint_of_one(alone, together):
    run_dir, [(code, said), (other_code, other_said)] = together
    assert (code, other_code) == (0, 0), said + other_said
    assert "resumed from step 5" in said and "2 processes, 8 devices" in said
    assert other_said == "", "only process 0 speaks"
    np.testing.assert_allclose(losses(run_dir), losses(alone), rtol=1e-5)
    found = records(run_dir)
    assert list(found) == ["tokenizer", "prepare", "pretrain", "sft", "eval", "report"]
    assert all(record["status"] == "done" for record in found.values())
    assert found["sft"]["hardware"]["hosts"] == 2 and found["sft"]["hardware"]["devices"] == 8


def test_what_two_processes_trained_is_examined_once(together):
    run_dir = together[0]
    exams = json.loads((run_dir / "eval" / "sft.json").read_text())
    assert exams["inputs"]["params_sha256"] == records(run_dir)["sft"]["params_sha256"]
    assert exams["tasks"]["identity"]["n"] == 2 and exams["tasks"]["bits_per_byte"]["bytes"] > 0
    assert len(losses(run_dir, "sft")) == records(run_dir)["sft"]["facts"]["steps"]
    assert (run_dir / "report.md").exists() and (run_dir / "base" / "samples" / f"step_{STEPS:06d}.md").exists()


def test_a_signal_to_one_stops_both_after_the_same_step_and_one_process_goes_on(corpus, alone, tmp_path):
    run_dir = tmp_path / "stopped"
    two = start_two(corpus, run_dir, "--stages", "pretrain")
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir / "base" / "metrics.jsonl")) < 2:
        assert time.monotonic() < deadline and all(p.poll() is None for p in two), finish(two, 5)
        time.sleep(0.01)
    two[1].send_signal(signal.SIGTERM)
    said = finish(two)
    assert [code for code, _ in said] == [75, 75], said
    step = max(int(p.name) for p in (run_dir / "base").iterdir() if p.name.isdigit())
    assert step < STEPS and all(f"stopped by SIGTERM after step {step}, saved" in error for _, error in said)
    assert len(losses(run_dir)) == step
    [(code, error)] = finish([start(corpus, run_dir, 8, None, None, "--stages", "pretrain")])
    assert code == 0 and f"resumed from step {step}" in error, error
    np.testing.assert_allclose(losses(run_dir), losses(alone), rtol=1e-5)
    scores = [[r["val_bpb"] for r in read_metrics(d / "base/metrics.jsonl") if "val_bpb" in r] for d in (run_dir, alone)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)
