"""Laws of scoring: packed equals plain, whatever stands beside it; few shapes; long texts lose their left end."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import lively
from whole_run import on_devices

from jaxchat import model as gpt
from jaxchat.config import MeshConfig, ModelConfig
from jaxchat.engine.scoring import Scorer, Span, common_prefix, lengths, score_targets, tails
from jaxchat.scaling import resolve_model
from jaxchat.sharding import make_mesh

V, CONTEXT = 90, 128
SHAPES = {
    # a window of 9 is shorter than prefixes and than some continuations; two query heads share a kv head
    "jaxchat": ModelConfig(
        recipe="jaxchat", depth=2, seq_len=CONTEXT, vocab_size=V, width=32, n_heads=4, n_kv_heads=2, head_width=8,
        window_short=9,
    ),
    "classic": ModelConfig(
        recipe="classic", depth=1, seq_len=CONTEXT, vocab_size=V, width=32, n_heads=2, head_width=16,
        tie_embeddings=True,
    ),
}  # fmt: skip


@functools.cache
def model(recipe):
    config = resolve_model(SHAPES[recipe])
    return config, lively(config, 1, 0.3)


@functools.cache
def scorer_of(recipe, batch_rows=2):
    return Scorer(*model(recipe), batch_rows=batch_rows)


@functools.cache
def plain(recipe):
    config, params = model(recipe)
    return jax.jit(lambda tokens: gpt.logits(config, params, gpt.hidden(config, params, tokens)))


def log_probabilities(recipe, tokens):
    """(T, V) float64 from one text by itself."""
    padded = np.zeros((1, 2 * CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    z = np.asarray(plain(recipe)(padded), np.float64)[0]
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def questions(seed, count, longest=95):
    """Groups of one to five texts with a common beginning; the first of a group says what the model itself would."""
    draw, groups = np.random.default_rng(seed), []
    for _ in range(count):
        prefix = draw.integers(0, V, draw.integers(1, longest)).tolist()
        texts = [prefix + draw.integers(0, V, draw.integers(1, 30)).tolist() for _ in range(draw.integers(1, 6))]
        groups.append([Span(t, len(prefix), len(t)) for t in texts])
    return groups


def greedy(recipe, tokens, count):
    for _ in range(count):
        tokens = [*tokens, int(log_probabilities(recipe, tokens)[len(tokens) - 1].argmax())]
    return tokens


@pytest.mark.parametrize("batch_rows", [0, 2])
@pytest.mark.parametrize("recipe", SHAPES)
def test_a_span_scores_as_in_a_plain_forward_pass(recipe, batch_rows):
    groups = questions(0, 25)
    said = greedy(recipe, groups[0][0].tokens[:20], 4)
    groups += [[Span(said, 20, 24), Span([*said[:-1], (said[-1] + 1) % V], 20, 24), Span(said[:22], 20, 22)]]
    groups += [[Span(said, 1, 24)]]
    scorer = scorer_of(recipe, batch_rows)
    found = scorer.spans(groups)
    for group, scores in zip(groups, found, strict=True):
        for span, score in zip(group, scores, strict=True):
            logp = log_probabilities(recipe, span.tokens)
            at = [(i - 1, span.tokens[i]) for i in range(span.start, span.end)]
            assert score.loss == pytest.approx(-sum(logp[i, t] for i, t in at), rel=1e-5)
            assert score.best == all(logp[i].argmax() == t for i, t in at)
            assert score.count == span.end - span.start and score.mean == pytest.approx(score.loss / score.count)
    assert [s.best for s in found[-2]] == [True, False, True]
    assert any(room for _, _, room in scorer.shapes), "no row held continuations"
    # a batch of several rows takes what a program of its own would compile for
    assert any(not room for _, _, room in scorer.shapes) == (batch_rows == 0)


def test_a_score_does_not_depend_on_what_is_scored_with_it():
    groups = questions(3, 12, longest=60)
    scorer = scorer_of("jaxchat")
    together = scorer.spans(groups)
    alone = [scorer.spans([group])[0] for group in reversed(groups)][::-1]
    for a, b in zip(together, alone, strict=True):
        assert [s.loss for s in a] == pytest.approx([s.loss for s in b], rel=1e-6)
        assert [s.best for s in a] == [s.best for s in b]


def test_equal_options_score_equal_to_the_last_bit():
    texts = [[1, 2, 3, *tail] for tail in ([7, 8], [9], [7, 8], [7, 8, 9], [9])]
    (scores,) = scorer_of("jaxchat").spans([[Span(t, 3, len(t)) for t in texts]])
    assert scores[0] == scores[2] and scores[1] == scores[4] and scores[0] != scores[3]


def test_texts_with_nothing_in_common_are_scored_by_themselves():
    texts = [[1, 2, 3], [2, 2, 3], [3, 3]]
    (scores,) = scorer_of("jaxchat").spans([[Span(t, 1, len(t)) for t in texts]])
    for text, score in zip(texts, scores, strict=True):
        logp = log_probabilities("jaxchat", text)
        assert score.loss == pytest.approx(-sum(logp[i, t] for i, t in enumerate(text[1:])), rel=1e-5)


def test_an_empty_span_has_no_mean():
    ((score,),) = scorer_of("classic").spans([[Span([1, 2, 3], 3, 3)]])
    assert score.count == 0 and score.loss == 0 and score.best and np.isnan(score.mean)


@pytest.mark.parametrize("recipe", SHAPES)
def test_letters_have_the_log_probabilities_of_a_plain_forward_pass(recipe):
    draw = np.random.default_rng(5)
    prompts = [draw.integers(0, V, n).tolist() for n in (1, 3, 64, 65, 100, 128)]
    letters = [[3, 4], [5], [6, 7, 8], [9, 10, 11, 12, 13], [3, 4], [89, 0]]
    done = []
    found, cropped = scorer_of(recipe).letters(prompts, letters, done.append)
    assert cropped == 0 and sum(done) == len(prompts)
    for prompt, ids, scores in zip(prompts, letters, found, strict=True):
        assert scores == pytest.approx(log_probabilities(recipe, prompt)[len(prompt) - 1, ids].tolist(), abs=2e-5)


def test_every_length_goes_through_at_most_twelve_programs():
    config = resolve_model(dataclasses.replace(SHAPES["classic"], seq_len=300))
    scorer = Scorer(config, gpt.init_params(config, 0), batch_rows=1)
    before = score_targets._cache_size()
    for seed in range(8):
        scorer.spans(questions(seed, 10, longest=260))
    assert 4 <= len(scorer.shapes) <= 2 * len(lengths(300)) == 8
    assert score_targets._cache_size() - before <= len(scorer.shapes)


@pytest.mark.parametrize("seq_len", [1, 40, 64, 100, 256, 1000, 2048, 4096, 131072])
def test_there_are_at_most_six_lengths_and_the_context_fits(seq_len):
    found = lengths(seq_len)
    assert len(found) <= 6 and found == sorted(set(found)) and found[-1] >= seq_len
    assert all(tails(T) in (32, 64, 128) for T in found)


def test_long_texts_lose_their_left_end_and_are_counted():
    scorer, draw = scorer_of("jaxchat"), np.random.default_rng(7)
    prefix = draw.integers(0, V, 150).tolist()
    long = [[*prefix, 1, 2], [*prefix, 3]]
    (scores,) = scorer.spans([[Span(t, 150, len(t)) for t in long]])
    assert [s.cropped for s in scores] == [152 - CONTEXT] * 2
    short = [[*prefix[152 - CONTEXT :], 1, 2], [*prefix[152 - CONTEXT :], 3]]
    (expected,) = scorer.spans([[Span(t, CONTEXT - 2, len(t)) for t in short]])
    assert [s.loss for s in scores] == [s.loss for s in expected]
    assert scorer.letters([[*prefix, 5]], [[1, 2]])[1] == 1
    # a span that is longer than the context itself
    ((all_of_it,),) = scorer.spans([[Span(prefix, 1, 150)]])
    assert all_of_it.count == CONTEXT - 1 and all_of_it.cropped == 150 - CONTEXT
    # without cropping, as nanochat
    ((whole,),) = Scorer(*model("jaxchat"), batch_rows=1, context=0).spans([[Span(long[0], 150, 152)]])
    logp = log_probabilities("jaxchat", long[0])
    assert whole.loss == pytest.approx(-logp[149, 1] - logp[150, 2], rel=1e-5) and whole.cropped == 0


def test_nothing_to_score_is_no_error():
    scorer = scorer_of("classic")
    assert scorer.spans([]) == [] and scorer.spans([[]]) == [[]] and scorer.letters([], []) == ([], 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=4))
def test_common_prefix(sequences):
    expected = 0
    while all(len(s) > expected and s[expected] == sequences[0][expected] for s in sequences):
        expected += 1
    assert common_prefix(sequences) == expected


def spread(devices):
    """Scores and letters on a mesh, for the test below, which runs this file by itself."""
    config, params = model("jaxchat")
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    scorer = Scorer(config, params, mesh, batch_rows=4)
    groups = questions(11, 9, longest=30)
    prompts = [group[0].tokens for group in groups]
    asked = prompts, [[1, 2, 3]] * len(prompts)
    letters, _ = scorer.letters(*asked)
    found = [[[s.loss, s.best] for s in scores] for scores in scorer.spans(groups)], letters
    with compilations() as compiled:
        again = Scorer(config, params, mesh, batch_rows=4)  # a spot check later
        assert again.letters(*asked)[0] == letters and len(again.spans(groups)) == len(groups) and not compiled
    return found


def test_rows_are_spread_over_devices():
    one, three = on_devices(3, "test_scoring.py")
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(three), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_bfloat16_is_near():
    config, params = model("classic")
    groups = questions(2, 4, longest=40)
    exact, near = (Scorer(config, params, batch_rows=1, dtype=d).spans(groups) for d in (jnp.float32, jnp.bfloat16))
    for a, b in zip(exact, near, strict=True):
        assert [s.mean for s in a] == pytest.approx([s.mean for s in b], rel=0.05)
    assert any(x.loss != y.loss for a, b in zip(exact, near, strict=True) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    assert jax.device_count() == 3
    print(json.dumps([spread(1), spread(3)]))
