"""Continuous batching: requests enter free slots between chunks of decoding and leave when they are done.

An engine belongs to one thread. That thread either calls `generate`, `chat` and `stream`, which run to their end, or
drives `submit`, `step` and `cancel` itself (a server).
"""

from __future__ import annotations

import collections
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
from jaxchat.engine.device import FULL, STOPPED, TOP, Made, Programs, blank_settings, power_of_two, report, score
from jaxchat.engine.loading import load_run, mesh_for, trained_stages
from jaxchat.engine.request import Event, Handle, QueueFull, Request, Result, Token
from jaxchat.engine.scoring import common_prefix
from jaxchat.engine.turn import Turn
from jaxchat.errors import DataError, UsageError
from jaxchat.kv_cache import Cache, layer_capacity
from jaxchat.run_dir import RunDir
from jaxchat.tokenizer import ASSISTANT_END, BOS, PYTHON_END, USER_START, Tokenizer

# What idle slots still hold, and how much of it a new prompt can go on from.


LEAST_REUSE = 32  # tokens; a shorter prefix is sooner run again


@dataclass(frozen=True)
class Held:
    """An idle slot's cache holds the keys of `tokens`, and has perhaps seen positions up to `reach`."""

    tokens: list[int]
    reach: int

    def usable(self, prompt: list[int], ring: int) -> int:
        """How many first tokens of a prompt need not run again; the last one always does, to say what follows.

        `ring`: positions of the smallest windowed layer's cache. One that came round has lost what it held before, so
        all that it saw must belong to the prompt; the one position behind that the window does not need is harmless.
        """
        n = common_prefix([self.tokens, prompt[:-1]])
        if n < LEAST_REUSE or 2 * n < len(prompt) or (self.reach > ring and self.reach > n + 1):
            return 0
        return n


# Requests that wait for a slot: clients take turns, and each client's own come in order.


class Waiting:
    """A queue in which a client with a thousand requests delays another client's by one turn.

    Whoever had the last turn comes behind all who wait, so nobody waits for ever.
    """

    def __init__(self) -> None:
        self._clients: dict[str, deque[Handle]] = {}  # in the order of their next turns

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __bool__(self) -> bool:
        return bool(self._clients)

    def __contains__(self, handle: Handle) -> bool:
        return handle in self._clients.get(handle.request.client, ())

    def of(self, client: str) -> int:
        """How many of a client's wait."""
        return len(self._clients.get(client, ()))

    def check_room(self, client: str, more: int, most: int, free: int) -> None:
        """`QueueFull` where `more` of a client's requests find no place: `most` may wait beside those that fill `free`
        slots. Who has nothing waiting may still come where others have taken that many places."""
        others = 0 if self.of(client) else min(len(self), most)
        if len(self) - others + more > most + free:
            raise QueueFull(f"{len(self)} requests wait already, and no more than {most} may; come again")

    def add(self, handle: Handle) -> None:
        self._clients.setdefault(handle.request.client, deque()).append(handle)

    def take(self) -> Handle:
        """The request whose turn it is."""
        client, queue = next(iter(self._clients.items()))
        handle = queue.popleft()
        del self._clients[client]
        if queue:
            self._clients[client] = queue  # behind the others
        return handle

    def remove(self, handle: Handle) -> None:
        queue = self._clients[handle.request.client]
        queue.remove(handle)
        if not queue:
            del self._clients[handle.request.client]


# What a chunk of decoding means for one answer.


def take_in(handle: Handle, made: list[int], reports: Sequence[np.ndarray], state: int) -> list[Event]:
    """Give an answer its new tokens and return the pieces that they complete.

    `reports`: (logprob, top, top_logprob) of its row where it wants them; `state`: of its slot after the chunk. Where
    a stop text came first, what the slot made behind it does not count.
    """
    turn, count, events = handle.turn, handle.request.logprobs, []
    handle.advanced += len(made)
    handle.first_token = handle.first_token or time.perf_counter()
    ids = made[:-1] if state == STOPPED else made
    for i, token in enumerate(ids):
        handle.made += 1
        events += turn.add(token, None if count is None else report(token, count, i, reports))
        if turn.stopped:
            return events
    if state == STOPPED:
        handle.made += 1
        handle.stop_id = made[-1]
    if state in (STOPPED, FULL):
        events += turn.flush()
    return events


# Which request runs in which slot, and how prompts get there.
#
# Short prompts are prefilled at once and put into slots. Long ones, those that several answers share, and those that an
# idle slot holds the beginning of run in pieces beside the slots, one piece between two chunks of decoding, and are
# copied into slots when they are done.


START = 4  # what it costs to copy a prompt's keys and values into a slot, in tokens of a prompt
JOBS = 4  # prompts under way at once; each holds the keys and values of a whole slot


@dataclass(eq=False)
class SharedPrompt:
    """A prompt of several answers. Its keys and values wait on the device until the last answer has found a slot."""

    left: int  # answers that have no slot yet
    job: Job | None = None  # while it is prefilled
    rows: Cache | None = None  # then

    def abandon(self) -> None:
        """One answer less will come."""
        self.left -= 1
        if not self.left:
            self.rows = None


@dataclass(eq=False)
class Job:
    """A prompt that is prefilled in pieces, and the answers that wait for it, with their devices."""

    tokens: list[int]  # without the last one
    rows: Cache
    done: int
    members: list[tuple[Handle, int]]
    shared: SharedPrompt | None = None


@dataclass
class Admission:
    """`pause`: the id at which a row with tools waits for the host."""

    programs: Programs
    pause: int
    reuse: bool = True
    rows: dict[int, Handle] = field(default_factory=dict)  # busy slots
    held: dict[int, Held] = field(default_factory=dict)  # of idle slots, the oldest first
    jobs: deque[Job] = field(default_factory=deque)

    def __post_init__(self) -> None:
        p = self.programs
        self._claimed = [0] * p.devices  # slots that requests not started yet will need
        self._ring = min(layer_capacity(p.config, p.capacity))

    @property
    def running(self) -> int:
        return len(self.rows) + sum(self._claimed)

    @property
    def free(self) -> int:
        return self.programs.slots * self.programs.devices - self.running

    def admit(self, waiting: Waiting) -> None:
        """Start what waits and finds a slot, but run no more than about two pieces of prompts."""
        if self.jobs:
            self._piece(self.jobs[0])
        budget, short = self.programs.piece, []
        while waiting and self.free and budget > 0 and len(self.jobs) < JOBS:
            handle = waiting.take()
            handle.started = time.perf_counter()
            shared, prompt = handle.prompt, handle.request.tokens
            place = self._claim()
            if shared and shared.rows is not None:
                self._start_member(handle, place, shared, shared.rows)
                cost = START
            elif shared and shared.job:
                shared.job.members.append((handle, place))
                cost = 0
            elif shared or self._long(prompt):
                cost = self._begin(handle, place, budget)
            else:
                short.append((handle, place))
                cost = self._bucket(len(prompt) - 1)
            budget -= cost
        self._admit_short(short)

    def leave(self, handle: Handle, in_flight: int) -> int | None:
        """Free what a request has; its slot, if it had one. `in_flight`: steps of it that nobody has read."""
        for job in self.jobs:
            for member in job.members:
                if member[0] is handle:
                    job.members.remove(member)
                    self._claimed[member[1]] -= 1
                    if job.shared:
                        job.shared.abandon()
                    if not job.members:
                        self._give_up(job)
                    return None
        slot = self.slot(handle)
        del self.rows[slot]
        turn, prompt = handle.turn, handle.request.tokens
        known = [*prompt, *turn.tokens, *([] if handle.stop_id is None else [handle.stop_id])][:-1]
        reach = min(len(prompt) - 1 + handle.advanced + in_flight, self.programs.capacity)
        self.held[slot] = Held(known, reach)
        return slot

    def slot(self, handle: Handle) -> int:
        return next(slot for slot, owner in self.rows.items() if owner is handle)

    def compact(self, least: int) -> int:
        """Bring the busy slots of every device together at its front; how many slots from there on, at least `least`
        over all devices, a chunk must run."""
        per, devices = self.programs.slots, self.programs.devices
        busiest = max(sum(slot // per == d for slot in self.rows) for d in range(devices))
        count = max(power_of_two(busiest), least // devices, self.programs.least_rows)
        for slot in sorted(s for s in self.rows if s % per >= count):
            first = slot - slot % per
            into = next(s for s in range(first, first + count) if s not in self.rows)
            self.programs.swap(slot, into)
            self.rows[into] = self.rows.pop(slot)
            if into in self.held:
                self.held[slot] = self.held.pop(into)
        return count

    # Inside

    def _claim(self) -> int:
        """A device that has a slot to spare, the emptiest one."""
        per = self.programs.slots
        used = [self._claimed[d] + sum(s // per == d for s in self.rows) for d in range(self.programs.devices)]
        place = used.index(min(used))
        self._claimed[place] += 1
        return place

    def _take_slot(self, place: int, handle: Handle) -> int:
        """A free slot of a device, best one that holds nothing."""
        per = self.programs.slots
        free = [s for s in range(place * per, (place + 1) * per) if s not in self.rows]
        slot = next((s for s in free if s not in self.held), None)
        if slot is None:
            slot = next(s for s in self.held if s in free)
        self.held.pop(slot, None)
        self.rows[slot] = handle
        self._claimed[place] -= 1
        return slot

    def _long(self, prompt: list[int]) -> bool:
        """Whether a prompt of a single answer runs beside the slots."""
        short = self.programs.group and len(prompt) - 1 <= self.programs.piece
        return not short or (self.reuse and self._held(prompt)[1] > 0)

    def _held(self, prompt: list[int]) -> tuple[int, int]:
        """(slot, tokens): the idle slot that holds most of a prompt."""
        found = ((held.usable(prompt, self._ring), slot) for slot, held in self.held.items())
        n, slot = max(found, default=(0, 0))
        return slot, n

    def _begin(self, handle: Handle, place: int, budget: int) -> int:
        """Prefill beside the slots, now where it is short; what that cost."""
        p, tokens = self.programs, handle.request.tokens[:-1]
        slot, n = self._held(handle.request.tokens) if self.reuse else (0, 0)
        owner, room = slot // p.slots, 0
        if n and owner != place:
            room = p.slots - self._claimed[owner] - sum(s // p.slots == owner for s in self.rows)
            if room > 0:
                self._claimed[place] -= 1
                self._claimed[owner] += 1
                place = owner
        if owner != place or (handle.prompt and p.devices > 1):  # answers of a group may be on any device
            n = 0
        last = tokens[n - 1] if n else 0
        whole = np.ones(p.devices, np.int32)
        rows = p.take(np.minimum(p.only(slot), p.slots - 1), n * whole, last * whole)
        if n:
            del self.held[slot]  # the longer one takes its place
        handle.reused = n
        job = Job(tokens, rows, n, [(handle, place)], handle.prompt)
        if handle.prompt:
            handle.prompt.job = job
        self.jobs.append(job)
        left = len(tokens) - n
        if left > min(self.programs.piece, budget):
            return 0
        self._piece(job)
        return self._bucket(left)

    def _piece(self, job: Job) -> None:
        """Run the next piece of a prompt; after the last one its answers start."""
        p = self.programs
        part = job.tokens[job.done : job.done + self.programs.piece]
        if part:
            tokens = np.zeros((p.devices, self._bucket(len(part))), np.int32)
            tokens[:, : len(part)] = part
            job.rows = p.prolong(job.rows, tokens, np.full(p.devices, len(part), np.int32))
            job.done += len(part)
        if job.done < len(job.tokens):
            return
        self.jobs.remove(job)
        if job.shared:
            job.shared.job, job.shared.rows = None, job.rows
        for handle, place in job.members:
            self._start_member(handle, place, job.shared, job.rows)

    def _give_up(self, job: Job) -> None:
        self.jobs.remove(job)
        if job.shared:
            job.shared.job = None

    def _start_member(self, handle: Handle, place: int, shared: SharedPrompt | None, rows: Cache) -> None:
        slot = self._take_slot(place, handle)
        p = self.programs
        target, remaining, settings = self._starts(p.devices)
        self._fill(target, remaining, settings, slot // p.slots, slot, handle)
        p.start(rows, target, remaining, settings)
        self._mark(slot, handle)
        handle.prompt = None
        if shared:
            shared.abandon()

    def _admit_short(self, members: Sequence[tuple[Handle, int]]) -> None:
        """Prefill short prompts, some at once, each on its device."""
        p = self.programs
        queues: list[list[Handle]] = [[h for h, place in members if place == d] for d in range(p.devices)]
        while any(queues):
            size = 1 if max(map(len, queues)) == 1 else p.group
            now, queues = [q[:size] for q in queues], [q[size:] for q in queues]
            longest = max(len(h.request.tokens) for group in now for h in group) - 1
            tokens = np.zeros((p.devices * size, self._bucket(longest)), np.int32)
            length = np.ones(p.devices * size, np.int32)
            target, remaining, settings = self._starts(p.devices * size)
            for place, group in enumerate(now):
                for i, handle in enumerate(group, place * size):
                    slot, ids = self._take_slot(place, handle), handle.request.tokens[: tokens.shape[1]]
                    tokens[i, : len(ids)], length[i] = ids, len(handle.request.tokens)
                    self._fill(target, remaining, settings, i, slot, handle)
            p.admit(tokens, length, target, remaining, settings)
        for handle, _ in members:
            self._mark(self.slot(handle), handle)

    def _bucket(self, n: int) -> int:
        return next(b for b in self.programs.prompt_buckets if b >= n)

    def _mark(self, slot: int, handle: Handle) -> None:
        if handle.request.repetition_penalty != 1:
            seen = np.zeros(self.programs.config.vocab_size, bool)
            seen[handle.request.tokens] = True
            self.programs.mark(slot, seen)

    def _starts(self, size: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """target, remaining and settings, as `slots.admit` takes them, for nobody."""
        return np.full((size, 2), self.programs.slots, np.int32), np.ones(size, np.int32), blank_settings(size)

    def _fill(self, target: Any, remaining: Any, settings: Any, i: int, slot: int, handle: Handle) -> None:
        r = handle.request
        target[i], remaining[i] = (slot % self.programs.slots, r.tokens[-1]), handle.limit
        settings.seed[i], settings.temperature[i] = handle.seed, r.temperature
        settings.top_k[i], settings.top_p[i], settings.min_p[i] = r.top_k, r.top_p, r.min_p
        settings.penalty[i], settings.report[i] = r.repetition_penalty, r.logprobs is not None
        settings.stop[i, : len(r.stop)] = r.stop
        if r.tools:
            settings.pause[i] = self.pause


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
