"""kill -9, again and again, at every stage and in the middle of saves: nothing is lost, the result is the same bit for
bit.

    python -m pytest tests/drills -m slow -n0 -s
"""

import collections
import json
import random
import time

import pytest
from whole_run import arguments, finish, records, start

pytestmark = pytest.mark.slow
KILLS = 100
IN_A_SAVE = 4  # every so many kills wait for a save to be half done
TRAINED = ("pretrain", "sft", "rl")


def stage_of(run_dir):
    """What runs at this moment."""
    try:
        found = records(run_dir)
    except FileNotFoundError:
        return "start"
    return next((name for name, record in found.items() if record["status"] == "running"), "between")


def saving(run_dir):
    return any(run_dir.glob("*/*orbax-checkpoint-tmp*")) or any(
        not (p / "commit_success.txt").exists() for p in run_dir.glob("*/[0-9]*") if p.is_dir()
    )


def kill_at_a_moment(process, run_dir, wait_for_save, moment):
    """Kill after `moment` seconds, or in the first save that is seen; (stage, whether in a save), None at the end."""
    end = time.monotonic() + moment
    while process.poll() is None:
        in_save = wait_for_save and saving(run_dir)
        if in_save or (not wait_for_save and time.monotonic() > end):
            found = stage_of(run_dir), in_save or saving(run_dir)
            process.kill()
            process.communicate()
            return found
        time.sleep(0.002)
    return None


def test_a_hundred_kills_lose_nothing(corpus, finished, tmp_path):
    moments, killed, in_saves, runs, resumed = random.Random(8), collections.Counter(), 0, 0, 0
    wanted = {name: records(finished)[name]["params_sha256"] for name in TRAINED}
    while sum(killed.values()) < KILLS:
        run_dir, of_this_run = tmp_path / f"run{runs}", 0
        while True:
            process = start(arguments(corpus, run_dir))
            count = sum(killed.values())
            calm = count >= KILLS or of_this_run > 40
            found = (
                None if calm else kill_at_a_moment(process, run_dir, count % IN_A_SAVE == 3, moments.uniform(0.5, 14))
            )
            if found is None:
                code, _, err = finish(process, 600)
                assert code == 0 and "Traceback" not in err, err
                resumed += "resumed from step" in err
                break
            killed[found[0]] += 1
            in_saves += found[1]
            of_this_run += 1
        runs += 1
        assert {name: records(run_dir)[name]["params_sha256"] for name in TRAINED} == wanted
    print(
        json.dumps({"kills": sum(killed.values()), "in a save": in_saves, "runs": runs, "lost": 0, "at": dict(killed)})
    )
    assert in_saves >= 10 and {"pretrain", "sft", "rl", "eval"} <= killed.keys()
