"""Continuous batching: requests get slots between chunks of decoding and leave them when they are done.

An engine belongs to one thread. That thread either calls `generate`, `chat` and `stream`, which run to their end, or
drives `submit`, `step` and `cancel` itself (a server).
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxchat.chat import continued, render_prompt
from jaxchat.config import ModelConfig
from jaxchat.engine import device
from jaxchat.engine.device import FULL, STOPPED, ChunkOutput, Programs, Starts, power_of_two
from jaxchat.engine.loading import load_run, mesh_for, trained_stages
from jaxchat.engine.request import Event, Handle, QueueFull, Request, Result, Token
from jaxchat.engine.scoring import common_prefix
from jaxchat.engine.turn import Turn
from jaxchat.errors import DataError, UsageError
from jaxchat.kv_cache import Cache, layer_capacity
from jaxchat.run_dir import RunDir
from jaxchat.tokenizer import ASSISTANT_END, BOS, PYTHON_END, USER_START, Tokenizer

LEAST_REUSE = 32  # tokens; a shorter prefix is sooner computed again
COPY_COST = 4  # of copying a prompt's keys and values into a slot, in prompt tokens
MAX_PREFILLS = 4  # chunked prefills at once; each holds the keys and values of a whole slot
WEIGHTS = ("auto", "float32", "bfloat16", "int8")  # `serve.weights`


class WaitingQueue:
    """Requests that wait for a slot. Clients take turns, so many requests of one delay another by one turn each."""

    def __init__(self) -> None:
        self._clients: dict[str, deque[Handle]] = {}  # in the order of their next turns

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __bool__(self) -> bool:
        return bool(self._clients)

    def __contains__(self, handle: Handle) -> bool:
        return handle in self._clients.get(handle.request.client, ())

    def check_room(self, client: str, count: int, limit: int, free: int) -> None:
        """Raise `QueueFull` where `count` more requests exceed `limit` waiting ones beside those for `free` slots.

        A client with nothing in the queue may still come where others have filled it.
        """
        others = 0 if client in self._clients else min(len(self), limit)
        if len(self) - others + count > limit + free:
            raise QueueFull(f"{len(self)} requests wait already, and no more than {limit} may; try again later")

    def add(self, handle: Handle) -> None:
        self._clients.setdefault(handle.request.client, deque()).append(handle)

    def pop(self) -> Handle:
        """Remove the request whose turn it is; its client goes to the end."""
        client, own = next(iter(self._clients.items()))
        handle = own.popleft()
        del self._clients[client]
        if own:
            self._clients[client] = own
        return handle

    def remove(self, handle: Handle) -> None:
        own = self._clients[handle.request.client]
        own.remove(handle)
        if not own:
            del self._clients[handle.request.client]


@dataclass(frozen=True)
class CachedPrefix:
    """The keys and values of `tokens` in an idle slot, which may have decoded positions up to `reach`."""

    tokens: list[int]
    reach: int

    def usable(self, prompt: list[int], ring: int) -> int:
        """Return how many first tokens of a prompt need no prefill; the last one always runs.

        `ring`: positions of the smallest windowed layer's cache. A ring that came round has lost its oldest positions,
        so all that it has seen must belong to the prompt, but for the one position behind the window.
        """
        n = common_prefix([self.tokens, prompt[:-1]])
        if n < LEAST_REUSE or 2 * n < len(prompt) or (self.reach > ring and self.reach > n + 1):
            return 0
        return n


@dataclass(eq=False)
class Prompt:
    """A prompt of one or several answers, prefilled once."""

    tokens: list[int]  # without the last one, which the first decoding step runs
    answers: int  # that have no slot yet
    rows: Cache | None = None  # keys and values of the first `done` tokens, until the last answer has a slot
    done: int = 0
    members: list[tuple[Handle, int]] = field(default_factory=list)  # with their devices; they wait for the prefill

    def release(self) -> None:
        """One answer less needs it."""
        self.answers -= 1
        if not self.answers:
            self.rows = None


@dataclass
class Scheduler:
    """Assigns requests to slots and prefills their prompts.

    Short prompts are prefilled in batches, straight into slots. Long ones, those of several answers and those with a
    cached prefix run beside the slots, one chunk between two chunks of decoding, and are then copied into slots.
    """

    programs: Programs
    pause: int  # id at which a row with tools waits for the host
    reuse: bool = True  # of cached prefixes
    rows: dict[int, Handle] = field(default_factory=dict)  # busy slots
    prefix_cache: dict[int, CachedPrefix] = field(default_factory=dict)  # of idle slots, the oldest first
    prefills: deque[Prompt] = field(default_factory=deque)  # under way

    def __post_init__(self) -> None:
        p = self.programs
        self._claimed = [0] * p.devices  # slots for requests whose prefill is not done
        self._ring = min(layer_capacity(p.config, p.capacity))

    @property
    def running(self) -> int:
        return len(self.rows) + sum(self._claimed)

    @property
    def free(self) -> int:
        return self.programs.slots * self.programs.devices - self.running

    def admit(self, waiting: WaitingQueue) -> None:
        """Give slots to waiting requests, while their prompts cost no more than about two prefill chunks."""
        if self.prefills:
            self._run_chunk(self.prefills[0])
        budget, short = self.programs.prompt_chunk, []
        while waiting and self.free and budget > 0 and len(self.prefills) < MAX_PREFILLS:
            handle = waiting.pop()
            handle.started = time.perf_counter()
            prompt: Prompt = handle.prompt
            place = min(range(self.programs.devices), key=self._load)
            self._claimed[place] += 1
            if prompt.members:
                prompt.members.append((handle, place))
            elif prompt.rows is not None:
                self._start(handle, place)
                budget -= COPY_COST
            elif prompt.answers > 1 or not self._is_short(handle.request.tokens):
                budget -= self._begin_prefill(handle, place, budget)
            else:
                short.append((handle, place))
                budget -= self._bucket(len(prompt.tokens))
        self._prefill_short(short)

    def leave(self, handle: Handle, in_flight: int) -> int | None:
        """Free what a request has; return its slot, if it had one. `in_flight`: its steps that nobody has read."""
        prompt: Prompt | None = handle.prompt
        if prompt:  # its prefill is under way
            place = next(place for member, place in prompt.members if member is handle)
            self._claimed[place] -= 1
            prompt.members.remove((handle, place))
            prompt.release()
            if not prompt.members:
                self.prefills.remove(prompt)
                prompt.rows, prompt.done = None, 0
            return None
        slot = self.slot(handle)
        del self.rows[slot]
        stop = [] if handle.stop_id is None else [handle.stop_id]
        reach = min(handle.prompt_tokens - 1 + handle.advanced + in_flight, self.programs.capacity)
        self.prefix_cache[slot] = CachedPrefix([*handle.request.tokens, *handle.turn.tokens, *stop][:-1], reach)
        return slot

    def slot(self, handle: Handle) -> int:
        return next(slot for slot, owner in self.rows.items() if owner is handle)

    def compact(self, least: int) -> int:
        """Move the busy slots of every device to its front; return how many slots a chunk must run there.

        `least`: over all devices.
        """
        per, devices = self.programs.slots, self.programs.devices
        busiest = max(sum(slot // per == d for slot in self.rows) for d in range(devices))
        count = max(power_of_two(busiest), least // devices, self.programs.least_rows)
        for slot in sorted(s for s in self.rows if s % per >= count):
            first = slot - slot % per
            into = next(s for s in range(first, first + count) if s not in self.rows)
            self.programs.swap(slot, into)
            self.rows[into] = self.rows.pop(slot)
            if into in self.prefix_cache:
                self.prefix_cache[slot] = self.prefix_cache.pop(into)
        return count

    def _load(self, place: int) -> int:
        """Slots of a device that are busy or claimed."""
        return self._claimed[place] + sum(slot // self.programs.slots == place for slot in self.rows)

    def _is_short(self, prompt: list[int]) -> bool:
        p = self.programs
        return bool(p.group) and len(prompt) - 1 <= p.prompt_chunk and not self._longest_prefix(prompt)[1]

    def _longest_prefix(self, prompt: list[int]) -> tuple[int, int]:
        """Return (slot, tokens) of the longest cached prefix of a prompt."""
        if not self.reuse:
            return 0, 0
        usable = ((prefix.usable(prompt, self._ring), slot) for slot, prefix in self.prefix_cache.items())
        tokens, slot = max(usable, default=(0, 0))
        return slot, tokens

    def _begin_prefill(self, handle: Handle, place: int, budget: int) -> int:
        """Begin a chunked prefill, and run it at once where it is short; return what that cost."""
        p, prompt = self.programs, handle.prompt
        slot, reused = self._longest_prefix(handle.request.tokens)
        owner = slot // p.slots
        if reused and owner != place and self._load(owner) < p.slots:
            self._claimed[place] -= 1
            self._claimed[owner] += 1
            place = owner
        if owner != place or (prompt.answers > 1 and p.devices > 1):  # answers to one prompt may be on any device
            reused = 0
        whole = np.ones(p.devices, np.int32)
        last = prompt.tokens[reused - 1] if reused else 0
        prompt.rows = p.copy_prefix(np.minimum(p.only(slot), p.slots - 1), reused * whole, last * whole)
        if reused:
            del self.prefix_cache[slot]  # the longer one takes its place
        handle.reused = prompt.done = reused
        prompt.members = [(handle, place)]
        self.prefills.append(prompt)
        left = len(prompt.tokens) - reused
        if left > min(p.prompt_chunk, budget):
            return 0
        self._run_chunk(prompt)
        return self._bucket(left)

    def _run_chunk(self, prompt: Prompt) -> None:
        """Run the next chunk of a prefill; after the last one its answers start."""
        p = self.programs
        chunk = prompt.tokens[prompt.done : prompt.done + p.prompt_chunk]
        if chunk:
            tokens = np.zeros((p.devices, self._bucket(len(chunk))), np.int32)
            tokens[:, : len(chunk)] = chunk
            assert prompt.rows
            prompt.rows = p.prefill_chunk(prompt.rows, tokens, np.full(p.devices, len(chunk), np.int32))
            prompt.done += len(chunk)
        if prompt.done == len(prompt.tokens):
            self.prefills.remove(prompt)
            members, prompt.members = prompt.members, []
            for handle, place in members:
                self._start(handle, place)

    def _start(self, handle: Handle, place: int) -> None:
        """Copy a finished prefill into a slot."""
        slot = self._take_slot(place, handle)
        self.programs.start(handle.prompt.rows, self._starts(self.programs.devices, {place: (slot, handle)}))
        handle.prompt.release()
        handle.prompt = None

    def _prefill_short(self, members: Sequence[tuple[Handle, int]]) -> None:
        """Prefill short prompts in batches, each on its device."""
        p = self.programs
        queues: list[list[Handle]] = [[h for h, place in members if place == d] for d in range(p.devices)]
        while any(queues):
            size = 1 if max(map(len, queues)) == 1 else p.group
            batch, queues = [queue[:size] for queue in queues], [queue[size:] for queue in queues]
            longest = max(len(h.request.tokens) for group in batch for h in group) - 1
            tokens = np.zeros((p.devices * size, self._bucket(longest)), np.int32)
            length, starts = np.ones(p.devices * size, np.int32), {}
            for place, group in enumerate(batch):
                for i, handle in enumerate(group, place * size):
                    ids = handle.request.tokens[: tokens.shape[1]]
                    tokens[i, : len(ids)], length[i] = ids, len(handle.request.tokens)
                    starts[i] = self._take_slot(place, handle), handle
                    handle.prompt = None
            p.admit(tokens, length, self._starts(p.devices * size, starts))

    def _starts(self, size: int, starts: dict[int, tuple[int, Handle]]) -> Starts:
        """Return `size` entries; entry i starts a (slot, request), others nothing."""
        arrays = self.programs.blank_starts(size)
        s = arrays.settings
        for i, (slot, handle) in starts.items():
            r = handle.request
            arrays.slot[i], arrays.token[i] = slot % self.programs.slots, r.tokens[-1]
            arrays.remaining[i] = handle.limit
            if r.repetition_penalty != 1:
                arrays.seen[i, r.tokens] = True
            s.seed[i], s.temperature[i] = handle.seed, r.temperature
            s.top_k[i], s.top_p[i], s.min_p[i] = r.top_k, r.top_p, r.min_p
            s.penalty[i], s.report[i] = r.repetition_penalty, r.logprobs is not None
            s.stop[i, : len(r.stop)] = r.stop
            s.pause[i] = self.pause if r.tools else device.NO_TOKEN
        return arrays

    def _take_slot(self, place: int, handle: Handle) -> int:
        """Return a free slot of a device: one without a cached prefix, or else the one with the oldest."""
        first = place * self.programs.slots
        free = [s for s in range(first, first + self.programs.slots) if s not in self.rows]
        slot = next(s for s in (*(s for s in free if s not in self.prefix_cache), *self.prefix_cache) if s in free)
        self.prefix_cache.pop(slot, None)
        self.rows[slot] = handle
        self._claimed[place] -= 1
        return slot

    def _bucket(self, n: int) -> int:
        return next(b for b in self.programs.prompt_buckets if b >= n)


def update(handle: Handle, tokens: list[int], reports: Sequence[np.ndarray], status: int) -> list[Event]:
    """Add a chunk's tokens to an answer; return the events that they complete.

    `reports`: (logprob, top, top_logprob) of its row where it wants them; `status`: of its slot after the chunk. Tokens
    that the slot made behind a stop text do not count.
    """
    turn, count, events = handle.turn, handle.request.logprobs, []
    handle.advanced += len(tokens)
    handle.first_token = handle.first_token or time.perf_counter()
    for i, token in enumerate(tokens[:-1] if status == STOPPED else tokens):
        handle.made += 1
        events += turn.add(token, None if count is None else device.report(token, count, i, reports))
        if turn.stopped:
            return events
    if status == STOPPED:
        handle.made += 1
        handle.stop_id = tokens[-1]
    if status in (STOPPED, FULL):
        events += turn.flush()
    return events


@dataclass
class Chunk:
    """A dispatched chunk of decoding: its outputs, still being computed, and whose rows they are."""

    made: ChunkOutput
    handles: dict[int, Handle]


class Engine:
    """Generates text with one model.

    Args:
      config: resolved (`scaling.resolve_model`); params: see `load`.
      slots: sequences decoded at once at most, a power of two (on each device, where there are several).
      capacity: tokens of context, `config.seq_len` by default.
      chunk: tokens a row decodes between two looks of the host; new requests start at these points.
      queue_limit: requests that may wait for a slot; None: any number.
      mesh: devices that share the slots, each with whole weights of its own; None: one device.
      weights: "float32", "bfloat16", "int8" or "auto": float32 on a CPU, bfloat16 elsewhere.
      reuse: prompts start from cached prefixes.
      chats: False for a base model, which continues texts.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        slots: int = 8,
        capacity: int | None = None,
        chunk: int = 8,
        queue_limit: int | None = None,
        mesh: Mesh | None = None,
        weights: str = "auto",
        reuse: bool = True,
        chats: bool = True,
    ):
        devices = mesh.size if mesh else 1
        if slots < 1 or slots % devices or (slots // devices) & (slots // devices - 1):
            rule = "a power of two" if devices == 1 else f"a power of two for each of the {devices} devices"
            raise UsageError(f"serve.slots: must be {rule}, not {slots}")
        if tokenizer.vocab_size > config.vocab_size:
            sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
            raise DataError(f"{sizes}: they are not from the same run")
        if weights not in WEIGHTS:
            raise UsageError(f"serve.weights: one of {', '.join(WEIGHTS)}, not {weights!r}")
        self.config, self.tokenizer, self.weights, self.chats = config, tokenizer, weights, chats
        self.ends = tuple(tokenizer.special[name] for name in (ASSISTANT_END, USER_START, BOS))  # of any answer
        self.slots, self.capacity, self.chunk = slots, capacity or config.seq_len, chunk
        default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(weights, default)  # of the cache too
        self._programs = Programs(config, slots, self.capacity, chunk, self.dtype, mesh)
        self._scheduler = Scheduler(self._programs, tokenizer.special[PYTHON_END], reuse)
        self.load(params)
        self.queue_limit, self._waiting = queue_limit, WaitingQueue()
        self._dispatched = deque[Chunk]()
        self.least_rows = 1  # of a chunk: a batch job would rather waste rows than compile for fewer

    @classmethod
    def from_pretrained(cls, run_dir: str | Path, stage: str | None = None, **options: Any) -> Engine:
        """The model of a run directory: the furthest trained stage, or the one named. `DataError` if there is none."""
        stage = stage or trained_stages(RunDir(run_dir))[0]
        config, params, tokenizer, serve = load_run(RunDir(run_dir), stage)
        options = dict[str, Any](slots=serve.slots, weights=serve.weights, chats=stage != "base") | options
        options.setdefault("mesh", mesh_for(options["slots"]))
        return cls(config, params, tokenizer, **options)

    def load(self, params: dict[str, Any]) -> None:
        """Take other weights of the same model, in the training layout or from `kv_cache.serving_params`.

        Nothing compiles again. No answer may be under way.
        """
        self._programs.load(params, self.weights)
        self._scheduler.prefix_cache.clear()

    def chat_request(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Request:
        """Answer a conversation that ends with a user message; `settings` are fields of `Request`."""
        if not self.chats:
            return self.text_request(continued(messages), **settings)
        return Request(render_prompt(self.tokenizer, list(messages)), **{"stop": self.ends} | settings)

    def text_request(self, text: str, **settings: Any) -> Request:
        """Continue a text as a document, to its end (a chat model ends it as an answer)."""
        tokens = [self.tokenizer.bos, *self.tokenizer.encode(text)]
        defaults: dict[str, Any] = {"stop": self.ends, "tools": False}
        return Request(tokens, **defaults | settings)

    def submit(self, request: Request) -> Handle:
        """Queue a request; `UsageError` for one that cannot run, `QueueFull` where too many wait."""
        return self.submit_group(request, [request.seed])[0]

    def submit_group(self, request: Request, seeds: Sequence[int | None]) -> list[Handle]:
        """Queue one answer for each seed; the prompt is prefilled once."""
        if self.queue_limit is not None:
            self._waiting.check_room(request.client, len(seeds), self.queue_limit, self._scheduler.free)
        n = len(request.tokens)
        if not 1 <= n <= self.capacity:
            raise UsageError(f"the prompt has {n} tokens; this model's context holds 1 to {self.capacity}")
        if len(request.stop) > device.MAX_STOP_IDS:
            raise UsageError(f"{len(request.stop)} stop ids; at most {device.MAX_STOP_IDS}")
        if request.logprobs is not None and not 0 <= request.logprobs <= device.TOP:
            raise UsageError(f"logprobs: 0 to {device.TOP}, not {request.logprobs}")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise UsageError(f"max_tokens: must be at least 1, not {request.max_tokens}")
        limit = min(self.capacity + 1 - n, request.max_tokens or self.capacity)
        prompt, handles = Prompt(request.tokens[:-1], len(seeds)), []
        for seed in seeds:
            number = secrets.randbits(32) if seed is None else seed % 2**32
            turn = Turn(self.tokenizer, request.stop_texts)
            handles.append(Handle(dataclasses.replace(request, seed=seed), number, limit, turn, prompt))
            self._waiting.add(handles[-1])
        return handles

    def cancel(self, handle: Handle) -> None:
        """Cancel a request; its slot is free at once. Without effect on a finished one."""
        if handle.done:
            return
        if handle in self._waiting:
            self._waiting.remove(handle)
            handle.prompt.release()
        else:
            slot = self._scheduler.leave(handle, self._in_flight(handle))
            if slot is not None:
                self._programs.release(slot)
        handle.finish("cancelled")

    def score(self, batch: Sequence[Sequence[int]]) -> list[list[Token | None]]:
        """Log-likelihood of each token of given sequences, with the likeliest tokens; None for the first token.

        `UsageError` for a sequence longer than the context.
        """
        longest = max(map(len, batch), default=0)
        if longest > self.capacity:
            raise UsageError(f"a text has {longest} tokens; this model's context holds {self.capacity}")
        return self._programs.score(batch)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def cache_usage(self) -> float:
        """Share of all slots' cache positions that running answers use, 0 to 1."""
        handles = list(self._scheduler.rows.values())  # a copy: other threads ask too
        used = sum(handle.prompt_tokens + handle.made for handle in handles)
        return min(1.0, used / (self.slots * self.capacity))

    def step(self) -> list[tuple[Handle, Event]]:
        """Start waiting requests, decode a chunk, and return the events of the one before; [] when idle."""
        self._scheduler.admit(self._waiting)
        unfinished = any(self._in_flight(h) + h.made < h.limit for h in self._scheduler.rows.values())
        if unfinished:
            self._dispatched.append(self._dispatch())
        if self._dispatched and (len(self._dispatched) > 1 or not unfinished):  # one runs while its forerunner is read
            return self._read(self._dispatched.popleft())
        return []

    def generate(self, requests: Sequence[Request], on_done: Callable[[Handle], None] | None = None) -> list[Result]:
        """Answer all requests, slots kept full; results in the order of the requests."""
        return self.finish([self.submit(request) for request in requests], on_done)

    def finish(
        self, handles: Sequence[Handle], on_done: Callable[[Handle], None] | None = None, shrink: int = 1
    ) -> list[Result]:
        """Run until these are done; return their results in order.

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
        """Yield the events of one answer, "done" last. Closing the iterator frees the slot."""
        handle = self.submit(request)
        try:
            while not handle.done:
                yield from (event for owner, event in self.step() if owner is handle)
        finally:
            self.cancel(handle)

    def chat(self, messages: Sequence[dict[str, Any]], **settings: Any) -> str:
        """Return the answer to a conversation; `settings` are fields of `Request` (default: temperature 0)."""
        return self.generate([self.chat_request(messages, **settings)])[0].text

    def stream(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece."""
        for event in self.events(self.chat_request(messages, **settings)):
            if event.kind == "text":
                yield event.text

    def warm_up(self, progress: Callable[[int, int], None] | None = None, background: bool = False) -> None:
        """Compile everything that any request can need.

        `progress` gets (programs ready, programs in all). With `background` this returns as soon as a short request can
        be answered; the other programs compile in threads, and `compiling` says how many are left.
        """
        assert not self.running and not self._dispatched
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

    def _dispatch(self) -> Chunk:
        """Start to decode a chunk of the busy slots."""
        rows, per = self._scheduler.compact(self.least_rows), self._programs.slots
        busy = self._scheduler.rows
        longest = max(h.prompt_tokens - 1 + h.advanced + self._in_flight(h) + self.chunk for h in busy.values())
        bucket = next((b for b in self._programs.cache_buckets if b >= longest), self.capacity)
        handles = {slot // per * rows + slot % per: handle for slot, handle in busy.items()}
        return Chunk(self._programs.decode(rows, bucket), handles)

    def _in_flight(self, handle: Handle) -> int:
        """Steps dispatched for a request whose tokens are not read yet."""
        return sum(self.chunk for chunk in self._dispatched if handle in chunk.handles.values())

    def _read(self, chunk: Chunk) -> list[tuple[Handle, Event]]:
        """Wait for a chunk and update its answers."""
        tokens, statuses = np.asarray(chunk.made.tokens), np.asarray(chunk.made.status)
        reports: list[np.ndarray] = []
        if any(handle.request.logprobs is not None for handle in chunk.handles.values()):
            reports = [np.asarray(a) for a in (chunk.made.logprob, chunk.made.top, chunk.made.top_logprob)]
        events: list[tuple[Handle, Event]] = []
        for row, handle in chunk.handles.items():
            own, status = tokens[row][tokens[row] != device.NO_TOKEN].tolist(), statuses[row]
            if handle.done or not own:  # cancelled; or it waited or ended before this chunk
                continue
            events += [(handle, event) for event in update(handle, own, [a[row] for a in reports], status)]
            if handle.turn.stopped or status in (STOPPED, FULL):
                events.append((handle, self._finish(handle, status)))
            elif status == device.PAUSED:
                self._programs.resume(self._scheduler.slot(handle), handle.turn.tool_output())
        return events

    def _finish(self, handle: Handle, status: int) -> Event:
        """Free the slot of a finished answer; return its last event."""
        ended = status in (STOPPED, FULL)  # else the device goes on behind a stop text
        slot = self._scheduler.leave(handle, 0 if ended else self._in_flight(handle))
        if slot is not None and not ended:
            self._programs.release(slot)
        handle.finish("length" if status == FULL and not handle.turn.stopped else "stop")
        return Event("done", finish_reason=handle.finish_reason, tokens=handle.turn.rest())
