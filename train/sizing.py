"""How large a model, vocabulary and horizon a text of one's own asks for: the tier `book`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxchat.config import Config
from jaxchat.data.corpus import iterate_documents
from jaxchat.data.tokenize import batches_of
from jaxchat.errors import DataError, UsageError
from jaxchat.log import say
from jaxchat.text.tokenizer import Tokenizer, train_tokenizer

EPOCHS = 4  # of a text that is small: then the held-out score of Shakespeare's plays was best (docs/book.md)
SMALL_RUN = 4_000_000  # tokens, about ten minutes on two cores; a longer text is read once at least
SAMPLE_CHARS = 1_500_000  # of the text at most, to learn how many tokens it comes to
BYTES_PER_TOKEN = 3.0  # taken where the text is too small to tell
VOCABULARIES = (384, 8192)  # at least and at most; one token for every kilobyte of text between
# (tokens of the text from which on, layers, width, heads)
SHAPES = ((0, 3, 128, 2), (100_000, 4, 192, 3), (3_000_000, 6, 256, 4), (20_000_000, 8, 384, 6))
BATCH_TOKENS = 2_048
SEQ_LEN = 256


def sized(config: Config) -> Config:
    """The configuration with what is -1 of layers, width, heads, context, vocabulary, batch and steps fitted to the
    text; as it was without `data.size_model`.

    Raises `DataError` where the text, or the tokenizer of `tokenizer.path`, cannot be read.
    """
    model, train = config.model, config.train
    keys = ("depth", "vocab_size", "seq_len")
    if not config.data.size_model or not (any(getattr(model, key) == -1 for key in keys) or train.steps == -1):
        return config
    if "hf:" in config.data.source and config.data.text_bytes < 1:
        raise UsageError(
            "data.size_model: how much of the hub's text? Set data.text_bytes, as --set data.text_bytes=20000000"
        )
    size, sample = _measured(config)
    path, (low, high) = config.tokenizer.path, VOCABULARIES
    own = Tokenizer.load(Path(path).expanduser()) if path else None
    fitted = own.vocab_size if own else min(high, max(low, 1 << (max(1, size // 1000).bit_length() - 1)))
    vocabulary = _given(model.vocab_size, fitted)
    tokenizer = own or _trained(config, vocabulary, sample)
    tokens = size / _bytes_per_token(tokenizer, sample) * (1 - config.data.val_fraction)
    _, depth, width, heads = next(shape for shape in reversed(SHAPES) if tokens >= shape[0])
    if model.depth != -1:  # the depth decides the rest, as everywhere
        width = heads = -1
    seen = max(tokens, min(EPOCHS * tokens, SMALL_RUN))
    model = dataclasses.replace(
        model,
        depth=_given(model.depth, depth),
        width=_given(model.width, width),
        n_heads=_given(model.n_heads, heads),
        vocab_size=vocabulary,
        seq_len=_given(model.seq_len, SEQ_LEN),
    )
    batch = _given(train.batch_tokens, max(BATCH_TOKENS, model.seq_len))
    train = dataclasses.replace(train, batch_tokens=batch, steps=_given(train.steps, max(1, round(seen / batch))))
    say(
        f"{size:,} bytes of text in UTF-8: {model.depth} layers, a vocabulary of {model.vocab_size:,} tokens, "
        f"{train.steps:,} step{'s' * (train.steps > 1)} (the text about {train.steps * batch / tokens:.1f} times)"
    )
    return dataclasses.replace(config, model=model, train=train)


def _measured(config: Config) -> tuple[int, list[str]]:
    """(bytes of the whole text, its first documents)."""
    size, chars, sample = 0, 0, list[str]()
    for text in iterate_documents(config.data):
        size += len(text.encode("utf-8", "replace"))
        if chars < SAMPLE_CHARS:
            sample.append(text)
            chars += len(text)
    return size, sample


def _trained(config: Config, vocabulary: int, sample: list[str]) -> Tokenizer | None:
    """One like that which stage tokenizer will train; None where the text is too small for it, which the stage says."""
    options = config.tokenizer
    try:
        return train_tokenizer(sample, vocabulary, options.train_chars, options.doc_chars, options.normalize)
    except DataError:
        return None


def _bytes_per_token(tokenizer: Tokenizer | None, sample: list[str]) -> float:
    """Measured, for languages differ too much for one figure."""
    if tokenizer is None:
        return BYTES_PER_TOKEN
    tokens = sum(len(ids) for batch in batches_of(sample) for ids in tokenizer.encode_batch(batch))
    return sum(len(text.encode("utf-8", "replace")) for text in sample) / max(tokens, 1)


def _given(value: int, fitted: int) -> int:
    return fitted if value == -1 else value
