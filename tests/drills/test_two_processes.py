"""One of two processes that train together is killed, ten times, at any moment: the other ends and says why, nothing is
lost, and the same two commands end with the same parameters bit for bit.

    python -m pytest tests/drills/test_two_processes.py -m slow -n0 -s
"""

import collections
import json
import random
import signal
import time

import pytest
from test_distributed import finish, start_two
from test_kills import TRAINED, stage_of
from whole_run import records

pytestmark = pytest.mark.slow
KILLS = 10
PATIENCE = 300  # seconds until the survivor has ended, at most; it is JAX's heartbeats, of 100 s, that tell it
MEETING = ("--connect-timeout", "120")  # seconds; one that is killed before both have met is waited for that long


def parameters(run_dir):
    return {name: records(run_dir)[name]["params_sha256"] for name in TRAINED}


def test_one_of_two_is_killed(corpus, tmp_path):
    draw, killed, ends, waited = random.Random(5), collections.Counter(), collections.Counter(), []
    calm = finish(start_two(corpus, tmp_path / "calm"), 400)
    assert [code for code, _ in calm] == [0, 0], calm
    wanted, runs = parameters(tmp_path / "calm"), 0
    while sum(killed.values()) < KILLS:
        run_dir, done = tmp_path / f"run{runs}", False
        while not done:
            two = start_two(corpus, run_dir, *MEETING)
            end, victim = time.monotonic() + draw.uniform(3, 45), draw.randrange(2)
            while sum(killed.values()) < KILLS and time.monotonic() < end and two[victim].poll() is None:
                time.sleep(0.01)
            if sum(killed.values()) >= KILLS or two[victim].poll() is not None:
                said = finish(two, 400)
                assert [code for code, _ in said] == [0, 0], said
                done = True
                continue
            stage = stage_of(run_dir)
            two[victim].kill()
            begin = time.monotonic()
            said = finish(two, PATIENCE)
            waited.append(time.monotonic() - begin)
            code, text = said[1 - victim]
            if code == 0:  # all was done already
                break
            own = "error: " in text or "the same command goes on" in text
            # where the survivor waits for nobody on a device, it is JAX's heartbeats that end it, with words of JAX's
            aborted = code == -signal.SIGABRT and "another task died" in text
            assert code not in (0, -9) and (own or aborted), said
            ends[code] += 1
            killed[f"{'first' if victim == 0 else 'second'}, {stage}"] += 1
        assert parameters(run_dir) == wanted
        runs += 1
    print(
        json.dumps(
            {
                "kills": KILLS,
                "runs": runs,
                "lost": 0,
                "at": dict(killed),
                "survivors' exit codes": dict(ends),
                "survivor, s": round(max(waited), 1),
            }
        )
    )
