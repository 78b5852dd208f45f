"""A pickled `tiktoken.Encoding` (nanochat's `tokenizer.pkl`) as a tokenizer of ours that encodes the same.

Nothing of the pickle runs: the reader knows one name, tiktoken's class, and puts the four facts of its state (name,
pattern, ranks, special tokens) into an inert object.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from jaxchat.errors import DataError
from jaxchat.text.ranks import Ranks, from_ranks
from jaxchat.text.tokenizer import Tokenizer


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
