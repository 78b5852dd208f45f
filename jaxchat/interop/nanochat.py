"""nanochat's own checkpoints: `model_NNNNNN.pt`, `meta_NNNNNN.json` and `tokenizer.pkl`. Needs no torch.

The layout of October to December 2025 is our recipe `classic`, the one since March 2026 is `modern`. Models written in
between have other tensors or gates, which their files do not fully describe; they are refused.

The files are pickles. Two readers here know a few names each and refuse every other, so that nothing of a pickle runs.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxchat.config import ModelConfig
from jaxchat.errors import DataError, UsageError
from jaxchat.interop.huggingface import assemble
from jaxchat.interop.trained import Trained, read_tokenizer
from jaxchat.run_dir import read_json, sha256_file
from jaxchat.scaling import resolve_model
from jaxchat.tokenizer import Tokenizer, byte_alphabet, byte_level

FOLDERS = {"base": "base", "mid": "sft", "chatsft": "sft", "sft": "sft", "chatrl": "rl", "rl": "rl"}  # X_checkpoints
SHAPES = {
    "sequence_len": "seq_len", "vocab_size": "vocab_size", "n_layer": "depth", "n_head": "n_heads",
    "n_kv_head": "n_kv_heads", "n_embd": "width",
}  # fmt: skip
STORAGES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}  # torch's -> numpy's
Ranks = dict[bytes, int]  # tiktoken's: every token's bytes, in the order in which they were merged


def read_nanochat(
    source: Path, stage: str | None = None, tokenizer: Path | None = None, allow_pickle: bool = False
) -> Trained:
    """Read the newest checkpoint of a folder.

    `stage`: what it is, by default as the folder's name says. `tokenizer`: a tokenizer.pkl or tokenizer.json, looked
    for beside the checkpoint and where nanochat keeps it. `DataError` names what cannot be read, and says that the
    files are pickles where `allow_pickle` is off.
    """
    files = {int(m[1]): p for p in source.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name))}
    if not files:
        raise DataError(f"{source}: no model_NNNNNN.pt there; give the folder that holds it")
    step, file = max(files.items())
    if not allow_pickle:
        raise DataError(
            f"{file}: is a pickle, which can run code; if you trust where it comes from, say --allow-pickle (even "
            "then only tensors are read from it, and only ranks from tokenizer.pkl)"
        )
    folders = [file.parent, *(folder / "tokenizer" for folder in (file.parent, *file.resolve().parents[1:3]))]
    places = [folder / name for folder in folders for name in ("tokenizer.pkl", "tokenizer.json")]
    tokenizer = tokenizer or next((path for path in places if path.is_file()), None)
    if tokenizer is None:
        raise DataError(f"{file}: no tokenizer.pkl beside it or in {folders[-1]}; give its place with --tokenizer")
    vocabulary = read_tokenizer(tokenizer) if tokenizer.suffix == ".json" else read_tiktoken(tokenizer)
    meta = read_json(file.with_name(file.name.replace("model_", "meta_").replace(".pt", ".json")))
    names, read = open_torch(file)
    config = _config(meta, modern="resid_lambdas" in names, file=file)
    params = assemble(config, "nanochat", names, read, file)
    if stage is None:  # other folders than nanochat's hold chat models, which is what people pass on
        kinds = [part.removesuffix("_checkpoints") for part in file.resolve().parts if part.endswith("_checkpoints")]
        stage = FOLDERS.get(kinds[-1], "sft") if kinds else "sft"
    name = file.parent.resolve().name
    origin = {"format": "nanochat", "from": name, "sha256": {file.name: sha256_file(file)}}
    return Trained(config, params, vocabulary, stage, name, step=step, imported=origin)


def _config(meta: Any, modern: bool, file: Path) -> ModelConfig:
    try:
        content = meta["model_config"]
        values = {ours: content[theirs] for theirs, ours in SHAPES.items()}
        values |= {"recipe": "modern" if modern else "classic", "head_width": content["n_embd"] // content["n_head"]}
        if modern:
            values["window_pattern"] = content.get("window_pattern", "L").upper()  # nanochat's default for old files
        return resolve_model(ModelConfig(**values))
    except (KeyError, TypeError, AttributeError, ArithmeticError, UsageError) as error:
        raise DataError(f"{file}: its meta file has no model_config that can be run ({error!r})") from None


class _Encoding:
    """Stands for `tiktoken.core.Encoding` while a pickle is read: keeps its state and does nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Reader(pickle.Unpickler):
    """Knows these names only, so nothing of the pickle runs."""

    NAMES: Mapping[tuple[str, str], Any] = {
        ("tiktoken.core", "Encoding"): _Encoding,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *described: described,  # storage, offset, shape, stride
        **{("torch", storage): dtype for storage, dtype in STORAGES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.NAMES:
            return self.NAMES[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a tensor nor a tokenizer")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def open_torch(file: Path) -> tuple[Collection[str], Callable[[str], np.ndarray]]:
    """Return the names of a `.pt` file's tensors, and a function that reads one; `DataError` names what else it holds.

    The file is a zip archive: a pickle describes the tensors, each storage is a file of bytes.
    """
    try:
        archive = zipfile.ZipFile(file)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")  # torch never does that, and a small file could fill the memory
        [index] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        content = Reader(io.BytesIO(archive.read(index))).load()
        tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in content.items()}
    except Exception as error:  # a pickle can hold anything
        raise DataError(f"{file}: cannot be read as tensors ({error})") from None

    def read(name: str) -> np.ndarray:
        try:
            (_, dtype, key, *_), start, shape, stride, *_ = tensors[name]
            data = np.frombuffer(archive.read(f"{index.removesuffix('.pkl')}/{key}"), dtype)
            array = data[start : start + math.prod(shape)].reshape(shape)
            steps = zip(array.strides, stride, shape, strict=True)
            if any(step != n * array.itemsize for step, n, size in steps if size > 1):
                raise ValueError("it is not contiguous")
            return array
        except Exception as error:  # as above
            raise DataError(f"{file}: {name} cannot be read as a tensor ({error})") from None

    return tensors.keys(), read


def read_tiktoken(file: Path) -> Tokenizer:
    """Read a pickled `tiktoken.Encoding` (nanochat's `tokenizer.pkl`) as a tokenizer with the same ids for every text.

    `DataError` names what else is in there.
    """
    try:
        with open(file, "rb") as stream:
            state = Reader(stream).load().state
        pattern, ranks, special = (state[key] for key in ("pat_str", "mergeable_ranks", "special_tokens"))
        backend = from_ranks(ranks, pattern)
        backend.add_special_tokens(sorted(special, key=lambda name: special[name]))
        if any(backend.token_to_id(name) != i for name, i in special.items()):
            raise ValueError(f"its special tokens do not follow its {len(ranks)} ranks one by one")
    except Exception as error:  # as above, and the library raises plain Exception
        raise DataError(f"{file}: not the pickle of a tiktoken.Encoding with its ranks ({error})") from None
    return Tokenizer.parse(backend.to_str(), file)


def from_ranks(ranks: Ranks, pattern: str) -> Backend:
    """Return a byte-level BPE that encodes as tiktoken does, words cut by `pattern`; without special tokens.

    tiktoken merges the pair whose bytes have the lowest rank, so the halves of a token are what its bytes merge to with
    lower ranks; a whole word that is a token is not merged (`ignore_merges`). Raises the library's errors.
    """
    printable = {byte: character for character, byte in byte_alphabet().items()}
    shown = {token: "".join(printable[byte] for byte in token) for token in ranks}
    merges = []
    for token, own_rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min((ranks.get(a + b, own_rank), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if rank >= own_rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((shown[parts[0]], shown[parts[1]]))
    vocab = {shown[token]: rank for token, rank in ranks.items()}
    return byte_level(Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True)), pattern)
