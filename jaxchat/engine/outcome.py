"""What a chunk of decoding means for one answer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from jaxchat.engine.likelihood import report
from jaxchat.engine.request import Event, Handle
from jaxchat.engine.slots import FULL, STOPPED


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
