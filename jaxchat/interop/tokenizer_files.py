"""A tokenizer in the files of Hugging Face's libraries, with the chat template; and back, also from tiktoken's pickle.

Their tokenizer finds special tokens in any text. So the template puts U+E000 behind every "<" of a content (and behind
whatever else begins a special token), and a normalizer takes it away again before the text is cut into tokens. What a
person types never becomes a special token.
"""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxchat.errors import DataError
from jaxchat.tokenizer import ASSISTANT_END, BOS, Tokenizer, byte_alphabet, byte_level

Ranks = dict[bytes, int]  # tiktoken's: every token's bytes, in the order in which they were merged
MARK = "\ue000"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def tokenizer_files(tokenizer: Tokenizer, chats: bool, seq_len: int) -> dict[str, str]:
    """Return the contents of `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` by name."""
    content = json.loads(tokenizer.to_json())
    for token in content["added_tokens"]:  # they must not eat what stands beside them, nor match behind the normalizer
        token |= {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    first = sorted({token["content"][0] for token in content["added_tokens"] if token["special"]} | {"<"})
    steps = [*map(_unmark, first), *([content["normalizer"]] if content["normalizer"] else [])]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    marks = " | ".join(f'replace({json.dumps(c)}, {json.dumps(c)[:-1]}{MARK}")' for c in first)
    end = ASSISTANT_END if chats else BOS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": Backend.from_str(json.dumps(content)).to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "chat_template.jinja": TEMPLATE.read_text(encoding="utf-8").replace("MARKED", marks),
    }


def _unmark(character: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": character + MARK}, "content": character}


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a `tokenizer.json`, without what `tokenizer_files` added to it; `DataError` where it cannot be used."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        normalizer = content.get("normalizer")
        if isinstance(normalizer, dict) and _unmark("<") in normalizer.get("normalizers", []):
            rest = [s for s in normalizer["normalizers"] if s != _unmark(str(s.get("content")))]
            content["normalizer"] = (
                None if not rest else rest[0] if len(rest) == 1 else {**normalizer, "normalizers": rest}
            )
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a tokenizer.json of Hugging Face's format ({error})") from None
    return Tokenizer.parse(json.dumps(content), file)


class _Encoding:
    """Stands for `tiktoken.core.Encoding` while a pickle is read: keeps its state and does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Knows one class name, so nothing of the pickle runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")


def read_tiktoken(file: Path) -> Tokenizer:
    """Read a pickled `tiktoken.Encoding` (nanochat's `tokenizer.pkl`) as a tokenizer with the same ids for every text.

    `DataError` names what else is in there.
    """
    try:
        with open(file, "rb") as stream:
            state: Any = _Reader(stream).load().state
        pattern, ranks, special = (state[key] for key in ("pat_str", "mergeable_ranks", "special_tokens"))
        backend = from_ranks(ranks, pattern)
        backend.add_special_tokens(sorted(special, key=lambda name: special[name]))
        follows = all(backend.token_to_id(name) == i for name, i in special.items())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a pickle can hold anything, and the library raises plain Exception
        raise DataError(f"{file}: not the pickle of a tiktoken.Encoding with its ranks ({error})") from None
    if not follows:
        raise DataError(f"{file}: its special tokens do not follow its {len(ranks)} ranks one by one")
    return Tokenizer.parse(backend.to_str(), file)


def from_ranks(ranks: Ranks, pattern: str) -> Backend:
    """Return a byte-level BPE that encodes as tiktoken does, words cut by `pattern`; without special tokens.

    tiktoken merges the pair whose bytes have the lowest rank, so the halves of a token are what its bytes merge to with
    lower ranks; a whole word that is a token is not merged (`ignore_merges`). Raises the library's errors.
    """
    printable = {byte: character for character, byte in byte_alphabet().items()}

    def shown(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        halves = _merged(token, ranks, rank)
        if len(token) > 1 and len(halves) == 2:
            merges.append((shown(halves[0]), shown(halves[1])))
    vocab = {shown(token): rank for token, rank in ranks.items()}
    return byte_level(Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True)), pattern)


def _merged(token: bytes, ranks: Ranks, below: int) -> list[bytes]:
    """Return what byte-pair merging with lower ranks makes of a token's bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [(ranks.get(a + b, below), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs, default=(below, 0))
        if rank >= below:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
