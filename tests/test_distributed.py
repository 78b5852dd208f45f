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
from jaxchat import distributed as hosts
from jaxchat.data.loader import Batches, val_batches
from jaxchat.data.packing import Rows, write_rows
from jaxchat.errors import UsageError
from jaxchat.log import read_metrics
from train import doctor as machine

STEPS, MIDDLE = 6, 3
TINY = ["model.depth=1", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=300",
        "model.seq_len=32", "train.batch_tokens=256", f"train.steps={STEPS}", f"train.eval_every={MIDDLE}",
        f"train.checkpoint_every={MIDDLE}", "train.keep_last=9", f"train.sample_every={STEPS}",
        "eval.max_per_task=2", "eval.rows=16", "train.eval_rows=8", "eval.sample_tokens=2", "sft.batch_tokens=256",
        'sft.mixture=["identity:30"]', "data.val_fraction=0.05", "rl.environment=arithmetic", "rl.steps=2",
        "rl.prompts=3", "rl.samples=4", "rl.max_tokens=4", "rl.eval_prompts=3", "rl.eval_samples=2",
        "rl.slots=4"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs that several of these processes run are compiled by the first of them, and in a hurry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
        yield


def start(corpus, run_dir, devices, process=None, port=None, *more):
    """launch.py as a process; `process` of two, or alone."""
    arguments = [part for override in TINY for part in ("--set", override)]
    arguments += ["--tier", "nano", "--data", f"files:{corpus}/*.txt", "--run-dir", str(run_dir), *more]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
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


@pytest.mark.slow  # all stages; training by two processes is in the test of signals
def test_two_processes_go_on_from_the_checkpoint_of_one(alone, together):
    run_dir, [(code, said), (other_code, other_said)] = together
    assert (code, other_code) == (0, 0), said + other_said
    assert f"resumed from step {MIDDLE}" in said and "2 processes, 8 devices" in said
    assert other_said == "", "only process 0 speaks"
    np.testing.assert_allclose(losses(run_dir), losses(alone), rtol=1e-5)
    found = records(run_dir)
    assert list(found) == ["tokenizer", "prepare", "pretrain", "sft", "rl", "eval", "report", "export"]
    assert {p.name for p in (run_dir / "export").iterdir()} == {"orbax", "hf", "html"}, "by process 0 alone"
    assert all(record["status"] == "done" for record in found.values())
    assert found["sft"]["hardware"]["hosts"] == 2 and found["sft"]["hardware"]["devices"] == 8


@pytest.mark.slow  # all stages; training by two processes is in the test of signals
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
    [(code, error)] = finish([start(corpus, run_dir, 1, None, None, "--stages", "pretrain")])
    assert code == 0 and f"resumed from step {step}" in error, error
    np.testing.assert_allclose(losses(run_dir), losses(alone), rtol=1e-5)
    scores = [
        [r["val_bpb"] for r in read_metrics(d / "base/metrics.jsonl") if "val_bpb" in r] for d in (run_dir, alone)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def test_processes_that_do_not_fit_together_end_with_one_line_each(corpus, tmp_path):
    """Other devices, and a coordinator that is not there."""
    unequal = start_two(corpus, tmp_path / "run", devices=(2, 1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # and does not listen
        lonely = start(corpus, tmp_path / "run", 1, 1, probe.getsockname()[1], "--connect-timeout", "3")
        [*both, (code, said)] = finish([*unequal, lonely])
    for found, text in both:
        assert found == 2 and text.count("\n") == 1
        assert "equally many devices, not 2 on process 0, 1 on process 1" in text
    assert code == 2 and said.count("\n") == 1 and "not all processes met at 127.0.0.1:" in said
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_failure_of_one_process_is_everybodys(corpus, tmp_path):
    """Process 0 finds no text; process 1 waits for it."""
    (tmp_path / "empty").mkdir()
    [(code, said), (other, other_said)] = finish(start_two(tmp_path / "empty", tmp_path / "run"))
    assert code == other == 3 and said.splitlines()[-1].startswith("error: ")
    assert other_said.startswith("error: process 0 ended: ") and other_said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "node1"], "--coordinator node1 "),
        (["--coordinator", "node1:0"], "--coordinator HOST:PORT"),
        (["--coordinator", "n:1", "--processes", "2", "--process-id", "2"], "--process-id 2: "),
        (["--coordinator", "n:1", "--processes", "2", "--process-id", "-1"], "--process-id -1: "),
        (["--processes", "0", "--process-id", "0"], "--processes 0 "),
        (["--processes", "two"], "argument --processes: invalid int value: 'two'"),
        (["--coordinator", "node1:12355"], "give --coordinator HOST:PORT, --processes N and --process-id I together"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(tmp_path, capsys, flags, message):
    assert launch.main(["--tier", "nano", "--run-dir", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
         "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}  # fmt: skip
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "count"),
    [({}, 1), (SLURM, 2), (SLURM | {"SLURM_NTASKS": "1"}, 1), (OPEN_MPI, 4), ({"KUBERNETES_SERVICE_HOST": "x"}, 1)],
)
def test_a_cluster_is_found_and_a_single_machine_is_none(monkeypatch, environment, count):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._detected(indexed_pod=False) == count
    if count == 1:
        assert not hosts.start(None, None, None, 1, False, False, print) and not hosts.several()


def test_one_process_of_several_asked_for_needs_no_runtime():
    assert not hosts.start(None, 1, 0, 1, False, False, print)
    assert hosts.Ballot().cast(15) == 15 and hosts.on_first(lambda: [1]) == [1]


def test_a_pod_of_an_indexed_job_needs_an_address_or_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)  # not installed
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(UsageError, match="pip install kubernetes"):
        hosts._detected(indexed_pod=True)


def test_each_process_reads_its_own_rows_of_the_same_batches(tmp_path):
    """Columns 0-1 of one process and 2-3 of the other are the batch of a single one; also of held-out rows."""
    write_rows(tmp_path / "rows", (np.arange(i, i + 9) for i in range(50)), 9, 0, 300, lambda: {"tokenizer": "t"})
    rows = Rows(tmp_path / "rows")
    batches = Batches(rows, 4, 2, seed=3)
    parts = [np.array([0, 1]), np.array([2, 3])]
    for step in (0, 7):
        halves, whole = [batches.batch(step, part) for part in parts], batches.batch(step)
        assert all(np.array_equal(np.concatenate([h[k] for h in halves], axis=1), whole[k]) for k in whole)
    for whole, *halves in zip(
        val_batches(rows, 4, 49), *(val_batches(rows, 4, 49, part) for part in parts), strict=True
    ):
        assert all(np.array_equal(np.concatenate([h[k] for h in halves], axis=1), whole[k]) for k in whole)


def test_what_made_a_run_is_recorded():
    assert machine.versions()["jax"] and machine.hardware()["hosts"] == 1 and machine.peak_rss() > 1e6
