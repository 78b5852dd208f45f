"""Stage tokenizer: train a byte-level BPE on the training text, or take an existing one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxchat.config import Config
from jaxchat.data.corpus import interleaved, iterate_documents, open_corpus, training_limit
from jaxchat.data.tokenize import batches_of
from jaxchat.errors import UsageError
from jaxchat.log import progress, say
from jaxchat.paths import RunDir
from jaxchat.text.tokenizer import Tokenizer, train_tokenizer

READS = (
    "tokenizer.", "data.source", "data.val_fraction", "data.val_source", "data.text_bytes", "data.encoding",
    "model.vocab_size",
)  # fmt: skip
SAMPLE_DOCUMENTS, SAMPLE_CHARS = 2000, 8_000_000  # of the held-out text at most, to measure the compression


def first_documents(documents: Iterable[str], count: int) -> list[str]:
    """The first ones, no more than `SAMPLE_CHARS` characters of them; at least one, if there is any."""
    found, size = [], 0
    for document in itertools.islice(documents, count):
        found.append(document)
        size += len(document)
        if size >= SAMPLE_CHARS:
            break
    return found


def run(config: Config, run: RunDir) -> dict[str, Any]:
    """Write `tokenizer/`; facts: vocabulary, bytes per token on held-out text, digest."""
    data, options = config.data, config.tokenizer
    if options.path:
        if options.normalize != "none":
            raise UsageError(
                "tokenizer.normalize: is for a tokenizer that is trained; set it to none with tokenizer.path"
            )
        tokenizer = Tokenizer.load(Path(options.path).expanduser())
        if tokenizer.vocab_size > config.model.vocab_size:
            raise UsageError(
                f"tokenizer.path: {options.path} has {tokenizer.vocab_size} tokens, special tokens included; "
                f"set model.vocab_size={tokenizer.vocab_size}"
            )
    else:
        for key, value in (("train_chars", options.train_chars), ("doc_chars", options.doc_chars)):
            if value < 1:
                raise UsageError(f"tokenizer.{key}: must be at least 1, not {value}")
        parts = open_corpus(data)
        documents = interleaved(parts, "train", training_limit(parts, data))
        with progress("tokenizer", None) as bar:
            tokenizer = train_tokenizer(
                bar.track(documents), config.model.vocab_size, options.train_chars, options.doc_chars, options.normalize
            )
    tokenizer.save(run.tokenizer)
    sample = first_documents(iterate_documents(data, "val"), SAMPLE_DOCUMENTS)
    tokens = sum(len(ids) for batch in batches_of(sample) for ids in tokenizer.encode_batch(batch))
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in sample)
    facts = {
        "vocab_size": tokenizer.vocab_size,
        "trained": not options.path,
        "bytes_per_token": size / max(tokens, 1),
        "chars_per_token": sum(map(len, sample)) / max(tokens, 1),
        "digest": tokenizer.digest,
    }
    say(f"  {facts['vocab_size']:,} tokens, {facts['bytes_per_token']:.2f} bytes per token on held-out text")
    return facts
