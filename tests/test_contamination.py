"""Exam text in the training text: found where it stands, against plain sets of tuples, and never in the way."""

import dataclasses
import difflib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from jaxchat.config import load_config
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.scaling import resolve
from jaxchat.tasks import get_task
from jaxchat.tasks.base import TaskFiles
from train import contamination
from train.contamination import LONG_PASSAGE, WINDOW, memorized

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
N = contamination.WORDS


def numbered(first, count):
    return [f"w{i}" for i in range(first, first + count)]


def by_hand(questions, documents):
    """(questions looked up, questions found) with sets of tuples."""
    seen = {tuple(d[i : i + N]) for d in documents for i in range(len(d) - N + 1)}
    grams = [[tuple(q[i : i + N]) for i in range(len(q) - N + 1)] for q in questions]
    found = [[gram in seen for gram in one] for one in grams]
    return sum(map(bool, grams)), sum(map(any, found))


def look_up(questions, documents):
    scores, read = contamination.search({"x": contamination.question_grams(questions)}, iter(documents))
    assert read == len(documents)
    x = scores["x"]
    assert x["questions"] == len(questions) and x["share"] == x["found"] / max(1, x["looked_up"])
    return x["looked_up"], x["found"]


def test_words_are_lower_case_letters_and_digits_of_any_language():
    assert " ".join(contamination.words("Don't STOP_now: 3.5 é, 한국어! ２")) == "don t stop now 3 5 é 한국어 ２"


def test_it_is_what_sets_of_tuples_find():
    """Few different words, so that 13-grams meet."""
    rng = random.Random(3)
    documents = [[rng.choice("ab") for _ in range(rng.randrange(60))] for _ in range(40)]
    questions = [["q"] * (i % 2) + [rng.choice("ab") for _ in range(rng.randrange(40))] for i in range(60)]
    expected = by_hand(questions, documents)
    assert 5 < expected[1] < expected[0] < 60
    assert look_up([" ".join(q) for q in questions], [" ".join(d) for d in documents]) == expected


def test_case_and_punctuation_do_not_hide_a_question_and_twelve_words_are_none():
    question = "Which of these, then, is (most likely) the CAUSE of the long winter nights? Say why."
    document = "foo bar\nwhich of these then is most likely the cause of the long winter nights -- say: why. Baz"
    other = "An entirely different question about the number of moons that go around the planet Jupiter today"
    assert look_up([question, other], [document]) == (2, 1)
    words = numbered(0, 20)
    assert look_up([" ".join(words), other], [" ".join(words[:12]), " ".join(words[12:])])[1] == 0
    assert look_up([" ".join(words), other], [" ".join(words[3 : 3 + N])])[1] == 1


def test_the_frame_that_all_questions_share_is_not_looked_up():
    questions = [f"Multiple choice question: {' '.join(numbered(40 * i, 20))} Respond with the letter." for i in (1, 2)]
    assert look_up(questions, [" ".join(numbered(40, 20))]) == (2, 1)
    assert [len(grams) for grams in contamination.question_grams(questions)] == [8, 8]


def test_short_questions_and_empty_exams_are_counted_and_not_looked_up():
    assert look_up(["too short", "and this as well"], ["too short and this as well"]) == (0, 0)
    assert look_up([], ["text"]) == (0, 0)


def test_equal_grams_have_equal_hashes():
    hashes = [contamination.grams(numbered(i, 15)) for i in range(6)]
    assert [len(own) for own in hashes] == [3] * 6 and contamination.grams(numbered(0, 12)).tolist() == []
    assert len(np.unique(np.concatenate(hashes))) == 8  # w0.. to w7.. begin eight different ones


# As a part of a run


def make_run(tmp_path, text, *sets, record=None):
    folder = tmp_path / "text"
    folder.mkdir()
    for i, document in enumerate(text):
        (folder / f"{i:03d}.txt").write_text(document, encoding="utf-8")
    config = resolve(
        load_config(
            "nano", [f"data.source=files:{folder}", "data.val_fraction=0.0", "eval.overlap_documents=-1", *sets]
        )
    )
    run = RunDir(tmp_path / "run")
    write_json(run.eval("base"), {"tasks": {"bits_per_byte": {"metric": 1.0}}})
    write_json(run.eval("sft"), record or {"tasks": {"word_problems": {"metric": 0.5, "accuracy": 0.5}}})
    return config, run


def training_texts():
    """Word problems' own exam among other text: an exam that leaked."""
    exam = [e.prompt[0]["content"] for e in get_task("word_problems").examples()]
    long = sorted({text for text in exam if len(contamination.words(text)) >= N})
    return [f"Some text {i}.\n" for i in range(8)] + [f"Before it. {text} After it." for text in long[:10]]


def test_a_leaked_exam_is_seen(tmp_path):
    config, run = make_run(tmp_path, training_texts())
    found = contamination.exam_contamination(config, run, 36)
    exam = found["exams"]["word_problems"]
    assert exam["questions"] == 256 and 9 <= exam["found"] < exam["looked_up"] < 256
    assert 17 <= found["documents"] <= 18 and found["document_share"] == found["documents"] / 36
    assert "bits_per_byte" not in found["exams"]


def test_the_result_is_kept_until_something_changes(tmp_path, capsys):
    config, run = make_run(tmp_path, training_texts())
    first = contamination.exam_contamination(config, run, None)
    assert "looked up in" in capsys.readouterr().err and first["document_share"] is None
    assert contamination.exam_contamination(config, run, None) == first and capsys.readouterr().err == ""
    fewer = dataclasses.replace(config, eval=dataclasses.replace(config.eval, overlap_documents=9))
    assert contamination.exam_contamination(fewer, run, None)["documents"] == 9
    (tmp_path / "text" / "new.txt").write_text("One more document.")
    assert contamination.exam_contamination(config, run, None)["documents"] == first["documents"] + 1
    off = dataclasses.replace(config, eval=dataclasses.replace(config.eval, overlap_documents=0))
    assert contamination.exam_contamination(off, run, None) == {}


def test_an_edited_exam_is_searched_again(tmp_path):
    leaked = " ".join(f"w{i}" for i in range(N))
    quiz = tmp_path / "quiz.jsonl"
    name = f"files:{quiz}"
    record = {"tasks": {name: {"metric": 0.5, "accuracy": 0.5}}}
    config, run = make_run(tmp_path, ["Some text.", leaked], f'eval.exams=["{name}"]', record=record)
    for question, found in ((leaked[::-1], 0), (leaked, 1)):  # as many words
        quiz.write_text(json.dumps({"question": question, "answer": "yes"}), encoding="utf-8")
        assert contamination.exam_contamination(config, run, 2)["exams"][name]["found"] == found


def test_what_is_missing_is_said_and_nothing_breaks(tmp_path):
    tasks = {n: {"metric": 0.5, "accuracy": 0.5} for n in ("word_problems", "arc_easy", "of_another_version")}
    config, run = make_run(tmp_path, training_texts(), record={"tasks": tasks, "core_tasks": {"copa": {}}})
    found = contamination.exam_contamination(config, run, 18)["exams"]
    assert found["word_problems"]["found"] and "core: copa" in found
    assert "ARC-Easy" in found["arc_easy"]["reason"] and "unknown" in found["of_another_version"]["reason"]
    gone = dataclasses.replace(config, data=dataclasses.replace(config.data, source="files:/no/such"))
    assert "/no/such" in contamination.exam_contamination(gone, run, 18)["reason"]


@pytest.mark.skipif(not DATA.is_dir(), reason="no exam data in ../shared/data")
def test_real_exams_of_all_kinds(tmp_path):
    """A question of ARC and an item of three kinds of CORE tasks, put among the training text, are found."""
    files = TaskFiles(str(DATA))
    core = get_task("core", files)
    picked = [get_task("arc_easy", files).examples()[7].prompt[0]["content"]]
    for part in contamination.core.CORE_TASKS:
        if part.label in ("copa", "winograd", "lambada_openai"):
            texts = contamination.question_texts(core, part.label)
            picked.append(next(text for text in texts if len(contamination.words(text)) > 14))
    tasks = {"arc_easy": {"metric": 0.3, "accuracy": 0.3}}
    record = {"tasks": tasks, "core_tasks": {"copa": {}, "winograd": {}, "lambada_openai": {}}}
    filler = [f"Nothing of interest, number {i}.\n" for i in range(5)]
    config, run = make_run(tmp_path, [*filler, *picked], f"tasks.data_dir={DATA}", record=record)
    found = contamination.exam_contamination(config, run, None)
    counts = {name: exam["found"] for name, exam in found["exams"].items()}
    twice = {"core: winograd": 2}  # its items come in pairs that differ in one word
    assert counts == dict.fromkeys(found["exams"], 1) | twice
    assert found["exams"]["core: lambada_openai"]["questions"] == 5153
    assert read_json(run.root / "eval" / "overlap.json")["documents"] == found["documents"] == 8


# Memorization: the same as the slow way finds, in any language

VOCABULARY = ["river", "walked", "over", "the", "hill", "그는", "길을", "떠났다", "and", "then", "나무", "back", "home"]


def text(draw, words):
    return " ".join(draw.choice(VOCABULARY) for _ in range(words))


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_the_slow_way_finds(seed):
    draw = random.Random(seed)
    documents = [text(draw, 120) for _ in range(8)]
    samples = [text(draw, 40) for _ in range(3)]
    samples[1] = samples[1][:50] + documents[5][100 : 160 + 20 * seed] + samples[1][50:]
    found = memorized(samples, documents)
    longest = max(
        difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
        for a in samples
        for b in documents
    )
    assert abs(found["longest"] - longest) <= 1  # a match may begin or end inside a character's bytes
    assert any(found["passage"] in d for d in documents) and any(found["passage"] in s for s in samples)
    assert (found["documents"], found["texts"]) == (8, 3)


def test_nothing_in_common():
    found = memorized(["abc" * 50], ["xyz" * 500, "", "a"])
    assert found == {"longest": 0, "passage": "", "share": 0.0, "documents": 3, "texts": 1}
    assert memorized([], ["text"])["share"] == 0.0 and memorized(["", "short"], ["short"])["longest"] == 0


def test_the_share_counts_long_passages_alone():
    document = text(random.Random(1), 400)
    new = "".join(chr(0x4E00 + i) for i in range(500))
    long, short = document[200 : 200 + LONG_PASSAGE + 50], document[900 : 900 + WINDOW + 8]
    sample = new[:100] + long + new[100:200] + short + new[200:]
    found = memorized([sample], [document])
    assert found["passage"] == long
    assert found["share"] == pytest.approx(len(long.encode()) / len(sample.encode()), abs=0.01)
    assert memorized([document], [document])["share"] == 1.0
