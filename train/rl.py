"""Stage `rl`: learn from questions whose answers can be checked (REINFORCE), or from pairs of answers in a file (DPO).

REINFORCE on groups: several answers to a question are sampled, and each is weighted by how much better it did than the
group's mean. The loss is normalized over tokens (DAPO, 2503.14476):
loss = -sum over sampled tokens of advantage * log p / number of those tokens. Every update is on policy, so there is no
reference model, no ratio and no clipping.

DPO (direct preference optimization, 2305.18290): the loss of a better and a worse answer is -log sigmoid(margin), with
the margin beta * ((log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected))), p0 the model after SFT. Its
gradient is that of sum(w * nll) over the tokens, where w is beta * sigmoid(-margin) for the chosen answer and its
negative for the rejected one. So both are the loop's update with a weight on every token.

Axes: P questions, S samples of each, L tokens of question and answer; R rows, T positions, A micro-batches of B rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxchat import distributed
from jaxchat.chat import Message, render, render_prompt
from jaxchat.checkpoint import restore_params
from jaxchat.config import Config, MeshConfig, replaced
from jaxchat.engine import Engine
from jaxchat.errors import DataError, UsageError
from jaxchat.kv_cache import serving_params
from jaxchat.log import progress, read_metrics, say, say_once
from jaxchat.run_dir import RunDir, atomic_write, read_json
from jaxchat.scaling import fine_tuning_optim
from jaxchat.sharding import batch_devices, batch_sharding, make_mesh, replicated
from jaxchat.tasks import get_task
from jaxchat.tasks.base import OWN, RIGHT, Example, TaskFiles, WrittenTask
from jaxchat.tasks.from_file import is_preferences, read_pairs
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import Batch, TrainState, decided, make_nll_step

from . import plausible
from .curves import plot
from .evaluate import passes, sampler, shown
from .loop import StepBatch, Trainer, continued
from .report import code

# Muon's momentum and the largest rates of the tables, before `rl.lr_ratio`, as in nanochat's RL
MOMENTUM, EMBEDDING_LR, UNEMBEDDING_LR = (0.95, 0.95, 0.95), 0.2, 0.004
FEW = 50  # held-out questions: the interval of their share is up to 27 % wide
LENGTH_MULTIPLE = 32  # tokens that caches and the longer rows are rounded up to
SHORTEST = 64  # positions of a row
CHUNK = 4  # decoding steps of a call: a row that calls a tool waits to the end of the next one (8: 1.4 times the time)
SHRINK = 4  # the last answers of a step are few and long: they run in fewer rows, down to a quarter of the slots
SHOWN = 8  # questions of every evaluation in `rollouts.md`
Pair = Any  # ((ids, mask) of the chosen answer, (ids, mask) of the rejected one)


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train from `sft/` into `rl/`; facts: questions, steps, scores before ("start") and after, `params_sha256`.

    `limit`: see `Trainer`; with it every other answer gets a reward, so that there is something to learn from.
    """
    tokenizer, mesh = Tokenizer.load(run.tokenizer), make_mesh(config.mesh)
    learner: Preferences | RolloutWorker
    if is_preferences(config.rl.environment):
        title, name, (train, held_out) = "dpo", config.rl.environment, fitting_pairs(config, tokenizer)
        count = len(train)
        settings = rl_config(config, count, batch_devices(mesh))
        learner = Preferences(settings, run, mesh, [*train, *held_out[: config.rl.eval_prompts]], count)
    else:
        task, examples = environment(config)
        questions, longest = fitting(config, tokenizer, examples)
        exam, longest_exam = fitting(config, tokenizer, task.examples(), config.rl.eval_prompts)
        capacity = min(config.model.seq_len, _rounded(max(longest, longest_exam) + config.rl.max_tokens))
        title, name, count = "rl", task.name, len(questions)
        settings = rl_config(config, count, batch_devices(mesh))
        learner = RolloutWorker(settings, run, task, tokenizer, mesh, capacity, questions, exam, limit > 0)
    steps = settings.train.steps
    say(f"  {name}: {count:,} questions, {steps:,} steps of {config.rl.prompts} x {learner.samples} answers")
    trainer = Trainer(
        settings,
        run.stage("rl"),
        tokenizer.byte_lengths(),
        next_batch=learner.next_batch,
        start=lambda state: continued(run, "sft", state),
        evaluators=[learner.scores],
        sampler=sampler(config, run, tokenizer, "rl"),
        score_start=True,
        title=title,
        limit=limit,
    )
    facts = trainer.run()
    groups = [record.get("live", 1) for record in read_metrics(trainer.metrics.path)]
    if not any(groups):
        line = f"no group of answers differed in its rewards in {len(groups):,} steps: nothing was learned"
        facts["warnings"] += plausible.warn("rl", [line])
    if distributed.index() == 0:
        plot(run.stage("rl") / "metrics.jsonl", "rl", run.stage("rl") / "reward.png", title.upper())
    return {"environment": name, "questions": count, "steps": steps} | facts


def check(config: Config) -> None:
    """Refuse, before any work, an environment without questions or with data that is not at hand."""
    if is_preferences(config.rl.environment):
        read_pairs(config.rl.environment, TaskFiles.of(config, download=False))
        return
    (task, questions), rl = environment(config), config.rl
    if not task.examples():
        raise UsageError(f"rl.environment: {task.name} has no exam, which pass@k is measured on")
    task.check()
    held_out = len(task.examples()) if rl.environment.startswith(OWN) else FEW
    if held_out < FEW or len(questions) < rl.prompts:
        counts = f"{len(questions):,} to train on, {held_out:,} held out"
        say(f"  rl.environment: few questions ({counts}): the scores after RL will say little", style="yellow")
    if rl.slots & (rl.slots - 1):
        raise UsageError(f"rl.slots: must be a power of two, not {rl.slots}")
    if rl.format_bonus and "format" not in task.readings(questions[0], ""):
        raise UsageError(f"rl.format_bonus: {task.name} asks for no form; set it to 0")


def ready(config: Config, run: RunDir) -> None:
    """Refuse, before anything is trained, questions of which none fits into the context."""
    if not (run.tokenizer / "tokenizer.json").exists():
        return
    if is_preferences(config.rl.environment):
        fitting_pairs(config, Tokenizer.load(run.tokenizer))
    else:
        fitting(config, Tokenizer.load(run.tokenizer), environment(config)[1])


def fitting(
    config: Config, tokenizer: Tokenizer, examples: Sequence[Example], count: int | None = None
) -> tuple[list[Example], int]:
    """Return the first `count` questions with room for an answer, and the tokens of the longest."""
    lengths = [len(render_prompt(tokenizer, example.prompt)) for example in examples]
    kept = [(example, n) for example, n in zip(examples, lengths, strict=True) if n < config.model.seq_len]
    if not kept:
        raise DataError(f"rl.environment: no question fits into the context of {config.model.seq_len} tokens")
    if len(kept) < len(examples):
        say_once(f"  {len(examples) - len(kept):,} questions are longer than the context and left out", "yellow")
    return [example for example, _ in kept[:count]], max(n for _, n in kept[:count])


def fitting_pairs(config: Config, tokenizer: Tokenizer) -> list[list[Pair]]:
    """Return the pairs to train on and those held out, if they fit into the context."""
    kept = []
    for pairs in read_pairs(config.rl.environment, TaskFiles.of(config, download=False)):
        rendered = [tuple(_rendered(tokenizer, side) for side in pair) for pair in pairs]
        kept.append([pair for pair in rendered if max(len(ids) for ids, _ in pair) <= config.model.seq_len + 1])
        if len(kept[-1]) < len(pairs):
            say_once(f"  {len(pairs) - len(kept[-1]):,} pairs are longer than the context and left out", "yellow")
        if not kept[-1]:
            raise DataError(f"{config.rl.environment}: no pair fits into the context of {config.model.seq_len} tokens")
    return kept


def _rendered(tokenizer: Tokenizer, turns: list[Message]) -> tuple[list[int], list[int]]:
    """Return ids and mask of a conversation; only the last answer is a target."""
    (ids, mask), start = render(tokenizer, turns), len(render_prompt(tokenizer, turns[:-1]))
    return ids, [0] * start + mask[start:]


def _rounded(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def environment(config: Config) -> tuple[WrittenTask, Sequence[Example]]:
    """Return the task to learn from and its training questions.

    `UsageError` if it has none, `DataError` without its data.
    """
    task = get_task(config.rl.environment, TaskFiles.of(config, download=True))
    questions = task.train_examples(config.seed) if isinstance(task, WrittenTask) else ()
    if not isinstance(task, WrittenTask) or not questions:
        raise UsageError(f"rl.environment: {task.name} has no questions for training; take one that has, as gsm8k")
    return task, questions


def rl_config(config: Config, questions: int, devices: int) -> Config:
    """Return the configuration the loop trains with: steps from the questions, and the rates of `rl`."""
    rl, optim = config.rl, config.optim
    steps = rl.steps if rl.steps > 0 else max(1, round(questions / rl.prompts))
    batch_tokens = -(-rl.prompts * rl.samples // devices) * devices * config.model.seq_len
    config = dataclasses.replace(config, optim=fine_tuning_optim(config, rl.lr_ratio))
    config = replaced(
        config,
        "optim",
        warmdown_ratio=1.0,
        momentum=MOMENTUM,
        embedding_lr=min(optim.embedding_lr, EMBEDDING_LR),
        unembedding_lr=min(optim.unembedding_lr, UNEMBEDDING_LR),
    )
    own = {"eval_every": rl.eval_every, "checkpoint_every": rl.checkpoint_every}
    return replaced(config, "train", steps=steps, batch_tokens=batch_tokens, **own)


class Learner:
    """What REINFORCE and DPO share. Both are functions of the weights, the seed and the step alone."""

    config: Config
    run: RunDir
    mesh: Mesh

    def chosen(self, step: int, count: int) -> list[int]:
        """Return the numbers of a step's questions, of `count`."""
        size, seed = self.config.rl.prompts, self.config.seed
        places = (divmod(step * size + i, count) for i in range(size))
        return [question_order(count, seed, epoch)[i] for epoch, i in places]

    def micro_batches(self, rows: int) -> tuple[int, int]:
        return micro_batches(rows, batch_devices(self.mesh), self.config.train.device_batch_rows)

    def placed(self, batch: dict[str, np.ndarray]) -> Batch:
        """Return rows (A, B, T) on the mesh; every process has all of them and gives its own part."""
        return jax.make_array_from_process_local_data(batch_sharding(self.mesh), batch, batch["inputs"].shape)

    def nll(self, params: Any, batch: Batch) -> np.ndarray:
        """Return the negative log-likelihoods of placed rows, (A, B, T)."""
        config = replaced(self.config, "model", seq_len=batch["inputs"].shape[-1])
        return np.asarray(make_nll_step(decided(config, self.mesh), self.mesh)(params, batch))

    def first_params(self, params: Any) -> Any:
        """Return the weights after SFT, placed as `params` are."""
        first, _ = restore_params(self.run.stage("sft"))
        return jax.device_put(first, jax.tree.map(lambda array: array.sharding, params))


# REINFORCE


@dataclass
class Answers:
    """Graded answers, as arrays over questions and samples."""

    tokens: np.ndarray  # (P, S, L) int32: question, answer and stop id, 0 behind
    length: np.ndarray  # (P, S) int32, of all three
    sampled: np.ndarray  # (P, S, L) bool: ids that the model sampled, the stop id among them, but no tool output
    score: np.ndarray  # (P, S) float64 from 0 to 1, right from `RIGHT` on
    formatted: np.ndarray  # (P, S) bool: in the form that the task asks for
    stopped: np.ndarray  # (P, S) bool: not truncated

    @property
    def correct(self) -> np.ndarray:
        return self.score >= RIGHT


@dataclass
class RolloutWorker(Learner):
    """Samples and grades answers with the newest weights, as batches for the training loop and as scores.

    All questions of a step go to one engine at once, whose slots lie on all devices of the process; each question is
    prefilled once for its group. Several processes each answer their own questions, on their own devices of `mesh`.
    """

    config: Config
    run: RunDir
    task: WrittenTask
    tokenizer: Tokenizer
    mesh: Mesh
    capacity: int  # tokens of question and answer together, at most
    questions: Sequence[Example] = ()
    exam: Sequence[Example] = ()
    made_up_rewards: bool = False

    def __post_init__(self) -> None:
        own = [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
        self._own_mesh = make_mesh(MeshConfig(), own)
        self._engine: Engine | None = None
        self._serving = jax.jit(serving_params, static_argnums=(0, 2), out_shardings=replicated(self.mesh))
        self._texts: dict[int, list[str]] = {}  # of this process's newest answers, by question
        self.samples = self.config.rl.samples

    def load(self, params: Any) -> None:
        """Take the weights of the training state, wherever they lie."""
        if self.mesh.size > 1:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
            sharding = replicated(self._own_mesh)

            def local(array: jax.Array) -> jax.Array:
                """Return a replicated array as one on this process's devices alone; nothing is copied."""
                shards = {shard.device: shard.data for shard in array.addressable_shards}
                parts = [shards[device] for device in self._own_mesh.devices.flat]
                return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)

            params = jax.tree.map(local, self._serving(self.config.model, params, dtype))
        if self._engine:
            self._engine.load(params)
        else:
            slots = self.config.rl.slots * self._own_mesh.size
            self._engine = Engine(
                self.config.model,
                params,
                self.tokenizer,
                slots=slots,
                capacity=self.capacity,
                chunk=CHUNK,
                mesh=self._own_mesh,
            )

    def sample(self, examples: Sequence[Example], seeds: Sequence[Sequence[int]]) -> Answers:
        """Return as many graded answers to every question as it has seeds (the same number for all)."""
        P, S, L, rl, engine = len(examples), len(seeds[0]), self.capacity + 1, self.config.rl, self._engine
        assert engine, "weights are loaded before answers are sampled"
        groups = {}
        for p in range(distributed.index(), P, jax.process_count()):
            request = engine.chat_request(
                examples[p].prompt, max_tokens=rl.max_tokens, temperature=rl.temperature, top_k=rl.top_k
            )
            groups[p] = request.tokens, engine.submit_group(request, seeds[p])
        engine.finish([handle for _, handles in groups.values() for handle in handles], shrink=SHRINK)
        answers = Answers(
            tokens=np.zeros((P, S, L), np.int32),
            length=np.zeros((P, S), np.int32),
            sampled=np.zeros((P, S, L), bool),
            score=np.zeros((P, S)),
            **{name: np.zeros((P, S), bool) for name in ("formatted", "stopped")},
        )
        self._texts = {}
        asked = [examples[p] for p in groups for _ in range(S)]
        texts = [handle.text for _, handles in groups.values() for handle in handles]
        answers.score[list(groups)] = np.reshape(self.task.grade_all(asked, texts), (-1, S))
        for p, (prompt, handles) in groups.items():
            self._texts[p] = [shown(handle) for handle in handles[:2]]
            for s, result in enumerate(handles):
                stop = [] if result.stop_id is None else [result.stop_id]
                ids = [*prompt, *result.tokens, *stop]
                answers.tokens[p, s, : len(ids)], answers.length[p, s] = ids, len(ids)
                sampled = [not forced for forced in result.forced] + [True] * len(stop)
                answers.sampled[p, s, len(prompt) : len(ids)] = sampled
                answers.stopped[p, s] = bool(stop)
                answers.formatted[p, s] = self.task.readings(examples[p], result.text).get("format", False)
        if distributed.several():  # every process has filled in its own questions

            def add(a: np.ndarray) -> np.ndarray:
                wide = a.astype(np.float32 if a.dtype == float else np.int32)  # all that JAX sends
                return multihost_utils.process_allgather(wide).sum(axis=0).astype(a.dtype)

            answers = Answers(**{name: add(array) for name, array in vars(answers).items()})
        return answers

    def next_batch(self, state: TrainState, step: int) -> StepBatch:
        """Sample the answers of one step; a function of the weights, the seed and the step."""
        rl, weights = self.config.rl, jax.block_until_ready(state.params)  # the update before is not a rollout's time
        begin = time.perf_counter()
        self.load(weights)
        chosen = self.chosen(step, len(self.questions))
        seeds = [[sample_seed(self.config.seed, step, q, s) for s in range(rl.samples)] for q in chosen]
        answers = self.sample([self.questions[q] for q in chosen], seeds)
        reward = answers.score + rl.format_bonus * answers.formatted
        if self.made_up_rewards:  # a model of a few steps is never right, and would learn nothing
            reward = np.indices(reward.shape)[1] % 2.0
        advantage = advantages(reward)
        live = advantage.any(axis=1)
        facts = {
            "reward": float(reward.mean()),
            "right": float(answers.correct.mean()),
            "length": float(answers.sampled.sum(axis=2).mean()),
            "endless": float(1 - answers.stopped.mean()),
            "live": int(live.sum()),
            "rollout_seconds": time.perf_counter() - begin,
        }
        arrays = self._batch(answers, advantage) if live.any() else None
        return StepBatch(arrays, int(answers.sampled.sum()), int((answers.length[live] - 1).sum()), facts)

    def scores(self, state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        """Yield pass@k on the exam's questions, with the same seeds every time, and the KL from the first weights."""
        rl, seed = self.config.rl, self.config.seed
        self.load(state.params)
        seeds = [[sample_seed(seed, "exam", q, s) for s in range(rl.eval_samples)] for q in range(len(self.exam))]
        answers = self.sample(self.exam, seeds)
        yield from ((name, scores["metric"]) for name, scores in passes(answers.correct).items())
        count = max(1, rl.prompts * rl.samples // rl.eval_samples)
        yield "kl", self._kl(state.params, Answers(**{k: array[:count] for k, array in vars(answers).items()}), step)
        if distributed.index() == 0:
            lines = [f"# Rollouts after {step} steps", "", "Tool calls in brackets.", ""]
            for p, texts in list(self._texts.items())[:SHOWN]:
                lines += [f"> {code(self.exam[p].prompt[-1]['content'])}", ""]
                for text, correct in zip(texts, answers.correct[p], strict=False):
                    verdict = "right" if correct else f"wrong, {self.exam[p].expected}"
                    lines.append(f"- **{verdict}**: {code(text) or '(nothing)'}")
                lines.append("")
            atomic_write(self.run.stage("rl") / "rollouts.md", "\n".join(lines))

    def _batch(self, answers: Answers, advantage: np.ndarray) -> Batch:
        """Return rows of the live groups on the mesh, in one of two lengths: every length is compiled."""
        rows = max(advantage.size, self.config.rl.prompts * self.config.rl.samples)
        needed = int(answers.length[advantage.any(axis=1)].max()) - 1
        shorter = 1 << ((self.capacity - 1).bit_length() - 1)  # the largest power of two below the capacity
        length = shorter if max(needed, SHORTEST) <= shorter else self.capacity
        return self.placed(build(answers, advantage, self.micro_batches(rows), length))

    def _kl(self, params: Any, answers: Answers, step: int) -> float:
        if step == 0:
            return 0.0
        batch = self._batch(answers, np.ones(answers.length.shape, np.float32))
        now, start = self.nll(params, batch), self.nll(self.first_params(params), batch)
        counts = distributed.gathered(batch["counts"]).reshape(now.shape)
        return kl_per_token(now, start, counts)


# DPO


@dataclass
class Preferences(Learner):
    """Weights the answers of pairs, as batches for the training loop and as scores.

    A forward pass finds the margins of a step's pairs. A row holds one answer, since attention does not stop between
    row mates.
    """

    config: Config
    run: RunDir
    mesh: Mesh
    pairs: Sequence[Pair]  # first those to train on, then those held out
    train: int  # how many are to train on
    samples: int = 2  # answers to a question
    reference: np.ndarray | None = field(default=None, init=False)  # (pairs, 2) log p0, float64

    def __post_init__(self) -> None:
        longest = max(len(ids) for pair in self.pairs for ids, _ in pair) - 1
        longer = min(_rounded(longest), self.config.model.seq_len)
        self.lengths = sorted({max(1, longer // 2), longer})  # each is compiled

    def rows(self, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the answers of `rl.prompts` pairs at most, (A, B, T), chosen and rejected in turn, padded."""
        sides = [side for number in chosen for side in self.pairs[number]]
        needed = max(len(ids) for ids, _ in sides) - 1
        length = next(n for n in self.lengths if n >= needed)
        shape = self.micro_batches(2 * self.config.rl.prompts)
        ids, mask = (np.zeros((shape[0] * shape[1], length + 1), dtype) for dtype in (np.int32, np.float32))
        for i, (tokens, targets) in enumerate(sides):
            ids[i, : len(tokens)], mask[i, : len(targets)] = tokens, targets
        arrays = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": mask[:, 1:]}
        return {name: array.reshape(*shape, length) for name, array in arrays.items()}

    def log_likelihoods(self, params: Any, batch: dict[str, np.ndarray], count: int) -> np.ndarray:
        """Return log p of the answers of `count` pairs, (count, 2) float64."""
        nll = self.nll(params, self.placed(batch))
        total = -(nll * batch["weights"]).reshape(-1, nll.shape[-1]).sum(axis=1, dtype=np.float64)
        return total[: 2 * count].reshape(count, 2)

    def all_log_likelihoods(self, params: Any, numbers: range, title: str) -> np.ndarray:
        parts, size = [np.zeros((0, 2))], self.config.rl.prompts
        with progress(title, len(numbers)) as bar:
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                parts.append(self.log_likelihoods(params, self.rows(part), len(part)))
                bar.advance(len(part))
        return np.concatenate(parts)

    def margins(self, params: Any, now: np.ndarray, numbers: Any) -> np.ndarray:
        """Return the margins of pairs from their log p; the first call finds log p0 of all, or what was kept of it."""
        if self.reference is None:
            digest = hashlib.sha256(repr(self.pairs).encode()).hexdigest()[:12]
            path = self.run.stage("rl") / f"reference_{digest}.json"
            kept = distributed.on_first(lambda: read_json(path) if path.is_file() else None)
            if kept is None:
                start = self.first_params(params)
                kept = self.all_log_likelihoods(start, range(len(self.pairs)), "dpo: log-likelihoods after SFT")
                if distributed.index() == 0:
                    atomic_write(path, json.dumps(kept.tolist()))
            self.reference = np.array(kept)
        gained = now - self.reference[numbers]
        return self.config.rl.beta * (gained[:, 0] - gained[:, 1])

    def next_batch(self, state: TrainState, step: int) -> StepBatch:
        """Return the pairs of one step, weighted so that the update's gradient is DPO's."""
        size, begin = self.config.rl.prompts, time.perf_counter()
        chosen = self.chosen(step, self.train)
        batch = self.rows(chosen)
        margin = self.margins(state.params, self.log_likelihoods(state.params, batch, size), chosen)
        weight = self.config.rl.beta / (1 + np.exp(np.clip(margin, -50, 50)))
        by_row = np.zeros(batch["weights"].shape[0] * batch["weights"].shape[1], np.float32)
        by_row[: 2 * size] = np.stack([weight, -weight], axis=1).ravel()
        counts = np.zeros_like(batch["weights"])  # they add up to the number of pairs
        counts.reshape(-1, counts.shape[-1])[: 2 * size, 0] = 0.5
        answers = int(batch["weights"].sum())
        facts = {
            "loss": float(np.logaddexp(0, -margin).mean()),
            "reward": float(margin.mean()),
            "right": float((margin > 0).mean()),
            "length": answers / (2 * size),
            "rollout_seconds": time.perf_counter() - begin,
        }
        batch |= {"weights": batch["weights"] * by_row.reshape(*counts.shape[:2], 1), "counts": counts}
        trained = sum(len(ids) - 1 for number in chosen for ids, _ in self.pairs[number])
        return StepBatch(self.placed(batch), answers, trained, facts)

    def scores(self, state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        """Yield the share of held-out pairs with a positive margin (half of those with none), and the mean margin."""
        numbers = range(self.train, len(self.pairs))
        margin = self.margins(state.params, self.all_log_likelihoods(state.params, numbers, "dpo: held-out"), numbers)
        yield "preferred", float(((np.sign(margin) + 1) / 2).mean())
        yield "margin", float(margin.mean())


# Arithmetic


@functools.lru_cache(2)
def question_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the numbers of all questions in the order of one epoch; every epoch has another."""
    order = list(range(count))
    random.Random(f"rl order {seed} {epoch}").shuffle(order)
    return order


def sample_seed(seed: int, *place: object) -> int:
    """Return the seed of one answer, 32 bits."""
    text = " ".join(map(str, ("rl", seed, *place)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def advantages(reward: np.ndarray) -> np.ndarray:
    """Return (P, S) float32 of rewards (P, S): reward minus the group's mean, exactly 0 where all rewards are equal."""
    live = reward.max(axis=1, keepdims=True) > reward.min(axis=1, keepdims=True)
    return np.where(live, reward - reward.mean(axis=1, keepdims=True), 0.0).astype(np.float32)


def micro_batches(rows: int, devices: int, device_rows: int) -> tuple[int, int]:
    """Return (A, B): micro-batches that hold `rows` rows with at most `device_rows` on a device at once."""
    per_device = -(-rows // devices)
    grad_accum = -(-per_device // device_rows)
    return grad_accum, -(-per_device // grad_accum) * devices


def build(answers: Answers, advantage: np.ndarray, shape: tuple[int, int], length: int) -> dict[str, np.ndarray]:
    """Return rows of the live groups (not all advantages 0), padded to `shape` rows of `length` positions.

    The shape is the same for any number of live groups, and micro-batches of padding alone are skipped. Returns inputs,
    targets (A, B, T) int32; weights float32, the advantage where a target was sampled, else 0; counts float32, 1 where
    a target of a live group was sampled: their sum is what the loss is divided by.
    """
    live = advantage.any(axis=1)
    tokens, sampled = (a[live].reshape(-1, a.shape[-1])[:, : length + 1] for a in (answers.tokens, answers.sampled))
    padding = (0, shape[0] * shape[1] - len(tokens)), (0, max(length + 1 - tokens.shape[1], 0))
    tokens, sampled = np.pad(tokens, padding), np.pad(sampled, padding)
    by_row, counts = np.pad(advantage[live].ravel(), padding[0]), sampled[:, 1:].astype(np.float32)
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": counts * by_row[:, None], "counts": counts}
    return {name: array.reshape(*shape, length) for name, array in arrays.items()}


def kl_per_token(now: np.ndarray, start: np.ndarray, counts: np.ndarray) -> float:
    """Return the KL divergence of the policy from its start, nats per sampled token, from one sample of each.

    Args: negative log-likelihoods under the present and the first weights, and 1 where a token was sampled, all of one
    shape. The estimator exp(d) - 1 - d, d = log p_start - log p_now, is never negative and unbiased (up to what top-k
    cuts off): http://joschu.net/blog/kl-approx.html.
    """
    d = (now - start).astype(np.float64)
    return float(((np.expm1(d) - d) * counts).sum() / max(counts.sum(), 1.0))
