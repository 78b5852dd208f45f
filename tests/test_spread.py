"""Jobs over processes and over Ray: in order, with their own errors, and no worker left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxchat.data import shards as module
from jaxchat.data.files import check_encoding
from jaxchat.data.shards import spread, token_dtype, workers_for
from jaxchat.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parent.parent


def work(job):
    kind, value = job
    if kind == "fail":
        raise DataError(f"{value}: not readable")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(value % 3 / 100)  # later jobs are done before earlier ones
    return value * value


def test_results_come_in_the_order_of_the_jobs():
    jobs = [("square", i) for i in range(40)]
    assert list(spread(work, jobs, "local", 2)) == [i * i for i in range(40)]


def test_jobs_of_a_generator_are_taken_as_they_are_needed():
    taken = []
    jobs = (taken.append(i) or ("square", i) for i in range(60))
    found = spread(work, jobs, "local", 2)
    for done in range(40):
        assert next(found) == done * done and len(taken) <= done + 1 + 2 * module.AHEAD
    assert list(found) == [i * i for i in range(40, 60)]


def test_what_a_job_says_is_said():
    jobs = [("square", 2), ("fail", "a.txt"), *(("square", i) for i in range(20))]
    found = spread(work, jobs, "local", 2)
    assert next(found) == 4
    with pytest.raises(DataError, match=r"^a\.txt: not readable$"):
        list(found)


def test_ray_gives_the_same(capfd):
    """With functions of the package, which its workers find; a whole preparation over Ray is in test_prepare."""
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    sizes = [300, 70_000, 65_536, 65_537] * 5
    assert list(spread(token_dtype, sizes, "ray", 2)) == list(map(token_dtype, sizes))
    with pytest.raises(UsageError, match=r"^data\.encoding: 'klingon' is unknown"):
        list(spread(check_encoding, ["utf-8", "klingon", "auto"], "ray", 2))


def test_a_worker_that_is_killed_is_told():
    with pytest.raises(
        DataError, match=r"was killed \(out of memory\?\); the same command goes on, --set data.workers=1"
    ):
        list(spread(work, [("die", 0)], "local", 1))


def test_workers():
    assert workers_for(3, 100) == 3 and workers_for(8, 2) == 2 and workers_for(-1, 0) == 1
    assert 1 <= workers_for(-1, 10**6) == len(os.sched_getaffinity(0))
    with pytest.raises(UsageError, match=r"data\.engine: 'spark' is unknown; choose from local, ray"):
        spread(work, [], "spark", 1)


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"ray is not installed; pip install -e '\.\[ray\]'"):
        list(spread(work, [("square", 1)], "ray", 1))


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Or they would write beside the next run."""
    (tmp_path / "sleeper.py").write_text(
        "import os, time\n\ndef sleep(path):\n    open(path, 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
    )
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
from sleeper import sleep
from jaxchat.data.shards import spread
if __name__ == "__main__":
    list(spread(sleep, [{str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}], "local", 2))
"""
    (tmp_path / "main.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=env)
    files = [tmp_path / "a", tmp_path / "b"]
    end = time.monotonic() + 60
    while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < end:
        time.sleep(0.05)
    workers = [int(f.read_text()) for f in files]
    process.kill()
    process.wait()
    end = time.monotonic() + 10 * module.ORPHAN_POLL
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
