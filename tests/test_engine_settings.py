"""Repetition penalty, log-probabilities, stop texts, scores; clients that take turns; weights of 8 bits."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CAPACITY, CONFIG, GREETING, QUESTION, learned, tokenizer

from jaxchat import model as gpt
from jaxchat.engine import Engine, QueueFull, Request
from jaxchat.engine import device as programs
from jaxchat.engine.device import SHORTEST, decode_chunk
from jaxchat.errors import UsageError
from jaxchat.low_precision import dot, quantize_int8


def engine(**options):
    return Engine(CONFIG, learned(), tokenizer(), **({"slots": 4} | options))


@functools.cache
def shared():
    return engine()


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


@pytest.mark.parametrize("lookahead", [False, True])
def test_log_probabilities_are_the_models_own(lookahead):
    own = engine(lookahead=lookahead, chunk=3)
    asked = Request(
        ids(9, seed=2), max_tokens=10, temperature=1.4, seed=5, logprobs=4, tools=False, repetition_penalty=1.3
    )
    result, silent = own.generate([asked, Request(ids(9, seed=3), max_tokens=10, tools=False)])
    expected = log_softmax(logits([*asked.tokens, *result.tokens]))[8:-1]
    assert silent.logprobs is None and [t.id for t in result.logprobs] == result.tokens
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
@pytest.mark.parametrize("options", [{"chunk": 2}, {"lookahead": True}])
def test_an_answer_ends_before_a_stop_text(stops, text, options):
    own = engine(**options)
    events = list(own.events(own.chat_request(GREETING, stop_texts=stops, logprobs=0)))
    assert "".join(e.text for e in events) == text and events[-1].finish_reason == "stop"
    shown = tokenizer().decode([t.id for e in events for t in e.tokens])
    assert shown.startswith(text) and len(shown) < len(text) + 3
    assert own.running == 0
    handle = own.submit(own.chat_request(GREETING, stop_texts=stops))
    result = own.finish([handle])[0]
    assert result.text == text and result.completion_tokens == handle.made >= len(result.tokens)


def test_a_stop_text_inside_a_tool_call_does_not_end_it():
    result = shared().generate([shared().chat_request(QUESTION, stop_texts=("30", "42", "is it"), max_tokens=60)])[0]
    assert [part["text"] for part in result.parts] == ["12+30", "42", "That "]


def test_scores_are_the_models_own():
    batch = [ids(n, seed=n) for n in (1, 5, CAPACITY, min(SHORTEST, CAPACITY) - 1)] + [[]]
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
    decode = own._programs.decode
    own._programs.decode = lambda count, bucket: rows.append(count) or decode(count, bucket)
    compiled = [static["rows"] for function, static, _ in own._programs._calls() if function is decode_chunk]
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
    assert own.cache_usage == 0 and result.completion_tokens == 12 and result.prompt_tokens == 20


def test_quantized_products_are_close_and_exact_where_they_can_be():
    draw = np.random.default_rng(0)
    weight, x = draw.standard_normal((64, 48)).astype(np.float32), draw.standard_normal((5, 64)).astype(np.float32)
    packed = quantize_int8(jnp.asarray(weight))
    assert packed.values.dtype == jnp.int8 and packed.scale.shape == (48,)
    steps = np.abs(weight).max(0) / 127
    assert (np.abs(packed.values * packed.scale - weight) <= steps / 2 * 1.001).all()
    np.testing.assert_allclose(dot(x, packed), x @ (packed.values * packed.scale), rtol=1e-4, atol=1e-4)
    exact = np.round(draw.uniform(-127, 127, (64, 3))).astype(np.float32)
    exact[0] = 127
    np.testing.assert_allclose(dot(x, quantize_int8(jnp.asarray(exact))), x @ exact, rtol=1e-5, atol=1e-2)


def test_a_model_of_8_bit_weights_says_nearly_the_same():
    small = engine(weights="int8")
    assert small.chat(GREETING) == "Hi 🙂 안녕!"
    text = ids(60, seed=7)
    exact, rounded = ([s.logprob for s in own.score([text])[0][1:]] for own in (shared(), small))
    difference = np.abs(np.array(exact) - rounded)
    assert 0 < difference.max() and abs(np.mean(exact) - np.mean(rounded)) < 0.05
    assert engine(weights="bfloat16").chat(GREETING) == "Hi 🙂 안녕!"
    with pytest.raises(UsageError, match="serve.weights: one of auto"):
        engine(weights="int4")
