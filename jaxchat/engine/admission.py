"""Which request runs in which slot, and how prompts get there.

Short prompts are prefilled at once and put into slots. Long ones, those that several answers share, and those that an
idle slot holds the beginning of run in pieces beside the slots, one piece between two chunks of decoding, and are
copied into slots when they are done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxchat.engine.held import Held
from jaxchat.engine.programs import Programs, power_of_two
from jaxchat.engine.request import Handle
from jaxchat.engine.slots import blank_settings
from jaxchat.engine.waiting import Waiting
from jaxchat.model.cache import Cache, layer_capacity

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
