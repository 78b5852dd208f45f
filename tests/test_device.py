"""Laws of decoding: cached equals uncached, rows are independent, and rows stop, pause and are forced on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import lively

from jaxchat import kv_cache
from jaxchat import model as gpt
from jaxchat.config import ModelConfig
from jaxchat.engine import device as engine
from jaxchat.scaling import resolve_model

V, CAPACITY = 97, 64
SHAPES = {
    # windows of 5 are shorter than every prompt; two query heads share a kv head
    "modern": ModelConfig(
        recipe="modern", depth=4, seq_len=CAPACITY, vocab_size=V, width=32, n_heads=4, n_kv_heads=2, head_width=8,
        window_short=5,
    ),
    "jaxchat": ModelConfig(
        recipe="jaxchat", depth=3, seq_len=CAPACITY, vocab_size=V, width=32, n_heads=4, n_kv_heads=2, head_width=8,
        window_short=5,
    ),
    "classic": ModelConfig(
        recipe="classic", depth=3, seq_len=CAPACITY, vocab_size=V, width=32, n_heads=4, n_kv_heads=1, head_width=8,
        window_pattern="SL", window_short=5, tie_embeddings=True,
    ),
}  # fmt: skip


@functools.cache
def model(recipe):
    """(config, params, serving params), every weight away from its initial value."""
    config = resolve_model(SHAPES[recipe])
    params = lively(config, 1, 0.2)
    if config.smear:
        params["smear_scale"] = jnp.float32(0.7)
    return config, params, kv_cache.serving_params(config, params, jnp.float32)


@functools.cache
def uncached(recipe):
    config, params, _ = model(recipe)
    return jax.jit(lambda tokens: gpt.logits(config, params, gpt.hidden(config, params, tokens)))


def uncached_logits(recipe, tokens):
    """(T, V) by the training model, which is causal: padding on the right changes nothing (and compiles once)."""
    padded = np.zeros((1, CAPACITY), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(uncached(recipe)(padded))[0, : len(tokens)]


def random_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(3, V, length).tolist()


def admit(recipe, slots, prompts, places, remaining=CAPACITY, bucket=32, stop=(), **lists):
    """Start `prompts` in the slots `places`; greedy without stop or pause where not given."""
    config, _, serving = model(recipe)
    tokens = np.zeros((len(prompts), bucket), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt[:bucket]
    length = np.array([len(p) for p in prompts], np.int32)
    rows = engine.blank_rows(len(prompts), V)
    settings = {"status": engine.RUNNING, "token": [p[-1] for p in prompts], "remaining": remaining} | lists
    for name, values in settings.items():
        rows[name][:] = values
    for i, ids in enumerate(stop):
        rows["stop"][i, : len(ids)] = ids
    return engine.admit(config, serving, slots, tokens, length, np.array(places, np.int32), rows)


def fresh(recipe, slots=4):
    return engine.new_slots(model(recipe)[0], slots, CAPACITY, jnp.float32)


def set_status(slots, slot, status, forced=()):
    queue = np.full((1, engine.FORCED + 1), engine.NO_TOKEN, np.int32)
    queue[0, : len(forced)] = forced
    allowed = np.full((1, engine.words(V)), engine.ALL, np.uint32)
    return engine.set_status(slots, np.array([slot]), np.array([status], np.int32), queue, allowed)


def chunk(recipe, slots, rows=4, bucket=CAPACITY, steps=8):
    config, _, serving = model(recipe)
    slots, made = engine.decode_chunk(config, serving, slots, np.array([steps]), rows, bucket, steps, CAPACITY)
    return slots, np.asarray(made[0]), np.asarray(made[1])


@functools.partial(jax.jit, static_argnums=0)
def step(config, serving, tokens, cache, active):
    """Logits (R, V) after one more token of each active row, and the cache with it."""
    x, cache = kv_cache.append(config, serving, tokens[:, None], active.astype(jnp.int32), cache)
    return gpt.logits(config, serving, x[:, 0]), cache


def greedy_continuation(recipe, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(uncached_logits(recipe, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("recipe", SHAPES)
@pytest.mark.parametrize("prompt_length", [1, 2, 7, 21])
def test_cached_logits_equal_uncached_ones_at_every_position(recipe, prompt_length):
    config, _, serving = model(recipe)
    tokens = random_tokens(40)
    slots = admit(recipe, fresh(recipe), [tokens[:prompt_length]], [2])
    active = jnp.arange(4) == 2
    cache, cached = slots.cache, []
    for token in tokens[prompt_length - 1 :]:
        logits, cache = step(config, serving, jnp.full(4, token), cache, active)
        cached.append(np.asarray(logits[2]))
    expected = uncached_logits(recipe, tokens)[prompt_length - 1 :]
    np.testing.assert_allclose(np.array(cached), expected, atol=1e-4)
    assert np.abs(expected[1:] - expected[:-1]).max() > 0.1  # positions do differ


@pytest.mark.parametrize("recipe", SHAPES)
def test_prefill_equals_the_uncached_model_and_fills_the_rings(recipe):
    config, _, serving = model(recipe)
    prompts = [random_tokens(n, seed=n) for n in (1, 6, 13, 32)]
    padded = np.full((4, 32), 5, np.int32)
    for i, prompt in enumerate(prompts):
        padded[i, : len(prompt)] = prompt
    length = jnp.array([len(p) for p in prompts])
    append = jax.jit(kv_cache.append, static_argnums=0, static_argnames="empty")
    for empty in (True, False):
        cache = kv_cache.new_cache(config, 4, CAPACITY)
        x, cache = append(config, serving, padded, length, cache, empty=empty)
        logits = gpt.logits(config, serving, x[jnp.arange(4), length - 1])
        more, cache = step(config, serving, jnp.full(4, 7), cache, jnp.array([True, True, True, False]))
        for i, prompt in enumerate(prompts):
            np.testing.assert_allclose(logits[i], uncached_logits(recipe, prompt)[-1], atol=1e-4)
            if i < 3:
                np.testing.assert_allclose(more[i], uncached_logits(recipe, [*prompt, 7])[-1], atol=1e-4)
        assert cache.length.tolist() == [2, 7, 14, 32]


def test_windowed_layers_keep_only_their_window():
    assert kv_cache.layer_capacity(model("modern")[0], 48) == [6, 6, 6, 48]
    assert kv_cache.layer_capacity(model("modern")[0], 4) == [4] * 4


@pytest.mark.parametrize("recipe", SHAPES)
@pytest.mark.parametrize("bucket", [32, CAPACITY])
def test_greedy_chunks_follow_the_uncached_model(recipe, bucket):
    prompt = random_tokens(9)
    slots = admit(recipe, fresh(recipe), [prompt], [0])
    slots, first, _ = chunk(recipe, slots, rows=1, bucket=bucket)
    slots, second, _ = chunk(recipe, slots, rows=1, bucket=bucket)
    assert [*first[0], *second[0]] == greedy_continuation(recipe, prompt, 16)


def test_a_row_does_not_depend_on_slot_neighbours_or_row_count():
    prompt, others = random_tokens(11, seed=3), [random_tokens(n, seed=n) for n in (4, 20, 30)]
    sampling = {"seed": [9], "temperature": [0.9], "top_k": [40], "top_p": [0.95]}
    outcomes = set()
    for slot, rows, bucket in ((0, 1, 32), (0, 4, CAPACITY), (1, 2, 32), (3, 4, CAPACITY)):
        for neighbours in (False, True):
            slots = fresh("modern")
            if neighbours:
                free = [r for r in range(4) if r != slot]
                hot = {"seed": [1, 2, 3], "temperature": [2.0, 1.0, 0.0]}
                slots = admit("modern", slots, others, free, **hot)
            slots = admit("modern", slots, [prompt], [slot], **sampling)
            _, tokens, _ = chunk("modern", slots, rows, bucket)
            outcomes.add(tuple(tokens[slot].tolist()))
    assert len(outcomes) == 1


def test_logits_agree_over_row_counts():
    config, _, serving = model("modern")
    prompts = [random_tokens(n, seed=n) for n in (5, 17, 8, 30)]
    state = admit("modern", fresh("modern"), prompts, [0, 1, 2, 3])
    whole, _ = step(config, serving, state.rows["token"], state.cache, jnp.ones(4, bool))
    for rows in (1, 2):
        part = jax.tree.map(lambda a, rows=rows: a[:rows], state)
        logits, _ = step(config, serving, part.rows["token"], part.cache, jnp.ones(rows, bool))
        np.testing.assert_allclose(np.asarray(logits), np.asarray(whole[:rows]), atol=1e-4)


def test_rows_stop_at_stop_ids_limits_and_capacity():
    prompt = random_tokens(9)
    wanted = greedy_continuation("modern", prompt, 8)
    at = next(i for i in range(1, 8) if wanted[i] not in wanted[:i])
    long_prompt = random_tokens(CAPACITY - 2, seed=4)
    prompts = [prompt, prompt, long_prompt, prompt]
    slots = fresh("modern")
    stop = [(wanted[at],), (), (), ()]
    slots = admit("modern", slots, prompts, [0, 1, 2, 3], remaining=[60, 3, 60, 60], bucket=CAPACITY, stop=stop)
    slots, tokens, status = chunk("modern", slots)
    assert status.tolist() == [engine.STOPPED, engine.FULL, engine.FULL, engine.RUNNING]
    nothing = engine.NO_TOKEN
    assert tokens[0].tolist() == wanted[: at + 1] + [nothing] * (7 - at)
    assert tokens[1].tolist() == wanted[:3] + [nothing] * 5
    assert tokens[2].tolist() == greedy_continuation("modern", long_prompt, 3) + [nothing] * 5  # one beyond the cache
    assert tokens[3].tolist() == wanted
    assert np.asarray(slots.cache.length).tolist() == [len(prompt) + at, len(prompt) + 2, CAPACITY, len(prompt) + 7]


def test_a_pause_waits_and_forced_tokens_come_next_and_do_not_stop():
    prompt = random_tokens(9)
    wanted = greedy_continuation("modern", prompt, 8)
    mark = wanted[2]
    at = wanted.index(mark)
    forced = [mark, 50, 51]  # a forced id neither pauses nor stops
    slots = admit("modern", fresh("modern"), [prompt], [1], pause=[mark], stop=[(50,)])
    slots, tokens, status = chunk("modern", slots, rows=2)
    assert status[1] == engine.PAUSED and tokens[1].tolist() == wanted[: at + 1] + [engine.NO_TOKEN] * (7 - at)
    slots, tokens, status = chunk("modern", slots, rows=2)
    assert status[1] == engine.PAUSED and set(tokens[1]) == {engine.NO_TOKEN}
    slots = set_status(slots, 1, engine.RUNNING, forced)
    slots, tokens, status = chunk("modern", slots, rows=2, steps=5)
    history = [*prompt, *wanted[: at + 1], mark, 50, 51]
    assert tokens[1].tolist() == [mark, 50, 51, *greedy_continuation("modern", history, 2)]


def test_swapped_and_released_slots():
    prompt = random_tokens(9)
    wanted = greedy_continuation("modern", prompt, 8)
    slots = admit("modern", fresh("modern"), [prompt], [3])
    slots, first, _ = chunk("modern", slots, steps=4)
    slots = engine.swap(slots, np.array([[3, 0]]))
    slots, second, status = chunk("modern", slots, steps=4)
    assert [*first[3], *second[0]] == wanted and status[3] == engine.IDLE
    slots, third, status = chunk("modern", set_status(slots, 0, engine.IDLE), steps=4)
    assert status[0] == engine.IDLE and set(third.ravel()) == {engine.NO_TOKEN}


def test_padding_prompts_touch_no_slot():
    prompt = random_tokens(9)
    slots = admit("modern", fresh("modern"), [prompt] * 4, [0, 1, 2, 3])
    before = [np.array(leaf) for leaf in jax.tree.leaves(slots)]
    after = admit("modern", slots, [random_tokens(5), random_tokens(6)], [4, 4])
    for a, b in zip(before, jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
