"""Byte-level BPE with the chat's special tokens: train, load, encode, decode, count bytes.

Any string can be encoded. Text never becomes a special token: these are outside the BPE model and are inserted by id
alone (`special`), so "<|bos|>" typed by a person is seven ordinary characters. Lone surrogates become U+FFFD.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import atomic_write, read_json, require_format, write_json

BOS = "<|bos|>"
USER_START, USER_END = "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
OUTPUT_START, OUTPUT_END = "<|output_start|>", "<|output_end|>"
SPECIAL_TOKENS = (
    BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END
)  # fmt: skip
# GPT-4's split, with digits in groups of at most 2 (a small vocabulary has no room for 1,000 numbers)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FORMAT = 1
PROBE = "Two  spaces,\n\ttabs, Ünïcode, 한국어 and 😀 <|bos|>\n "  # a foreign tokenizer must round-trip this


class Tokenizer:
    """A `tokenizers` tokenizer in which every special token of the chat has an id.

    Another project's tokenizer keeps its ids and its normalizer; missing ones of `SPECIAL_TOKENS` are appended.
    """

    def __init__(self, backend: Backend):
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        there = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS if t not in there])
        backend.encode_special_tokens = True  # special tokens written in a text are encoded as text
        ids = backend.get_vocab(with_added_tokens=True)
        # the library numbers added tokens by count, and every id takes a row of the embedding
        if sorted(ids.values()) != list(range(len(ids))):
            raise DataError(f"the ids of the tokenizer's {len(ids):,} tokens have gaps; take another one")
        self.vocab_size = len(ids)
        self.special = {name: ids[name] for name in SPECIAL_TOKENS}
        self.bos = self.special[BOS]
        alphabet = byte_alphabet()
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

        def token_bytes(i: int, token: str) -> bytes:
            if i in special:
                return b""
            if all(c in alphabet for c in token):
                return bytes(alphabet[c] for c in token)
            return token.encode("utf-8")  # an added ordinary token is stored as its text

        self._bytes = [token_bytes(i, token) for token, i in sorted(ids.items(), key=lambda item: item[1])]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a `tokenizer.json`, or the one in a directory. `DataError` names a missing or foreign file."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no text; a SentencePiece model must be converted first"
            raise DataError(f"{file}: cannot be read as a tokenizer.json of Hugging Face's format ({reason})") from None
        if path.is_dir() and (meta := path / "meta.json").exists():
            require_format(read_json(meta), FORMAT, meta)
        return cls.parse(text, file)

    @classmethod
    def parse(cls, text: str, source: object) -> Tokenizer:
        """Parse the content of a `tokenizer.json`; `DataError` names `source` if it cannot be used here."""
        try:
            content = json.loads(text)  # by Python's rules too: the library's parser takes more than JSON
            backend = Backend.from_str(text)
        except BaseException as error:  # the library raises plain Exception, and Rust's panics are not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{source}: not a tokenizer.json of Hugging Face's format ({error})") from None
        if not isinstance(backend.model, models.BPE) or "ByteLevel" not in str(content.get("decoder")):
            raise DataError(f"{source}: only byte-level BPE tokenizers can encode every text; this is another kind")
        try:
            tokenizer = cls(backend)
        except DataError as error:
            raise DataError(f"{source}: {error}") from None
        if lacking := 256 - len({token for token in tokenizer._bytes if len(token) == 1}):
            raise DataError(f"{source}: {lacking} of the 256 bytes have no token, so it cannot encode every text")
        if any(tokenizer.decode(tokenizer.encode(text)) != text for text in (PROBE, " " + PROBE)):
            raise DataError(f"{source}: does not give a text back as it was (it adds, drops or changes characters)")
        return tokenizer

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`, in Hugging Face's format."""
        return str(self._backend.to_str(pretty=True))

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` (Hugging Face's format) and `meta.json`."""
        directory = Path(directory)
        atomic_write(directory / "tokenizer.json", self.to_json())
        meta = {"format": FORMAT, "vocab_size": self.vocab_size, "digest": self.digest, "special_tokens": self.special}
        write_json(directory / "meta.json", meta)

    @functools.cached_property
    def digest(self) -> str:
        """Return the SHA-256 of what decides the encoding, whatever the file's layout."""
        content = json.loads(self.to_json())
        deciding = {key: content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without `<|bos|>` and never a special token."""
        return self._backend.encode(_clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        encodings = self._backend.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token; empty for special tokens and for ids without a token."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ordinary tokens among ids; they may end inside a character."""
        return b"".join(self.token_bytes(i) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ordinary tokens among ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each id adds to what `decode` returns; "" where a character goes on in the next one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(self.token_bytes(id), i == len(ids)) for i, id in enumerate(ids, 1)]

    def byte_lengths(self) -> np.ndarray:
        """Return the number of bytes of each token, (V,) int32; 0 for special tokens."""
        return np.array([len(b) for b in self._bytes], np.int32)


TRAIN_CHARS = 2_000_000_000  # that BPE sees of the training text
DOC_CHARS = 10_000  # of one document, so that a few giants do not decide the merges


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    max_chars: int = TRAIN_CHARS,
    doc_chars: int = DOC_CHARS,
    normalize: str = "none",
    fewer: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` ids, special tokens included, from a stream of documents.

    Sees at most `max_chars` characters, `doc_chars` of each document, and keeps only word counts. `normalize` "nfc"
    composes what it encodes, so that the two ways to write Hangul or an accent become one. `DataError` if the text does
    not fill the vocabulary, unless `fewer` ids will do; `UsageError` if the vocabulary cannot hold the bytes.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UsageError(f"model.vocab_size: {vocab_size} is below {least}, the bytes and the special tokens")
    backend = byte_level(Backend(models.BPE(byte_fallback=False)), SPLIT)
    if normalize == "nfc":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=0,
    )

    def limited() -> Iterator[str]:
        left = max_chars
        for document in documents:
            if left <= 0:
                return
            text = _clean(document[: min(doc_chars, left)])
            left -= len(text)
            yield text

    backend.train_from_iterator(limited(), trainer)
    tokenizer = Tokenizer(backend)
    if tokenizer.vocab_size < vocab_size and not fewer:
        raise DataError(
            f"model.vocab_size: {vocab_size} is more than the {tokenizer.vocab_size} tokens that the text gives; "
            f"set model.vocab_size={tokenizer.vocab_size} or less"
        )
    return tokenizer


def _clean(text: str) -> str:
    """Replace lone surrogates (from damaged JSON escapes) by U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def byte_level(backend: Backend, pattern: str) -> Backend:
    """Cut words by `pattern` and work on bytes."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_alphabet() -> dict[str, int]:
    """Return which byte each printable character of byte-level BPE (GPT-2's) stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}
