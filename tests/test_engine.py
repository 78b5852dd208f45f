"""The engine as a whole, with a tiny model that has learned two conversations.

Calculator turns, batching, sampling settings, chunked prefill, prefix cache, no recompiles.
"""

import functools
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from small_model import CAPACITY, CONFIG, GREETING, QUESTION, learned, tokenizer
from test_device import CAPACITY as POSITIONS
from test_device import SHAPES, model, random_tokens, step, uncached_logits

from jaxchat import kv_cache
from jaxchat import model as gpt
from jaxchat.engine import Engine, Event, QueueFull, Request
from jaxchat.engine import device as programs
from jaxchat.engine.device import SCORED, decode_chunk
from jaxchat.errors import DataError, UsageError
from jaxchat.low_precision import quantize_int8
from jaxchat.tokenizer import train_tokenizer

APPEND = jax.jit(kv_cache.append, static_argnums=0)
NAMES = ("admit", "decode_chunk", "prefill_chunk", "set_status", "score_tokens", "start", "swap", "copy_prefix")


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Several cache buckets and pieces of prompts in this small context."""
    monkeypatch.setattr(programs, "MIN_CACHE_BUCKET", 32)
    monkeypatch.setattr(programs, "PROMPT_CHUNK", 32)


def engine(**options):
    return Engine(CONFIG, learned(), tokenizer(), **({"slots": 4} | options))


@functools.cache
def shared():
    return engine()


@functools.cache
def constraints():
    return [shared().constraint(json={"type": "object"}), shared().constraint(choice=["yes", "아니오"])]


def random_requests(count, seed=0, **fixed):
    rng = random.Random(seed)
    return [
        Request(
            tokens=[rng.randrange(270) for _ in range(rng.randint(1, CAPACITY))],
            **({
                "max_tokens": rng.randint(1, 20), "temperature": rng.choice([0.0, 0.5, 1.0, 1.7]),
                "top_k": rng.choice([0, 1, 20, 500]), "top_p": rng.choice([1.0, 0.9, 0.3]), "seed": rng.getrandbits(33),
                "stop": tuple(rng.sample(range(280), rng.randint(0, 4))), "tools": rng.random() < 0.5,
                "min_p": rng.choice([0.0, 0.1]), "repetition_penalty": rng.choice([1.0, 1.0, 1.5]),
                "frequency_penalty": rng.choice([0.0, 0.0, 0.7]), "presence_penalty": rng.choice([0.0, 0.0, -1.5, 1.0]),
                "logit_bias": rng.choice([{}, {}, {7: 3.5, 60: -100}]), "min_tokens": rng.choice([0, 0, 4]),
                "constraint": rng.choice([None, None, None, *constraints()]),
                "logprobs": rng.choice([None, None, 0, 20]), "stop_texts": rng.choice([(), ("a",), ("the", "no")]),
            } | fixed),
        )
        for _ in range(count)
    ]  # fmt: skip


def test_a_calculator_turn():
    own = engine(chunk=3)
    result = own.generate([own.chat_request(QUESTION, max_tokens=60)])[0]
    assert result.parts == [
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "That is it."},
    ]
    assert result.text == "That is it." and result.finish_reason == "stop"
    assert own.running == own.waiting == 0


def test_tools_off_does_not_pause():
    result = shared().generate([shared().chat_request(QUESTION, tools=False, max_tokens=12)])[0]
    assert result.parts[0] == {"type": "python", "text": "12+30"}
    assert "42" not in [part["text"] for part in result.parts]


def test_chat_and_stream_give_the_same_text_and_no_half_characters():
    assert shared().chat(GREETING) == "Hi 🙂 안녕!"
    pieces = list(shared().stream(GREETING))
    assert "".join(pieces) == "Hi 🙂 안녕!" and len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces)
    events = list(shared().events(shared().chat_request(GREETING)))
    assert events[-1] == Event("done", finish_reason="stop")


@pytest.mark.parametrize(
    ("options", "group"),
    [({"slots": 1}, 1), ({"slots": 8, "chunk": 5}, 4), ({"chunk": 1}, 0)],
)
def test_results_do_not_depend_on_slots_chunks_or_company(options, group, monkeypatch):
    monkeypatch.setattr(programs, "PREFILL_GROUP", {"cpu": group})
    requests = random_requests(12, seed=3)
    alone = [shared().generate([request])[0].tokens for request in requests]
    together = [result.tokens for result in engine(**options).generate(requests)]
    assert together == alone
    assert any(len(tokens) > 5 for tokens in alone)


def test_seeds_decide_and_repeat():
    def made(seed):
        return shared().generate([Request([0, 5, 9], max_tokens=20, temperature=1.5, seed=seed)])[0].tokens

    assert made(1) == made(1) != made(2)
    free = [shared().generate([Request([0, 5, 9], max_tokens=20, temperature=1.5)])[0] for _ in range(2)]
    assert free[0].seed != free[1].seed and made(free[0].seed) == free[0].tokens


def test_after_warm_up_nothing_compiles():
    own = engine(chunk=4)
    heard = []
    own.programs.warm_up(lambda done, total: heard.append((done, total)))
    assert heard[-1][0] == heard[-1][1] == len(heard) > 10
    requests = random_requests(100, seed=5)
    with compilations() as compiled:
        jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(3))  # proves that the listener hears compilations
        assert compiled
        compiled.clear()
        handles, rng = [], random.Random(1)
        for request in requests:  # a server's way: the number of busy rows goes up and down
            handles.append(own.submit(request))
            for _ in range(rng.choice([0, 0, 0, 1, 4])):
                own.step()
        while not all(handle.done for handle in handles):
            own.step()
        own.finish(own.submit_group(own.chat_request(QUESTION, temperature=1.0), range(3)))
        own.score([request.tokens for request in requests[:20]])
        assert compiled == []


def test_a_background_warm_up_answers_at_once_and_compiles_every_program_once():
    own = engine(chunk=4)
    total = sum(1 for _ in own.programs._calls())
    jax.clear_caches()
    with compilations(NAMES) as compiled:
        own.programs.warm_up(background=True)
        first = len(compiled)
        assert 0 < own.programs.compiling <= total - 3
        answers = own.generate(random_requests(12, seed=3))  # while the others compile
        own.score([[1, 2, 3]])
        while own.programs.compiling:
            time.sleep(0.05)
        assert first < total and len(compiled) <= total + 1  # and the copy of a prefix that comes before
        before = len(compiled)
        again = own.generate(random_requests(12, seed=3))
        assert len(compiled) == before
        assert [a.tokens for a in answers] == [a.tokens for a in again]


def test_a_background_warm_up_can_be_stopped():
    own = engine(chunk=4)
    expected = own.generate(random_requests(3, seed=4))
    jax.clear_caches()
    own.programs.warm_up(background=True)
    own.programs.stop_compiling()
    end = time.monotonic() + 120
    while own.programs.compiling and time.monotonic() < end:
        time.sleep(0.05)
    assert own.programs.compiling == 0
    assert [a.tokens for a in own.generate(random_requests(3, seed=4))] == [a.tokens for a in expected]


def test_limits_and_reasons():
    prompt = list(range(CAPACITY - 4))
    results = shared().generate(
        [
            Request(prompt, tools=False),
            Request(prompt[:10], max_tokens=3, tools=False),
            Request([*prompt, 1, 2, 3, 4], tools=False),
        ]
    )
    assert [len(r.tokens) for r in results] == [5, 3, 1] and {r.finish_reason for r in results} == {"length"}
    assert [r.prompt_tokens for r in results] == [CAPACITY - 4, 10, CAPACITY]
    with pytest.raises(UsageError, match=rf"{CAPACITY + 1} tokens.*{CAPACITY}"):
        shared().submit(Request([1] * (CAPACITY + 1)))
    with pytest.raises(UsageError, match="0 tokens"):
        shared().submit(Request([]))
    with pytest.raises(UsageError, match="max_tokens"):
        shared().submit(Request([1], max_tokens=0))
    with pytest.raises(UsageError, match="stop"):
        shared().submit(Request([1], stop=tuple(range(17))))


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it():
    first = shared().generate([Request([0, 7], max_tokens=6, tools=False)])[0].tokens
    stopped = shared().generate([Request([0, 7], max_tokens=6, tools=False, stop=(first[2],))])[0]
    assert stopped.tokens == first[: first.index(first[2])] and stopped.finish_reason == "stop"


def test_cancelled_requests_free_their_slots_at_once():
    own = engine(slots=2, chunk=2)
    handles = [own.submit(r) for r in random_requests(5, seed=8, max_tokens=60, stop=(), tools=False)]
    own.step()
    assert (own.running, own.waiting) == (2, 3)
    own.cancel(handles[0])
    own.cancel(handles[4])
    assert (own.running, own.waiting) == (1, 2) and handles[0].finish_reason == "cancelled"
    while own.running or own.waiting:
        assert not any(owner in (handles[0], handles[4]) for owner, _ in own.step())
    alone = [own.generate([h.request])[0].tokens for h in handles[1:4]]
    assert [h.tokens for h in handles[1:4]] == alone


def test_leaving_a_stream_frees_its_slot():
    stream = shared().stream(QUESTION)
    for _ in stream:
        break
    stream.close()
    assert shared().running == 0


def test_text_of_a_person_never_becomes_a_special_token():
    request = shared().chat_request([{"role": "user", "content": "<|assistant_end|><|python_start|>"}])
    special = set(tokenizer().special.values())
    assert [t for t in request.tokens if t in special] == [
        tokenizer().special[name] for name in ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>")
    ]


def test_refuses_slots_and_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match="power of two, not 3"):
        engine(slots=3)
    large = train_tokenizer(["many other words to learn here " + "x" * i for i in range(60)], 290, 10_000, 1000)
    with pytest.raises(DataError, match=r"290.*280"):
        Engine(CONFIG, learned(), large)
    with pytest.raises(DataError, match="not a run directory"):
        Engine.from_pretrained(tmp_path)


@functools.cache
def forward():
    params = learned()
    return jax.jit(lambda tokens: gpt.logits(CONFIG, params, gpt.hidden(CONFIG, params, tokens)))


def logits(tokens):
    """(T, V) by the training model."""
    padded = np.zeros((1, CAPACITY), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward()(padded))[0, : len(tokens)]


def log_softmax(z):
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def ids(count, seed):
    rng = random.Random(seed)
    return [rng.randrange(270) for _ in range(count)]


def test_repetition_penalty_lowers_every_id_of_prompt_and_answer():
    prompt, penalty = ids(12, seed=1), 1.6
    tokens = list(prompt)
    for _ in range(20):
        z = logits(tokens)[-1].copy()
        seen = sorted(set(tokens))
        z[seen] = np.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
        tokens.append(int(z.argmax()))
    plain = Request(prompt, max_tokens=20, tools=False)
    strict = Request(prompt, max_tokens=20, tools=False, repetition_penalty=penalty)
    results = shared().generate([plain, strict, plain])
    assert results[1].tokens == tokens[12:] != results[0].tokens == results[2].tokens
    assert len(set(results[1].tokens)) > len(set(results[0].tokens))
    assert shared().generate([plain])[0].tokens == results[0].tokens  # the slot's next request hears nothing of it


def test_log_probabilities_are_the_models_own():
    own = engine(chunk=3)
    asked = Request(
        ids(9, seed=2), max_tokens=10, temperature=1.4, seed=5, logprobs=4, tools=False, repetition_penalty=1.3
    )
    result, silent = own.generate([asked, Request(ids(9, seed=3), max_tokens=10, tools=False)])
    expected = log_softmax(logits([*asked.tokens, *result.tokens]))[8:-1]
    assert silent.logprobs == [] and [t.id for t in result.logprobs] == result.tokens
    for token, z in zip(result.logprobs, expected, strict=True):
        assert token.logprob == pytest.approx(z[token.id], abs=1e-4)
        assert [i for i, _ in token.top] == np.argsort(-z, kind="stable")[:4].tolist()
        assert [p for _, p in token.top] == pytest.approx(np.sort(z)[::-1][:4], abs=1e-4)
    assert all(t.top == () for t in own.generate([Request([1, 2], max_tokens=3, logprobs=0)])[0].logprobs)
    with pytest.raises(UsageError, match="0 to 20, not 21"):
        own.submit(Request([1], logprobs=21))


def test_events_carry_the_tokens_of_their_text():
    events = list(shared().events(shared().chat_request(GREETING, logprobs=0)))
    tokens = [token.id for event in events for token in event.tokens]
    assert tokenizer().decode(tokens) == "Hi 🙂 안녕!" and events[-1].kind == "done"
    shown = b""
    for event in events[:-1]:
        shown += b"".join(tokenizer().token_bytes(token.id) for token in event.tokens)
        assert shown.decode() == "".join(e.text for e in events[: events.index(event) + 1])
    events = list(shared().events(shared().chat_request(QUESTION, logprobs=0, max_tokens=60)))
    special = tokenizer().special
    assert special["<|output_start|>"] in [token.id for event in events for token in event.tokens]


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        (("안녕",), "Hi 🙂 "),
        (("H",), ""),
        (("녕!x", "nowhere"), "Hi 🙂 안녕!"),
        (("안x", "안녕!!", "!"), "Hi 🙂 안녕"),
        (("🙂 안", "Hi 🙂 안녕"), "Hi "),
    ],
)
@pytest.mark.parametrize("chunk", [2, 8])
def test_an_answer_ends_before_a_stop_text(stops, text, chunk):
    own = engine(chunk=chunk)
    events = list(own.events(own.chat_request(GREETING, stop_texts=stops, logprobs=0)))
    assert "".join(e.text for e in events) == text and events[-1].finish_reason == "stop"
    shown = tokenizer().decode([t.id for e in events for t in e.tokens])
    assert shown.startswith(text) and len(shown) < len(text) + 3
    assert own.running == 0
    handle = own.submit(own.chat_request(GREETING, stop_texts=stops))
    result = own.finish([handle])[0]
    assert result.text == text and result.made >= len(result.tokens)


def test_a_stop_text_inside_a_tool_call_does_not_end_it():
    result = shared().generate([shared().chat_request(QUESTION, stop_texts=("30", "42", "is it"), max_tokens=60)])[0]
    assert [part["text"] for part in result.parts] == ["12+30", "42", "That "]


def test_scores_are_the_models_own():
    batch = [ids(n, seed=n) for n in (1, 5, CAPACITY, min(SCORED, CAPACITY) - 1)] + [[]]
    found = shared().score(batch)
    assert found[4] == []
    for tokens, scores in zip(batch[:4], found, strict=False):
        assert scores[0] is None and [s.id for s in scores[1:]] == tokens[1:]
        z = log_softmax(logits(tokens))
        assert [s.logprob for s in scores[1:]] == pytest.approx([z[i, t] for i, t in enumerate(tokens[1:])], abs=1e-4)
        assert [s.top[0][0] for s in scores[1:]] == z[:-1].argmax(-1).tolist() and all(
            len(s.top) == 20 for s in scores[1:]
        )
    with pytest.raises(UsageError, match=f"{CAPACITY + 1} tokens.*{CAPACITY}"):
        shared().score([[1] * (CAPACITY + 1)])


def test_clients_take_turns_and_nobody_waits_for_ever():
    own = engine(slots=1)
    crowd = [own.submit(Request([1, 2, i], max_tokens=2, client="crowd", tools=False)) for i in range(6)]
    late = [own.submit(Request([3, i], max_tokens=2, client="late", tools=False)) for i in range(2)]
    last = own.submit(Request([4], max_tokens=2, client="last", tools=False))
    ended = []
    while own.running or own.waiting:
        ended += [handle for handle, event in own.step() if event.kind == "done"]
    assert ended == [crowd[0], late[0], last, crowd[1], late[1], *crowd[2:]]


def test_a_single_answer_runs_beside_an_idle_row_where_that_is_faster(monkeypatch):
    """As on a GPU: no chunk of one row is compiled or run, and the answer is the same."""
    alone = engine().generate([Request([1, 2, 3], max_tokens=9, seed=1, temperature=1.0)])[0].tokens
    monkeypatch.setitem(programs.LEAST_ROWS, "cpu", 2)
    own, rows = engine(slots=4), []
    decode = own.programs.decode
    own.programs.decode = lambda count, *more: rows.append(count) or decode(count, *more)
    compiled = [static["rows"] for function, _, static in own.programs._calls() if function is decode_chunk]
    assert sorted(set(compiled)) == [2, 4]
    assert own.generate([Request([1, 2, 3], max_tokens=9, seed=1, temperature=1.0)])[0].tokens == alone
    assert set(rows) == {2}


def test_a_bounded_queue_refuses_and_recovers():
    own = engine(slots=2, queue_limit=2)
    handles = [own.submit(Request([1, i], max_tokens=30, tools=False)) for i in range(4)]  # two slots and two places
    with pytest.raises(QueueFull, match="2 may"):
        own.submit(Request([1]))
    own.step()
    with pytest.raises(QueueFull):
        own.submit_group(Request([1]), [1])
    own.cancel(handles[3])
    own.submit(Request([1, 2], max_tokens=1, tools=False))
    with pytest.raises(QueueFull):
        own.submit(Request([1]))
    own.finish(handles[:3])
    assert len(own.submit_group(Request([1], max_tokens=1, tools=False), [1, 2, 3])) == 3


def test_a_full_queue_still_takes_somebody_new():
    own = engine(slots=1, queue_limit=4)
    request = Request([1, 2], max_tokens=3, tools=False, client="many")
    own.submit_group(request, [1, 2, 3, 4, 5])
    with pytest.raises(QueueFull):
        own.submit(request)
    late = own.submit(Request([1, 3], max_tokens=3, tools=False, client="new"))
    with pytest.raises(QueueFull):
        own.submit_group(Request([1, 3], client="third"), [1] * 6)  # more than could ever wait
    with pytest.raises(QueueFull):
        own.submit(Request([1, 3], client="new"))
    own.submit_group(Request([1, 3], max_tokens=3, client="third"), [1] * 3)
    with pytest.raises(QueueFull):
        own.submit(Request([1, 3], client="fourth"))  # twice the length, no more
    assert own.finish([late])[0].finish_reason == "length"


def test_times_and_gauges():
    own = engine(slots=4)
    assert own.cache_usage == 0
    handle = own.submit(Request(ids(20, seed=1), max_tokens=12, tools=False))
    own.step()
    assert own.cache_usage == pytest.approx((20 + handle.made) / (4 * CAPACITY))
    result = own.finish([handle])[0]
    assert handle.submitted <= handle.started < handle.first_token <= handle.finished
    assert own.cache_usage == 0 and result.made == 12 and result.prompt_tokens == 20


def test_quantized_products_are_close_and_exact_where_they_can_be():
    draw = np.random.default_rng(0)
    weight, x = draw.standard_normal((64, 48)).astype(np.float32), draw.standard_normal((5, 64)).astype(np.float32)
    packed = quantize_int8(jnp.asarray(weight))
    assert packed.values.dtype == jnp.int8 and packed.scale.shape == (48,)
    steps = np.abs(weight).max(0) / 127
    assert (np.abs(packed.values * packed.scale - weight) <= steps / 2 * 1.001).all()
    np.testing.assert_allclose(packed.product(x), x @ (packed.values * packed.scale), rtol=1e-4, atol=1e-4)
    exact = np.round(draw.uniform(-127, 127, (64, 3))).astype(np.float32)
    exact[0] = 127
    np.testing.assert_allclose(quantize_int8(jnp.asarray(exact)).product(x), x @ exact, rtol=1e-5, atol=1e-2)


def test_a_model_of_8_bit_weights_says_nearly_the_same():
    small = engine(weights="int8")
    assert small.chat(GREETING) == "Hi 🙂 안녕!"
    text = ids(60, seed=7)
    exact, rounded = ([s.logprob for s in own.score([text])[0][1:]] for own in (shared(), small))
    difference = np.abs(np.array(exact) - rounded)
    assert 0 < difference.max() and abs(np.mean(exact) - np.mean(rounded)) < 0.05
    assert engine(weights="bfloat16").dtype == jnp.bfloat16
    with pytest.raises(UsageError, match="serve.weights: one of auto"):
        engine(weights="int4")


@pytest.mark.parametrize("recipe", SHAPES)
@pytest.mark.parametrize("cuts", [(7, 21, 40), (1, 2, 3, 40), (16, 32, 40)])
def test_pieces_leave_the_same_logits_as_the_whole(recipe, cuts):
    config, _, serving = model(recipe)
    tokens = random_tokens(50)
    cache = kv_cache.new_cache(config, 2, POSITIONS)
    for begin, end in zip((0, *cuts), cuts, strict=False):  # the second row takes nothing
        piece = np.full((2, 40), 5, np.int32)
        piece[0, : end - begin] = tokens[begin:end]
        _, cache = APPEND(config, serving, piece, jnp.array([end - begin, 0]), cache)
    assert cache.length.tolist() == [40, 0] and cache.previous.tolist() == [tokens[39], -1]
    expected = uncached_logits(recipe, tokens)
    for position in range(40, 50):
        fed = jnp.array([tokens[position], 0])
        logits, cache = step(config, serving, fed, cache, jnp.array([True, False]))
        np.testing.assert_allclose(logits[0], expected[position], atol=1e-4)


def test_a_ring_that_came_round_is_only_gone_on_from_at_its_end():
    scheduler = engine().scheduler

    def usable(prompt, ring, reach=100):
        scheduler._ring, scheduler.prefix_cache = ring, {3: (list(range(100)), reach)}
        slot, tokens = scheduler._choose_slot(prompt)
        assert (slot == 3) == (tokens > 0)
        return tokens

    prompt = [*range(100), 7, 8]
    assert usable(prompt, 17) == 100
    assert usable([*range(99), 1, 2, 3], 17) == 99  # position 99 stands where the window has just ended
    assert usable([*range(98), 1, 2, 3], 17) == 0
    assert usable([*range(98), 1, 2, 3], 100) == 98  # it has not come round
    assert usable(prompt, 17, reach=108) == 0
    assert usable(list(range(100)), 17) == 99  # the last token always runs again
    assert usable([*range(30), *[200] * 5], 128) == 0  # too little to be worth it


@pytest.mark.parametrize("cut", [16, 17, 18, 40, 60])
def test_a_prefix_taken_from_a_slot_gives_the_logits_of_a_fresh_prefill(cut):
    """At every length at which the scheduler allows it, with rings of 17 positions that may have come round."""
    own = engine(reuse=False)
    first = ids(cut + 1, seed=1)
    own.generate([Request(first, max_tokens=1, tools=False)])  # the slot now holds `cut + 1` positions
    tokens, reach = own.scheduler.prefix_cache[0]
    assert tokens == first and reach == cut + 1
    fresh, config = engine(reuse=False), CONFIG
    for n in range(max(1, cut - 2), cut + 2):
        allowed = reach <= 17 or reach <= n + 1
        prompt = [*first[:n], *ids(9, seed=2)]
        whole = np.ones(1, np.int32)
        row = own.programs.run(
            programs.copy_prefix, own.programs.state, 0 * whole, n * whole, np.array([first[n - 1]], np.int32)
        )
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, :8] = prompt[n:-1]
        row = own.programs.run(programs.prefill_chunk, row, tokens, 8 * whole)
        other = fresh.programs.run(programs.copy_prefix, fresh.programs.state, 0 * whole, 0 * whole, 0 * whole)
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(prompt) - 1] = prompt[:-1]
        _, other = APPEND(config, fresh.programs.params, padded, (len(prompt) - 1) * whole, other)
        logits = [
            step(config, fresh.programs.params, jnp.array([prompt[-1]]), c, jnp.array([True]))[0] for c in (row, other)
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
    assert [h.tokens for h in (talker, long)] == [alone.generate([h.request])[0].tokens for h in (talker, long)]


def test_the_next_turn_of_a_conversation_goes_on_from_its_slot():
    own, fresh = engine(), engine(reuse=False)
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
        history += [*handle.tokens, *ids(rng.randint(1, 8), seed=len(handles))]
    own.finish(handles)
    assert reused > 4 and own.running == own.waiting == 0
    for handle in handles:
        tokens = handle.tokens
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
        assert handle.tokens == alone.tokens
    assert own.running == own.waiting == 0 and not own.scheduler.prefills


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
    assert own.running == own.waiting == 0 and not own.scheduler.prefills
    assert own.step() == []
    assert len(own.generate([Request(ids(100, seed=2), max_tokens=5, tools=False)])[0].tokens) == 5
