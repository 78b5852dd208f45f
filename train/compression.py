"""The tokenizer beside GPT-2's and GPT-4's on the same held-out text, where their files are at hand."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from jaxchat.config import Config
from jaxchat.data.corpus import iterate_documents
from jaxchat.data.tokenize import batches_of
from jaxchat.errors import DataError
from jaxchat.log import say
from jaxchat.paths import RunDir
from jaxchat.text.ranks import from_ranks
from jaxchat.text.tokenizer import Tokenizer
from train.tokenizer import first_documents

DOCUMENTS = 2000  # of the held-out text, as in stage tokenizer
HUB_CACHE = Path("~/.cache/huggingface/hub")
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name -> files inside tasks.data_dir, and repositories whose tokenizer.json may lie in the hub's cache
OTHERS = {
    "GPT-2": (("tokenizers/gpt2.json", "gpt2/tokenizer.json"), ("openai-community/gpt2", "gpt2")),
    "GPT-4": (
        ("tokenizers/gpt4.json", "gpt-4/tokenizer.json", "tokenizers/cl100k_base.tiktoken", "cl100k_base.tiktoken"),
        ("Xenova/gpt-4",),
    ),
}


def other_tokenizers(config: Config, run: RunDir, cache: Path = HUB_CACHE) -> list[dict[str, Any]]:
    """Vocabulary and bytes per token of each, and how many of our tokens one of its takes on average."""
    found = {name: _find(config.tasks.data_dir, *places, cache.expanduser()) for name, places in OTHERS.items()}
    if not any(found.values()):
        return []
    try:
        documents = iterate_documents(config.data, "val")
        texts, tokenizer = first_documents(documents, DOCUMENTS), Tokenizer.load(run.tokenizer)
        ours = sum(len(ids) for batch in batches_of(texts) for ids in tokenizer.encode_batch(batch))
    except DataError as error:
        say(f"  other tokenizers: {error}", style="yellow")
        return []
    size, results = sum(len(text.encode("utf-8", "replace")) for text in texts), []
    for name, path in found.items():
        if path is None:
            continue
        try:
            backend = load(path)
        except Exception as error:  # the library raises plain Exception
            say(f"  {path}: not a tokenizer ({error}); left out", style="yellow")
            continue
        count = max(1, _count(backend, texts))
        results.append(
            {
                "name": name,
                "vocab_size": backend.get_vocab_size(),
                "bytes_per_token": size / count,
                "ours_per_token": ours / count,
            }
        )
    return results


def _find(data_dir: str, files: Sequence[str], repos: Sequence[str], cache: Path) -> Path | None:
    places = [Path(data_dir).expanduser() / file for file in files] if data_dir else []
    for repo in repos:
        places += sorted((cache / f"models--{repo.replace('/', '--')}").glob("snapshots/*/tokenizer.json"))
    return next((path for path in places if path.is_file()), None)


def _count(backend: Backend, texts: Sequence[str]) -> int:
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    return sum(len(encoding.ids) for encoding in backend.encode_batch_fast(clean, add_special_tokens=False))


def load(path: Path) -> Backend:
    """From a `tokenizer.json`, or from tiktoken's file of GPT-4's ranks (a line: a token in base64 and its rank).

    Raises `ValueError` for a damaged file of ranks, and what the library raises for a damaged `tokenizer.json`.
    """
    if path.suffix != ".tiktoken":
        return Backend.from_file(str(path))
    ranks = {}
    for line in path.read_bytes().splitlines():
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {len(ranks) + 1} is no token with its rank") from None
    return from_ranks(ranks, GPT4_SPLIT)
