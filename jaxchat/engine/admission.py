"""How waiting requests enter the slots: padded prefills, and prompts that several answers share.

The prompt of a group of answers runs through the model once. Its keys and values wait on the device until the last of
its answers has found a slot, however long that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.engine import decode
from jaxchat.engine.request import Handle
from jaxchat.engine.waiting import Waiting
from jaxchat.model.cache import Prefix

MIN_PROMPT_BUCKET = 32  # tokens
PREFILL_GROUP = 8  # prompts prefilled at once when several wait


@dataclass(eq=False)
class SharedPrompt:
    """A prompt of several answers: row `index` of `prefix`, once that is computed."""

    tokens: list[int]
    prefix: Prefix | None = None
    index: int = 0


def take(waiting: Waiting, free: int) -> list[Handle]:
    """Next handles for `free` slots, in order and off the queue: single ones or members of groups, never both; at most
    `PREFILL_GROUP` prompts that are not prefilled yet."""
    taken: list[Handle] = []
    new: set[int] = set()
    while waiting and len(taken) < free:
        handle = waiting.next()
        if taken and (handle.prompt is None) != (taken[0].prompt is None):
            break
        prompt = handle.prompt
        if prompt is None or prompt.prefix is None:
            new.add(id(handle if prompt is None else prompt))
            if len(new) > PREFILL_GROUP:
                break
        taken.append(waiting.take())
    return taken


@dataclass(frozen=True)
class Admission:
    """Starts answers in slots. `pause`: the id at which a row with tools waits for the host."""

    config: ModelConfig
    slots: int
    capacity: int
    pause: int

    def start(self, params: Any, state: decode.Slots, group: list[Handle], rows: list[int]) -> decode.Slots:
        """Prefill what `take` took and start it in the slots `rows`."""
        size = self._size(len(group))
        if group[0].prompt is None:
            prompts = self._padded([handle.request.tokens for handle in group], size)
            return decode.admit(self.config, params, state, *prompts, *self._starts(group, rows, size))
        self._prefill_shared(params, group)
        left = list(zip(group, rows, strict=True))
        while left:
            prefix = left[0][0].prompt.prefix
            same = [pair for pair in left if pair[0].prompt.prefix is prefix][:size]
            left = [pair for pair in left if pair not in same]
            handles, into = map(list, zip(*same, strict=True))
            source = np.zeros(size, np.int32)
            source[: len(same)] = [handle.prompt.index for handle in handles]
            state = decode.start(state, prefix, source, *self._starts(handles, into, size))
        for handle in group:
            handle.prompt = None
        return state

    def warm_up(self, params: Any, state: decode.Slots) -> decode.Slots:
        """Compile what single requests need."""
        for size in {1, self._size(self.slots)}:
            for bucket in buckets(MIN_PROMPT_BUCKET, self.capacity):
                prompts = np.zeros((size, bucket), np.int32), np.ones(size, np.int32)
                state = decode.admit(self.config, params, state, *prompts, *self._starts([], [], size))
        return state

    def _prefill_shared(self, params: Any, group: list[Handle]) -> None:
        """Prefill those prompts of the group that are not yet."""
        new = list(dict.fromkeys(handle.prompt for handle in group if handle.prompt.prefix is None))
        if new:
            prompts = self._padded([prompt.tokens for prompt in new], self._size(len(new)))
            prefix = decode.prefill_prompts(self.config, params, *prompts)
            for index, prompt in enumerate(new):
                prompt.prefix, prompt.index = prefix, index

    def _size(self, count: int) -> int:
        return 1 if count == 1 else min(PREFILL_GROUP, self.slots)

    def _padded(self, prompts: Sequence[list[int]], size: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens and length, as `decode.admit` takes them."""
        longest = max(map(len, prompts)) - 1
        bucket = next(b for b in buckets(MIN_PROMPT_BUCKET, self.capacity) if b >= longest)
        tokens, length = np.zeros((size, bucket), np.int32), np.ones(size, np.int32)
        for i, prompt in enumerate(prompts):
            ids = prompt[:bucket]
            tokens[i, : len(ids)], length[i] = ids, len(prompt)
        return tokens, length

    def _starts(self, handles: Sequence[Handle], rows: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """target, remaining and settings, as `decode.admit` takes them."""
        target, remaining = np.full((size, 2), self.slots, np.int32), np.ones(size, np.int32)
        settings: Any = decode.blank_settings(size)
        for i, (handle, row) in enumerate(zip(handles, rows, strict=True)):
            r = handle.request
            target[i], remaining[i] = (row, r.tokens[-1]), handle.limit
            settings.seed[i], settings.temperature[i] = handle.seed, r.temperature
            settings.top_k[i], settings.top_p[i] = r.top_k, r.top_p
            settings.stop[i, : len(r.stop)] = r.stop
            if r.tools:
                settings.pause[i] = self.pause
        return target, remaining, settings


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def buckets(smallest: int, largest: int) -> list[int]:
    """Powers of two from the smallest, and the largest itself."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(power_of_two(sizes[-1] + 1), largest))
    return sizes
