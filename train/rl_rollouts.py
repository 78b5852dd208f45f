"""Rollouts: groups of sampled answers to a step's questions, graded.

All questions of a step go to one engine at once, whose slots lie on all devices of the process; each question is
prefilled once for its group. What is sampled is a function of (seed, step, question, sample) and the weights alone.

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
from jax.sharding import Mesh, NamedSharding

from jaxchat import hosts
from jaxchat.config import Config, MeshConfig
from jaxchat.engine import Engine, Handle, Result
from jaxchat.mesh import make_mesh, replicated
from jaxchat.model.cache import serving_params
from jaxchat.tasks.base import Example, WrittenTask
from jaxchat.text.tokenizer import Tokenizer

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
