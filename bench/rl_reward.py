"""Mean reward of RL on held-out questions before, during and after: does the first step break what SFT learned?

    python -m bench.rl_reward runs/nano --seeds 1,2,3

Trains RL from the run's SFT in a temporary directory, once a seed, and prints one JSON object: the mean reward at
temperature `rl.temperature` after each step of `--at`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxchat.config import Config, load_config
from jaxchat.log import read_metrics
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.train_state import TrainState
from train import rl


def measure(config: Config, source: Path, at: Sequence[int]) -> dict[str, float]:
    """Mean reward by steps done, and the end's share of right answers in training, of one RL run."""
    scores = rl.RolloutWorker.scores

    def at_chosen_steps(self: rl.RolloutWorker, state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        if step in (0, *at, config.rl.steps):
            yield from scores(self, state, step)

    with tempfile.TemporaryDirectory(prefix="rl-reward-") as folder:
        run = RunDir(Path(folder) / "run")
        run.root.mkdir()
        for name in ("tokenizer", "sft"):
            (run.root / name).symlink_to((source / name).resolve())
        for name in ("stages.json", "config.toml"):
            shutil.copy(source / name, run.root / name)
        rl.RolloutWorker.scores = at_chosen_steps  # type: ignore[method-assign]
        try:
            facts: dict[str, Any] = rl.run(config, run)
        finally:
            rl.RolloutWorker.scores = scores  # type: ignore[method-assign]
        records = read_metrics(run.stage("rl") / "metrics.jsonl")
    found = {0: facts["start"]["pass@1"]} | {r["step"] + 1: r["pass@1"] for r in records if "pass@1" in r}
    return {str(step): round(value, 4) for step, value in sorted(found.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--at", default="1,2,5,10,20", help="steps after which the reward is measured")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], metavar="K=V")
    arguments = parser.parse_args()
    config = resolve(load_config(arguments.run / "config.toml", arguments.set))
    result = {}
    for seed in map(int, arguments.seeds.split(",")):
        asked = dataclasses.replace(
            config.rl, eval_every=1, eval_prompts=arguments.questions, eval_samples=arguments.answers
        )
        steps = [int(step) for step in arguments.at.split(",") if step]
        result[seed] = measure(dataclasses.replace(config, seed=seed, rl=asked), arguments.run, steps)
    print(json.dumps({"run": str(arguments.run), "set": arguments.set, "mean_reward": result}))


if __name__ == "__main__":
    main()
