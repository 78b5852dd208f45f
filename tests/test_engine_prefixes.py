"""Prompts in pieces, prefixes that slots still hold, prompts of several answers: the same answers as from scratch."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CAPACITY, CONFIG, QUESTION, learned, tokenizer
from test_decode import CAPACITY as POSITIONS
from test_decode import SHAPES, model, random_tokens, uncached_logits

from jaxchat import kv_cache as model_cache
from jaxchat.engine import Engine, Request
from jaxchat.engine import device as programs
from jaxchat.engine.scheduler import Held

STEP = jax.jit(model_cache.decode, static_argnums=(0, 5))
EXTEND = jax.jit(model_cache.extend, static_argnums=0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(programs, "MIN_CACHE_BUCKET", 32)
    monkeypatch.setattr(programs, "PIECE", 32)


def engine(**options):
    return Engine(CONFIG, learned(), tokenizer(), **({"slots": 4} | options))


def ids(count, seed):
    rng = random.Random(seed)
    return [rng.randrange(270) for _ in range(count)]


@pytest.mark.parametrize("recipe", SHAPES)
@pytest.mark.parametrize("cuts", [(0, 40), (7, 21, 40), (1, 2, 3, 40), (16, 32, 40), (39, 40)])
def test_pieces_leave_the_same_logits_as_the_whole(recipe, cuts):
    config, _, serving = model(recipe)
    tokens = random_tokens(50)
    cache = model_cache.new_cache(config, 2, POSITIONS)
    for begin, end in zip((0, *cuts), cuts, strict=False):  # the second row takes nothing
        piece = np.full((2, 40), 5, np.int32)
        piece[0, : end - begin] = tokens[begin:end]
        cache = EXTEND(config, serving, piece, jnp.array([end - begin, 0]), cache)
    assert cache.length.tolist() == [40, 0] and not np.any(cache.previous[1])
    expected = uncached_logits(recipe, tokens)
    for position in range(40, 50):
        fed = jnp.array([tokens[position], 0])
        logits, cache = STEP(config, serving, fed, cache, jnp.array([True, False]), POSITIONS)
        np.testing.assert_allclose(logits[0], expected[position], atol=1e-4)


def test_a_ring_that_came_round_is_only_gone_on_from_at_its_end():
    held = Held(list(range(100)), reach=100)
    prompt = [*range(100), 7, 8]
    assert held.usable(prompt, ring=17) == 100
    assert held.usable([*range(99), 1, 2, 3], ring=17) == 99  # position 99 stands where the window has just ended
    assert held.usable([*range(98), 1, 2, 3], ring=17) == 0
    assert held.usable([*range(98), 1, 2, 3], ring=100) == 98  # it has not come round
    assert Held(list(range(100)), reach=108).usable(prompt, ring=17) == 0
    assert held.usable(list(range(100)), ring=17) == 99  # the last token always runs again
    assert held.usable([*range(30), *[200] * 5], ring=128) == 0  # too little to be worth it


@pytest.mark.parametrize("cut", [16, 17, 18, 40, 60])
def test_a_prefix_taken_from_a_slot_gives_the_logits_of_a_fresh_prefill(cut):
    """At every length at which `Held` allows it, with rings of 17 positions that may have come round."""
    own = engine(reuse=False)
    first = ids(cut + 1, seed=1)
    own.generate([Request(first, max_tokens=1, tools=False)])  # the slot now holds `cut + 1` positions
    held = own._admission.held[0]
    assert held.tokens == first and held.reach == cut + 1
    fresh, config = engine(reuse=False), CONFIG
    for n in range(max(1, cut - 2), cut + 2):
        allowed = held.reach <= 17 or held.reach <= n + 1
        prompt = [*first[:n], *ids(9, seed=2)]
        whole = np.ones(1, np.int32)
        row = own._programs.take(0 * whole, n * whole, np.array([first[n - 1]], np.int32))
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, :8] = prompt[n:-1]
        row = own._programs.prolong(row, tokens, 8 * whole)
        other = fresh._programs.take(0 * whole, 0 * whole, 0 * whole)
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(prompt) - 1] = prompt[:-1]
        other = EXTEND(config, fresh._programs.params, padded, (len(prompt) - 1) * whole, other)
        logits = [
            STEP(config, fresh._programs.params, np.array([prompt[-1]]), c, np.array([True]), CAPACITY)[0]
            for c in (row, other)
        ]
        difference = float(jnp.abs(logits[0] - logits[1]).max())
        assert difference < 1e-4 if allowed else difference > 1e-4, (n, difference)


def test_long_prompts_run_in_pieces_while_others_answer():
    own = engine(chunk=2)
    talker = own.submit(Request(ids(5, seed=1), max_tokens=40, tools=False))
    for _ in range(3):
        own.step()
    long = own.submit(Request(ids(110, seed=2), max_tokens=5, tools=False))
    made = []
    while long.first_token is None:
        before = talker.made
        own.step()
        made.append(talker.made - before)
    assert made[:4] == [2, 2, 2, 2]  # four pieces, and no stop between them
    assert own.running == 2
    own.finish([talker, long])
    alone = engine(reuse=False)
    assert [h.result().tokens for h in (talker, long)] == [
        alone.generate([h.request])[0].tokens for h in (talker, long)
    ]


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_next_turn_of_a_conversation_goes_on_from_its_slot(lookahead):
    own, fresh = engine(lookahead=lookahead), engine(reuse=False)
    handle = own.submit(own.chat_request(QUESTION, max_tokens=60))
    first = own.finish([handle])[0]
    assert first.finish_reason == "stop" and handle.reused == 0
    messages = [*QUESTION, {"role": "assistant", "content": first.parts}, {"role": "user", "content": "and so?"}]
    handle = own.submit(own.chat_request(messages, max_tokens=12))
    assert own.finish([handle])[0].tokens == fresh.generate([handle.request])[0].tokens
    # all but the mark that ended the answer, which was never fed back
    assert handle.reused == first.prompt_tokens + len(first.tokens)


def test_random_conversations_in_company_are_as_from_scratch():
    rng = random.Random(4)
    own, fresh = engine(chunk=3), engine(reuse=False)
    histories = [ids(20, seed=i) for i in range(6)]
    handles, reused = [], 0
    for _ in range(30):
        history = rng.choice(histories)
        if len(history) > 90:
            history[:] = ids(rng.randint(1, 40), seed=len(handles))
        request = Request(
            list(history), max_tokens=rng.randint(1, 9), temperature=rng.choice([0, 1]), seed=3, tools=False
        )
        handle = own.submit(request)
        handles.append(handle)
        while not handle.done and rng.random() < 0.97:
            own.step()
        if rng.random() < 0.2:
            own.cancel(handle)
        reused += handle.reused > 0
        history += [*handle.result().tokens, *ids(rng.randint(1, 8), seed=len(handles))]
    own.finish(handles)
    assert reused > 4 and own.running == own.waiting == 0
    for handle in handles:
        tokens = handle.result().tokens
        assert fresh.generate([handle.request])[0].tokens[: len(tokens)] == tokens


@pytest.mark.parametrize("length", [9, 80])
@pytest.mark.parametrize("slots", [2, 8])
def test_answers_that_share_a_prompt_are_as_if_alone(length, slots):
    own = engine(slots=slots)
    request = Request(ids(length, seed=5), max_tokens=8, temperature=1.3, tools=False)
    handles = own.submit_group(request, [1, 2, 3, 4, 5])
    other = own.submit(Request(ids(12, seed=6), max_tokens=8, tools=False))
    own.step()
    own.cancel(handles[4])
    own.finish([*handles, other])
    fresh = engine(reuse=False)
    for seed, handle in zip((1, 2, 3, 4), handles, strict=False):
        alone = fresh.generate([Request(request.tokens, max_tokens=8, temperature=1.3, tools=False, seed=seed)])[0]
        assert handle.result().tokens == alone.tokens
    assert own.running == own.waiting == 0 and not own._admission.jobs


def test_cancelled_while_its_prompt_runs():
    own = engine(slots=2)
    long = own.submit(Request(ids(100, seed=2), max_tokens=5))
    group = own.submit_group(Request(ids(100, seed=3), max_tokens=5), [1, 2, 3])
    own.step()
    assert own.running == 2 and own.waiting == 2
    own.cancel(long)
    assert own.running == 1
    for handle in group:
        own.cancel(handle)
    assert own.running == own.waiting == 0 and not own._admission.jobs
    assert own.step() == []
    assert len(own.generate([Request(ids(100, seed=2), max_tokens=5, tools=False)])[0].tokens) == 5
