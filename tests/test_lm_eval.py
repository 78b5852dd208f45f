"""The adapter for lm-evaluation-harness, under the harness itself; skipped where that is not installed."""

import pytest

pytest.importorskip("lm_eval", reason="needs pip install lm-eval")

from lm_eval.api.instance import Instance
from small_model import CAPACITY, GREETING, learned, tokenizer, write_run

from jaxchat.engine.scoring import Scorer, Span
from jaxchat.interop.lm_eval import JaxChat


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run")).root


def asked(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_log_likelihoods_are_the_scorers(run_dir):
    model, encode = JaxChat(str(run_dir)), tokenizer().encode
    found = model.loglikelihood(asked("loglikelihood", ("Tom has", " 12"), ("Tom has", " 30 apples"), ("", "Tom")))
    scorer = Scorer(model.config, learned())
    for (value, best), (context, text) in zip(
        found, (("Tom has", " 12"), ("Tom has", " 30 apples"), ("", "Tom")), strict=True
    ):
        whole = [tokenizer().bos, *encode(context + text)]
        ((score,),) = scorer.spans([[Span(whole, 1 + len(encode(context)), len(whole))]])
        assert value == pytest.approx(-score.loss, rel=1e-5) and best == score.best


def test_a_whole_text_longer_than_the_context(run_dir):
    model, text = JaxChat(str(run_dir)), "Tom has 12 apples and buys 30 more. " * 8
    ids = tokenizer().encode(text)
    assert len(ids) > CAPACITY
    (value,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert -20 * len(ids) < value < 0
    (short,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", ("Tom has",)))
    ((score,),) = Scorer(model.config, learned()).spans(
        [[Span([tokenizer().bos, *tokenizer().encode("Tom has")], 1, 1 + len(tokenizer().encode("Tom has")))]]
    )
    assert short == pytest.approx(-score.loss, rel=1e-5)


def test_answers_end_before_the_first_stop(run_dir):
    model = JaxChat(str(run_dir), chat=True)
    question = GREETING[0]["content"]
    whole, cut, short = model.generate_until(
        asked("generate_until", (question, {"until": ["\n"], "max_gen_toks": 40}), (question, {"until": ["", "🙂"]}),
              (question, {"until": ["x"], "max_gen_toks": 2}))
    )  # fmt: skip
    assert whole == "Hi 🙂 안녕!" and cut == "Hi " and whole.startswith(short) and len(short) <= 2
