"""Tokenizer: every text comes back as it was, no text becomes a special token, and bad input is named."""

import itertools
import json
import shutil
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from jaxchat.config import Config, DataConfig, ModelConfig, TokenizerConfig
from jaxchat.data.sources import iterate_documents
from jaxchat.errors import DataError, UsageError
from jaxchat.interop.nanochat import from_ranks
from jaxchat.run_dir import RunDir, read_json
from jaxchat.tokenizer import BOS, SPECIAL_TOKENS, SPLIT, Tokenizer, train_tokenizer
from train import prepare as stage

VOCAB = 700
HARD_TEXTS = [
    "",
    " ",
    "\n\n\r\n \t",
    "\0",
    "Hello, world!",
    "안녕하세요, 반갑습니다. 오늘 날씨가 좋네요!",
    "ㅋㅋㅋ ㅠㅠ 각각",  # the last: decomposed jamo
    "日本語と中文与العربية עברית हिन्दी ไทย",
    "e\u0301 \u00e9 \u212b \ufb01",  # composed and decomposed forms stay apart
    "👩‍👩‍👧‍👦 🇰🇷 \U0010ffff \ufeff\ufffe\uffff",
    "def f(x):\n\treturn x ** 2  # 12345678901234567890",
    "Ġ Ċ ¡ ÿ Ā ń",  # the letters byte-level BPE writes bytes with
    "it's I'LL we've  'D",
    "".join(map(chr, range(0x20, 0x250))),
]


@pytest.fixture(scope="module")
def sample():
    return list(itertools.islice(iterate_documents("chitchat"), 300))


@pytest.fixture(scope="module")
def tokenizer(sample):
    return train_tokenizer(sample, VOCAB, 10**9, 10_000)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.byte_lengths()[ids]) == len(text.encode())


def test_every_unicode_string_round_trips(tokenizer):
    hypothesis = pytest.importorskip("hypothesis", reason="needs the extra dev")

    @hypothesis.settings(max_examples=300, deadline=None, database=None)
    @hypothesis.given(hypothesis.strategies.text(hypothesis.strategies.characters(exclude_categories=["Cs"])))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special.values())

    check()


@pytest.mark.parametrize("known", [None, True, False])
def test_typed_special_tokens_stay_text_in_every_tokenizer(tokenizer, tmp_path, sample, known):
    """Saved and loaded; from elsewhere; from elsewhere with some of the tokens there already, special or not."""
    path = foreign(tmp_path / "f.json", sample)
    if known is not None:
        backend = Backend.from_file(str(path))
        backend.add_tokens([AddedToken(name, special=known, normalized=False) for name in SPECIAL_TOKENS[2:5]])
        backend.save(str(path))
    for source in (tokenizer, Tokenizer.load(path)):
        source.save(tmp_path / "saved")
        for taken in (source, Tokenizer.load(tmp_path / "saved")):
            special = set(taken.special.values())
            assert len(special) == 9 and not taken.byte_lengths()[list(special)].any()
            for name in SPECIAL_TOKENS:
                text = f"{name} a {name}{name}b"
                ids = taken.encode(text)
                assert not set(ids) & special and taken.decode(ids) == text
                assert taken.encode_batch([text]) == [ids]


def test_special_tokens_stand_for_no_text(tokenizer):
    assert tokenizer.vocab_size == VOCAB
    assert sorted(tokenizer.special.values()) == list(range(VOCAB - 9, VOCAB))
    assert list(tokenizer.special) == list(SPECIAL_TOKENS)
    assert tokenizer.bos == tokenizer.special[BOS]
    lengths = tokenizer.byte_lengths()
    assert lengths.dtype == np.int32 and lengths.shape == (VOCAB,)
    assert set(np.flatnonzero(lengths == 0)) == set(tokenizer.special.values())
    hello = tokenizer.encode("hello")
    assert tokenizer.decode([tokenizer.bos, *hello, tokenizer.special[SPECIAL_TOKENS[-1]]]) == "hello"


def test_bytes_of_tokens_add_up_and_may_split_a_character(tokenizer):
    text = "안녕 👋 bye"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids[:1]) == "\ufffd"  # the first byte of three: no character yet
    assert tokenizer.token_bytes(VOCAB) == tokenizer.token_bytes(-1) == b""
    assert {tokenizer.token_bytes(i) for i in range(VOCAB)} >= {bytes([b]) for b in range(256)}


def test_pieces_add_up_to_the_text_and_hold_whole_characters(tokenizer):
    for text in HARD_TEXTS:
        ids = tokenizer.encode(text)
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
    assert tokenizer.pieces(tokenizer.encode("é")[:1])[-1] in ("é", "\ufffd")  # cut


def test_digits_go_in_groups_of_at_most_two():
    tokenizer = train_tokenizer([" ".join(f"{n} x{n}y 2024 １２３" for n in range(3000))], 350, 10**9, 10**9)
    tokens = [tokenizer.token_bytes(i).decode("utf-8", "ignore") for i in range(350)]
    assert max(sum(c.isdigit() for c in token) for token in tokens) == 2
    ids = tokenizer.encode("a20242024")
    assert [tokenizer.token_bytes(i) for i in ids] == [b"a", b"20", b"24", b"20", b"24"]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode_batch(["\udc00"])[0]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"  # two halves that belong together


def test_training_is_deterministic_and_compresses(tokenizer, sample):
    again = train_tokenizer(iter(sample), VOCAB, 10**9, 10_000)
    assert again.digest == tokenizer.digest
    ids = tokenizer.encode_batch(sample)
    assert sum(map(len, sample)) / sum(map(len, ids)) > 2  # characters a token


def test_training_reads_no_more_than_it_is_told(sample):
    read = []

    def documents():
        for text in sample:
            read.append(text)
            yield text

    train_tokenizer(documents(), 300, 5_000, 1_000)
    assert len(read) <= 30  # 5,000 characters, a thousand at most of each
    assert train_tokenizer(sample[:1], 300, 500, 10_000).digest != train_tokenizer(sample[:1], 300, 1000, 10_000).digest


def test_too_small_a_corpus_names_the_size_it_reaches():
    with pytest.raises(DataError, match=r"model\.vocab_size: 5000 .*model\.vocab_size=270"):
        train_tokenizer(["hello hello"], 5000, 10**9, 10**9)
    assert train_tokenizer(["hello hello"], 5000, 10**9, 10**9, fewer=True).vocab_size == 270
    with pytest.raises(UsageError, match="model.vocab_size: 264 is below 265"):
        train_tokenizer(["hello"], 264, 10**9, 10**9)
    assert train_tokenizer(["hello"], 265, 10**9, 10**9).decode([*range(256)]) != ""


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    for loaded in (Tokenizer.load(tmp_path / "t"), Tokenizer.load(tmp_path / "t" / "tokenizer.json")):
        assert loaded.digest == tokenizer.digest
        assert loaded.special == tokenizer.special
        assert [loaded.encode(t) for t in HARD_TEXTS] == [tokenizer.encode(t) for t in HARD_TEXTS]
        assert loaded.encode(BOS) == tokenizer.encode(BOS) != [tokenizer.bos]
    meta = read_json(tmp_path / "t" / "meta.json")
    assert meta["vocab_size"] == VOCAB and meta["digest"] == tokenizer.digest
    # another layout of the same content is the same tokenizer
    path = tmp_path / "t" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")), indent=7), encoding="utf-8")
    assert Tokenizer.load(path).digest == tokenizer.digest
    assert train_tokenizer(["abc " * 99], 265, 10**9, 10**9).digest != tokenizer.digest


def foreign(path, sample, **changes):
    """A tokenizer.json as others make it: GPT-2's way, with an end-of-text token of its own."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    if changes.get("normalizer"):
        backend.normalizer = changes["normalizer"]
    alphabet = changes.get("alphabet", pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sample[:20], trainer)
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    backend.save(str(path))
    return path


def test_a_foreign_tokenizer_gets_the_special_tokens(tmp_path, sample):
    tokenizer = Tokenizer.load(foreign(tmp_path / "f.json", sample))
    assert tokenizer.vocab_size == 400 + len(SPECIAL_TOKENS)
    assert sorted(tokenizer.special.values()) == list(range(400, 409))
    for text in [*HARD_TEXTS, "<|endoftext|>", BOS, sample[0]]:  # not cut to 5 tokens and not padded either
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 not in ids and max(ids, default=0) < 400  # <|endoftext|> has id 0
    assert tokenizer.byte_lengths()[0] == 0
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").digest == tokenizer.digest


def test_a_special_token_that_was_an_ordinary_one_becomes_special(tmp_path, sample):
    path = foreign(tmp_path / "f.json", sample)
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"]["<|bos|>"] = 400
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.bos == 400 and tokenizer.byte_lengths()[400] == 0
    assert 400 not in tokenizer.encode("<|bos|>")


def test_tokenizers_that_cannot_hold_every_text_are_refused(tmp_path, sample):
    lower = foreign(tmp_path / "lower.json", sample, normalizer=normalizers.Lowercase())
    spaced = foreign(tmp_path / "spaced.json", sample, add_prefix_space=True)
    partial = foreign(tmp_path / "partial.json", sample, alphabet=["a", "b"])
    for path in (lower, spaced):
        with pytest.raises(DataError, match=f"{path}: does not give a text back"):
            Tokenizer.load(path)
    with pytest.raises(DataError, match=r"of the 256 bytes have no token"):
        Tokenizer.load(partial)
    gaps = foreign(tmp_path / "gaps.json", sample)
    content = json.loads(gaps.read_text("utf-8"))
    vocab = content["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    vocab[last] = len(vocab) + 3
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) != last]
    gaps.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="gaps"):
        Tokenizer.load(gaps)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read as a tokenizer"),
        (b"\xff\xfe\0", "cannot be read as a tokenizer"),
        (b"{}", "not a tokenizer.json"),
        (b'{"model": 3', "not a tokenizer.json"),
        ("wordlevel", "only byte-level BPE"),
    ],
)
def test_bad_tokenizer_files_are_named(tmp_path, content, words):
    path = tmp_path / "tokenizer.json"
    if content == "wordlevel":
        Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_stage_trains_on_the_training_text_and_measures_on_the_rest(tmp_path, sample):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(sample[:150]), encoding="utf-8")
    config = Config(
        model=ModelConfig(vocab_size=500), data=DataConfig(source=f"files:{tmp_path}/*.txt", val_fraction=0.1)
    )
    run = RunDir(tmp_path / "run")
    facts = stage.run_tokenizer(config, run)
    loaded = Tokenizer.load(run.tokenizer)
    assert facts["vocab_size"] == loaded.vocab_size == 500 and facts["digest"] == loaded.digest and facts["trained"]
    expected = train_tokenizer(iterate_documents(config.data.source, "train", 0.1), 500, 10**9, 10_000)
    assert loaded.digest == expected.digest
    held_out = list(iterate_documents(config.data.source, "val", 0.1))
    size = sum(len(text.encode()) for text in held_out)
    assert facts["bytes_per_token"] == pytest.approx(size / sum(map(len, map(loaded.encode, held_out))))
    # an existing one is taken as it is, if the model has room for it
    taken = TokenizerConfig(path=str(run.tokenizer / "tokenizer.json"))
    again = stage.run_tokenizer(
        Config(model=ModelConfig(vocab_size=512), data=config.data, tokenizer=taken), RunDir(tmp_path / "b")
    )
    assert again["digest"] == facts["digest"] and not again["trained"]
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(UsageError, match="model.vocab_size=500"):
        stage.run_tokenizer(
            Config(model=ModelConfig(vocab_size=499), data=config.data, tokenizer=taken), RunDir(tmp_path / "b")
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (TokenizerConfig(), DataError, r"model\.vocab_size: 9000"),
        (TokenizerConfig(path="/no/such/tokenizer.json"), DataError, "/no/such/tokenizer.json: cannot be read"),
    ],
)
def test_a_stage_that_cannot_do_it_leaves_nothing(tmp_path, sample, options, error, words):
    (tmp_path / "a.txt").write_text("\n\n".join(sample[:50]), encoding="utf-8")
    source = DataConfig(source=f"files:{tmp_path}/a.txt", val_fraction=0.1)
    with pytest.raises(error, match=words):
        stage.run_tokenizer(
            Config(model=ModelConfig(vocab_size=9000), data=source, tokenizer=options), RunDir(tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()


def test_the_two_ways_to_write_hangul_are_one(tmp_path):
    """A syllable as one character, or as its letters (as file names of macOS have it)."""
    text = "한국어 문장과 café"
    apart = unicodedata.normalize("NFD", text)
    plain, composing = (
        train_tokenizer([text, apart] * 20, 268, 10**6, 10**4, normalize) for normalize in ("none", "nfc")
    )
    assert composing.encode(apart) == composing.encode(text) and composing.decode(composing.encode(apart)) == text
    assert plain.decode(plain.encode(apart)) == apart and len(plain.encode(apart)) > len(plain.encode(text))
    assert plain.digest != composing.digest
    composing.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == composing.digest and again.encode(apart) == composing.encode(text)


def test_ranks_alone_make_the_same_tokenizer(tokenizer, sample):
    """Of every token only its bytes and its place in the order are told."""
    ranks = {tokenizer.token_bytes(i): i for i in range(VOCAB - len(SPECIAL_TOKENS))}
    again = from_ranks(ranks, SPLIT)
    for text in [*HARD_TEXTS, *sample[:50]]:
        assert again.encode(text).ids == tokenizer.encode(text)
        assert again.decode(again.encode(text).ids) == text
