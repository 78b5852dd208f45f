"""Everything that reads what a person or another program wrote, with made-up input: it is read, or refused with one of
our own errors; nothing else is raised, nothing hangs, no damage passes.

python -m pytest -n0 tests/test_fuzz_readers.py        FUZZ_EXAMPLES=5000 for a long run
"""

import contextlib
import copy
import json
import os
import shutil
import tomllib
from collections import Counter

import numpy as np
import pytest

from jaxchat.chat import continued, normalize, render, render_prompt
from jaxchat.config import Config, flatten, load_config, to_toml
from jaxchat.data.packing import Rows, write_rows
from jaxchat.data.shards import Job, read_documents, tokenize_unit
from jaxchat.data.sources import Unit, read_file, read_records
from jaxchat.errors import DataError, JaxchatError, UsageError
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tasks.conversations import ANSWERS, LISTS, QUESTIONS, conversation_of
from jaxchat.tasks.identity import load_persona
from jaxchat.tokenizer import Tokenizer, train_tokenizer

hypothesis = pytest.importorskip("hypothesis", reason="needs the extra dev")
st = hypothesis.strategies
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=20_000,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)

TEXT = st.text(max_size=40) | st.text(st.characters(categories=["Cs", "Cc", "Zl", "Mn"]), max_size=8) | st.sampled_from(
    ["<|bos|>", "<|assistant_start|>", "<|python_end|>x", "\x00", "\ud800", "한글 🙂", "a" * 5_000]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, and the dog sat beside it. " * 20], 290, 10_000, 10_000)


def places(value, at=()):
    """Every place in a tree of dictionaries and lists, the root too."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*at, key))


def changed(draw, tree):
    """The tree with one place replaced by something else, or deleted."""
    tree = copy.deepcopy(tree)
    where = draw(st.sampled_from(list(places(tree))))
    if not where:
        return draw(VALUES)
    *parents, last = where
    holder = tree
    for key in parents:
        holder = holder[key]
    if draw(st.booleans()):
        holder[last] = draw(VALUES)
    else:
        del holder[last]
    return tree


def bent(draw, data):
    """The bytes cut, longer, or with some of them replaced."""
    how = draw(st.sampled_from(["cut", "longer", "replaced", "other"]))
    if how == "cut":
        return data[: draw(st.integers(0, max(0, len(data) - 1)))]
    if how == "longer":
        return data + draw(st.binary(min_size=1, max_size=20))
    if how == "other":
        return draw(st.binary(max_size=200))
    begin = draw(st.integers(0, max(0, len(data) - 1)))
    new = draw(st.binary(min_size=1, max_size=8))
    return data[:begin] + new + data[begin + len(new) :]


PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "python", "python_output"]) | TEXT, "text": TEXT | VALUES}
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]) | TEXT},
    optional={"content": TEXT | st.lists(PART, max_size=4) | VALUES},
)


@fuzz
@hypothesis.given(st.lists(MESSAGE, max_size=6) | VALUES)
def test_any_messages_are_rendered_or_refused(tokenizer, messages):
    for read in (render, render_prompt, continued):
        with contextlib.suppress(UsageError):
            read(tokenizer, messages) if read is not continued else read(messages)


FIELDS = st.sampled_from([*LISTS, *QUESTIONS, *ANSWERS, "role", "from", "content", "value", "text", "chat",
                          "system", "history", "context", "tool_calls", "function_call", "weight", "label",
                          "chosen"])  # fmt: skip
RECORDS = st.recursive(
    VALUES | st.sampled_from(["user", "gpt", "### Human: a### Assistant: b", '[{"role": "user", "content": "x"}]']),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=10,
)


@fuzz
@hypothesis.given(RECORDS | st.dictionaries(FIELDS, RECORDS, max_size=4))
def test_any_record_is_a_conversation_or_refused(record):
    with contextlib.suppress(UsageError):
        turns = normalize(conversation_of(record)[1])
        assert normalize(turns) == turns


@fuzz
@hypothesis.given(st.lists(TEXT, min_size=1, max_size=7))
def test_what_is_said_never_opens_or_closes_a_turn(tokenizer, contents):
    roles = ["user", "assistant"]
    ids, mask = render(tokenizer, [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)])
    special = {number: name for name, number in tokenizer.special.items()}
    found = [special[i] for i in ids if i in special]
    wanted = [f"<|{roles[i % 2]}_{end}|>" for i in range(len(contents)) for end in ("start", "end")]
    assert found == ["<|bos|>", *wanted] and len(mask) == len(ids) and set(mask) <= {0, 1}
    said = [text.encode("utf-8", "replace") for text in contents]  # a lone surrogate becomes a question mark or U+FFFD
    assert len(tokenizer.decode_bytes(ids)) >= sum(map(len, said)) - sum(text.count(b"?") for text in said)


def test_what_is_sound_is_read(tokenizer, tmp_path):
    """What the tests below bend is itself taken, so that a reader which refuses everything fails."""
    (tmp_path / "mine.toml").write_text(to_toml(Config()), encoding="utf-8")
    assert load_config(tmp_path / "mine.toml") == Config()
    (tmp_path / "identity.toml").write_text(IDENTITY, encoding="utf-8")
    assert load_persona(tmp_path / "identity.toml").name == "Mina"
    (tmp_path / "text.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    assert [record for _, record in read_records(tmp_path / "text.jsonl")] == [json.loads(line) for line in LINES]
    assert list(read_file(tmp_path / "text.jsonl", "auto", Counter())) == ["one", "hi\nho"]
    assert Tokenizer.parse(tokenizer.to_json(), "mine").digest == tokenizer.digest
    RunDir(tmp_path).stages.write_text(json.dumps(RECORDS))
    assert RunDir(tmp_path).records() == RECORDS
    assert render_prompt(tokenizer, SPOKEN["messages"][:1]) and render(tokenizer, SPOKEN["messages"])


@fuzz
@hypothesis.given(st.data())
def test_any_settings_are_taken_or_refused(tmp_path, data):
    draw, keys = data.draw, list(flatten(Config()))
    odd = st.sampled_from(
        ["-1", "0", "1", "7", "1e9", "-5", "0.5", "true", "[]", '["a"]', '""', "nan", "inf", "99999999999"]
    )
    pairs = draw(st.lists(st.tuples(st.sampled_from(keys) | TEXT, odd | TEXT), max_size=4))
    try:
        config = load_config("nano", [f"{key}={value}" for key, value in pairs])
        again = tmp_path / "again.toml"
        again.write_text(to_toml(config), encoding="utf-8")
        assert load_config(again) == config
        resolve(config)
    except UsageError:
        pass
    except UnicodeEncodeError:
        assert any("\ud800" <= c <= "\udfff" for pair in pairs for c in "".join(pair))


@fuzz
@hypothesis.given(st.data())
def test_any_tier_file_is_read_or_refused(tmp_path, data):
    path, text = tmp_path / "mine.toml", to_toml(Config()).encode()
    path.write_bytes(bent(data.draw, text))
    with contextlib.suppress(UsageError):
        load_config(path)


IDENTITY = """name = "Mina"
maker = "the club"
languages = ["en"]
tone = "friendly"
[[facts]]
questions = ["where do you live", "where is your home"]
answer = "I live in the club room."
must_say = "club room"
"""


@fuzz
@hypothesis.given(st.data())
def test_any_identity_is_read_or_refused(tmp_path, data):
    path = tmp_path / "identity.toml"
    if data.draw(st.booleans()):
        path.write_bytes(bent(data.draw, IDENTITY.encode()))
    else:
        tree = changed(data.draw, tomllib.loads(IDENTITY))
        lines = [f"{k} = {json.dumps(v)}" for k, v in tree.items()] if isinstance(tree, dict) else [json.dumps(tree)]
        path.write_bytes("\n".join(lines).encode("utf-8", "replace"))
    with contextlib.suppress(JaxchatError):
        load_persona(path)


SPOKEN = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
LINES = [json.dumps(line) for line in ({"text": "one"}, SPOKEN)]


@fuzz
@hypothesis.given(st.data(), st.sampled_from([".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".txt", ".md", ".parquet"]))
def test_any_file_of_text_is_read_or_refused(tmp_path, data, suffix):
    path, draw = tmp_path / f"text{suffix}", data.draw
    if draw(st.booleans()):
        path.write_bytes(bent(draw, "\n".join(LINES).encode()))
    else:
        path.write_bytes("\n".join(json.dumps(changed(draw, json.loads(line))) for line in LINES).encode())
    for read in (lambda: read_file(path, "auto", Counter()), lambda: (text for _, text in read_records(path))):
        try:
            for text in read():
                assert text is None or isinstance(text, str | dict | list | int | float)
        except DataError as error:
            assert str(path) in str(error)


@fuzz
@hypothesis.given(st.data())
def test_any_tokenizer_is_read_or_refused(tokenizer, data):
    text = tokenizer.to_json()
    broken = bent(data.draw, text.encode()).decode("utf-8", "replace") if data.draw(st.booleans()) else json.dumps(
        changed(data.draw, json.loads(text)))  # fmt: skip
    try:
        again = Tokenizer.parse(broken, "mine")
        assert again.decode(again.encode("The cat, 한글 🙂")) == "The cat, 한글 🙂"
    except DataError:
        pass


@pytest.fixture(scope="module")
def written(tokenizer, tmp_path_factory):
    """A folder of rows, one of conversations' rows and one of token shards, as stage prepare writes them."""
    folder = tmp_path_factory.mktemp("written")
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 290, draw.integers(3, 17)).astype(np.uint16) for _ in range(9)]
    for name, rows in (("rows", ids), ("sft", [(row, np.ones(len(row), np.uint8)) for row in ids])):
        write_rows(folder / name, rows, 17, 63, 290, lambda: {"tokenizer": "none"})
    tokenizer.save(folder / "tokenizer")
    (folder / "text.txt").write_text("one\n\n" * 3_000)
    unit = Unit("files:text.txt", str(folder / "text.txt"))
    tokenize_unit(Job(unit, 0.2, str(folder / "tokenizer"), str(folder / "tokens"), 10_000, "here"))
    return folder


def contents(folder, kind, tokenizer):
    """All that training reads of a folder."""
    if kind == "tokens":
        found = [pair for split in ("train", "val") for pair in read_documents(folder, split, tokenizer.digest)]
        return [(tokens.tolist(), number) for tokens, number in found]
    rows = Rows(folder, "none")
    return [[part.tolist() for part in rows[i]] for i in range(len(rows))]


@fuzz
@hypothesis.given(st.data(), st.sampled_from(["rows", "sft", "tokens"]))
def test_no_damage_of_rows_or_shards_passes(written, tokenizer, tmp_path, data, kind):
    folder, draw = tmp_path / kind, data.draw
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written / kind, folder)
    before = contents(folder, kind, tokenizer)
    path = draw(st.sampled_from(sorted(folder.iterdir())))
    if path.suffix == ".json" and draw(st.booleans()):
        path.write_text(json.dumps(changed(draw, json.loads(path.read_text()))))
    else:
        path.write_bytes(bent(draw, path.read_bytes()))
    try:
        assert contents(folder, kind, tokenizer) == before
    except DataError as error:
        assert str(folder) in str(error)


START = "2026-11-22T02:00:00+00:00"
RECORD = {"format": 1, "status": "done", "start": START, "end": START, "seconds": 3.0, "inputs": {"seed": 42},
          "facts": {"digest": "a"}}  # fmt: skip
RECORDS = {"pretrain": RECORD, "sft": RECORD | {"status": "running", "facts": {}}}


@fuzz
@hypothesis.given(st.data())
def test_any_records_are_read_or_refused(tmp_path, data):
    run = RunDir(tmp_path)
    if data.draw(st.booleans()):
        run.stages.write_bytes(bent(data.draw, json.dumps(RECORDS).encode()))
    else:
        run.stages.write_text(json.dumps(changed(data.draw, RECORDS)))
    try:
        for record in run.records().values():
            assert record["start"].upper() and record["inputs"].keys() is not None and record["seconds"] + 0.5
            assert record["status"] != "done" or record["facts"]["digest"].upper() is not None
    except JaxchatError as error:
        assert str(run.stages) in str(error)
