"""Ctrl-C and SIGTERM at thirty moments of a run: it saves and ends with 75 within the grace time, and the same command
goes on to the same parameters bit for bit.

    python -m pytest tests/drills/test_signals.py -m slow -n0 -s
"""

import collections
import json
import random
import signal
import time

import pytest
from test_kills import TRAINED, stage_of
from whole_run import arguments, finish, records, start

from jaxchat.config import load_config
from jaxchat.run_dir import RunDir
from train.stages import unfinished

pytestmark = pytest.mark.slow
SIGNALS = 30
GRACE = 30.0  # seconds that clouds give at least before they take a machine away


def all_done(run_dir):
    run = RunDir(run_dir)
    return run.config.exists() and not unfinished(load_config(run.config), run)


def test_thirty_signals(corpus, finished, tmp_path):
    draw, sent, seconds, runs = random.Random(6), collections.Counter(), [], 0
    wanted = {name: records(finished)[name]["params_sha256"] for name in TRAINED}
    while sum(sent.values()) < SIGNALS:
        run_dir = tmp_path / f"run{runs}"
        while True:
            process = start(arguments(corpus, run_dir))
            end = time.monotonic() + draw.uniform(0.3, 14)
            while process.poll() is None and time.monotonic() < end and sum(sent.values()) < SIGNALS:
                time.sleep(0.002)
            if process.poll() is not None or sum(sent.values()) >= SIGNALS:
                code, _, err = finish(process, 600)
                assert code == 0, err
                break
            stage, number = stage_of(run_dir), draw.choice([signal.SIGTERM, signal.SIGINT])
            begin = time.monotonic()
            process.send_signal(number)
            code, _, err = finish(process, 600)
            taken = time.monotonic() - begin
            if code == 0 or (code in (-number, 130) and all_done(run_dir)):  # it was going away by itself
                break
            early = stage == "start" and code in (-number, 130)  # before Python has set anything up
            assert (code == 75 or early) and "Traceback" not in err, (code, err)
            assert taken < GRACE, (stage, taken)
            sent[f"{stage}"] += 1
            seconds.append(taken)
        assert {name: records(run_dir)[name]["params_sha256"] for name in TRAINED} == wanted
        runs += 1
    longest = round(max(seconds), 1)
    print(json.dumps({"signals": SIGNALS, "runs": runs, "lost": 0, "at": dict(sent), "longest, s": longest}))
