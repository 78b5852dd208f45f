"""A tokenizer as Hugging Face's libraries load it, with the chat template; and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from jaxchat.errors import DataError
from jaxchat.text.tokenizer import ASSISTANT_END, BOS, Tokenizer

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
