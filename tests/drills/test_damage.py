"""Fifty damaged checkpoints of a real training: every one is noticed, and training goes on from the one before.

python -m pytest tests/drills -m slow -n0 -s
"""

import json
import os
import random
import shutil
import signal
import time

import pytest
from whole_run import arguments, finish, records, start

from jaxchat.checkpoint import Checkpoints
from jaxchat.run_dir import damage

pytestmark = pytest.mark.slow
CASES, WHOLE_RUNS = 50, 5
TIMES = ("commit_success.txt", "_CHECKPOINT_METADATA")  # hold when it was saved, nothing that is read


def hurt(path, how, draw):
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(bytes(data[: draw.randrange(len(data))]) if data else b"x")
    elif how == "a bit flipped":
        place = draw.randrange(len(data)) if data else 0
        path.write_bytes(bytes([*data[:place], data[place] ^ (1 << draw.randrange(8)), *data[place + 1 :]]) or b"x")
    else:
        path.write_bytes(os.urandom(max(1, len(data))))


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """A run that was stopped after three checkpoints of pretraining."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    process = start(arguments(corpus, run_dir, "--set", "train.keep_last=9"))
    while not (run_dir / "base" / "18").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    return run_dir


def test_fifty_damaged_checkpoints_and_none_in_silence(stopped, corpus, finished, tmp_path):
    draw, found = random.Random(9), []
    for case in range(CASES):
        run_dir = tmp_path / f"case{case}"
        shutil.copytree(stopped, run_dir)
        steps = sorted((int(p.name) for p in (run_dir / "base").iterdir() if p.name.isdigit()), reverse=True)
        newest = run_dir / "base" / str(steps[0])
        path = draw.choice(sorted(p for p in newest.rglob("*") if p.is_file() and p.name not in TIMES))
        how = draw.choice(["deleted", "truncated", "a bit flipped", "overwritten"])
        sums = path.name == "SHA256SUMS"
        hurt(path, how, draw)
        if not (sums and how == "deleted"):  # then the checkpoint is as whole as one of an older version
            assert damage(newest) is not None, (case, how, path)
        if case % (CASES // WHOLE_RUNS) == 0 and not sums:
            code, _, err = finish(start(arguments(corpus, run_dir, "--stages", "pretrain")), 600)
            assert code == 0 and f"going on from {steps[1]}" in err, err
            assert records(run_dir)["pretrain"]["params_sha256"] == records(finished)["pretrain"]["params_sha256"]
        else:
            checkpoints = Checkpoints(run_dir / "base")
            taken = checkpoints._newest_whole(True)
            checkpoints.close()
            assert taken == (steps[0] if sums and how == "deleted" else steps[1]), (case, how, path)
        found.append(how)
        shutil.rmtree(run_dir)
    print(json.dumps({"damaged": len(found), "in silence": 0, "how": {how: found.count(how) for how in set(found)}}))
