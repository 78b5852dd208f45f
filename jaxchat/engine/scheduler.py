"""Continuous batching: requests enter free slots between chunks of decoding and leave when they are done.

An engine belongs to one thread. That thread either calls `generate`, `chat` and `stream`, which run to their end, or
drives `submit`, `step` and `cancel` itself (a server).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.engine import decode
from jaxchat.engine.admission import Admission, SharedPrompt, buckets, power_of_two, take
from jaxchat.engine.loading import load_run
from jaxchat.engine.request import Event, Handle, QueueFull, Request, Result, Token
from jaxchat.engine.turn import Turn
from jaxchat.engine.waiting import Waiting
from jaxchat.errors import DataError, UsageError
from jaxchat.model.cache import serving_params
from jaxchat.paths import RunDir
from jaxchat.text.chat import render_prompt
from jaxchat.text.tokenizer import ASSISTANT_END, BOS, PYTHON_END, USER_START, Tokenizer

MIN_CACHE_BUCKET = 512  # positions; cutting out fewer costs more than reading them

_serve = jax.jit(serving_params, static_argnums=(0, 2))


@dataclass
class _Chunk:
    """A dispatched chunk: its outputs (still being computed) and whose rows they are."""

    tokens: jax.Array
    status: jax.Array
    handles: dict[int, Handle]
    steps: int


class Engine:
    """Generates with one model.

    Args:
      config: resolved (`recipes.resolve_model`); params: see `load`.
      slots: sequences decoded at once at most, a power of two.
      capacity: tokens of context, `config.seq_len` by default.
      chunk: tokens a row makes between two looks of the host; new requests enter at these points.
      dtype: of weights and cache; float32 on a CPU and bfloat16 elsewhere by default.
      lookahead: read a chunk while the next one runs; by default where the device is not the CPU itself.
      queue_limit: requests that may wait for a slot; None: any number.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        slots: int = 8,
        capacity: int | None = None,
        chunk: int = 8,
        dtype: Any = None,
        lookahead: bool | None = None,
        queue_limit: int | None = None,
    ):
        on_cpu = jax.default_backend() == "cpu"
        if slots < 1 or slots & (slots - 1):
            raise UsageError(f"serve.slots: must be a power of two, not {slots}")
        if tokenizer.vocab_size > config.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: "
                "they are not from the same run"
            )
        self.config, self.tokenizer = config, tokenizer
        self.slots, self.capacity, self.chunk = slots, capacity or config.seq_len, chunk
        self.dtype = dtype or (jnp.float32 if on_cpu else jnp.bfloat16)
        self.load(params)
        self._state = decode.new_slots(config, slots, self.capacity, self.dtype)
        self._admission = Admission(config, slots, self.capacity, tokenizer.special[PYTHON_END])
        self._lookahead = not on_cpu if lookahead is None else lookahead
        self._rows: dict[int, Handle] = {}  # busy slots
        self.queue_limit = queue_limit
        self._waiting = Waiting()
        self._flying: collections.deque[_Chunk] = collections.deque()
        self.least_rows = 1  # of a chunk: a batch job would rather waste rows than compile for fewer

    @classmethod
    def from_pretrained(cls, run_dir: str | Path, stage: str | None = None, **options: Any) -> Engine:
        """The model of a run directory: the furthest trained stage, or the one named. `DataError` if there is none."""
        config, params, tokenizer, slots = load_run(RunDir(run_dir), stage)
        options = {"slots": slots} | options
        return cls(config, params, tokenizer, **options)

    def load(self, params: dict[str, Any]) -> None:
        """Take other weights of the same model: a nested dict of arrays in the training layout, or what
        `cache.serving_params` made of one. Nothing compiles again. No answer may be under way."""
        ready = "layers" in params
        self._params = params if ready else _serve(self.config, params, self.dtype)

    # Requests

    def chat_request(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Request:
        """Answer a conversation that ends with a user message; `settings` are fields of `Request`."""
        stop = tuple(self.tokenizer.special[name] for name in (ASSISTANT_END, USER_START, BOS))
        given: dict[str, Any] = {"stop": stop} | settings
        return Request(render_prompt(self.tokenizer, list(messages)), **given)

    def text_request(self, text: str, **settings: Any) -> Request:
        """Continue a text as a document of the pretraining corpus, to its end."""
        tokens = [self.tokenizer.bos, *self.tokenizer.encode(text)]
        given: dict[str, Any] = {"stop": (self.tokenizer.bos,), "tools": False} | settings
        return Request(tokens, **given)

    def submit(self, request: Request) -> Handle:
        """Queue a request; `UsageError` for one that cannot run, `QueueFull` where too many wait."""
        if self.queue_limit is not None and len(self._waiting) >= self.queue_limit:
            raise QueueFull(f"{len(self._waiting)} requests wait already, and no more may; try again later")
        n = len(request.tokens)
        if not 1 <= n <= self.capacity:
            raise UsageError(f"the prompt has {n} tokens; this model's context holds 1 to {self.capacity}")
        if len(request.stop) > decode.MAX_STOP_IDS:
            raise UsageError(f"{len(request.stop)} stop ids; at most {decode.MAX_STOP_IDS}")
        limit = self.capacity + 1 - n
        if request.max_tokens is not None:
            limit = min(limit, request.max_tokens)
        if limit < 1:
            raise UsageError(f"max_tokens: must be at least 1, not {request.max_tokens}")
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        handle = Handle(request, seed, limit, Turn(self.tokenizer))
        self._waiting.add(handle)
        return handle

    def submit_group(self, request: Request, seeds: Sequence[int]) -> list[Handle]:
        """Queue as many answers to one prompt as there are seeds; the prompt is prefilled once."""
        handles = [self.submit(dataclasses.replace(request, seed=seed)) for seed in seeds]
        shared = SharedPrompt(request.tokens)
        for handle in handles:
            handle.prompt = shared
        return handles

    def cancel(self, handle: Handle) -> None:
        """Give up a request; its slot is free at once. Without effect on a finished one."""
        if handle.done:
            return
        if handle in self._waiting:
            self._waiting.remove(handle)
        else:
            self._state = decode.release(self._state, np.int32(self._leave(handle)))
        handle.finish("cancelled")

    def score(self, batch: Sequence[Sequence[int]]) -> list[list[Token | None]]:
        """How likely the model finds each token of given sequences, after those before it; None for the first one,
        which nothing stands before."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_usage(self) -> float:
        """Share of all slots' cache positions that running answers use, 0 to 1."""
        used = sum(handle.prompt_tokens + handle.made for handle in self._rows.values())
        return min(1.0, used / (self.slots * self.capacity))

    @property
    def running(self) -> int:
        return len(self._rows)

    # Driving

    def step(self) -> list[tuple[Handle, Event]]:
        """Start what waits, decode one chunk, and return what it brought; [] when there is nothing to do."""
        self._admit()
        unfinished = any(self._in_flight(row, h) + h.made < h.limit for row, h in self._rows.items())
        if unfinished:
            self._flying.append(self._dispatch())
        if self._flying and (len(self._flying) > self._lookahead or not unfinished):
            return self._read(self._flying.popleft())
        return []

    def generate(self, requests: Sequence[Request], on_done: Callable[[Handle], None] | None = None) -> list[Result]:
        """Answer all requests, slots kept full; results in the order of the requests."""
        return self.finish([self.submit(request) for request in requests], on_done)

    def finish(self, handles: Sequence[Handle], on_done: Callable[[Handle], None] | None = None) -> list[Result]:
        """Go on until these are done; their results, in order."""
        self.least_rows = min(power_of_two(len(handles)), self.slots)
        while not all(handle.done for handle in handles):
            for handle, event in self.step():
                if event.kind == "done" and on_done:
                    on_done(handle)
        self.least_rows = 1
        return [handle.result() for handle in handles]

    def events(self, request: Request) -> Iterator[Event]:
        """Pieces of one answer as they are made, "done" last. Closing the iterator frees the slot."""
        handle = self.submit(request)
        try:
            while not handle.done:
                yield from (event for owner, event in self.step() if owner is handle)
        finally:
            self.cancel(handle)

    def chat(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
        """The text of the answer to a conversation; `settings` are fields of `Request` (default: temperature 0)."""
        return self.generate([self.chat_request(messages, **settings)])[0].text

    def stream(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Iterator[str]:
        """The same piece by piece."""
        for event in self.events(self.chat_request(messages, **settings)):
            if event.kind == "text":
                yield event.text

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile everything that any request can need (a server, before it says that it is ready).

        `progress` hears (programs ready, programs in all)."""
        assert not self._rows and not self._flying
        self._state = self._admission.warm_up(self._params, self._state)
        for rows in buckets(1, self.slots):
            for bucket in buckets(MIN_CACHE_BUCKET, self.capacity):
                self._state, *_ = self._decode(rows, bucket)
        zero = np.int32(0)
        self._state = decode.resume(self._state, zero, np.zeros(decode.FORCED, np.int32), zero)
        self._state = decode.move(self._state, zero, zero)
        self._state = decode.release(self._state, zero)
        jax.block_until_ready(self._state)

    # Inside

    def _admit(self) -> None:
        while self._waiting and len(self._rows) < self.slots:
            group = take(self._waiting, self.slots - len(self._rows))
            free = (row for row in range(self.slots) if row not in self._rows)
            rows = list(itertools.islice(free, len(group)))
            self._rows.update(zip(rows, group, strict=True))
            for handle in group:
                handle.started = time.perf_counter()
            self._state = self._admission.start(self._params, self._state, group, rows)

    def _dispatch(self) -> _Chunk:
        rows = max(power_of_two(len(self._rows)), self.least_rows)
        for row in sorted(r for r in self._rows if r >= rows):  # keep the busy rows together
            free = next(r for r in range(rows) if r not in self._rows)
            self._rows[free] = self._rows.pop(row)
            self._state = decode.move(self._state, np.int32(row), np.int32(free))
        longest = max(
            len(h.request.tokens) - 1 + h.made + self._in_flight(row, h) + self.chunk for row, h in self._rows.items()
        )
        sizes = buckets(MIN_CACHE_BUCKET, self.capacity)
        self._state, tokens, status = self._decode(rows, next((b for b in sizes if b >= longest), self.capacity))
        return _Chunk(tokens, status, dict(self._rows), self.chunk)

    def _decode(self, rows: int, bucket: int) -> tuple[decode.Slots, jax.Array, jax.Array]:
        return decode.decode_chunk(self.config, self._params, self._state, rows, bucket, self.chunk, self.capacity)

    def _in_flight(self, row: int, handle: Handle) -> int:
        """Steps dispatched for a request whose outcome is not known yet."""
        return sum(chunk.steps for chunk in self._flying if handle in chunk.handles.values())

    def _read(self, chunk: _Chunk) -> list[tuple[Handle, Event]]:
        """Wait for a chunk and hand out its tokens."""
        tokens, status = np.asarray(chunk.tokens).T, np.asarray(chunk.status)
        events: list[tuple[Handle, Event]] = []
        for row, handle in chunk.handles.items():
            made = tokens[row][tokens[row] != decode.NO_TOKEN].tolist()
            if handle.done or not made:  # cancelled; or it already waited or ended before this chunk
                continue
            handle.made += len(made)
            handle.first_token = handle.first_token or time.perf_counter()
            state = status[row]
            if state == decode.STOPPED:
                handle.stop_id = made.pop()
            for token in made:
                events += [(handle, event) for event in handle.turn.add(token)]
            if state == decode.PAUSED:
                self._resume(handle)
            elif state in (decode.STOPPED, decode.FULL):
                self._leave(handle)
                handle.finish("stop" if state == decode.STOPPED else "length")
                events += [(handle, event) for event in handle.turn.flush()]
                events.append((handle, Event("done", finish_reason=handle.finish_reason)))
        return events

    def _resume(self, handle: Handle) -> None:
        """Answer the tool call at which a row waits."""
        row = next(r for r, h in self._rows.items() if h is handle)
        ids = handle.turn.tool_output()
        forced = np.zeros(decode.FORCED, np.int32)
        forced[: len(ids)] = ids
        self._state = decode.resume(self._state, np.int32(row), forced, np.int32(len(ids)))

    def _leave(self, handle: Handle) -> int:
        row = next(r for r, h in self._rows.items() if h is handle)
        del self._rows[row]
        return row
