"""Files appear whole or not at all; a run directory belongs to one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxchat.errors import DataError, UsageError
from jaxchat.log import MetricsFile, read_metrics
from jaxchat.run_dir import RunDir, atomic_write, read_json, sha256_file, write_json


def test_atomic_write_replaces_whole_and_leaves_nothing_aside(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "old")
    atomic_write(path, "neu é")
    assert path.read_text(encoding="utf-8") == "neu é"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    with pytest.raises(TypeError):
        atomic_write(path, 3)  # type: ignore[arg-type]
    assert path.read_text(encoding="utf-8") == "neu é"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_json_round_trip_and_errors(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, "é"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, "é"]}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "none.json")
    assert sha256_file(tmp_path / "bad.json").startswith("021fb596db81e6d0")


def test_the_lock_names_the_other_process_and_ends_with_it(tmp_path):
    run = RunDir(tmp_path / "run")
    code = (
        "import sys; from jaxchat.run_dir import RunDir\n"
        f"with RunDir({str(run.root)!r}).lock(): print('in', flush=True); sys.stdin.read()"
    )
    root = Path(__file__).resolve().parent.parent
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UsageError, match=f"in use by process {other.pid}"), run.lock():
        pass
    other.kill()
    other.wait()
    with run.lock():
        assert (run.root / ".owner").read_text() == str(os.getpid())
    assert not (run.root / ".owner").exists(), "who reads it later must not stop a stranger"


def test_metrics_survive_a_torn_line_and_truncate(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    for step in range(5):
        metrics.append({"step": step, "loss": 1.0})
    with open(metrics.path, "a") as file:
        file.write('{"step": 5, "lo')
    metrics.truncate_to(3)
    assert [r["step"] for r in read_metrics(metrics.path)] == [0, 1, 2]
    metrics.amend({"val_bpb": 1.5})
    assert read_metrics(metrics.path)[-1] == {"step": 2, "loss": 1.0, "val_bpb": 1.5}
    assert len(metrics.path.read_text().splitlines()) == 3
    assert all(json.loads(line) for line in metrics.path.read_text().splitlines())
