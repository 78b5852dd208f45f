"""Who gets which slot, with the real programs of a tiny model on one device."""

import jax.numpy as jnp
import numpy as np
from small_model import CAPACITY, CONFIG, learned, tokenizer

from jaxchat.engine.device import MIN_PROMPT_BUCKET, Programs
from jaxchat.engine.request import Handle, Request
from jaxchat.engine.scheduler import START, Admission, SharedPrompt, Waiting
from jaxchat.engine.turn import Turn


def admission(slots):
    programs = Programs(CONFIG, slots, CAPACITY, 4, jnp.float32, None)
    programs.load(learned(), "auto")
    return Admission(programs, pause=0)


def queue(*prompts, shared=None):
    waiting, handles = Waiting(), []
    for tokens in prompts:
        handles.append(Handle(Request(list(tokens)), 0, 99, Turn(tokenizer(), ()), prompt=shared))
        waiting.add(handles[-1])
    return waiting, handles


def test_one_round_runs_prompts_of_about_one_piece():
    own = admission(16)
    waiting, _ = queue(*[np.arange(2, 22)] * 16)
    own.admit(waiting)
    assert own.running == CAPACITY // MIN_PROMPT_BUCKET and own.free == 16 - own.running
    while waiting:
        own.admit(waiting)
    assert own.running == 16 and sorted(own.rows) == list(range(16))


def test_answers_to_one_prompt_start_in_one_round():
    own, shared = admission(16), SharedPrompt(16)
    waiting, handles = queue(*[np.arange(2, 22)] * 16, shared=shared)
    own.admit(waiting)
    assert MIN_PROMPT_BUCKET + 15 * START < CAPACITY and own.running == len(own.rows) == 16
    assert shared.rows is None and all(handle.prompt is None for handle in handles)


def test_busy_slots_are_brought_to_the_front_and_idle_ones_keep_what_they_hold():
    own = admission(8)
    waiting, handles = queue(*(np.arange(2, 42 + i) for i in range(8)))
    while waiting:
        own.admit(waiting)
    for handle in handles[:6]:
        own.leave(handle, 0)
    assert set(own.rows.values()) == set(handles[6:]) and len(own.held) == 6
    assert own.compact(1) == 2 and sorted(own.rows) == [0, 1]
    assert set(own.rows.values()) == set(handles[6:]) and own.held.keys() == set(range(2, 8))
    longer, (handle,) = queue(np.arange(2, 70))
    own.admit(longer)
    while own.jobs:
        own.admit(longer)
    assert handle.reused >= 39 and own.running == 3


def test_who_leaves_while_its_prompt_runs_gives_its_place_back():
    own = admission(2)
    own.programs.piece = 32
    waiting, (handle,) = queue(np.arange(2, 102))
    own.admit(waiting)
    assert (own.running, len(own.jobs), own.rows) == (1, 1, {})
    assert own.leave(handle, 0) is None and not own.jobs
    assert own.running == 0 and own.free == 2
