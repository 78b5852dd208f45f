"""Rollouts: a prompt prefilled once for its group, weights replaced without compiling, sampled told from forced, and
models that never stop, never close a call or write what is no text."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from compilations import compilations
from small_model import CAPACITY, CONFIG, GREETING, QUESTION, SHAPES, learned, tokenizer

from jaxchat import model as gpt
from jaxchat.config import load_config
from jaxchat.engine import Engine, Request
from jaxchat.engine.device import Programs, prefill_chunk
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.tasks import get_task
from jaxchat.tasks.base import NO_FILES, Example, user
from jaxchat.tasks.gsm8k import GSM8K
from train.rl import RolloutWorker, advantages, sample_seed

WARM = {"temperature": 1.0, "top_k": 50, "max_tokens": 20}


def engine(**options):
    return Engine(CONFIG, learned(), tokenizer(), **({"slots": 8, "chunk": 4} | options))


def special(name):
    return tokenizer().special[f"<|{name}|>"]


def chain(successor):
    """Parameters of a model that after token a always says successor[a]: real weights of the usual shapes, in which
    every layer adds nothing."""
    params = jax.device_get(gpt.init_params(CONFIG, seed=0))
    embedding, unembedding = np.zeros_like(params["embedding"]), np.zeros_like(params["unembedding"])
    axes = np.eye(CONFIG.width, dtype=np.float32)
    for place, (token, follower) in enumerate(successor.items()):
        embedding[token] = axes[place]
        unembedding[follower] += 20 * axes[place]
    for name in ("q", "k", "v", "o", "proj"):
        params["blocks"][name] = np.zeros_like(params["blocks"][name])
    params["value_embedding"] = np.zeros_like(params["value_embedding"])
    return params | {"embedding": embedding, "unembedding": unembedding}


def count_prefills(monkeypatch):
    """Prompt tokens of every piece that is prefilled."""
    seen, real = [], Programs.run

    def counted(self, function, *arguments, **static):
        if function is prefill_chunk:
            seen.append(int(arguments[-1].sum()))
        return real(self, function, *arguments, **static)

    monkeypatch.setattr(Programs, "run", counted)
    return seen


@pytest.mark.parametrize("options", [{"slots": 1}, {"slots": 32}])
def test_groups_give_what_single_requests_give(options):
    own = engine(**options)
    requests = [own.chat_request(messages, **WARM) for messages in (QUESTION, GREETING)]
    requests.append(Request([tokenizer().bos], **WARM))  # nothing to prefill
    seeds = [[100 * i + s for s in range(5)] for i in range(3)]
    handles = [own.submit_group(r, group) for r, group in zip(requests, seeds, strict=True)]
    own.finish([h for group in handles for h in group])
    assert own.running == own.waiting == 0
    alone = engine(slots=1)
    for request, group, own_seeds in zip(requests, handles, seeds, strict=True):
        singles = alone.generate([dataclasses.replace(request, seed=seed) for seed in own_seeds])
        assert [(h.tokens, h.parts, h.stop_id) for h in group] == [(h.tokens, h.parts, h.stop_id) for h in singles]
    assert len({tuple(h.tokens) for h in handles[2]}) > 1  # samples differ


def test_every_prompt_is_prefilled_once_however_few_slots_are_free(monkeypatch):
    seen = count_prefills(monkeypatch)
    own = engine(slots=4)
    groups = [own.submit_group(own.text_request(f"prompt {n}", **WARM), range(7)) for n in range(11)]
    single = own.submit(own.text_request("alone", **WARM))  # among them
    more = own.submit_group(own.text_request("prompt 3", **WARM), range(3))
    own.finish([*(h for group in groups for h in group), single, *more])
    assert len(seen) == 13
    assert all(handle.prompt is None for group in groups for handle in group)  # nothing holds the keys any more


def test_a_group_fills_free_slots_together(monkeypatch):
    seen = count_prefills(monkeypatch)
    own = engine(slots=32)
    for n in range(8):
        own.submit_group(own.text_request(f"prompt {n}", stop=(), **WARM), range(4))
    own.step()
    starts = [own.running]
    while own.waiting:
        own.step()
        starts.append(own.running)
    assert starts[0] >= 8 and starts[-1] == 32 and len(seen) == 8


def test_new_weights_compile_nothing_and_change_the_answers():
    own = engine()
    groups = [own.chat_request(GREETING, temperature=0.0, max_tokens=12)] * 2
    run = lambda: [own.finish(own.submit_group(r, range(4)))[0].text for r in groups]  # noqa: E731
    before = run()
    a, b = special("assistant_start"), tokenizer().encode("b")[0]
    other = chain({a: b, b: b})
    own.load(other)
    own.load(learned())
    with compilations() as compiled:
        own.load(other)
        assert run() == ["b" * 12] * 2
        own.load(learned())
        assert run() == before and all(text.startswith("Hi 🙂 ") for text in before)
        assert compiled == []


def test_sampled_is_told_from_forced_and_the_stop_id_is_kept():
    own = engine()
    call, greeting = own.generate([own.chat_request(m, max_tokens=60) for m in (QUESTION, GREETING)])
    forced = [t for t, put in zip(call.tokens, call.forced, strict=True) if put]
    assert forced == [special("output_start"), *tokenizer().encode("42"), special("output_end")]
    assert call.stop_id == greeting.stop_id == special("assistant_end") and not any(greeting.forced)
    cut = own.generate([own.chat_request(QUESTION, max_tokens=n) for n in range(1, 14)])
    for n, result in enumerate(cut, 1):  # cut anywhere, also inside of what is forced
        assert (result.tokens, result.forced) == (call.tokens[:n], call.forced[:n]) and result.stop_id is None


# Models that misbehave


def rollouts(params, task, examples, samples=2, **more):
    """Answers of a model through the real path of RL, at a temperature that changes nothing."""
    sets = [f"model.{k}={getattr(CONFIG, k)}" for k in SHAPES]
    sets += ["rl.slots=4", "rl.temperature=0.001", *(f"rl.{k}={v}" for k, v in more.items())]
    config = resolve(load_config("nano", [*sets, "train.batch_tokens=128"]))
    made = RolloutWorker(config, None, task, tokenizer(), make_mesh(config.mesh, jax.devices()[:1]), CAPACITY)
    made.load(params)
    return made.sample(examples, [[sample_seed(1, p, s) for s in range(samples)] for p in range(len(examples))])


def words(text):
    return tokenizer().encode(text)


EXAMPLES = [Example([user("1+1?")], "2"), Example([user("2+2?")], "4")]


@functools.cache
def bad_models():
    start, call, close = special("assistant_start"), special("python_start"), special("python_end")
    out, nine = special("output_end"), words("9")[0]
    odd = next(t for t in range(256 + 20) if tokenizer().token_bytes(t) == b"\xff")
    return {
        "never stops": chain({start: nine, nine: nine}),
        "never closes its call": chain({start: call, call: nine, nine: nine}),
        "calls without end": chain({start: call, call: nine, nine: close, out: call}),
        "calls with nothing in it": chain({start: call, call: close, out: call}),
        "closes what is not open": chain({start: close, close: close}),
        "says invalid UTF-8": chain({start: odd, odd: odd}),
        "calls with invalid UTF-8": chain({start: call, call: odd, odd: close, out: special("assistant_end")}),
        "opens outputs itself": chain({start: special("output_start"), special("output_start"): nine, nine: nine}),
        "says nothing": chain({start: special("assistant_end")}),
        "begins the next question": chain({start: special("user_start")}),
    }


@pytest.mark.parametrize("name", bad_models())
def test_models_that_misbehave_are_counted_and_graded_wrong(name):
    task = GSM8K(NO_FILES) if list(bad_models()).index(name) % 2 else get_task("word_problems")
    answers = rollouts(bad_models()[name], task, EXAMPLES, max_tokens=40)
    stops = name in ("calls with invalid UTF-8", "says nothing", "begins the next question")
    assert not answers.correct.any() and (answers.stopped == stops).all()
    prompt = len(Engine(CONFIG, learned(), tokenizer(), slots=1).chat_request(EXAMPLES[0].prompt).tokens)
    made = answers.length - prompt
    assert (made == 40).all() if not stops else (made <= 40).all()
    assert not answers.sampled[..., :prompt].any()
    forced = (made - answers.sampled.sum(axis=2)).tolist()
    assert (np.array(forced) > 0).all() == ("calls with" in name)
    assert not advantages(answers.correct + 0.2 * answers.formatted).any()


def test_rollouts_repeat_and_carry_the_right_ids():
    """The learned question is answered right by every sample at temperature 1e-3; the other one by none."""
    task, examples = get_task("word_problems"), [Example(QUESTION, "42"), Example(GREETING, "42")]
    first, second = (rollouts(learned(), task, examples, samples=3, max_tokens=60) for _ in range(2))
    for name, array in vars(first).items():
        np.testing.assert_array_equal(array, vars(second)[name])
    answer = "That is it."  # without a number: the calculator's output is not part of the answer
    assert not first.correct.any()
    ids = first.tokens[0, 0, : first.length[0, 0]].tolist()
    assert ids[-1] == special("assistant_end") and tokenizer().decode(ids[:-1]).endswith(answer)
    drawn = first.sampled[0, 0, : len(ids)].tolist()
    at = ids.index(special("output_start"))
    assert drawn[at - 1] and not any(drawn[at : ids.index(special("output_end")) + 1]) and drawn[-1]
    assert not first.sampled[0, 0, len(ids) :].any() and not first.tokens[0, 0, len(ids) :].any()
