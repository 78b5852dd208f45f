"""Two runs side by side: pairs, intervals and p by hand and against scipy; two real tiny runs through the command."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
import small_model
from whole_run import arguments, finish, start

import launch
from jaxchat import model as gpt
from jaxchat.engine.scoring import Scorer
from jaxchat.errors import DataError
from jaxchat.run_dir import RunDir, read_json, write_json
from train import compare as comparison
from train.compare import mcnemar, share_interval
from train.loop import ratio_error


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (1, 8), (5, 5), (30, 12), (400, 300), (3000, 3300)])
def test_mcnemar_is_the_exact_binomial_test(a, b):
    expected = scipy.stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9) == mcnemar(b, a)
    assert mcnemar(1, 8) == pytest.approx(20 / 512)


def test_interval_of_two_paired_shares():
    """By hand for 100 questions, 8 and 20 only one got right: (20.5 - 8.5) / 102 +- 1.96 sqrt(29 - 144 / 102) / 102."""
    low, high = share_interval(8, 20, 100)
    assert ((low + high) / 2, (high - low) / 2) == pytest.approx(
        (12 / 102, 1.959964 * math.sqrt(29 - 144 / 102) / 102), rel=1e-6
    )
    low, high = share_interval(0, 0, 50)
    assert -0.1 < low < 0 < high < 0.1, "two that agree on 50 questions need not agree on all"
    assert share_interval(3, 9, 40) == pytest.approx([-x for x in reversed(share_interval(9, 3, 40))])


def test_error_of_a_ratio():
    rng = np.random.default_rng(0)
    d, s = rng.normal(0.3, 1.0, 400), rng.uniform(1, 9, 400)
    drawn = rng.multinomial(400, np.full(400, 1 / 400), 10_000)
    assert ratio_error(d, s) == pytest.approx(((drawn @ d) / (drawn @ s)).std(), rel=0.1)
    assert ratio_error(d, np.ones(400)) == pytest.approx(d.std(ddof=1) / 20)
    assert ratio_error(d[:1], s[:1]) is None and ratio_error(s, 2 * s) == 0


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40, 200])
def test_windows_score_every_token_once_with_half_a_context_before(length):
    ids, scored = list(range(length)), []
    for span in comparison.windows(ids, 16):
        assert len(span.tokens) <= 16 and 1 <= span.start < span.end == len(span.tokens)
        assert span.start >= 8 or span.tokens[0] == 0
        assert span.tokens == ids[span.tokens[0] : span.tokens[-1] + 1]
        scored += span.tokens[span.start :]
    assert scored == ids[1:]


def test_nats_of_a_document_are_the_models_own():
    """Against a plain forward pass over each window; what pads it on the right is not seen."""
    tokenizer, config = small_model.tokenizer(), small_model.CONFIG
    params, key = gpt.init_params(config, seed=0), jax.random.key(1)  # without noise every token is equally likely
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(key, p.shape), params)
    texts = ["Tom has 12 apples.", "Tom has 12 apples and buys 30 more. How many? " * 9, "안녕 🙂"]
    found = comparison.document_nats(Scorer(config, params, batch_rows=4), tokenizer, texts, config.seq_len)
    spans = [comparison.windows([tokenizer.bos, *tokenizer.encode(text)], config.seq_len) for text in texts]
    ids = np.zeros((sum(map(len, spans)), config.seq_len), np.int32)
    for row, span in zip(ids, (span for group in spans for span in group), strict=True):
        row[: len(span.tokens)] = span.tokens
    logits = jax.jit(lambda p, x: gpt.logits(config, p, gpt.hidden(config, p, x)))(params, ids)
    nll = -jax.nn.log_softmax(logits[:, :-1, : tokenizer.vocab_size])
    nll = np.take_along_axis(np.asarray(nll), ids[:, 1:, None], axis=2)[..., 0]
    rows = iter(nll)
    for group, nats in zip(spans, found, strict=True):
        assert nats == pytest.approx(sum(next(rows)[s.start - 1 : s.end - 1].sum() for s in group), rel=1e-4)
    assert [len(group) for group in spans] == [1, 4, 1] and found[1] / found[0] > 5


def test_only_questions_of_both_are_paired():
    first = {"a": True, "b": False, "c": True, "d": True}
    second = {"b": True, "c": False, "d": True, "e": True}
    found = comparison.paired(first, second)
    assert (found["n"], found["only_first"], found["only_second"], found["p"]) == (3, 1, 1, 1.0)
    assert found["values"] == [pytest.approx(2 / 3)] * 2 and found["difference"] == 0
    with pytest.raises(DataError, match="no question was put to both"):
        comparison.paired({"a": True}, {"b": True})


def test_a_question_that_reads_otherwise_is_another_one(tmp_path):
    rows = [{"index": 0, "prompt": [{"role": "user", "content": "1+1"}], "expected": "2", "right": True},
            {"index": 1, "chosen": "A", "expected": "B", "right": False}]  # fmt: skip
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = comparison.answers(path)
    assert list(one.values()) == [True, False]
    path.write_text(json.dumps(rows[0] | {"prompt": "1+2"}) + "\n" + json.dumps(rows[1] | {"chosen": "C"}) + "\n")
    assert len(one.keys() & comparison.answers(path).keys()) == 1
    path.write_text("".join(json.dumps(row | {"question": "0a"}) + "\n" for row in rows))
    assert not one.keys() & comparison.answers(path).keys()
    for damage in ("{", "[]\n", '{"index": 1}\n'):
        path.write_text(damage)
        with pytest.raises(DataError, match="x.jsonl: damaged"):
            comparison.answers(path)


# Two real runs


@pytest.fixture(scope="module")
def second(corpus, finished, tmp_path_factory):
    """Another tokenizer and fewer steps. Its chat exams are the first run's, less a question, one judged otherwise."""
    run_dir = tmp_path_factory.mktemp("runs") / "second"
    sets = ["model.vocab_size=320", "train.steps=6", "eval.sample_tokens=4"]
    more = [part for override in sets for part in ("--set", override)]
    code, _, err = finish(start(arguments(corpus, run_dir, "--stages", "eval", *more)))
    assert code == 0, err
    shutil.copy(finished / "eval" / "sft.json", run_dir / "eval")
    for exam in ("word_problems", "identity"):
        rows = read_rows(finished, exam)[1:]
        rows[0]["right"] = not rows[0]["right"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / "eval" / f"sft_{exam}.jsonl").write_text(text, encoding="utf-8")
    return run_dir


def read_rows(run, exam):
    return [json.loads(line) for line in (run / "eval" / f"sft_{exam}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def compared(finished, second):
    return comparison.collect(comparison.side(str(finished)), comparison.side(str(second)))


def test_the_same_documents_are_read_by_both(finished, second, compared):
    found = compared["bits_per_byte"]["base"]
    held_out = read_json(finished / "stages.json")["prepare"]["facts"]["val"]
    assert found["documents"] == held_out["documents"] and found["bytes"] == held_out["bytes"]
    assert found["documents"] == 1 and found["interval"] is None and found["note"] == "", "one says nothing of many"
    assert found["difference"] == pytest.approx(found["values"][1] - found["values"][0])
    for run, value in zip((finished, second), found["values"], strict=True):
        own = read_json(run / "eval" / "base.json")["tasks"]["bits_per_byte"]["text"]["bits_per_byte"]
        assert value == pytest.approx(own, rel=0.1), "the rows of stage eval cut documents elsewhere"
    assert found["difference"] > 0.2, "a quarter of the steps should be seen"
    assert list(compared["bits_per_byte"]) == ["base"], "only what both have trained"


def test_the_same_questions_are_paired(finished, second, compared):
    for exam in ("word_problems", "identity"):
        found = compared["exams"]["sft"][exam]
        right = [{row["index"]: row["right"] for row in read_rows(run, exam)} for run in (finished, second)]
        assert found["n"] == len(right[1]) == len(right[0]) - 1 == 3
        assert found["values"] == [sum(one[i] for i in right[1]) / 3 for one in right]
        assert found["only_first"] + found["only_second"] == 1 and found["p"] == 1.0
    assert list(compared["exams"]) == ["sft"]


def test_settings_speed_time_and_cost(compared):
    assert compared["config"]["model.vocab_size"] == [400, 320] and compared["config"]["train.steps"] == [24, 6]
    assert "model.depth" not in compared["config"]
    assert all(one["tokens_per_second"] > 0 for one in compared["speed"]["base"])
    assert compared["seconds"]["report"][1] is None and compared["cost_usd"] == [0, 0]


def test_the_command_prints_tables_or_one_object(finished, second, compared, capsys):
    text = comparison.text(compared)
    for words in (f"A: {finished}", "BASE", "SFT word_problems", "model.vocab_size", "nothing"):
        assert words in text, words
    assert launch.main(["--compare", str(finished), str(second), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["exams"] == json.loads(json.dumps(compared["exams"]))
    assert found["bits_per_byte"]["base"]["values"] == pytest.approx(compared["bits_per_byte"]["base"]["values"])
    for stage, scores in found["bits_per_byte"].items():
        assert f"{scores['difference']:+.4f}" in text, stage


@pytest.fixture(scope="module")
def many(finished, second, tmp_path_factory):
    """The two runs, had their text been many short documents of which half is held out."""
    path = tmp_path_factory.mktemp("text") / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"The cat sees the river number {i}."}) + "\n" for i in range(40)))
    return [_with(comparison.side(str(run)), source=f"files:{path}", val_fraction=0.5) for run in (finished, second)]


def _with(side, **data):
    config = dataclasses.replace(side.config, data=dataclasses.replace(side.config.data, **data))
    return dataclasses.replace(side, config=config)


def test_intervals_come_from_documents_in_pairs(many):
    found = comparison.bits_per_byte(*many, ["base"])["base"]
    low, high = found["interval"]
    assert low < found["difference"] < high and found["documents"] > 10
    assert high - low < abs(found["difference"]), "alike documents differ alike, in pairs"
    turned = comparison.bits_per_byte(*reversed(many), ["base"])["base"]
    assert turned["difference"] == pytest.approx(-found["difference"])
    assert turned["interval"] == pytest.approx((-high, -low))


def test_documents_that_the_second_run_may_have_trained_on_are_left_out(many):
    a, b = many
    texts, note = comparison.documents(a, b)
    hashes = sorted(map(comparison.document_hash, texts))
    assert max(hashes) < 0.5 and note == ""
    kept, note = comparison.documents(a, _with(b, val_fraction=(hashes[2] + hashes[3]) / 2))
    assert len(kept) == 3 and note.startswith(f"{len(texts) - 3} documents")
    kept, note = comparison.documents(a, _with(b, val_fraction=0.0))
    assert kept == texts and "may have been trained" in note


def test_what_cannot_be_compared_is_one_clear_line(finished, tmp_path, capsys):
    def refused(*runs):
        code = launch.main(["--compare", *map(str, runs)])
        return code, capsys.readouterr().err.splitlines()[-1]

    empty, bare = tmp_path / "empty", tmp_path / "bare"
    empty.mkdir()
    bare.mkdir()
    shutil.copy(finished / "config.toml", bare)
    assert refused(finished, finished / ".." / finished.name)[0] == 2
    assert "same directory" in refused(finished, finished)[1]
    for run, words in ((tmp_path / "none", "no such directory"), (empty, "not a run directory"),
                       (bare, "neither checkpoints nor exams")):  # fmt: skip
        for pair in ((finished, run), (run, finished)):
            code, line = refused(*pair)
            assert code == 3 and line.startswith("error: ") and words in line and str(run) in line
    write_json(RunDir(bare).eval("rl"), {"tasks": {}})
    code, line = refused(bare, finished)
    assert code == 3 and "nothing in common" in line


def test_exams_are_compared_where_the_text_is_gone(finished, tmp_path, capsys):
    """A run that was copied without its data still has its exams."""
    other = shutil.copytree(finished, tmp_path / "other", ignore=shutil.ignore_patterns("data", "base", "sft", "rl"))
    assert launch.main(["--compare", str(other), str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] == {} and "no stage trained in both" in found["not_compared"]["bits per byte"]
    assert found["exams"]["sft"]["word_problems"]["difference"] == 0
    assert (finished / "eval" / "sft_free_answers.jsonl").exists(), "of answers that are neither right nor wrong"
    assert "sft free_answers" not in found["not_compared"] and "free_answers" not in found["exams"]["sft"]
