"""The waiting queue, the assignment of slots and what a chunk's tokens mean for an answer."""

import jax.numpy as jnp
import numpy as np
from small_model import CAPACITY, CONFIG, learned, tokenizer

from jaxchat.engine.device import FULL, MIN_PROMPT_BUCKET, RUNNING, STOPPED, Programs
from jaxchat.engine.request import Handle, Request
from jaxchat.engine.scheduler import COPY_COST, Prompt, Scheduler, WaitingQueue, update
from jaxchat.engine.turn import Turn


def handle(client="", **settings):
    request = Request([1, 2], client=client, **settings)
    return Handle(request, 0, 99, Turn(tokenizer(), request.stop_texts))


def test_clients_take_turns_and_each_in_its_order():
    waiting = WaitingQueue()
    many, one = [handle("many") for _ in range(3)], handle("one")
    for h in (*many, one):
        waiting.add(h)
    assert len(waiting) == 4 and one in waiting
    assert [waiting.pop() for _ in range(4)] == [many[0], one, many[1], many[2]]
    assert not waiting


def test_a_removed_request_leaves_its_client_in_turn():
    waiting = WaitingQueue()
    first, second, other = handle("a"), handle("a"), handle("b")
    for h in (first, second, other):
        waiting.add(h)
    waiting.remove(first)
    assert first not in waiting and len(waiting) == 2
    waiting.remove(second)
    assert waiting.pop() is other and len(waiting) == 0


def test_a_chunk_that_ends_by_a_stop_id():
    answer, text = handle(), tokenizer().encode("hello")
    end = tokenizer().special["<|assistant_end|>"]
    events = update(answer, text, (), RUNNING)
    assert answer.made == len(text) and answer.first_token is not None
    events += update(answer, [end], (), STOPPED)
    assert "".join(event.text for event in events) == "hello"
    assert answer.stop_id == end and answer.made == len(text) + 1 and answer.turn.tokens == text


def test_tokens_behind_a_stop_text_do_not_count():
    answer = handle(stop_texts=("lo",))
    ids = [i for letter in "hello you" for i in tokenizer().encode(letter)]
    events = update(answer, ids, (), FULL)
    assert "".join(event.text for event in events) == "hel" and answer.turn.stopped
    assert answer.made < len(ids) == answer.advanced


def scheduler(slots):
    programs = Programs(CONFIG, slots, CAPACITY, 4, jnp.float32, None)
    programs.load(learned(), "auto")
    return Scheduler(programs, pause=0)


def queue(*prompts, shared=None):
    waiting, handles = WaitingQueue(), []
    for tokens in prompts:
        prompt = shared or Prompt(list(tokens)[:-1], 1)
        handles.append(Handle(Request(list(tokens)), 0, 99, Turn(tokenizer(), ()), prompt))
        waiting.add(handles[-1])
    return waiting, handles


def test_one_round_runs_prompts_of_about_one_piece():
    own = scheduler(16)
    waiting, _ = queue(*[np.arange(2, 22)] * 16)
    own.admit(waiting)
    assert own.running == CAPACITY // MIN_PROMPT_BUCKET and own.free == 16 - own.running
    while waiting:
        own.admit(waiting)
    assert own.running == 16 and sorted(own.rows) == list(range(16))


def test_answers_to_one_prompt_start_in_one_round():
    own, shared = scheduler(16), Prompt(list(range(2, 21)), 16)
    waiting, handles = queue(*[np.arange(2, 22)] * 16, shared=shared)
    own.admit(waiting)
    assert MIN_PROMPT_BUCKET + 15 * COPY_COST < CAPACITY and own.running == len(own.rows) == 16
    assert shared.rows is None and all(handle.prompt is None for handle in handles)


def test_busy_slots_are_brought_to_the_front_and_idle_ones_keep_what_they_hold():
    own = scheduler(8)
    waiting, handles = queue(*(np.arange(2, 42 + i) for i in range(8)))
    while waiting:
        own.admit(waiting)
    for handle in handles[:6]:
        own.leave(handle, 0)
    assert set(own.rows.values()) == set(handles[6:]) and len(own.prefix_cache) == 6
    assert own.compact(1) == 2 and sorted(own.rows) == [0, 1]
    assert set(own.rows.values()) == set(handles[6:]) and own.prefix_cache.keys() == set(range(2, 8))
    longer, (handle,) = queue(np.arange(2, 70))
    own.admit(longer)
    while own.prefills:
        own.admit(longer)
    assert handle.reused >= 39 and own.running == 3


def test_who_leaves_while_its_prompt_runs_gives_its_place_back():
    own = scheduler(2)
    own.programs.prompt_chunk = 32
    waiting, (handle,) = queue(np.arange(2, 102))
    own.admit(waiting)
    assert (own.running, len(own.prefills), own.rows) == (1, 1, {})
    assert own.leave(handle, 0) is None and not own.prefills
    assert own.running == 0 and own.free == 2
