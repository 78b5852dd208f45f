"""Reinforcement learning on questions whose answers can be checked: the chat model -> one that is more often right.

REINFORCE on groups: several sampled answers to a question, each pushed by how much better than the group it did. No
reference model, no clipping: every update is on policy.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxchat import hosts
from jaxchat.checkpoint import restore_params
from jaxchat.config import Config
from jaxchat.errors import DataError, UsageError
from jaxchat.log import read_metrics, say
from jaxchat.mesh import batch_devices, batch_sharding, make_mesh
from jaxchat.optim.horizon import fine_tuning_optim
from jaxchat.paths import RunDir, atomic_write
from jaxchat.scores import make_nll_step
from jaxchat.state import Batch, TrainState, decided
from jaxchat.tasks.base import Example, WrittenTask
from jaxchat.tasks.files import TaskFiles
from jaxchat.tasks.registry import get_task
from jaxchat.text.chat import render_prompt
from jaxchat.text.tokenizer import Tokenizer
from train.draws import Draw
from train.loop import Job, continued, fit
from train.report_plots import rl_plot
from train.rl_batch import advantages, build, longest, micro_batches, on_mesh, rewards, row_lengths
from train.rl_rollouts import LENGTH_MULTIPLE, Answers, Rollouts, sample_seed
from train.rl_scores import kl_per_token
from train.samples import answer_line, quote
from train.shares import pass_at_k

# Muon's momentum and the largest rates of the tables, before `rl.lr_ratio`, as in nanochat's RL
MOMENTUM, EMBEDDING_LR, UNEMBEDDING_LR = (0.95, 0.95, 0.95), 0.2, 0.004
SHOWN = 8  # questions of every evaluation in `rollouts.md`


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train from `sft/` into `rl/`; facts: questions, steps, scores before ("start") and after, `params_sha256`.

    `limit`: as of a `Job`; with it every other answer counts as right, so that there is something to learn from.
    """
    tokenizer, task, mesh = Tokenizer.load(run.tokenizer), environment(config), make_mesh(config.mesh)
    questions, longest_question = _fitting(task.train_examples(config.seed), config, tokenizer)
    exam, longest_exam = _fitting(task.examples(), config, tokenizer, config.rl.eval_prompts)
    room = max(longest_question, longest_exam) + config.rl.max_tokens
    capacity = min(config.model.seq_len, -(-room // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    settings = rl_config(config, len(questions), batch_devices(mesh))
    rollouts = Rollouts(config, task, tokenizer, mesh, capacity)
    player = Player(settings, run, rollouts, questions, exam, made_up_rewards=limit > 0)
    say(
        f"  {task.name}: {len(questions):,} questions, {settings.train.steps:,} steps of {config.rl.prompts} x "
        f"{config.rl.samples} answers"
    )

    job = Job(
        config=settings,
        directory=run.stage("rl"),
        rows=None,
        val_rows=None,
        byte_lengths=tokenizer.byte_lengths(),
        start=lambda state: continued(run, "sft", state),
        draw=player.draw,
        evaluators=[player.scores],
        score_start=True,
        title="rl",
        limit=limit,
    )
    facts = fit(job)
    if hosts.index() == 0:
        rl_plot(read_metrics(run.stage("rl") / "metrics.jsonl"), run.stage("rl") / "reward.png", "RL")
    about = {"environment": task.name, "questions": len(questions), "steps": settings.train.steps}
    return about | facts | {"digest": facts["params_sha256"]}


def check(config: Config) -> None:
    """Refuse, before any work, an environment that is none or whose questions are not at hand."""
    task, rl = environment(config), config.rl
    if rl.slots & (rl.slots - 1):
        raise UsageError(f"rl.slots: must be a power of two, not {rl.slots}")
    if rl.format_bonus and "format" not in task.readings(task.train_examples(config.seed)[0], ""):
        raise UsageError(f"rl.format_bonus: {task.name} asks for no form; set it to 0")


def environment(config: Config) -> WrittenTask:
    """The task to learn from. `UsageError` if it has no questions for training, `DataError` if they are missing."""
    task = get_task(config.rl.environment, TaskFiles.of(config, download=True))
    if not isinstance(task, WrittenTask) or not task.train_examples(config.seed):
        raise UsageError(f"rl.environment: {task.name} has no questions for training; take one that has, as gsm8k")
    return task


def rl_config(config: Config, questions: int, devices: int) -> Config:
    """The configuration the loop trains with: steps from the questions, and the rates of `rl`."""
    rl = config.rl
    steps = rl.steps if rl.steps > 0 else max(1, round(rl.epochs * questions / rl.prompts))
    rows = -(-rl.prompts * rl.samples // devices) * devices
    return dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            steps=steps,
            batch_tokens=rows * config.model.seq_len,
            eval_every=rl.eval_every,
            checkpoint_every=rl.checkpoint_every,
        ),
        optim=dataclasses.replace(
            fine_tuning_optim(config, rl.lr_ratio),
            embedding_lr=min(config.optim.embedding_lr, EMBEDDING_LR),
            unembedding_lr=min(config.optim.unembedding_lr, UNEMBEDDING_LR),
            warmdown_ratio=1.0,
            momentum=MOMENTUM,
        ),
    )


class Player:
    """Draws the batches of the loop and scores the model, with rollouts of the newest weights."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        rollouts: Rollouts,
        questions: Sequence[Example],
        exam: Sequence[Example],
        made_up_rewards: bool = False,
    ):
        self.made_up_rewards = made_up_rewards
        self.config, self.run, self.rollouts, self.questions, self.exam = config, run, rollouts, questions, exam
        self.lengths = row_lengths(rollouts.capacity)
        self._nll = functools.cache(self._nll_step)  # by the rows' length
        self._start: Any = None  # first weights, on the host
        self._order: tuple[int, list[int]] = -1, []  # of one epoch

    def draw(self, state: TrainState, step: int) -> Draw:
        """The answers of one step as a batch; a function of the weights, the seed and the step."""
        rl, weights = self.config.rl, jax.block_until_ready(state.params)  # the update before is not a rollout's time
        begin = time.perf_counter()
        self.rollouts.load(weights)
        chosen = [self._question(step * rl.prompts + i) for i in range(rl.prompts)]
        seeds = [[sample_seed(self.config.seed, step, q, s) for s in range(rl.samples)] for q in chosen]
        answers = self.rollouts.sample([self.questions[q] for q in chosen], seeds)
        reward = rewards(answers, rl.format_bonus)
        if self.made_up_rewards:  # a model of a few steps is never right, and would learn nothing
            reward = np.indices(reward.shape)[1] % 2.0
        advantage = advantages(reward)
        live = advantage.any(axis=1)
        facts = {
            "reward": float(reward.mean()),
            "right": float(answers.right.mean()),
            "length": float(answers.sampled.sum(axis=2).mean()),
            "endless": float(1 - answers.stopped.mean()),
            "live": int(live.sum()),
            "rollout_seconds": time.perf_counter() - begin,
        }
        made = int(answers.sampled.sum())
        if not live.any():
            return Draw(None, made, 0, facts)
        trained = int((answers.length[live] - 1).sum())
        return Draw(self._batch(answers, advantage), made, trained, facts)

    def scores(self, state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        """pass@k on the exam's questions, always with the same seeds, and the KL divergence from the first weights."""
        rl = self.config.rl
        self.rollouts.load(state.params)
        seeds = [
            [sample_seed(self.config.seed, "exam", q, s) for s in range(rl.eval_samples)] for q in range(len(self.exam))
        ]
        answers = self.rollouts.sample(self.exam, seeds)
        yield from pass_at_k(answers.right).items()
        yield "kl", self._kl(state.params, answers.first(max(1, rl.prompts * rl.samples // rl.eval_samples)), step)
        if hosts.index() == 0:
            self._show(answers, step)

    def _question(self, position: int) -> int:
        """Every epoch has all questions once, in an order of its own."""
        epoch, place = divmod(position, len(self.questions))
        if self._order[0] != epoch:
            order = list(range(len(self.questions)))
            random.Random(f"rl order {self.config.seed} {epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1][place]

    def _batch(self, answers: Answers, advantage: np.ndarray) -> dict[str, jax.Array]:
        config, mesh = self.config, self.rollouts.mesh
        rows = max(advantage.size, config.rl.prompts * config.rl.samples)
        shape = micro_batches(rows, batch_devices(mesh), config.train.device_batch_rows)
        needed = longest(answers, advantage)
        length = next(n for n in self.lengths if n >= needed)
        return on_mesh(build(answers, advantage, shape, length), batch_sharding(mesh))

    def _kl(self, params: Any, answers: Answers, step: int) -> float:
        if step == 0:
            return 0.0
        if self._start is None:
            self._start, _ = restore_params(self.run.stage("sft"))
        batch = self._batch(answers, np.ones(answers.length.shape, np.float32))
        nll = self._nll(batch["inputs"].shape[-1])
        now = np.asarray(nll(params, batch))
        start = np.asarray(nll(placed(self._start, params), batch))
        return kl_per_token(now, start, hosts.gathered(batch["counts"]).reshape(now.shape))

    def _nll_step(self, length: int) -> Callable[[Any, Batch], jax.Array]:
        model = dataclasses.replace(self.config.model, seq_len=length)
        config = dataclasses.replace(self.config, model=model)
        return make_nll_step(decided(config, self.rollouts.mesh), self.rollouts.mesh)

    def _show(self, answers: Answers, step: int) -> None:
        """`rollouts.md`: some of the exam's questions with what the model answered and whether it is right."""
        lines = [f"# Rollouts after {step} steps", "", "Tool calls in brackets.", ""]
        for p, example in enumerate(self.exam[:SHOWN]):
            prompt = len(render_prompt(self.rollouts.tokenizer, example.prompt))
            lines += [quote(example.prompt[-1]["content"]), ""]
            for s in range(min(2, answers.length.shape[1])):
                ids = answers.tokens[p, s, prompt : answers.length[p, s]].tolist()
                verdict = "right" if answers.right[p, s] else f"wrong, {example.expected}"
                lines.append(f"- **{verdict}**: {answer_line(self.rollouts.tokenizer, ids)}")
            lines.append("")
        atomic_write(self.run.stage("rl") / "rollouts.md", "\n".join(lines))


def placed(params: Any, like: Any) -> Any:
    """Host arrays on the devices, laid out as `like`."""
    return jax.device_put(params, jax.tree.map(lambda array: array.sharding, like))


def _fitting(
    examples: Sequence[Example], config: Config, tokenizer: Tokenizer, count: int | None = None
) -> tuple[list[Example], int]:
    """The first `count` of those whose question leaves room for an answer, and the tokens of the longest; `DataError`
    if none does."""
    lengths = [len(render_prompt(tokenizer, example.prompt)) for example in examples]
    kept = [(example, n) for example, n in zip(examples, lengths, strict=True) if n < config.model.seq_len]
    if not kept:
        raise DataError(f"rl.environment: no question fits into the context of {config.model.seq_len} tokens")
    if len(kept) < len(examples):
        say(f"  {len(examples) - len(kept):,} questions are longer than the context and left out", style="yellow")
    return [example for example, _ in kept[:count]], max(n for _, n in kept[:count])
