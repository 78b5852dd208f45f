"""Continuous batching: requests get slots between chunks of decoding and leave them when they are done.

An engine belongs to one thread. That thread either calls `generate`, `chat` and `stream`, which run to their end, or
drives `submit`, `step` and `cancel` itself (a server).
"""

from __future__ import annotations

import bisect
import functools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import keystr, tree_leaves_with_path

from jaxchat.chat import continued, render_prompt
from jaxchat.checkpoint import trained_params
from jaxchat.config import MeshConfig, ModelConfig, ServeConfig, load_config
from jaxchat.engine import device
from jaxchat.engine.device import FULL, IDLE, PAUSED, RUNNING, STOPPED, Programs, power_of_two
from jaxchat.engine.request import EVERY_TOKEN, MAX_STOP_IDS, NO_TOKEN, Event, Handle, QueueFull, Request, Token
from jaxchat.engine.scoring import common_prefix
from jaxchat.errors import DataError, UsageError, command_line
from jaxchat.kv_cache import Cache, layer_capacity
from jaxchat.model import abstract_params
from jaxchat.run_dir import RESTORE, TRAINED, RunDir, saved_steps
from jaxchat.scaling import resolve_model
from jaxchat.sharding import make_mesh
from jaxchat.tokenizer import ASSISTANT_END, BOS, PYTHON_END, USER_START, Tokenizer

if TYPE_CHECKING:
    from jaxchat.engine.constraint import Constraint

WEIGHTS = ("auto", "float32", "bfloat16", "int8")  # `serve.weights`
LEAST_REUSE = 32  # tokens; a shorter prefix is sooner computed again
COPY_COST = 4  # of copying a prompt's keys and values into a slot, in prompt tokens
# go from a request to its row
SETTINGS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"
)  # fmt: skip
MAX_PREFILLS = 4  # chunked prefills at once; each holds the keys and values of a whole slot


def trained_stages(run: RunDir) -> list[str]:
    """Return the stages with a checkpoint, the furthest first; `DataError` where there is none."""
    if not run.config.is_file():
        raise DataError(f"{run.root}: not a run directory (no config.toml); train one first")
    stages = [s for s in reversed(TRAINED) if saved_steps(run.stage(s))]
    if not stages:
        raise DataError(f"{run.root}: no trained stage yet; finish it: {command_line('--run-dir', run.root)}")
    return stages


def load_run(run: RunDir, stage: str | None) -> tuple[ModelConfig, dict[str, Any], Tokenizer, ServeConfig]:
    """Return (resolved config, parameters, tokenizer, `serve.*`) of the stage, by default the furthest trained one."""
    stages = trained_stages(run)
    if stage is not None and stage not in stages:
        raise DataError(f"{run.root}: no stage {stage!r} with a checkpoint; found: {', '.join(stages)}")
    config = load_config(run.config)
    model, params = resolve_model(config.model), trained_params(run, stage or stages[0])
    trees = (abstract_params(model), params)
    expected, stored = ({keystr(path): leaf.shape for path, leaf in tree_leaves_with_path(tree)} for tree in trees)
    for name in sorted(expected.keys() | stored.keys()):
        if expected.get(name) != (shape := stored.get(name)):
            what = f"{name} is {shape} in its checkpoint, and {expected.get(name)} by this file"
            raise DataError(f"{run.config}: describes another model than the one trained: {what}; {RESTORE}")
    return model, params, Tokenizer.load(run.tokenizer), config.serve


@dataclass(eq=False)
class Prompt:
    """A prompt of one or several answers, prefilled once."""

    tokens: list[int]  # without the last one, which the first decoding step runs
    answers: int  # that have not started
    cache: Cache | None = None  # keys and values of the first `done` tokens, until the last answer has started
    done: int = 0

    def release(self) -> None:
        """Count one answer less that needs it."""
        self.answers -= 1
        if not self.answers:
            self.cache = None


class Scheduler:
    """Assigns requests to slots and prefills their prompts.

    Short prompts are prefilled in batches, straight into slots. Long ones, those of several answers and those with a
    cached prefix run beside the slots, one chunk between two chunks of decoding, and are then copied into slots.

    Args:
      pause: id at which a row with tools waits for the host; reuse: prompts start from cached prefixes.
    """

    def __init__(self, programs: Programs, pause: int, reuse: bool = True):
        self.programs, self.pause, self.reuse = programs, pause, reuse
        self.waiting: list[Handle] = []  # in the order of their turns
        self.rows: dict[int, Handle] = {}  # busy slots; `handle.prompt` is None where they decode
        # of idle slots, the oldest first: tokens whose keys and values they hold, and positions that they have decoded
        self.prefix_cache: dict[int, tuple[list[int], int]] = {}
        self.prefills: list[Prompt] = []  # under way
        self._turn = 0  # of the last request that got a slot
        self._ring = min(layer_capacity(programs.config, programs.capacity))  # positions of the smallest cache

    @property
    def free(self) -> int:
        return self.programs.slots * self.programs.devices - len(self.rows)

    @property
    def decoding(self) -> list[Handle]:
        return [handle for handle in self.rows.values() if handle.prompt is None]

    def check_room(self, client: str, count: int, limit: int) -> None:
        """Raise `QueueFull` where `count` more requests exceed `limit` waiting ones beside those for free slots.

        A client with nothing in the queue may still come where others have filled it.
        """
        total = len(self.waiting)
        others = 0 if any(h.request.client == client for h in self.waiting) else min(total, limit)
        if total - others + count > limit + self.free:
            raise QueueFull(f"{total} requests wait already, and no more than {limit} may; try again later")

    def enqueue(self, handle: Handle) -> None:
        """Let a request wait. Clients take turns, so many requests of one delay another by one turn each."""
        client = handle.request.client
        last = next((h.order for h in reversed(self.waiting) if h.request.client == client), 0)
        handle.order = max(self._turn, last) + 1
        bisect.insort(self.waiting, handle, key=lambda h: h.order)

    def admit(self) -> None:
        """Give slots to waiting requests, while their prompts cost no more than about two prefill chunks."""
        p = self.programs
        if self.prefills:
            self._run_chunk(self.prefills[0])
        budget, short = p.prompt_chunk, list[Handle]()
        while self.waiting and self.free and budget > 0 and len(self.prefills) < MAX_PREFILLS:
            handle = self.waiting.pop(0)
            handle.started, self._turn = time.perf_counter(), handle.order
            prompt: Prompt = handle.prompt
            fresh = prompt.cache is None
            # answers to one prompt may be on any device, a cached prefix is on one
            reuse = self.reuse and fresh and (prompt.answers == 1 or p.devices == 1)
            handle.slot, reused = self._choose_slot(handle.request.tokens if reuse else [])
            self.rows[handle.slot] = handle
            self.prefix_cache.pop(handle.slot, None)
            if not fresh:
                if prompt not in self.prefills:  # else it starts when that is done
                    self._start(handle)
                    budget -= COPY_COST
            elif prompt.answers > 1 or reused or not p.group or len(prompt.tokens) > p.prompt_chunk:
                whole, last = np.ones(p.devices, np.int32), prompt.tokens[reused - 1] if reused else 0
                source = np.minimum(p.only(handle.slot), p.slots - 1)
                prompt.cache = p.run(device.copy_prefix, p.state, source, reused * whole, last * whole)
                handle.reused = prompt.done = reused
                self.prefills.append(prompt)
                left = len(prompt.tokens) - reused
                if left <= min(p.prompt_chunk, budget):  # short enough to run at once
                    self._run_chunk(prompt)
                    budget -= self._bucket(left)
            else:
                short.append(handle)
                budget -= self._bucket(len(prompt.tokens))
        self._prefill_short(short)

    def leave(self, handle: Handle, ended: bool = False) -> None:
        """Free what a request has, whether it waits, is being prefilled or decodes.

        `ended`: its slot has stopped decoding, so it has advanced no further than the tokens that were read.
        """
        prompt: Prompt | None = handle.prompt
        if handle.slot < 0 and prompt:
            self.waiting.remove(handle)
            prompt.release()
            return
        del self.rows[handle.slot]
        if prompt:
            prompt.release()
            if not any(h.prompt is prompt for h in self.rows.values()):
                self.prefills.remove(prompt)
                prompt.cache, prompt.done = None, 0
            return
        stop = [] if handle.stop_id is None else [handle.stop_id]
        reach = handle.prompt_tokens - 1 + handle.advanced + (0 if ended else handle.in_flight)
        tokens = [*handle.request.tokens, *handle.tokens, *stop][:-1]
        self.prefix_cache[handle.slot] = tokens, min(reach, self.programs.capacity)
        if not ended:
            self.programs.set_status(handle.slot, IDLE)

    def compact(self, least: int) -> int:
        """Move the decoding slots of every device to its front; return how many slots a chunk must run there.

        `least`: over all devices.
        """
        p, per = self.programs, self.programs.slots
        slots = sorted(handle.slot for handle in self.decoding)
        busiest = max(sum(slot // per == d for slot in slots) for d in range(p.devices))
        count = max(power_of_two(busiest), least // p.devices, p.least_rows)
        for slot in (s for s in slots if s % per >= count):
            first = slot - slot % per
            into = next(s for s in range(first, first + count) if s not in self.rows or self.rows[s].prompt)
            p.update(device.swap, np.stack([p.only(slot), p.only(into)], axis=1))
            moved, other = self.rows.pop(slot), self.rows.pop(into, None)
            self.rows[into], moved.slot = moved, into
            if other:
                self.rows[slot], other.slot = other, slot
            elif into in self.prefix_cache:
                self.prefix_cache[slot] = self.prefix_cache.pop(into)
        return count

    def _choose_slot(self, prompt: list[int]) -> tuple[int, int]:
        """Return a free slot, and how many first tokens of the prompt it holds: the one with most of them cached.

        Without any: on the least busy device a slot without a cached prefix, or else the one with the oldest.
        """
        best, best_slot = 0, 0
        for slot, (tokens, reach) in self.prefix_cache.items() if prompt else ():
            n = common_prefix([tokens, prompt[:-1]])  # the last token always runs
            # A ring that wrapped around has lost its oldest positions. So all that it has seen must belong to the
            # prompt, except the one position outside of the window.
            complete = reach <= self._ring or reach <= n + 1
            if complete and n >= LEAST_REUSE and 2 * n >= len(prompt) and n > best:
                best, best_slot = n, slot
        if best:
            return best_slot, best
        per, devices, ages = self.programs.slots, self.programs.devices, list(self.prefix_cache)
        load = [sum(slot // per == d for slot in self.rows) for d in range(devices)]
        free = (slot for slot in range(per * devices) if slot not in self.rows)
        return min(free, key=lambda s: (load[s // per], ages.index(s) if s in self.prefix_cache else -1)), 0

    def _run_chunk(self, prompt: Prompt) -> None:
        """Run the next chunk of a prefill; after the last one its answers start."""
        p = self.programs
        chunk = prompt.tokens[prompt.done : prompt.done + p.prompt_chunk]
        if chunk:
            tokens = np.zeros((p.devices, self._bucket(len(chunk))), np.int32)
            tokens[:, : len(chunk)] = chunk
            count = np.full(p.devices, len(chunk), np.int32)
            prompt.cache = p.run(device.prefill_chunk, prompt.cache, tokens, count)
            prompt.done += len(chunk)
        if prompt.done == len(prompt.tokens):
            self.prefills.remove(prompt)
            for handle in [h for h in self.rows.values() if h.prompt is prompt]:
                self._start(handle)

    def _start(self, handle: Handle) -> None:
        """Copy a finished prefill into a slot."""
        p, prompt = self.programs, handle.prompt
        rows = self._start_rows(p.devices, {handle.slot // p.slots: handle})
        p.update(device.start, prompt.cache, p.only(handle.slot), rows)
        prompt.release()
        handle.prompt = None

    def _prefill_short(self, handles: Sequence[Handle]) -> None:
        """Prefill short prompts in batches, each on its device."""
        p = self.programs
        queues = [[h for h in handles if h.slot // p.slots == d] for d in range(p.devices)]
        while any(queues):
            size = 1 if max(map(len, queues)) == 1 else p.group
            batch = {d * size + i: h for d, queue in enumerate(queues) for i, h in enumerate(queue[:size])}
            queues = [queue[size:] for queue in queues]
            count = p.devices * size
            tokens = np.zeros((count, self._bucket(max(len(h.prompt.tokens) for h in batch.values()))), np.int32)
            length, slot = np.ones(count, np.int32), np.full(count, p.slots, np.int32)
            for i, handle in batch.items():
                ids = handle.prompt.tokens
                tokens[i, : len(ids)], length[i], slot[i] = ids, len(ids) + 1, handle.slot % p.slots
                handle.prompt = None
            p.update(device.admit, tokens, length, slot, self._start_rows(count, batch))

    def _start_rows(self, count: int, handles: dict[int, Handle]) -> device.Rows:
        """Return `count` rows of the device's state; row i starts the answer of `handles[i]`, others nothing."""
        rows = device.blank_rows(count, self.programs.config.vocab_size)
        for i, handle in handles.items():
            r = handle.request
            penalties = r.repetition_penalty != 1 or r.frequency_penalty or r.presence_penalty
            row = {name: getattr(r, name) for name in SETTINGS} | {
                "status": RUNNING,
                "token": r.tokens[-1],
                "remaining": handle.limit,
                "seed": handle.seed,
                "adjusts": bool(penalties or r.logit_bias or r.min_tokens or handle.constraint),
                "least": r.min_tokens,
                "report": r.logprobs is not None,
                "pause": EVERY_TOKEN if handle.constraint else self.pause if r.tools else NO_TOKEN,
            }
            row["temperature"] *= r.top_p > 0
            for name, value in row.items():
                rows[name][i] = value
            rows["uses"][i, r.tokens] = 1
            for token, bias in r.logit_bias.items():
                rows["bias"][i, token] = bias if bias > -100 else device.BANNED
            if handle.constraint:
                rows["allowed"][i] = handle.constraint.allowed()
            rows["stop"][i, : len(r.stop)] = r.stop
        return rows

    def _bucket(self, n: int) -> int:
        return next(b for b in self.programs.prompt_buckets if b >= n)


class Engine:
    """Generates text with one model.

    Args:
      config: resolved (`scaling.resolve_model`); params: see `load`.
      slots: sequences decoded at once at most, a power of two (on each device, where there are several).
      capacity: tokens of context, `config.seq_len` by default.
      chunk: tokens that a row decodes in one call; new requests start between two calls.
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
        if slots < 1 or slots % devices or power_of_two(slots // devices) != slots // devices:
            each = f" for each of the {devices} devices" if devices > 1 else ""
            raise UsageError(f"serve.slots: must be a power of two{each}, not {slots}")
        if tokenizer.vocab_size > config.vocab_size:
            sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
            raise DataError(f"{sizes}: they are not from the same run")
        if weights not in WEIGHTS:
            raise UsageError(f"serve.weights: one of {', '.join(WEIGHTS)}, not {weights!r}")
        self.config, self.tokenizer, self.weights, self.chats = config, tokenizer, weights, chats
        self.ends = tuple(tokenizer.special[name] for name in (ASSISTANT_END, USER_START, BOS))  # of any answer
        self.slots, self.capacity, self.chunk, self.queue_limit = slots, capacity or config.seq_len, chunk, queue_limit
        default = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}.get(weights, default)  # of the cache too
        self.programs = Programs(config, slots, self.capacity, chunk, self.dtype, mesh)
        self.scheduler = Scheduler(self.programs, tokenizer.special[PYTHON_END], reuse)
        self.load(params)
        # chunks that are being computed, whose rows they are, and their steps
        self._dispatched = deque[tuple[tuple[jax.Array, ...], dict[int, Handle], int]]()
        self.least_rows = 1  # of a chunk; a batch job raises it, since idle rows cost less than compiling for fewer

    @classmethod
    def from_pretrained(cls, run_dir: str | Path, stage: str | None = None, **options: Any) -> Engine:
        """Return the model of a run directory: the furthest trained stage, or the one named, on all devices.

        `DataError` if there is none.
        """
        stage = stage or trained_stages(RunDir(run_dir))[0]
        config, params, tokenizer, serve = load_run(RunDir(run_dir), stage)
        options = dict[str, Any](slots=serve.slots, weights=serve.weights, chats=stage != "base") | options
        devices = jax.local_devices()
        if 1 < len(devices) <= options["slots"]:
            options.setdefault("mesh", make_mesh(MeshConfig(), devices))
        return cls(config, params, tokenizer, **options)

    def load(self, params: dict[str, Any]) -> None:
        """Take other weights of the same model, in the training layout or from `kv_cache.serving_params`.

        Nothing compiles again. No answer may be under way.
        """
        self.programs.load(params, self.weights)
        self.scheduler.prefix_cache.clear()

    def chat_request(
        self, messages: Sequence[dict[str, Any]], *, continue_final: bool = False, **settings: Any
    ) -> Request:
        """Answer a conversation that ends with a user message; `settings` are fields of `Request`.

        continue_final: go on behind its last message, an assistant's.
        """
        if not self.chats:
            return self.text_request(continued(messages), **settings)
        return Request(render_prompt(self.tokenizer, messages, continue_final), **{"stop": self.ends} | settings)

    def text_request(self, text: str, **settings: Any) -> Request:
        """Continue a text as a document, to its end (a chat model ends it as an answer)."""
        tokens = [self.tokenizer.bos, *self.tokenizer.encode(text)]
        defaults: dict[str, Any] = {"stop": self.ends, "tools": False}
        return Request(tokens, **defaults | settings)

    def constraint(self, **what: Any) -> Constraint:
        """Return a request's `constraint`: `json` (a JSON Schema), `regex` or `choice` (texts). From any thread.

        `UsageError` for one that is wrong or too large.
        """
        from jaxchat.engine.constraint import constrain  # the library is loaded where it is used

        ((kind, value),) = what.items()
        return constrain(self._vocabulary, kind, value)

    @functools.cached_property
    def _vocabulary(self) -> Any:
        from jaxchat.engine.constraint import vocabulary

        return vocabulary(self.tokenizer, self.ends, self.config.vocab_size)

    def submit(self, request: Request) -> Handle:
        """Queue a request; `UsageError` for one that cannot run, `QueueFull` where too many wait."""
        return self.submit_group(request, [request.seed])[0]

    def submit_group(self, request: Request, seeds: Sequence[int | None]) -> list[Handle]:
        """Queue one answer for each seed; the prompt is prefilled once."""
        if self.queue_limit is not None:
            self.scheduler.check_room(request.client, len(seeds), self.queue_limit)
        n = len(request.tokens)
        if not 1 <= n <= self.capacity:
            raise UsageError(f"the prompt has {n} tokens; this model's context holds 1 to {self.capacity}")
        if request.constraint:  # it ends where it is complete, whatever the request says
            request = replace(request, stop=tuple({*request.stop, *self.ends}), tools=False)
        if len(request.stop) > MAX_STOP_IDS:
            raise UsageError(f"{len(request.stop)} stop ids; at most {MAX_STOP_IDS}")
        if wrong := [token for token in request.logit_bias if not 0 <= token < self.tokenizer.vocab_size]:
            raise UsageError(f"logit_bias: no token {wrong[0]}; ids lie below {self.tokenizer.vocab_size}")
        if request.logprobs is not None and not 0 <= request.logprobs <= device.TOP:
            raise UsageError(f"logprobs: 0 to {device.TOP}, not {request.logprobs}")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise UsageError(f"max_tokens: must be at least 1, not {request.max_tokens}")
        limit = min(self.capacity + 1 - n, request.max_tokens or self.capacity)
        prompt, handles = Prompt(request.tokens[:-1], len(seeds)), []
        for seed in seeds:
            number = secrets.randbits(32) if seed is None else seed % 2**32
            handles.append(Handle(request, number, limit, self.tokenizer, prompt))
            self.scheduler.enqueue(handles[-1])
        return handles

    def cancel(self, handle: Handle) -> None:
        """Cancel a request; its slot is free at once. Without effect on a finished one."""
        if not handle.done:
            self.scheduler.leave(handle)
            handle.finish("cancelled")

    def score(self, batch: Sequence[Sequence[int]]) -> list[list[Token | None]]:
        """Return the log-likelihood of each token of given sequences, with the likeliest tokens; None for the first.

        `UsageError` for a sequence longer than the context.
        """
        longest = max(map(len, batch), default=0)
        if longest > self.capacity:
            raise UsageError(f"a text has {longest} tokens; this model's context holds {self.capacity}")
        scores: list[list[Token | None]] = []
        for ids in batch:
            tokens = np.zeros((1, next(n for n in self.programs.text_buckets if n >= len(ids))), np.int32)
            tokens[0, : len(ids)] = ids
            made = [np.asarray(a) for a in self.programs.run(device.score_tokens, tokens)]
            scores.append([None if i == 0 else device.report(t, device.TOP, i - 1, made) for i, t in enumerate(ids)])
        return scores

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        return len(self.scheduler.rows)

    @property
    def compiling(self) -> int:
        """Number of programs that a background warm-up has still to compile."""
        return self.programs.compiling

    @property
    def cache_usage(self) -> float:
        """Share of all slots' cache positions that running answers use, 0 to 1."""
        handles = list(self.scheduler.rows.values())  # a copy: other threads ask too
        used = sum(handle.prompt_tokens + handle.made for handle in handles)
        return min(1.0, used / (self.slots * self.capacity))

    def step(self) -> list[tuple[Handle, Event]]:
        """Start waiting requests, decode a chunk, and return the events of the one before; [] when idle."""
        self.scheduler.admit()
        decoding, per = self.scheduler.decoding, self.programs.slots
        unfinished = any(h.in_flight + h.made < h.limit for h in decoding)
        # A constrained row makes one token in a chunk, then waits until the host has read it. Where there are only such
        # rows the next chunk waits too, and is short; beside other rows short chunks would cost these 5 to 15 %.
        waiting = all(h.constraint for h in decoding)
        steps = 1 if waiting and self.programs.short_chunks else self.chunk
        if unfinished:
            rows = self.scheduler.compact(self.least_rows)
            longest = max(h.prompt_tokens - 1 + h.advanced + h.in_flight + steps for h in decoding)
            bucket = next((b for b in self.programs.cache_buckets if b >= longest), self.capacity)
            for handle in decoding:
                handle.in_flight += steps
            handles = {h.slot // per * rows + h.slot % per: h for h in decoding}
            self._dispatched.append((self.programs.decode(rows, bucket, steps), handles, steps))
        if self._dispatched and (len(self._dispatched) > 1 or not unfinished or waiting):  # the next one runs meanwhile
            return self._read(*self._dispatched.popleft())
        return []

    def _read(self, made: tuple[jax.Array, ...], handles: dict[int, Handle], steps: int) -> list[tuple[Handle, Event]]:
        """Wait for a chunk and add its tokens to the answers; return the events that they complete."""
        wanted = any(handle.request.logprobs is not None for handle in handles.values())
        tokens, statuses, *reports = (np.asarray(a) for a in (made if wanted else made[:2]))
        events: list[tuple[Handle, Event]] = []
        for row, handle in handles.items():
            handle.in_flight -= steps
            own, status = tokens[row][tokens[row] != NO_TOKEN].tolist(), statuses[row]
            if handle.done or not own:  # cancelled; or it waited or ended before this chunk
                continue
            count, new, ended = handle.request.logprobs, list[Event](), status in (STOPPED, FULL)
            report = [a[row] for a in reports]
            handle.advanced += len(own)
            handle.first_token = handle.first_token or time.perf_counter()
            for i, token in enumerate(own[:-1] if status == STOPPED else own):
                handle.made += 1
                new += handle.add(token, None if count is None else device.report(token, count, i, report))
                if handle.stopped:  # tokens after a stop text do not count
                    break
            else:
                if status == STOPPED:
                    handle.made += 1
                    handle.stop_id = own[-1]
                if ended:
                    new += handle.flush()
            failed = status == PAUSED and handle.constraint and not handle.constraint.accept(own[-1])
            if handle.stopped or ended or failed:  # the device knows only of stop ids and limits
                self.scheduler.leave(handle, ended)
                handle.finish("length" if (status == FULL or failed) and not handle.stopped else "stop")
                new.append(Event("done", finish_reason=handle.finish_reason, tokens=handle.rest()))
            elif status == PAUSED and handle.constraint:
                self.programs.set_status(handle.slot, RUNNING, allowed=handle.constraint.allowed())
            elif status == PAUSED:
                self.programs.set_status(handle.slot, RUNNING, handle.tool_output())
            events += [(handle, event) for event in new]
        return events

    def generate(self, requests: Sequence[Request]) -> list[Handle]:
        """Answer all requests, slots kept full; return the answers in the order of the requests."""
        return self.finish([self.submit(request) for request in requests])

    def finish(
        self, handles: Sequence[Handle], on_done: Callable[[Handle], None] | None = None, shrink: int = 1
    ) -> list[Handle]:
        """Run until these are done, and return them.

        Once nothing waits, a chunk may have fewer rows, down to one `shrink`-th of the slots: more programs compile,
        which pays where the same is done many times.
        """
        self.least_rows = min(power_of_two(len(handles)), self.slots)
        while not all(handle.done for handle in handles):
            if shrink > 1 and not self.waiting:
                self.least_rows = max(1, min(self.least_rows, self.slots // shrink))
            for handle, event in self.step():
                if event.kind == "done" and on_done:
                    on_done(handle)
        self.least_rows = 1
        return list(handles)

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
