"""MMLU and ARC from every layout they come in, and what a changed or damaged file is told."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.errors import DataError
from jaxchat.tasks import get_task
from jaxchat.tasks.base import MissingData, TaskFiles
from jaxchat.tasks.choice import question

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "mmlu").is_dir(), reason=f"no exam data in {DATA}")
HEADER = "question,A,B,C,D,answer\n"
ROWS = [
    {"question": "What barks?", "subject": "zoology", "choices": ["cat", "dog", "cow", "fox"], "answer": 1},
    {"question": "What moos?", "subject": "farming", "choices": ["cat", "dog", "cow", "fox"], "answer": 2},
]


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def exam(name, folder):
    return get_task(name, TaskFiles(str(folder)))


def test_the_question_as_it_is_put():
    text = question("What barks?", ("A", "B"), ["cat", "dog"])
    assert text == (
        "Multiple Choice question: What barks?\n- cat=A\n- dog=B\n\nRespond only with the letter of the correct answer."
    )


@pytest.mark.parametrize("place", ["all", "mmlu/all", "cais/mmlu/all"])
def test_mmlu_in_the_hubs_layout(tmp_path, place):
    parquet(tmp_path / place / "test-00000-of-00001.parquet", ROWS)
    parquet(tmp_path / place / "auxiliary_train-00000-of-00001.parquet", [{**ROWS[0], "question": "Which is red?"}] * 3)
    found = exam("mmlu", tmp_path).examples()
    assert [(e.right, e.letters, e.tags) for e in found] == [
        (1, ("A", "B", "C", "D"), {"subject": "zoology"}),
        (2, ("A", "B", "C", "D"), {"subject": "farming"}),
    ]
    assert found[0].prompt == [{"role": "user", "content": question("What barks?", "ABCD", ROWS[0]["choices"])}]
    taught = list(exam("mmlu", tmp_path).train_conversations(2, seed=1))
    assert len(taught) == 2 and taught[0][1]["content"] == [{"type": "text", "text": "B"}]
    assert all("Which is red?" in conversation[0]["content"] for conversation in taught)


def test_mmlu_from_tables_whose_quotes_are_not_doubled(tmp_path):
    folder = tmp_path / "mmlu"
    folder.mkdir()
    (folder / "law_test.csv").write_text(HEADER + '"A b, c","1","2","3","4",0\n')
    (folder / "art_test.csv").write_text(
        HEADER + '"He said "one," and "two"","1","2","3","4",1\n"Two\n lines","a "b","c","d\n e","f",2\n'
    )
    art, lines, law = exam("mmlu", tmp_path).examples()
    assert 'question: He said "one," and "two"\n- 1=A' in art.prompt[0]["content"] and art.right == 1
    assert 'Two\n lines\n- a "b=A\n- c=B\n- d\n e=C\n- f=D' in lines.prompt[0]["content"] and lines.right == 2
    assert "question: A b, c\n- 1=A" in law.prompt[0]["content"] and law.tags == {"subject": "law"}


@pytest.mark.parametrize("text", ["question,A,B,C,D,key\n", HEADER])
def test_a_damaged_table_is_named(tmp_path, text):
    (tmp_path / "law_test.csv").write_text(text + '"q","1","2","3",0\n')
    with pytest.raises(DataError, match=r"law_test\.csv: not a record"):
        exam("mmlu", tmp_path).examples()


def test_a_changed_column_or_a_broken_file_of_the_hub(tmp_path):
    path = tmp_path / "all" / "test-00000-of-00001.parquet"
    parquet(path, [{**{k: v for k, v in ROWS[0].items() if k != "choices"}, "options": ["a"]}])
    with pytest.raises(DataError, match=":1: .*KeyError.*choices"):
        exam("mmlu", tmp_path).examples()
    parquet(path, [ROWS[0], {**ROWS[0], "answer": 4}])
    with pytest.raises(DataError, match=":2: .*answer 4 of 4 options"):
        exam("mmlu", tmp_path).examples()
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="not a readable parquet file"):
        exam("mmlu", tmp_path).examples()


ARC = {"id": "1", "question": "What barks?", "choices": {"text": ["cat", "dog"], "label": ["1", "2"]}, "answerKey": "2"}


def test_arc_in_the_hubs_layout_keeps_its_own_letters(tmp_path):
    parquet(tmp_path / "ai2_arc" / "ARC-Easy" / "test-00000-of-00001.parquet", [ARC])
    parquet(tmp_path / "ai2_arc" / "ARC-Easy" / "train-00000-of-00001.parquet", [ARC] * 2)
    (found,) = exam("arc_easy", tmp_path).examples()
    assert found.letters == ("1", "2") and found.right == 1
    assert found.prompt[0]["content"] == question("What barks?", "12", ["cat", "dog"])
    assert [c[1]["content"][0]["text"] for c in exam("arc_easy", tmp_path).train_conversations(None, 0)] == ["2", "2"]
    assert len(list(exam("arc_easy", tmp_path).train_conversations(5000, 0))) == 2
    with pytest.raises(MissingData, match="ARC-Challenge"):
        exam("arc_challenge", tmp_path).examples()


def test_a_damaged_arc(tmp_path):
    path = tmp_path / "ARC-Easy" / "test-00000-of-00001.parquet"
    for damaged in ({**ARC, "answerKey": "3"}, {**ARC, "choices": ["cat", "dog"]}):
        parquet(path, [damaged])
        with pytest.raises(DataError, match=":1: "):
            exam("arc_easy", tmp_path).examples()


def test_nothing_there_says_how_to_place_it(tmp_path):
    with pytest.raises(MissingData, match=r"cais/mmlu, revision c30699e8, and put it into"):
        exam("mmlu", tmp_path).examples()
    with pytest.raises(MissingData, match=r"set tasks.data_dir to it"):
        get_task("mmlu").examples()


@needs_data
def test_the_real_files():
    mmlu = exam("mmlu", DATA).examples()
    assert len(mmlu) == 9183 and len({e.tags["subject"] for e in mmlu}) == 57
    assert {len(e.letters) for e in mmlu} == {4} and {e.right for e in mmlu} == {0, 1, 2, 3}
    (quoted,) = [e for e in mmlu if "ternary (base-3) logic" in e.prompt[0]["content"]]
    assert 'as "true," "false," and "unknown." If' in quoted.prompt[0]["content"] and quoted.right == 2
    easy, hard = (exam(name, DATA).examples() for name in ("arc_easy", "arc_challenge"))
    assert (len(easy), len(hard)) == (2376, 1172)
    assert easy[0].prompt[0]["content"].startswith("Multiple Choice question: Which statement best explains")
