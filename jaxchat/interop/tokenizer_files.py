"""A tokenizer as Hugging Face's libraries load it, with the chat template; and back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from jaxchat.errors import DataError
from jaxchat.tokenizer import ASSISTANT_END, BOS, Ranks, Tokenizer, from_ranks

# A pickled `tiktoken.Encoding` (nanochat's `tokenizer.pkl`) as a tokenizer of ours that encodes the same.
#
# Nothing of the pickle runs: the reader knows one name, tiktoken's class, and puts the four facts of its state (name,
# pattern, ranks, special tokens) into an inert object.


class _Encoding:
    """Stands for `tiktoken.core.Encoding` while a pickle is read."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")


def read_ranks(file: Path) -> tuple[str, Ranks, dict[str, int]]:
    """(pattern, rank of every token's bytes, id of every special token); `DataError` names what else is in there."""
    try:
        with open(file, "rb") as stream:
            found = _Reader(stream).load()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a pickle can fail in any way
        raise DataError(f"{file}: not the pickle of a tiktoken.Encoding ({error})") from None
    state: Any = found.state if isinstance(found, _Encoding) else None
    if isinstance(state, str):
        raise DataError(f"{file}: only names tiktoken's encoding {state!r}, without its ranks; give its tokenizer.json")
    try:
        pattern, ranks, special = (state[key] for key in ("pat_str", "mergeable_ranks", "special_tokens"))
        whole = all(isinstance(token, bytes) and isinstance(rank, int) for token, rank in ranks.items())
        whole &= all(isinstance(name, str) and isinstance(i, int) for name, i in special.items())
        whole &= sorted(ranks.values()) == list(range(len(ranks))) and isinstance(pattern, str)
    except (TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{file}: its ranks are not those of a whole byte-level vocabulary")
    return pattern, ranks, special


def read_tiktoken(file: Path) -> Tokenizer:
    """The tokenizer of a pickled `tiktoken.Encoding`, with the same ids for every text."""
    pattern, ranks, special = read_ranks(file)
    try:
        backend = from_ranks(ranks, pattern)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file}: cannot be made a tokenizer.json ({error})") from None
    backend.add_special_tokens(sorted(special, key=lambda name: special[name]))
    if any(backend.token_to_id(name) != i for name, i in special.items()):
        raise DataError(f"{file}: its special tokens do not follow its {len(ranks)} ranks one by one")
    return Tokenizer.parse(backend.to_str(), file)


# Their tokenizer finds special tokens in any text it is given. The template puts U+E000 behind every "<" of a content
# (and behind what else a special token begins with), so that it finds none there, and a normalizer takes it away again
# afterwards, before the text is cut into tokens.
MARK = "\ue000"
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def tokenizer_files(tokenizer: Tokenizer, chats: bool, seq_len: int) -> dict[str, str]:
    """Name -> content of `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`."""
    content = json.loads(tokenizer.to_json())
    own = content["normalizer"]
    for token in content["added_tokens"]:  # they must not eat what stands beside them, nor match behind the normalizer
        token |= {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    first = sorted({token["content"][0] for token in content["added_tokens"] if token["special"]} | {"<"})
    unmark = [_unmark(character) for character in first]
    content["normalizer"] = {"type": "Sequence", "normalizers": [*unmark, *([own] if own else [])]}
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


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, ours without what `tokenizer_files` added; `DataError` if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not a tokenizer.json of Hugging Face's format ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: not a tokenizer.json of Hugging Face's format")
    return Tokenizer.parse(json.dumps(_unmarked(content)), file)


def _unmark(character: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": character + MARK}, "content": character}


def _unmarked(content: dict[str, Any]) -> dict[str, Any]:
    given = content.get("normalizer")
    inner = given.get("normalizers") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(inner, list) or _unmark("<") not in inner:
        return content
    rest = [step for step in inner if not (isinstance(step, dict) and step == _unmark(str(step.get("content"))))]
    return content | {"normalizer": None if not rest else rest[0] if len(rest) == 1 else given | {"normalizers": rest}}
