"""Reinforcement learning on questions whose answers can be checked: the chat model -> one that is more often right.

REINFORCE on groups: several sampled answers to a question, each pushed by how much better than the group it did. No
reference model, no clipping: every update is on policy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding

from jaxchat import distributed as hosts
from jaxchat.chat import render_prompt
from jaxchat.checkpoint import restore_params
from jaxchat.config import Config, MeshConfig
from jaxchat.data.loader import own_columns, place
from jaxchat.engine import Engine, Handle, Result
from jaxchat.errors import DataError, UsageError
from jaxchat.kv_cache import serving_params
from jaxchat.log import read_metrics, say
from jaxchat.run_dir import RunDir, atomic_write
from jaxchat.scaling import fine_tuning_optim
from jaxchat.sharding import batch_devices, batch_sharding, make_mesh, replicated
from jaxchat.tasks.base import Example, WrittenTask
from jaxchat.tasks.files import TaskFiles
from jaxchat.tasks.registry import get_task
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import Batch, TrainState, decided, make_nll_step

from .evaluate import answer_line, quote
from .loop import Draw, Job, continued, fit
from .plots import rl_plot
from .statistics import pass_at_k

# How far RL has come from the model that it started with.


def kl_per_token(now: np.ndarray, start: np.ndarray, counts: np.ndarray) -> float:
    """KL divergence of the policy from its start in nats per sampled token, from one sample of each.

    Args: negative log-likelihoods under the present weights and under the first ones, and 1 where a token was sampled,
    all of one shape. The estimator exp(d) - 1 - d, d = log p_start - log p_now, is never negative and unbiased (up to
    what top-k cuts off): http://joschu.net/blog/kl-approx.html.
    """
    d = (now - start).astype(np.float64)
    return float(((np.expm1(d) - d) * counts).sum() / max(counts.sum(), 1.0))


# Rollouts: groups of sampled answers to a step's questions, graded.
#
# All questions of a step go to one engine at once, whose slots lie on all devices of the process; each question is
# prefilled once for its group. What is sampled is a function of (seed, step, question, sample) and the weights alone.
#
# Axes: P questions, S samples of each, L tokens of question and answer together.


LENGTH_MULTIPLE = 64  # tokens that rows and caches are rounded up to
SHRINK = 4  # the last answers of a step are few and long: they run in fewer rows, down to a quarter of the slots


@dataclass
class Answers:
    """Graded answers. tokens (P, S, L) int32: question, answer and stop id, 0 behind; length (P, S) int32: of both;
    sampled (P, S, L) bool: ids that the model drew, the stop id among them, but no tool output; right, formatted and
    stopped (P, S) bool: by the task, in the task's form, ended by itself."""

    tokens: np.ndarray
    length: np.ndarray
    sampled: np.ndarray
    right: np.ndarray
    formatted: np.ndarray
    stopped: np.ndarray

    def first(self, count: int) -> Answers:
        """The answers to the first questions."""
        return Answers(**{name: array[:count] for name, array in vars(self).items()})


def sample_seed(seed: int, *place: object) -> int:
    """Seed of one answer, 32 bits."""
    text = " ".join(map(str, ("rl", seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


class Rollouts:
    """Samples answers with the newest weights that were loaded.

    `capacity`: tokens of question and answer together, at most. Several processes each make the answers to their own
    questions, on their own devices of `mesh`.
    """

    def __init__(self, config: Config, task: WrittenTask, tokenizer: Tokenizer, mesh: Mesh, capacity: int):
        self.config, self.task, self.tokenizer, self.mesh, self.capacity = config, task, tokenizer, mesh, capacity
        own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        self._own = make_mesh(MeshConfig(), own)
        self._engine: Engine | None = None
        self._serve = jax.jit(serving_params, static_argnums=(0, 2), out_shardings=replicated(mesh))

    def load(self, params: Any) -> None:
        """Take the weights of the training state, wherever they lie."""
        if self.mesh.size > 1:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
            place = replicated(self._own)
            params = jax.tree.map(lambda a: _whole(a, place), self._serve(self.config.model, params, dtype))
        if self._engine:
            self._engine.load(params)
            return
        slots = self.config.rl.slots * self._own.size
        self._engine = Engine(
            self.config.model, params, self.tokenizer, slots=slots, capacity=self.capacity, mesh=self._own
        )

    def sample(self, examples: Sequence[Example], seeds: Sequence[Sequence[int]]) -> Answers:
        """As many answers to every question as it has seeds (the same number for all)."""
        P, S, L = len(examples), len(seeds[0]), self.capacity + 1
        mine = [p for p in range(P) if p % jax.process_count() == hosts.index()]
        results = self._generate([examples[p] for p in mine], [seeds[p] for p in mine])
        kinds = {"tokens": np.int32, "length": np.int32, "sampled": bool, "right": bool, "formatted": bool}
        shapes = {"tokens": (P, S, L), "sampled": (P, S, L)}
        made = {name: np.zeros(shapes.get(name, (P, S)), kind) for name, kind in (kinds | {"stopped": bool}).items()}
        for p, (prompt, group) in zip(mine, results, strict=True):
            right = self.task.grade_all([examples[p]] * S, [result.text for result in group])
            for s, result in enumerate(group):
                ids, drawn = _row(prompt, result)
                made["tokens"][p, s, : len(ids)], made["sampled"][p, s, : len(ids)] = ids, drawn
                made["length"][p, s], made["stopped"][p, s] = len(ids), result.stop_id is not None
                made["right"][p, s] = right[s]
                made["formatted"][p, s] = self.task.readings(examples[p], result.text).get("format", False)
        if hosts.several():  # every process has filled in its own questions
            made = {
                name: multihost_utils.process_allgather(a.astype(np.int32)).sum(axis=0).astype(a.dtype)
                for name, a in made.items()
            }
        return Answers(**made)

    def _generate(
        self, examples: Sequence[Example], seeds: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], list[Result]]]:
        """(question's tokens, its answers) of every example."""
        rl, engine = self.config.rl, self._engine
        assert engine, "weights are loaded before answers are sampled"
        groups: list[tuple[list[int], list[Handle]]] = []
        for example, own in zip(examples, seeds, strict=True):
            request = engine.chat_request(
                example.prompt, max_tokens=rl.max_tokens, temperature=rl.temperature, top_k=rl.top_k
            )
            groups.append((request.tokens, engine.submit_group(request, own)))
        engine.finish([handle for _, handles in groups for handle in handles], shrink=SHRINK)
        return [(tokens, [handle.result() for handle in handles]) for tokens, handles in groups]


def _row(prompt: list[int], result: Result) -> tuple[list[int], list[bool]]:
    """Ids of question and answer with its stop id, and which of them the model drew."""
    stop = [] if result.stop_id is None else [result.stop_id]
    drawn = [False] * len(prompt) + [not forced for forced in result.forced] + [True] * len(stop)
    return [*prompt, *result.tokens, *stop], drawn


def _whole(array: jax.Array, place: NamedSharding) -> jax.Array:
    """A replicated array as one that this process's devices alone hold; nothing is copied."""
    shards = {shard.device: shard.data for shard in array.addressable_shards}
    parts = [shards[device] for device in place.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(array.shape, place, parts)


# From graded answers to a training batch: rewards, advantages, rows of few shapes.
#
# REINFORCE with the group's mean as the baseline, the loss normalized over tokens (DAPO, 2503.14476):
# loss = -sum over live sampled tokens of advantage * log p / number of those tokens. On policy no ratio is needed.
#
# Axes: P questions, S samples of each, R rows, T positions, A micro-batches of B rows.


SHORTEST = 64  # positions of a row


def rewards(answers: Answers, format_bonus: float) -> np.ndarray:
    """(P, S) float64: 1 for a right answer, and the bonus for one in the task's form."""
    return answers.right.astype(np.float64) + format_bonus * answers.formatted


def advantages(reward: np.ndarray) -> np.ndarray:
    """(P, S) float32 of rewards (P, S): reward minus the group's mean, exactly 0 in a group of equal rewards."""
    live = reward.max(axis=1, keepdims=True) > reward.min(axis=1, keepdims=True)
    return np.where(live, reward - reward.mean(axis=1, keepdims=True), 0.0).astype(np.float32)


def row_lengths(capacity: int) -> list[int]:
    """Positions of a row: the capacity, and the largest power of two below it."""
    shorter = 1 << ((capacity - 1).bit_length() - 1) if capacity > 1 else 1
    return [shorter, capacity] if SHORTEST <= shorter < capacity else [capacity]


def micro_batches(rows: int, devices: int, device_rows: int) -> tuple[int, int]:
    """(A, B) that hold `rows` rows with at most `device_rows` on a device at once."""
    per_device = -(-rows // devices)
    grad_accum = -(-per_device // device_rows)
    return grad_accum, -(-per_device // grad_accum) * devices


def build(answers: Answers, advantage: np.ndarray, shape: tuple[int, int], length: int) -> dict[str, np.ndarray]:
    """Rows of the live groups, those whose advantages are not all 0, padded to `shape` rows of `length` positions: one
    program for any number of live groups, and micro-batches of padding alone are skipped.

    inputs, targets (A, B, T) int32; weights float32, the advantage where a target was sampled, else 0; counts float32,
    1 where a target of a live group was sampled: their sum is what the loss is divided by.
    """
    live = advantage.any(axis=1)
    tokens, sampled = (a[live].reshape(-1, a.shape[-1])[:, : length + 1] for a in (answers.tokens, answers.sampled))
    width = max(length + 1 - tokens.shape[1], 0)
    padding = (0, shape[0] * shape[1] - len(tokens)), (0, width)
    tokens, sampled = np.pad(tokens, padding), np.pad(sampled, padding)
    by_row = np.pad(advantage[live].ravel(), padding[0])
    counts = sampled[:, 1:].astype(np.float32)
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": counts * by_row[:, None],
        "counts": counts,
    }
    return {name: array.reshape(*shape, length) for name, array in arrays.items()}


def longest(answers: Answers, advantage: np.ndarray) -> int:
    """Input positions of the longest answer of a live group."""
    live = np.asarray(advantage).any(axis=1)
    return int(answers.length[live].max()) - 1


def on_mesh(batch: dict[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
    """The batch with its rows spread over the devices; every process has all of it and gives its own part."""
    shape: Any = batch["inputs"].shape
    columns = own_columns(sharding, shape)
    return place({name: array[:, columns] for name, array in batch.items()}, sharding, shape, columns)


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
    steps = rl.steps if rl.steps > 0 else max(1, round(questions / rl.prompts))
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
