"""A disk that fills up at ten points of a run: said, the checkpoint before is whole, the same command goes on later.

    python -m pytest tests/drills -m slow -n0 -s

needs root and tmpfs.
"""

import json
import os
import subprocess
import sys

import pytest
from whole_run import ROOT, arguments, finish, records, start

pytestmark = pytest.mark.slow
POINTS = 10
# what fills a disk after the check that a run makes at its start
UNCHECKED = "import sys, launch, train.plan as p; p.check_room = lambda *a: None; sys.exit(launch.main(sys.argv[1:]))"


def unchecked(args):
    command = [sys.executable, "-c", UNCHECKED, *args]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def mount(folder, size, *options):
    return subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)],
        capture_output=True, text=True,
    ).returncode == 0  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() or not mount(folder, "1m"):
        pytest.skip("needs root and tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up(small_disk, corpus, finished):
    whole = sum(p.stat().st_blocks * 512 for p in finished.rglob("*") if p.is_file())
    seen = {}
    for point in range(1, POINTS + 1):
        size = int(whole * point / (POINTS + 1.5))
        assert mount(small_disk, size, "remount")
        run_dir = small_disk / "run"
        code, _, err = finish(start(arguments(corpus, run_dir)), 600)
        assert code == 3 and "needed" in err and not run_dir.exists(), err  # said before anything is written
        code, _, err = finish(unchecked(arguments(corpus, run_dir)), 600)
        said = [line for line in err.splitlines() if line.startswith("error: ")]  # Orbax's threads add their own
        assert code == 3 and len(said) == 1, err
        assert "No space left" in said[0] or "no room on the disk" in said[0], err
        seen[f"{size // 1024} KiB"] = said[0].replace(str(small_disk), "")[:110]
        assert mount(small_disk, whole * 4, "remount")
        code, _, err = finish(start(arguments(corpus, run_dir)), 600)
        assert code == 0, err
        for name in ("pretrain", "sft", "rl"):
            assert records(run_dir)[name]["params_sha256"] == records(finished)[name]["params_sha256"]
        subprocess.run(["rm", "-rf", str(run_dir)], check=True)
    print(json.dumps({"points": POINTS, "lost": 0, "said": seen}, indent=1))
