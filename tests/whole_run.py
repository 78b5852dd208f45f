"""One whole tiny run, as a person would start it; shared by the tests that look at what a run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
TINY = ["model.depth=2", "model.width=48", "model.n_heads=3", "model.head_width=16", "model.vocab_size=400",
        "model.seq_len=64", "train.batch_tokens=256", f"train.steps={STEPS}", "train.eval_every=12",
        "train.checkpoint_every=6", "train.device_batch_rows=4", "eval.max_per_task=4", "eval.sample_tokens=8",
        'sft.mixture=["identity:60","word_problems:60"]', "data.val_fraction=0.05",
        "rl.steps=3", "rl.prompts=2", "rl.samples=2", "rl.max_tokens=8", "rl.eval_prompts=2", "rl.eval_samples=2",
        "rl.checkpoint_every=2", "rl.slots=4"]  # fmt: skip


def write_corpus(folder):
    """A small text with structure."""
    verbs, nouns = ["sees", "finds", "likes", "paints", "hears"], ["cat", "river", "house", "star", "boat", "tree"]
    lines = [
        f"The {nouns[i % 6]} {verbs[i % 5]} the {nouns[(i * 7 + 3) % 6]} number {i % 97}.\n"
        + ("\n" if i % 9 == 8 else "")
        for i in range(3000)
    ]
    (folder / "tale.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def arguments(corpus, run_dir, *more):
    sets = [part for override in TINY for part in ("--set", override)]
    return ["--tier", "nano", "--data", f"files:{corpus}/*.txt", "--run-dir", str(run_dir), *sets, *more]


def start(args, **options):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, ROOT / "launch.py", *args], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def on_devices(count, script, *arguments):
    """The JSON that a script of this folder prints last, run with so many simulated devices."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count} --xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, ROOT / "tests" / script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def records(run_dir):
    return json.loads((run_dir / "stages.json").read_text())
