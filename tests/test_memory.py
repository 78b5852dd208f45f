"""Out of memory for real, in processes that may not take what their batch needs: exit code 4 and a batch that fits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from whole_run import TINY, arguments, write_corpus

from jaxchat.config import load_config
from jaxchat.errors import OutOfMemoryError
from jaxchat.scaling import resolve
from train.doctor import available_memory
from train.loop import Trainer, memory_advice

ROOT = Path(__file__).resolve().parent.parent
# The limit comes after JAX's start, whose threads reserve more address space the more cores there are.
LIMITED = """
import os, resource, sys
import jax, jax.numpy as jnp
jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(8)))
import launch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
sys.exit(launch.main(sys.argv[1:]))
"""
LARGE = {"train.batch_tokens": 1 << 17, "train.steps": 1, "train.eval_every": 0}


def limited(*command):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env, timeout=500)


def train(corpus, rows):
    sets = [part for key, value in LARGE.items() for part in ("--set", f"{key}={value}")]
    given = arguments(corpus, corpus / "run", *sets, "--set", f"train.device_batch_rows={rows}", "--stages", "pretrain")
    return limited("-c", LIMITED, *given)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_too_many_rows_end_with_4_and_the_number_that_fits(tmp_path):
    corpus = write_corpus(tmp_path)
    done = train(corpus, 2048)
    assert done.returncode == OutOfMemoryError.exit_code == 4, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    named = re.search(r"^error: out of device memory \(.* GiB\) with .*_rows=2048; add --set .*_rows=(\d+) ", last)
    assert named, last
    fits = int(named[1])
    assert 1 <= fits < 2048 and f"--set train.device_batch_rows={fits}" in last
    again = train(corpus, fits)
    assert again.returncode == 0, again.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_free_memory_is_what_the_process_may_take(tmp_path):
    program = (
        "import resource, mmap\nfrom train.doctor import available_memory as free\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28),) * 2)\n"
        "n = free()\nmmap.mmap(-1, int(0.9 * n))\n"
        "try:\n    mmap.mmap(-1, int(1.1 * n))\nexcept OSError:\n    print(n)\n"
    )
    done = limited("-c", program)
    assert int(done.stdout) == pytest.approx(1 << 28, rel=0.1), done.stderr
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() < total


def test_a_batch_that_should_fit_is_not_blamed():
    """Compiled, it needs far less than is free: something else has the memory; the next smaller one is named."""
    line = memory_advice(resolve(load_config("nano", TINY)))
    assert "train.device_batch_rows=4" in line and "--set train.device_batch_rows=2" in line


def test_one_row_is_not_made_smaller():
    line = memory_advice(resolve(load_config("nano", [*TINY, "train.device_batch_rows=1"])))
    assert "no smaller batch fits" in line and "train.remat" in line and "mesh.fsdp" in line


def test_only_memory_is_explained(tmp_path):
    trainer = Trainer(resolve(load_config("nano", TINY)), tmp_path, None)

    def fail():
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    trainer._train = fail
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        trainer.run()
