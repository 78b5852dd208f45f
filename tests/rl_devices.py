"""RL on simulated devices: run with XLA_FLAGS=--xla_force_host_platform_device_count=4; trains on in the run directory
that is the argument, and prints the metrics."""

import json
import sys

from test_rl import Brevity, run_config

from jaxchat import tasks as registry
from jaxchat.log import read_metrics
from jaxchat.run_dir import RunDir
from train import rl

if __name__ == "__main__":
    registry.TASKS["brevity"] = Brevity
    run = RunDir(sys.argv[1])
    rl.run(run_config(run, "rl.steps=2", "rl.eval_every=0", "mesh.data=2", "mesh.fsdp=2"), run)
    print(json.dumps(read_metrics(run.stage("rl") / "metrics.jsonl")))
