"""The waiting queue and the assignment of slots."""

import jax.numpy as jnp
import numpy as np
from small_model import CAPACITY, CONFIG, learned, tokenizer

from jaxchat.engine.device import MIN_PROMPT_BUCKET, Programs
from jaxchat.engine.request import Handle, Request
from jaxchat.engine.scheduler import COPY_COST, Prompt, Scheduler


def handle(client=""):
    return Handle(Request([1, 2], client=client), 0, 99, tokenizer(), Prompt([1], 1))


def scheduler(slots):
    programs = Programs(CONFIG, slots, CAPACITY, 4, jnp.float32, None)
    programs.load(learned(), "auto")
    return Scheduler(programs, pause=0)


def enqueue(own, *prompts, shared=None):
    handles = []
    for tokens in prompts:
        prompt = shared or Prompt(list(tokens)[:-1], 1)
        handles.append(Handle(Request(list(tokens)), 0, 99, tokenizer(), prompt))
        own.enqueue(handles[-1])
    return handles


def test_a_removed_request_leaves_its_client_in_turn():
    own = scheduler(2)
    first, second, other = handle("a"), handle("a"), handle("b")
    for h in (first, second, other):
        own.enqueue(h)
    own.leave(first)
    assert own.waiting == [other, second]


def test_no_stream_of_new_clients_starves_one_that_waits():
    own = scheduler(1)
    for h in (own_first := handle("own"), own_second := handle("own")):
        own.enqueue(h)
    served = []
    for i in range(4):
        own.enqueue(handle(f"new {i}"))
        served.append(own.waiting.pop(0))
        own._turn = served[-1].order
    assert served[0] is own_first and own_second in served


def test_one_round_runs_prompts_of_about_one_piece():
    own = scheduler(16)
    enqueue(own, *[np.arange(2, 22)] * 16)
    own.admit()
    assert len(own.rows) == CAPACITY // MIN_PROMPT_BUCKET and own.free == 16 - len(own.rows)
    while own.waiting:
        own.admit()
    assert len(own.rows) == 16 and sorted(own.rows) == list(range(16))


def test_answers_to_one_prompt_start_in_one_round():
    own, shared = scheduler(16), Prompt(list(range(2, 21)), 16)
    handles = enqueue(own, *[np.arange(2, 22)] * 16, shared=shared)
    own.admit()
    assert MIN_PROMPT_BUCKET + 15 * COPY_COST < CAPACITY and len(own.rows) == 16
    assert shared.cache is None and all(handle.prompt is None for handle in handles)


def test_busy_slots_are_brought_to_the_front_and_idle_ones_keep_what_they_hold():
    own = scheduler(8)
    handles = enqueue(own, *(np.arange(2, 42 + i) for i in range(8)))
    while own.waiting:
        own.admit()
    for handle in handles[:6]:
        own.leave(handle)
    assert set(own.rows.values()) == set(handles[6:]) and len(own.prefix_cache) == 6
    assert own.compact(1) == 2 and sorted(own.rows) == [0, 1]
    assert set(own.rows.values()) == set(handles[6:]) and own.prefix_cache.keys() == set(range(2, 8))
    (handle,) = enqueue(own, np.arange(2, 70))
    own.admit()
    while own.prefills:
        own.admit()
    assert handle.reused >= 39 and len(own.rows) == 3


def test_who_leaves_while_its_prompt_runs_gives_its_place_back():
    own = scheduler(2)
    own.programs.prompt_chunk = 32
    (handle,) = enqueue(own, np.arange(2, 102))
    own.admit()
    assert len(own.rows) == len(own.prefills) == 1 and not own.decoding
    own.leave(handle)
    assert not own.prefills
    assert len(own.rows) == 0 and own.free == 2
