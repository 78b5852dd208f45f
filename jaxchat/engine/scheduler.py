"""Continuous batching: requests enter free slots between chunks of decoding and leave when they are done.

An engine belongs to one thread. That thread either calls `generate`, `chat` and `stream`, which run to their end, or
drives `submit`, `step` and `cancel` itself (a server).
"""

from __future__ import annotations

import collections
import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxchat.config import ModelConfig
from jaxchat.engine import slots as device
from jaxchat.engine.admission import Admission, SharedPrompt
from jaxchat.engine.decode import TOP, Made
from jaxchat.engine.likelihood import score
from jaxchat.engine.loading import load_run, mesh_for, trained_stages
from jaxchat.engine.outcome import take_in
from jaxchat.engine.programs import Programs, power_of_two
from jaxchat.engine.request import Event, Handle, Request, Result, Token
from jaxchat.engine.turn import Turn
from jaxchat.engine.waiting import Waiting
from jaxchat.errors import DataError, UsageError
from jaxchat.paths import RunDir
from jaxchat.text.chat import continued, render_prompt
from jaxchat.text.tokenizer import ASSISTANT_END, BOS, PYTHON_END, USER_START, Tokenizer

WEIGHTS = {"auto": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": None}  # `serve.weights`


@dataclass
class _Chunk:
    """A dispatched chunk: its outputs (still being computed) and whose rows of them they are."""

    made: Made
    handles: dict[int, Handle]


class Engine:
    """Generates with one model.

    Args:
      config: resolved (`recipes.resolve_model`); params: see `load`.
      slots: sequences decoded at once at most, a power of two (on each device, where there are several).
      capacity: tokens of context, `config.seq_len` by default.
      chunk: tokens a row makes between two looks of the host; new requests enter at these points.
      dtype: of weights and cache; float32 on a CPU and bfloat16 elsewhere by default.
      lookahead: read a chunk while the next one runs.
      queue_limit: requests that may wait for a slot; None: any number.
      mesh: devices that share the slots, each with whole weights of its own; None: one device.
      weights: "auto" (as `dtype`), "float32", "bfloat16" or "int8", see `cache.serving_params`.
      reuse: a prompt that begins with what an idle slot holds goes on from there.
      chats: False of a base model, which does not answer but continues what was said.
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
        lookahead: bool = True,
        queue_limit: int | None = None,
        mesh: Mesh | None = None,
        weights: str = "auto",
        reuse: bool = True,
        chats: bool = True,
    ):
        on_cpu = jax.default_backend() == "cpu"
        devices = mesh.size if mesh else 1
        if slots < 1 or slots % devices or (slots // devices) & (slots // devices - 1):
            rule = "a power of two" if devices == 1 else f"a power of two for each of the {devices} devices"
            raise UsageError(f"serve.slots: must be {rule}, not {slots}")
        if tokenizer.vocab_size > config.vocab_size:
            sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
            raise DataError(f"{sizes}: they are not from the same run")
        self.config, self.tokenizer, self.weights, self.chats = config, tokenizer, weights, chats
        self.ends = tuple(tokenizer.special[name] for name in (ASSISTANT_END, USER_START, BOS))  # of any answer
        self.slots, self.capacity, self.chunk = slots, capacity or config.seq_len, chunk
        if weights not in WEIGHTS:
            raise UsageError(f"serve.weights: one of {', '.join(WEIGHTS)}, not {weights!r}")
        self.dtype = WEIGHTS[weights] or dtype or (jnp.float32 if on_cpu else jnp.bfloat16)
        self._programs = Programs(config, slots, self.capacity, chunk, self.dtype, mesh)
        self._admission = Admission(self._programs, tokenizer.special[PYTHON_END], reuse)
        self.load(params)
        self._lookahead = lookahead
        self.queue_limit, self._waiting = queue_limit, Waiting()
        self._flying: collections.deque[_Chunk] = collections.deque()
        self.least_rows = 1  # of a chunk: a batch job would rather waste rows than compile for fewer

    @classmethod
    def from_pretrained(cls, run_dir: str | Path, stage: str | None = None, **options: Any) -> Engine:
        """The model of a run directory: the furthest trained stage, or the one named. `DataError` if there is none."""
        stage = stage or trained_stages(RunDir(run_dir))[0]
        config, params, tokenizer, serve = load_run(RunDir(run_dir), stage)
        given: dict[str, Any] = {"slots": serve.slots, "weights": serve.weights, "chats": stage != "base"} | options
        given.setdefault("mesh", mesh_for(given["slots"]))
        return cls(config, params, tokenizer, **given)

    def load(self, params: dict[str, Any]) -> None:
        """Take other weights of the same model: a nested dict of arrays in the training layout, or what
        `cache.serving_params` made of one. Nothing compiles again. No answer may be under way."""
        self._programs.load(params, self.weights)
        self._admission.held.clear()  # what other weights made

    def chat_request(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Request:
        """Answer a conversation that ends with a user message; `settings` are fields of `Request`."""
        if not self.chats:
            return self.text_request(continued(messages), **settings)
        given: dict[str, Any] = {"stop": self.ends} | settings
        return Request(render_prompt(self.tokenizer, list(messages)), **given)

    def text_request(self, text: str, **settings: Any) -> Request:
        """Continue a text as a document, to its end (a chat model ends it as an answer)."""
        tokens = [self.tokenizer.bos, *self.tokenizer.encode(text)]
        given: dict[str, Any] = {"stop": self.ends, "tools": False} | settings
        return Request(tokens, **given)

    def submit(self, request: Request) -> Handle:
        """Queue a request; `UsageError` for one that cannot run, `QueueFull` where too many wait."""
        self._check_queue(1, request.client)
        return self._queue(request)

    def _queue(self, request: Request) -> Handle:
        n = len(request.tokens)
        if not 1 <= n <= self.capacity:
            raise UsageError(f"the prompt has {n} tokens; this model's context holds 1 to {self.capacity}")
        if len(request.stop) > device.MAX_STOP_IDS:
            raise UsageError(f"{len(request.stop)} stop ids; at most {device.MAX_STOP_IDS}")
        if request.logprobs is not None and not 0 <= request.logprobs <= TOP:
            raise UsageError(f"logprobs: 0 to {TOP}, not {request.logprobs}")
        room = self.capacity + 1 - n
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        if limit < 1:
            raise UsageError(f"max_tokens: must be at least 1, not {request.max_tokens}")
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        handle = Handle(request, seed, limit, Turn(self.tokenizer, request.stop_texts))
        self._waiting.add(handle)
        return handle

    def submit_group(self, request: Request, seeds: Sequence[int | None]) -> list[Handle]:
        """Queue as many answers to one prompt as there are seeds; the prompt is prefilled once."""
        self._check_queue(len(seeds), request.client)
        handles = [self._queue(dataclasses.replace(request, seed=seed)) for seed in seeds]
        shared = SharedPrompt(len(handles))
        for handle in handles:
            handle.prompt = shared
        return handles

    def cancel(self, handle: Handle) -> None:
        """Give up a request; its slot is free at once. Without effect on a finished one."""
        if handle.done:
            return
        if handle in self._waiting:
            self._waiting.remove(handle)
            if handle.prompt:
                handle.prompt.abandon()
        else:
            slot = self._admission.leave(handle, self._in_flight(handle))
            if slot is not None:
                self._programs.release(slot)
        handle.finish("cancelled")

    def score(self, batch: Sequence[Sequence[int]]) -> list[list[Token | None]]:
        """How likely the model finds each token of given sequences after those before it, with the likeliest ones
        there; None for the first token, which nothing stands before. `UsageError` for one that is too long."""
        longest = max(map(len, batch), default=0)
        if longest > self.capacity:
            raise UsageError(f"a text has {longest} tokens; this model's context holds {self.capacity}")
        return score(self._programs.score, batch, self.capacity)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_usage(self) -> float:
        """Share of all slots' cache positions that running answers use, 0 to 1."""
        used = sum(handle.prompt_tokens + handle.made for handle in self._admission.rows.values())
        return min(1.0, used / (self.slots * self.capacity))

    @property
    def running(self) -> int:
        return self._admission.running

    # Driving

    def step(self) -> list[tuple[Handle, Event]]:
        """Start what waits, decode one chunk, and return what it brought; [] when there is nothing to do."""
        self._admission.admit(self._waiting)
        unfinished = any(self._in_flight(h) + h.made < h.limit for h in self._admission.rows.values())
        if unfinished:
            self._flying.append(self._dispatch())
        if self._flying and (len(self._flying) > self._lookahead or not unfinished):
            return self._read(self._flying.popleft())
        return []

    def generate(self, requests: Sequence[Request], on_done: Callable[[Handle], None] | None = None) -> list[Result]:
        """Answer all requests, slots kept full; results in the order of the requests."""
        return self.finish([self.submit(request) for request in requests], on_done)

    def finish(
        self, handles: Sequence[Handle], on_done: Callable[[Handle], None] | None = None, shrink: int = 1
    ) -> list[Result]:
        """Go on until these are done; their results, in order.

        Once nothing waits, a chunk may have fewer rows, down to one `shrink`-th of the slots: more programs compile,
        which pays where the same is done many times.
        """
        self.least_rows = min(power_of_two(len(handles)), self.slots)
        while not all(handle.done for handle in handles):
            if shrink > 1 and not self._waiting:
                self.least_rows = max(1, min(self.least_rows, self.slots // shrink))
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

    def warm_up(self, progress: Callable[[int, int], None] | None = None, background: bool = False) -> None:
        """Compile everything that any request can need, before the first one comes.

        `progress` hears (programs ready, programs in all). With `background` this returns as soon as a short request
        can be answered, and the other programs compile meanwhile; `compiling` says how many are left.
        """
        assert not self.running and not self._flying
        left = self._programs.warm_up(background)
        total = next(left)
        for missing in left:
            if progress:
                progress(total - missing, total)

    @property
    def compiling(self) -> int:
        """Programs that a background warm-up has not compiled yet."""
        return self._programs.compiling

    def stop_compiling(self) -> None:
        """End a background warm-up after the programs under way."""
        self._programs.stop_compiling()

    # Inside

    def _check_queue(self, more: int, client: str) -> None:
        if self.queue_limit is not None:
            self._waiting.check_room(client, more, self.queue_limit, self._admission.free)

    def _dispatch(self) -> _Chunk:
        rows, per = self._admission.compact(self.least_rows), self._programs.slots
        busy = self._admission.rows
        longest = max(h.prompt_tokens - 1 + h.advanced + self._in_flight(h) + self.chunk for h in busy.values())
        bucket = next((b for b in self._programs.cache_buckets if b >= longest), self.capacity)
        handles = {slot // per * rows + slot % per: handle for slot, handle in busy.items()}
        return _Chunk(self._programs.decode(rows, bucket), handles)

    def _in_flight(self, handle: Handle) -> int:
        """Steps dispatched for a request whose outcome is not known yet."""
        return sum(self.chunk for chunk in self._flying if handle in chunk.handles.values())

    def _read(self, chunk: _Chunk) -> list[tuple[Handle, Event]]:
        """Wait for a chunk and hand out its tokens."""
        tokens, status = np.asarray(chunk.made.tokens), np.asarray(chunk.made.status)
        wanted = any(handle.request.logprobs is not None for handle in chunk.handles.values())
        reports = (
            [np.asarray(a) for a in (chunk.made.logprob, chunk.made.top, chunk.made.top_logprob)] if wanted else []
        )
        events: list[tuple[Handle, Event]] = []
        for row, handle in chunk.handles.items():
            made = tokens[row][tokens[row] != device.NO_TOKEN].tolist()
            if handle.done or not made:  # cancelled; or it already waited or ended before this chunk
                continue
            events += [(handle, event) for event in self._take_in(handle, made, [a[row] for a in reports], status[row])]
        return events

    def _take_in(self, handle: Handle, made: list[int], reports: list[np.ndarray], state: int) -> list[Event]:
        """The events of one row's new tokens; what comes next for it is arranged."""
        events, turn = take_in(handle, made, reports, state), handle.turn
        if turn.stopped or state in (device.STOPPED, device.FULL):
            ended = state in (device.STOPPED, device.FULL)  # then the device has done nothing more
            slot = self._admission.leave(handle, 0 if ended else self._in_flight(handle))
            if slot is not None and not ended:
                self._programs.release(slot)
            handle.finish("length" if state == device.FULL and not turn.stopped else "stop")
            events.append(Event("done", finish_reason=handle.finish_reason, tokens=turn.rest()))
        elif state == device.PAUSED:
            self._programs.resume(self._admission.slot(handle), turn.tool_output())
        return events
