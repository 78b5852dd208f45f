"""Rollouts: groups of sampled answers to a step's questions, graded.

All questions of a step go to the engines at once, one engine on every device; each question is prefilled once for its
group. What is sampled is a function of (seed, step, question, sample) and the weights alone.

Axes: P questions, S samples of each, L tokens of question and answer together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxchat import hosts
from jaxchat.config import Config
from jaxchat.engine import Engine, Handle, Result
from jaxchat.engine.admission import power_of_two
from jaxchat.mesh import replicated
from jaxchat.model.cache import serving_params
from jaxchat.tasks.base import Example, WrittenTask
from jaxchat.text.tokenizer import Tokenizer

LENGTH_MULTIPLE = 64  # tokens that rows and caches are rounded up to


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

    `capacity`: tokens of question and answer together, at most.
    """

    def __init__(self, config: Config, task: WrittenTask, tokenizer: Tokenizer, mesh: Mesh, capacity: int):
        self.config, self.task, self.tokenizer, self.mesh, self.capacity = config, task, tokenizer, mesh, capacity
        self.engines: list[Engine] = []
        self._serve = jax.jit(serving_params, static_argnums=(0, 2), out_shardings=replicated(mesh))

    def load(self, params: Any) -> None:
        """Take the weights of the training state, wherever they lie."""
        devices = [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
        if self.mesh.size == 1:
            copies = [params]
        else:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
            served = self._serve(self.config.model, params, dtype)
            copies = [_on_device(served, device) for device in devices]
        if self.engines:
            for engine, copy in zip(self.engines, copies, strict=True):
                engine.load(copy)
            return
        for device, copy in zip(devices, copies, strict=True):
            with jax.default_device(device):
                engine = Engine(
                    self.config.model, copy, self.tokenizer, slots=self.config.rl.slots, capacity=self.capacity
                )
            self.engines.append(engine)

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
        rl = self.config.rl
        groups: list[tuple[list[int], list[Handle]]] = []
        owned: list[list[Handle]] = [[] for _ in self.engines]
        for i, (example, own) in enumerate(zip(examples, seeds, strict=True)):
            engine = self.engines[i % len(self.engines)]
            request = engine.chat_request(
                example.prompt, max_tokens=rl.max_tokens, temperature=rl.temperature, top_k=rl.top_k
            )
            handles = engine.submit_group(request, own)
            groups.append((request.tokens, handles))
            owned[i % len(self.engines)] += handles
        run_together(self.engines, owned)
        return [(tokens, [handle.result() for handle in handles]) for tokens, handles in groups]


def run_together(engines: Sequence[Engine], owned: Sequence[Sequence[Handle]]) -> None:
    """Drive several engines, each with handles of its own, until all are done.

    The last answers of a step are decoded in fewer rows, down to a quarter: they are few and long.
    """
    for engine, handles in zip(engines, owned, strict=True):
        engine.least_rows = min(power_of_two(len(handles)), engine.slots)
    while busy := [engine for engine in engines if engine.running or engine.waiting]:
        for engine in busy:
            if not engine.waiting:
                engine.least_rows = max(1, min(engine.least_rows, engine.slots // 4))
            engine.step()


def _row(prompt: list[int], result: Result) -> tuple[list[int], list[bool]]:
    """Ids of question and answer with its stop id, and which of them the model drew."""
    stop = [] if result.stop_id is None else [result.stop_id]
    drawn = [False] * len(prompt) + [not forced for forced in result.forced] + [True] * len(stop)
    return [*prompt, *result.tokens, *stop], drawn


def _on_device(tree: Any, device: jax.Device) -> Any:
    """The device's own copy of replicated arrays."""
    return jax.tree.map(lambda a: next(s.data for s in a.addressable_shards if s.device == device), tree)
