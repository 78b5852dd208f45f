"""Direct preference optimization (2305.18290): stage `rl` on pairs of a better and a worse answer, from a file.

loss of a pair = -log sigmoid(margin), with the margin
beta * ((log p(chosen) - log p0(chosen)) - (log p(rejected) - log p0(rejected))), p0 the model after SFT.

Its gradient is that of sum(w * nll) over the tokens, where w is beta * sigmoid(-margin) for the chosen answer and its
negative for the rejected one. So the loop's update serves as it is: a forward pass finds the margins of a step's pairs,
and the weights of its batch do the rest. A row holds one answer, since attention does not stop between row mates.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxchat import distributed
from jaxchat.chat import Message, render, render_prompt
from jaxchat.checkpoint import restore_params
from jaxchat.config import Config, replaced
from jaxchat.errors import DataError
from jaxchat.log import progress, say, say_once
from jaxchat.run_dir import RunDir, atomic_write
from jaxchat.sharding import batch_devices, batch_sharding
from jaxchat.tasks.base import TaskFiles
from jaxchat.tasks.from_file import read_pairs
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import TrainState, decided, make_nll_step

from .loop import StepBatch

LENGTH_MULTIPLE = 64  # tokens that the longer of the two lengths of rows is rounded up to


def fitting(config: Config, tokenizer: Tokenizer) -> list[list[Any]]:
    """Return the pairs to train on and those held out as (ids, mask) of both answers, if they fit into the context."""
    kept = []
    for pairs in read_pairs(config.rl.environment, TaskFiles.of(config, download=False)):
        rendered = [tuple(_rendered(tokenizer, side) for side in pair) for pair in pairs]
        kept.append([pair for pair in rendered if max(len(ids) for ids, _ in pair) <= config.model.seq_len + 1])
        if len(kept[-1]) < len(pairs):
            say_once(f"  {len(pairs) - len(kept[-1]):,} pairs are longer than the context and left out", "yellow")
        if not kept[-1]:
            raise DataError(f"{config.rl.environment}: no pair fits into the context of {config.model.seq_len} tokens")
    return kept


def prepare(
    config: Config, run: RunDir, tokenizer: Tokenizer, mesh: Mesh, order: Any, settings: Any
) -> tuple[Config, Learner, dict[str, Any]]:
    """Return the loop's configuration, what gives it batches, and facts: environment, pairs (`questions`), steps.

    order: (count, seed, epoch) -> the order of an epoch. settings: (config, count, devices) -> the loop's.
    """
    train, held_out = fitting(config, tokenizer)
    config = settings(config, len(train), batch_devices(mesh))
    learner = Learner(config, run, mesh, [*train, *held_out[: config.rl.eval_prompts]], len(train), order)
    say(f"  dpo: {len(train):,} pairs, {config.train.steps:,} steps of {config.rl.prompts}")
    return config, learner, {"environment": config.rl.environment, "questions": len(train), "steps": config.train.steps}


def _rendered(tokenizer: Tokenizer, turns: list[Message]) -> tuple[list[int], list[int]]:
    """Return ids and mask of a conversation; only the last answer is a target."""
    (ids, mask), start = render(tokenizer, turns), len(render_prompt(tokenizer, turns[:-1]))
    return ids, [0] * start + mask[start:]


@dataclass
class Learner:
    """Makes the batches and scores of DPO. What it returns depends on the weights, the seed and the step alone."""

    config: Config
    run: RunDir
    mesh: Mesh
    pairs: Sequence[Any]  # ((ids, mask) chosen, (ids, mask) rejected); first those to train on, then those held out
    train: int  # how many are to train on
    order: Any
    reference: np.ndarray | None = field(default=None, init=False)  # (pairs, 2) log p0, float64

    def __post_init__(self) -> None:
        longest = max(len(ids) for pair in self.pairs for ids, _ in pair) - 1
        longer = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.config.model.seq_len)
        self.lengths = sorted({max(1, longer // 2), longer})  # each is compiled
        self._nll = {
            n: make_nll_step(decided(replaced(self.config, "model", seq_len=n), self.mesh), self.mesh)
            for n in self.lengths
        }

    def rows(self, chosen: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the answers of `rl.prompts` pairs at most, (A, B, T), chosen and rejected in turn, padded."""
        sides = [side for number in chosen for side in self.pairs[number]]
        needed = max(len(ids) for ids, _ in sides) - 1
        length = next(n for n in self.lengths if n >= needed)
        rows, devices = 2 * self.config.rl.prompts, batch_devices(self.mesh)
        accumulate = -(-rows // (devices * self.config.train.device_batch_rows))
        shape = accumulate, -(-rows // (accumulate * devices)) * devices
        ids, mask = (np.zeros((shape[0] * shape[1], length + 1), dtype) for dtype in (np.int32, np.float32))
        for i, (tokens, targets) in enumerate(sides):
            ids[i, : len(tokens)], mask[i, : len(targets)] = tokens, targets
        arrays = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": mask[:, 1:]}
        return {name: array.reshape(*shape, length) for name, array in arrays.items()}

    def placed(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        shape, sharding = batch["inputs"].shape, batch_sharding(self.mesh)
        return jax.make_array_from_process_local_data(sharding, batch, shape)  # type: ignore[return-value]

    def log_likelihoods(self, params: Any, batch: dict[str, np.ndarray], count: int) -> np.ndarray:
        """Return log p of the answers of `count` pairs, (count, 2) float64."""
        nll = np.asarray(self._nll[batch["inputs"].shape[-1]](params, self.placed(batch)))
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
            kept = distributed.on_first(lambda: json.loads(path.read_text()) if path.is_file() else None)
            if kept is None:
                start, _ = restore_params(self.run.stage("sft"))
                start = jax.device_put(start, jax.tree.map(lambda array: array.sharding, params))
                kept = self.all_log_likelihoods(start, range(len(self.pairs)), "dpo: log-likelihoods after SFT")
                if distributed.index() == 0:
                    atomic_write(path, json.dumps(kept.tolist()))
            self.reference = np.array(kept)
        gained = now - self.reference[numbers]
        return self.config.rl.beta * (gained[:, 0] - gained[:, 1])

    def next_batch(self, state: TrainState, step: int) -> StepBatch:
        """Return the pairs of one step, weighted so that the update's gradient is DPO's."""
        size, seed = self.config.rl.prompts, self.config.seed
        begin = time.perf_counter()
        places = (divmod(step * size + i, self.train) for i in range(size))
        chosen = [self.order(self.train, seed, epoch)[i] for epoch, i in places]
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
