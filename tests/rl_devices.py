"""RL on simulated devices: run with XLA_FLAGS=--xla_force_host_platform_device_count=4; trains
on in the run directory that is the argument, and prints the metrics and how many programs sampling compiles on one
device and on all."""

import json
import sys

import jax
from test_rl import Brevity, run_config

from jaxchat.checkpoint import restore_params
from jaxchat.log import read_metrics
from jaxchat.run_dir import RunDir
from jaxchat.sharding import make_mesh
from jaxchat.tasks import registry
from jaxchat.tokenizer import Tokenizer
from train import rl
from train.rl import RolloutWorker


def programs(run: RunDir, devices: int) -> int:
    """Compiled by the first answers on so many devices."""
    config, task = run_config(run), Brevity()
    compiled: list[str] = []
    listener = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    params = restore_params(run.stage("sft"))[0]
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listener)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    rollouts = RolloutWorker(config, run, task, Tokenizer.load(run.tokenizer), mesh, 64)
    rollouts.load(params)
    rollouts.sample(task.examples()[:4], [[1, 2, 3, 4]] * 4)
    jax.monitoring.unregister_event_duration_listener(listener)
    return len(compiled)


if __name__ == "__main__":
    registry.TASKS["brevity"] = Brevity
    run = RunDir(sys.argv[1])
    rl.run(run_config(run, "rl.steps=2", "rl.eval_every=0", "mesh.data=2", "mesh.fsdp=2"), run)
    found = {"metrics": read_metrics(run.stage("rl") / "metrics.jsonl")}
    print(json.dumps(found | {"programs": [programs(run, n) for n in (1, 4)]}))
