"""The whole way on a tiny model: stages, resume, kill, repeat, refuse, exit codes. Real processes."""

import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from whole_run import ROOT, STEPS, arguments, finish, records, start

import jaxchat
import launch
from jaxchat.config import REMOVED
from jaxchat.log import read_metrics
from train.stages import NAMES


def test_the_whole_way(finished):
    found = records(finished)
    assert list(found) == list(NAMES) and all(r["status"] == "done" for r in found.values())
    for name in ("pretrain", "sft"):
        assert re.fullmatch("[0-9a-f]{64}", found[name]["params_sha256"])
    for path in ("config.toml", "tokenizer/tokenizer.json", "tokenizer/meta.json", "base/metrics.jsonl",
                 "base/loss.png", "sft/loss.png", "eval/base.json", "eval/sft.json", "report.md",
                 "report.json"):  # fmt: skip
        assert (finished / path).stat().st_size > 0, path
    metrics = read_metrics(finished / "base" / "metrics.jsonl")
    assert [r["step"] for r in metrics] == list(range(STEPS))
    keys = {"step", "tokens", "loss", "lr_mult", "grad_norm", "step_seconds", "tokens_per_second", "mfu"}
    assert all(keys <= set(r) for r in metrics)
    assert [r["step"] for r in metrics if "val_bpb" in r] == [11, 23]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    exams = json.loads((finished / "eval" / "sft.json").read_text())["tasks"]
    assert {"bits_per_byte", "word_problems", "identity"} <= set(exams)


def test_repeated_it_says_done_and_does_nothing(finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    begin = time.monotonic()
    code, _, err = finish(start(["--run-dir", str(finished)]))
    assert code == 0 and err.count("nothing to do") == len(NAMES), err
    assert time.monotonic() - begin < 30
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}


def kill_at(corpus, run_dir, step, sign):
    """Start, wait until pretraining has logged that step, send the signal; exit code and output."""
    process = start(arguments(corpus, run_dir, "--stages", "pretrain"))
    metrics = run_dir / "base" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) <= step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(sign)
    return finish(process)


def test_killed_stopped_and_started_again_ends_bit_equal(corpus, finished, tmp_path):
    run_dir = tmp_path / "killed"
    code, _, _ = kill_at(corpus, run_dir, 8, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert records(run_dir)["pretrain"]["status"] == "running"
    code, _, err = kill_at(corpus, run_dir, 14, signal.SIGTERM)
    assert code == 75 and "stopped by SIGTERM" in err and "Traceback" not in err
    saved = [int(p.name) for p in (run_dir / "base").iterdir() if p.name.isdigit()]
    assert max(saved) == len(read_metrics(run_dir / "base" / "metrics.jsonl")) < STEPS, "every step was saved"
    code, _, err = finish(start(arguments(corpus, run_dir, "--stages", "tokenizer,prepare,pretrain,sft")))
    assert code == 0 and "resumed from step" in err, err
    for name in ("pretrain", "sft"):
        assert records(run_dir)[name]["params_sha256"] == records(finished)[name]["params_sha256"]
    assert [r["step"] for r in read_metrics(run_dir / "base" / "metrics.jsonl")] == list(range(STEPS))
    losses = [[r["loss"] for r in read_metrics(d / "base" / "metrics.jsonl")] for d in (run_dir, finished)]
    assert losses[0] == losses[1]


def test_a_python_without_the_packages_is_told_what_to_install():
    done = subprocess.run([sys.executable, "-S", "launch.py", "--plan"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not installed here; run pip install -r requirements.txt" in done.stderr


def test_help_and_version_answer_at_once():
    """Without JAX, numpy and rich, and without starting the process again."""
    code = "import sys, launch\ntry:\n    launch.main(['--help'])\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {"jax", "numpy", "rich", "huggingface_hub", "jaxchat.log"} & set(done.stderr.split())
    assert len(done.stdout.splitlines()) <= 26 and all(f"\n    {name}" in done.stdout for name in launch.COMMANDS)
    best = math.inf
    for _ in range(5):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "launch.py", "--version"], cwd=ROOT, capture_output=True, text=True)
        best = min(best, time.perf_counter() - begin)
        assert done.stdout == f"jaxchat {jaxchat.__version__}\n"
    assert best < 0.3


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("", "train --tier nano"),
        ("--tier d20", "train --tier d20"),
        ("--run-dir runs/nano --chat", "chat --run-dir runs/nano"),
        ("--serve --run-dir runs/nano --port 1", "serve --run-dir runs/nano --port 1"),
        ("--tier d20 --plan --target h100:8", "plan --tier d20 --target h100:8"),
        ("--budget 100usd --target h100:8", "plan --budget 100usd --target h100:8"),
        ("--hours=1", "plan --hours 1"),
        ("--compare a b --json", "compare a b --json"),
        ("--rehearse --keep", "rehearse --keep"),
        ("--doctor --json", "doctor --json"),
        ("--tiers", "tiers"),
    ],
)
def test_flags_of_older_versions_are_commands(line, command):
    old, new = launch.parse(line.split()), launch.parse(command.split())
    if not line:
        new.tier = None
    assert vars(old) == vars(new)


@pytest.mark.parametrize(
    "line", ["--tier nano --tier=d12", "serve r --port 1 --port 1", "export r --stage sft --stage base"]
)
def test_a_flag_that_stands_there_twice_is_refused(line, capsys):
    words = line.split()
    assert launch.main(words) == 2
    flag = next(word for word in words if word.startswith("--"))
    assert f"{flag}: " in capsys.readouterr().err


def test_all_data_is_used_and_of_a_key_the_last_value(tmp_path, capsys):
    words = ["--data", "chitchat", "--data=synthetic:lottery", "--run-dir", str(tmp_path)]
    config, _ = launch.given_config(launch.parse([*words, "--set", "model.depth=3", "--set", "model.depth = 5"]))
    assert config.data.source == "chitchat + synthetic:lottery" and config.model.depth == 5
    assert "model.depth" in capsys.readouterr().err
    launch.given_config(launch.parse(words))
    assert capsys.readouterr().err == ""


def test_a_run_can_be_named_after_the_command(finished):
    args = launch.parse(["chat", str(finished)])
    config, root = launch.given_config(args)
    assert root == finished and config.model.depth == 2


@pytest.mark.parametrize("name", sorted(launch.COMMANDS))
def test_every_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as done:
        launch.main([name, "--help"])
    assert done.value.code == 0 and len(capsys.readouterr().out.splitlines()) > 3


INSIDE = """
import gc, signal, sys, time, launch
sent = []

def callback(phase, info):
    if not sent:
        sent.append(True)
        signal.raise_signal(signal.{name})

def work(arguments):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(20)

launch.run = work
sys.exit(launch.main([]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost(name):
    """What Python raises there it drops; JAX has such a callback, and stages that make many objects run it often."""
    done = subprocess.run(
        [sys.executable, "-c", INSIDE.format(name=name)], cwd=ROOT, capture_output=True, text=True, timeout=15
    )
    assert done.returncode == 75 and "the same command goes on" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_terminal_that_is_closed_saves_too(corpus, tmp_path):
    import pty

    run_dir = tmp_path / "closed"
    command = [sys.executable, str(ROOT / "launch.py"), *arguments(corpus, run_dir)]
    pid, screen = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, os.environ | {"JAX_PLATFORMS": "cpu"})
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir / "base" / "metrics.jsonl")) <= 3:
        assert time.monotonic() < deadline
        if select.select([screen], [], [], 0.01)[0]:
            os.read(screen, 65536)  # a terminal that nobody reads would stop the run
    os.close(screen)  # as a window that is closed
    os.waitpid(pid, 0)
    saved = [int(p.name) for p in (run_dir / "base").iterdir() if p.name.isdigit()]
    assert max(saved) == len(read_metrics(run_dir / "base" / "metrics.jsonl")) < STEPS


def test_changed_settings_are_refused_by_name(corpus, finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "copy")

    def run(*more):
        return launch.main(arguments(corpus, run_dir, *more)), capsys.readouterr().err

    code, err = run("--set", "optim.matrix_lr=0.01")
    assert code == 2 and "stage pretrain" in err and "optim.matrix_lr (0.02 -> 0.01)" in err
    before = (run_dir / "config.toml").read_bytes()
    code, err = run("--stages", "eval", "--set", "model.depth=3")
    assert code == 2 and "model.depth (2 -> 3)" in err, "an exam of another model than the one asked for"
    assert (run_dir / "config.toml").read_bytes() == before
    older = json.loads((run_dir / "stages.json").read_text())  # made before there was `data.dedup`, with a removed key
    assert older["prepare"]["inputs"].pop("data.dedup") is False
    older["prepare"]["inputs"]["data.pack_docs"] = REMOVED["data.pack_docs"]
    (run_dir / "stages.json").write_text(json.dumps(older))
    code, err = run("--stages", "eval", "--set", "data.dedup=true")
    assert code == 2 and "data.dedup (False -> True)" in err
    assert run("--stages", "eval", "--set", "train.checkpoint_every=5")[0] == 0, "may change at any time"
    older["prepare"]["inputs"]["data.pack_docs"] = 3
    (run_dir / "stages.json").write_text(json.dumps(older))
    code, err = run("--stages", "eval")
    assert code == 2 and "data.pack_docs (3 -> None)" in err


def test_two_at_once_on_one_directory(corpus, tmp_path):
    first = start(arguments(corpus, tmp_path / "run"))
    while not (tmp_path / "run" / "stages.json").exists():
        time.sleep(0.05)
    code, _, err = finish(start(arguments(corpus, tmp_path / "run")))
    first.kill()
    first.communicate()
    assert code == 2 and f"in use by process {first.pid}" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--tier", "nanoo"], 2, "did you mean nano?"),
        (["--set", "model.detph=3"], 2, "model.detph: unknown key, did you mean model.depth?"),
        (["--stages", "pretrian"], 2, "stage 'pretrian' is unknown"),
        (["--nonsense"], 2, "unrecognized arguments: --nonsense"),
        (["--keep"], 2, "unrecognized arguments: --keep"),
        (["--data", "files:/no/such/*.txt"], 3, "/no/such/*.txt"),
        (["--data", "ftp:x"], 2, "data.source"),
        (["--set", 'sft.mixture=["foo"]'], 2, "foo"),
        (["--set", 'sft.mixture=["identity:5","identity:6"]'], 2, "identity stands there twice"),
        (["--plan", "--target", "b300:8"], 2, "--target b300:8"),
        (["--chat"], 3, "run"),
        ([], 3, "there is no such run; give --tier to begin one"),
        (["--data", "."], 2, "did you mean files:.?"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    assert launch.main([*args, "--run-dir", str(tmp_path / "run")]) == code
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_text_too_small_for_the_vocabulary_leaves_nothing_half_written(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one two three.\n" * 300 + "\n" + "four five six.\n" * 300)
    args = ["--data", f"files:{tmp_path}/a.txt", "--run-dir", str(tmp_path / "run")]
    assert launch.main(args) == 3
    assert "model.vocab_size=275" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_mended_command_is_not_refused(corpus, tmp_path):
    """A first try that failed before it made anything does not pin its settings."""
    assert launch.main(["--data", "files:/no/such", "--run-dir", str(tmp_path / "run")]) == 3
    assert launch.main(arguments(corpus, tmp_path / "run", "--stages", "tokenizer")) == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert launch.main(["--tier", "nano", "--run-dir", str(tmp_path / "file" / "run")]) == 3
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize(("plugin", "flags", "expected"), [
    ("0.11.1", "--xla_a=1", "--xla_a=1"),
    ("0.11.0", "--xla_a=1", "--xla_a=1 --xla_backend_extra_options=-nvptx-allow-ftz-atomics"),
    ("0.10.2", "--xla_backend_extra_options=x=1", "--xla_backend_extra_options=x=1"),
])  # fmt: skip
def test_the_flag_for_atomics_goes_to_the_plugins_that_need_it(plugin, flags, expected, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: plugin)
    monkeypatch.setenv("XLA_FLAGS", flags)
    launch.prepare_environment()
    assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(("given", "expected"), [
    ({}, ("0.92", None)), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, (None, "0.5")),
    ({"XLA_CLIENT_MEM_FRACTION": "0.6"}, ("0.6", None)),
])  # fmt: skip
def test_the_share_of_memory_is_the_users_where_there_is_one(given, expected):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    env = {k: v for k, v in os.environ.items() if k not in names} | given
    code = f"import os, launch; print(tuple(map(os.environ.get, {names})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected)


def test_tiers_are_listed(capsys):
    assert launch.main(["--tiers"]) == 0
    out = capsys.readouterr().out
    for word in ("nano", "d20", "Hardware", "Cost"):
        assert word in out
