"""CORE's protocol: order, examples, texts and spans by hand, and what damaged files are told."""

import json
import random
from pathlib import Path

import pytest

from jaxchat.engine.scoring import SpanScore
from jaxchat.errors import DataError
from jaxchat.tasks import core
from jaxchat.tasks.base import MissingData, TaskFiles
from jaxchat.tasks.core import CORE_TASKS, Core
from jaxchat.tokenizer import train_tokenizer
from train.evaluate import accuracy, core_summary

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
BY_LABEL = {task.label: task for task in CORE_TASKS}
needs_data = pytest.mark.skipif(not (DATA / "core").is_dir(), reason=f"no exam data in {DATA}")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Question: Who sees the cat? Answer: the red dog.\n\n" * 3], 290, 1000, 1000)


def write(folder, name, items):
    (folder / "core").mkdir(exist_ok=True)
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "core" / name).write_text(lines, encoding="utf-8")


def mean(*losses):
    return [SpanScore(loss, 1, False) for loss in losses]


def test_texts_of_a_choice_with_examples():
    items = [{"query": f"Q{i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(12)]
    task = BY_LABEL["arc_easy"]
    shots = [items[i] for i in random.Random(1234 + 3).sample([i for i in range(12) if i != 3], 10)]
    before = "".join(f"{s['query']}\nAnswer: {s['choices'][s['gold']]}\n\n" for s in shots)
    assert core.prompts(task, items, 3) == [f"{before}Q3\nAnswer: a3", f"{before}Q3\nAnswer: b3"]
    assert "Q3\n" not in before


def test_texts_of_a_schema_and_of_a_continuation():
    items = [{"context_options": ["The cat", "The dog"], "continuation": "sleeps.", "gold": 1}]
    assert core.prompts(BY_LABEL["winograd"], items, 0) == ["The cat sleeps.", "The dog sleeps."]
    items = [{"context": f" C{i} \n", "continuation": f"x{i} "} for i in range(11)]
    without, whole = core.prompts(BY_LABEL["squad"], items, 0)
    assert whole.endswith("\n\nC0 x0 ") and without == whole[: -len(" x0 ")]
    assert whole.count("\n\n") == 10 and " C" not in whole
    without, _ = core.prompts(BY_LABEL["jeopardy"], items, 0)
    assert without.endswith("C0\nAnswer:")  # the space belongs to the answer's first token


def test_spans(tokenizer):
    def tokens(*texts):
        return [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]

    def scored(spans):
        return [tokenizer.decode(s.tokens[s.start : s.end]) for s in spans]

    choice, schema, language = (BY_LABEL[n] for n in ("copa", "winograd", "lambada_openai"))
    assert scored(core.spans(choice, tokens("the cat sees", "the cat", "the cat")))[1:] == ["", ""]
    assert scored(core.spans(choice, tokens("who the cat", "who the dog"))) == [" cat", " dog"]
    assert scored(core.spans(schema, tokens("a cat sees the dog", "the dog sees the dog"))) == [" sees the dog"] * 2
    (span,) = core.spans(language, tokens("the cat", "the cat sees"))
    assert scored([span]) == [" sees"] and span.tokens[0] == tokenizer.bos
    merged = core.spans(language, [[0, 5, 6], [0, 5, 7, 8]])  # the border fell inside a token
    assert (merged[0].start, merged[0].end) == (2, 4)
    same = core.spans(schema, [[0, 5], [0, 5]])
    assert all(span.start == 1 for span in same)  # <|bos|> itself is never scored


def test_decisions():
    choice = BY_LABEL["copa"]
    assert core.decide(choice, {"gold": 1}, mean(2.0, 1.0)) == (1, True)
    assert core.decide(choice, {"gold": 1}, mean(1.0, 1.0)) == (0, False)  # the first of equals
    assert core.decide(choice, {"gold": 1}, [SpanScore(3.0, 3, False), SpanScore(1.6, 2, False)]) == (1, True)
    empty = SpanScore(0.0, 0, True)
    assert core.decide(choice, {"gold": 1}, [*mean(5.0), empty]) == (0, False)
    assert core.decide(choice, {"gold": 0}, [empty, *mean(5.0)]) == (0, True)
    language = BY_LABEL["squad"]
    assert core.decide(language, {}, [SpanScore(9.0, 2, True)]) == (1, True)
    assert core.decide(language, {}, [SpanScore(0.1, 2, False)]) == (0, False)


def test_the_mean_is_over_centred_accuracies():
    assert core.centred(BY_LABEL["boolq"], 0.62) == 0 and core.centred(BY_LABEL["boolq"], 1.0) == 1
    found = {name: accuracy([True] * right + [False] * (100 - right), chance) | {"seconds": 1.0}
             for name, right, chance in (("copa", 75, 0.5), ("squad", 10, 0.0))}  # fmt: skip
    for name, score in found.items():
        score["centred"] = core.centred(BY_LABEL[name], score["accuracy"])
    summary = core_summary(found)
    assert summary["metric"] == pytest.approx((0.5 + 0.1) / 2) and summary["n"] == 200


def test_the_order_is_fixed(tmp_path):
    items = [{"query": str(i), "choices": ["a", "b"], "gold": 0} for i in range(40)]
    write(tmp_path, "copa.jsonl", items)
    expected = list(items)
    random.Random(1337).shuffle(expected)
    assert Core(TaskFiles(str(tmp_path))).load(BY_LABEL["copa"]) == expected != items


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


def test_damaged_files_are_named(tmp_path):
    exam, path = Core(TaskFiles(str(tmp_path))), tmp_path / "core" / "copa.jsonl"
    for item in ({**GOOD, "gold": 2}, {"question": "q", "choices": ["a", "b"], "gold": 0}, ["q"]):
        write(tmp_path, "copa.jsonl", [GOOD, item])
        with pytest.raises(DataError, match=r"copa\.jsonl:2: "):
            exam.load(BY_LABEL["copa"])
    for content, words in (
        (b'{"query": "q"\n', "copa.jsonl:1: not JSON"),
        (b"\xff\xff", "not text in UTF-8"),
        (b"", "no rows"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            exam.load(BY_LABEL["copa"])
    write(tmp_path, "piqa.jsonl", [GOOD] * 10)
    with pytest.raises(DataError, match="10 items are too few for 10 examples"):
        exam.load(BY_LABEL["piqa"])
    with pytest.raises(MissingData, match="eval_bundle.zip"):
        exam.load(BY_LABEL["coqa"])


def test_the_bundles_own_baselines_count(tmp_path):
    assert Core(TaskFiles(str(tmp_path))).baselines() == {}
    (tmp_path / "eval_bundle").mkdir()
    table = tmp_path / "eval_bundle" / "eval_meta_data.csv"
    table.write_text("Eval Task,Random baseline\ncopa,50\nboolq,62.0\n")
    assert Core(TaskFiles(str(tmp_path))).baselines() == {"copa": 0.5, "boolq": 0.62}
    table.write_text("Eval Task,Baseline\ncopa,50\n")
    with pytest.raises(DataError, match="no table of the tasks' random baselines"):
        Core(TaskFiles(str(tmp_path))).baselines()


def test_a_block_is_tokenized_as_its_items_are(tokenizer):
    """And the examples are drawn among the other items, in the order that they have without the asked one."""
    for label, n in (("arc_easy", 30), ("winograd", 5), ("squad", 12)):
        task = BY_LABEL[label]
        items = [
            {"query": f"Q{i}?", "choices": [f"the cat {i}", f"dog{i}"], "gold": i % 2}
            | {"context_options": [f"cat {i}", f"a dog {i}"], "continuation": f" sees {i}.", "context": f"C{i}"}
            for i in range(n)
        ]
        expected = []
        for i in range(n):
            others = [k for k in range(n) if k != i]
            drawn = random.Random(1234 + i).sample(others, min(task.shots, n - 1))
            texts = core.prompts(task, items, i)
            if task.kind == core.CHOICE:
                before = "".join(f"Q{k}?\nAnswer: {items[k]['choices'][items[k]['gold']]}\n\n" for k in drawn)
            else:
                before = "".join(f"C{k}  sees {k}.\n\n" for k in drawn)
            if task.kind != core.SCHEMA:
                assert all(text.startswith(before) and text[len(before) + 1 :].startswith(str(i)) for text in texts)
            expected.append(core.spans(task, [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]))
        assert core.groups(task, items, tokenizer, range(len(items))) == expected
        assert core.groups(task, items, tokenizer, range(2, 5)) == expected[2:5]


@needs_data
def test_the_real_files(tokenizer):
    exam, found = Core(TaskFiles(str(DATA))), {}
    for task in CORE_TASKS:
        try:
            found[task.label] = exam.load(task)
        except MissingData:
            continue
    assert CORE_TASKS[0].label not in found and len(found) == 18
    assert len(found["arc_easy"]) == 2376 and len(found["winograd"]) == 273 and len(found["jeopardy"]) == 2117
    for label in ("copa", "winograd", "bigbench_operators"):
        task, items = BY_LABEL[label], found[label][:20]
        for group, item in zip(core.groups(task, items, tokenizer, range(len(items))), items, strict=True):
            assert all(0 < s.start < s.end == len(s.tokens) for s in group)
            assert len(group) == len(item.get("choices") or item.get("context_options") or [0])
