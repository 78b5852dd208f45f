"""Before a run trains: accelerators that JAX does not use, days on a CPU, room on the disks.

`before_training` is for real runs; a rehearsal trains a few steps only and does not call it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp

from jaxchat.config import Config
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.model.sizes import flops_per_token
from jaxchat.paths import RunDir
from train.accelerators import unused_accelerator
from train.disk import check_room, rl_steps, sft_tokens
from train.stage import Stage
from train.stages import remaining
from train.targets import CPU

LONGEST_HOURS = 48.0  # on a CPU, without train.allow_slow
SLOWEST_RATE = 1e9  # FLOP/s of any CPU: what is short even there is not measured
PRODUCT = 1536  # side of the measured matrices


def before_training(config: Config, run: RunDir, stages: Sequence[Stage]) -> None:
    """Say what JAX does not use; stop where training would take days or a disk is too small.

    Only stages that would really run count. Raises `UsageError` for the time and `DataError` for the disk.
    """
    left = {stage.name for stage in remaining(config, run, stages)}
    if not left:
        return
    line = unused_accelerator()
    if line:
        say(f"  {line}", style="yellow")
    check_time(config, run, left, line)
    check_room(config, run, left)


def check_time(config: Config, run: RunDir, left: Collection[str], line: str | None = None) -> None:
    """`UsageError` where the stages `left` would train for more than two days on this CPU."""
    if config.train.allow_slow or jax.default_backend() != "cpu":
        return
    flops = training_flops(config, run, left)
    if flops / SLOWEST_RATE <= LONGEST_HOURS * 3600:
        return
    rate = product_rate() * jax.process_count()
    hours = flops / (rate * CPU.mfu) / 3600
    if hours <= LONGEST_HOURS:
        return
    measured = f"{rate / 1e9:,.0f} GFLOP/s in float32 products, {flops:.2g} FLOPs left"
    advice = f"{line}. Or take" if line else "Take"
    raise UsageError(
        f"{config.tier}: training would take about {hours / 24:,.0f} days on this CPU ({measured}). {advice} a machine "
        "with a GPU or TPU (what it needs there: --plan --target h100:8), or a smaller tier (--tiers); "
        "--set train.allow_slow=true trains here all the same"
    )


def training_flops(config: Config, run: RunDir, left: Collection[str]) -> float:
    """Return the FLOPs that the stages `left` have still to train, checkpoints counted as done."""
    per_token, total = flops_per_token(config.model), 0.0
    if "pretrain" in left:
        steps = [int(p.name) for p in run.stage("base").glob("*") if p.name.isdigit()]
        done = min(max(steps, default=0), config.train.steps)
        total += (config.train.steps - done) * config.train.batch_tokens * per_token
    if "sft" in left:
        total += sft_tokens(config) * config.sft.epochs * per_token
    if "rl" in left:  # an answer is made (a third of the FLOPs of training on it) and learned from
        answers = rl_steps(config) * config.rl.prompts * config.rl.samples
        total += answers * config.rl.max_tokens * per_token * 4 / 3
    return total


def product_rate(repeats: int = 3) -> float:
    """Return the FLOP/s of float32 products on this CPU, the best of a few."""
    multiply, matrix = jax.jit(jnp.matmul), jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        begin = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * PRODUCT**3 / min(seconds)
