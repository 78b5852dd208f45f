"""One HTML file that holds a model and chats in any browser, from the disk, without a network.

Kernels and unembedding are the engine's int8 (`serve.weights`), tables that are looked up int8 with a scale for each
row, all else float32; in base64, of which deflating would save 7 %. `html/model.js` is the engine, `page.js` the page.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jinja2 import Environment, FileSystemLoader

from jaxchat.chat import EXAMPLES
from jaxchat.errors import UsageError
from jaxchat.interop.trained import KINDS, Trained, model_card
from jaxchat.low_precision import KERNELS, quantize_int8
from jaxchat.run_dir import atomic_write
from jaxchat.sizes import count_parameters, value_layers, windows
from jaxchat.tokenizer import Tokenizer, byte_alphabet

ASSETS = Environment(loader=FileSystemLoader(Path(__file__).with_name("html")), autoescape=True)
MAX_PARAMETERS = 1_000_000_000  # Chromium opened 897 M: a file of 1.2 GB, 4.1 GB of memory
PIECE = 3 << 20  # bytes in one element of the page; no string comes near a browser's longest one (V8: 512 MiB)
TABLES = ("embedding", "unembedding", "value_embedding", "bigram_embedding")
SMALL = ("smear_gate", "smear_scale", "backout_scale", "residual_scale", "x0_scale", "ve_gate")  # stay float32
SERVE = ("temperature", "top_k", "max_tokens", "language", "message_chars")
HOW = "Open this file in a browser. It holds the weights in int8, needs no network and sends nothing anywhere."


def write_html(model: Trained, out: Path) -> dict[str, Any]:
    """Write a model as the file `out`, or `chat.html` in the folder `out`; facts: dtype, bytes.

    `UsageError` where the file exists, and where the model is too large for a browser, has parameters that the page
    does not know, or a tokenizer that it cannot run.
    """
    out = out if out.suffix == ".html" else out / "chat.html"
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: exists already; choose another --out or remove it")
    if (count := count_parameters(model.config).total) > MAX_PARAMETERS:
        raise UsageError(f"{model.name}: has {count:,} parameters; a browser opens at most {MAX_PARAMETERS:,}")
    tokenizer, arrays = tokenizer_tables(model.tokenizer)
    table, parts, offset = dict[str, Any](), list[np.ndarray](), 0
    for name, array, *scale in [*arrays, *tensors(model)]:
        table[name] = [array.dtype.name, offset, *array.shape]
        for part in [*scale, array]:  # each begins at a multiple of 4 bytes
            parts.append(np.pad(np.ascontiguousarray(part).reshape(-1).view(np.uint8), (0, -part.nbytes % 4)))
            offset += parts[-1].nbytes
    content = {
        "name": model.name,
        "chats": model.chats,
        "config": dataclasses.asdict(model.config) | {"windows": windows(model.config)},
        "tokenizer": tokenizer,
        "tensors": table,
        "bytes": offset,
        "serve": {key: getattr(model.run_config.serve, key) for key in SERVE},
        "examples": (model.run_config.eval.chat_prompts or EXAMPLES) if model.chats else [],
        "facts": facts(model, count),
        "card": re.sub(r"\A---\n.*?\n---\n+", "", model_card(model, HOW, "html"), flags=re.DOTALL),
    }
    # no text may end the element that it stands in
    text, data = json.dumps(content).replace("<", "\\u003c"), np.concatenate(parts).tobytes()
    pieces = (base64.b64encode(data[at : at + PIECE]).decode() for at in range(0, len(data), PIECE))
    atomic_write(out, ASSETS.get_template("page.html").render(name=model.name, content=text, pieces=pieces))
    return {"dtype": "int8", "bytes": out.stat().st_size}


def tensors(model: Trained) -> Iterator[tuple[Any, ...]]:
    """Yield (name, float32 (1, size)) or (name, int8 (rows, columns), scale (rows,)), layer by layer.

    A kernel's rows are its outputs. `UsageError` names parameters that the page would not use.
    """
    flat = {path.removeprefix("blocks."): np.asarray(p) for path, p in flatten_dict(model.params, sep=".").items()}
    if unknown := sorted(flat.keys() - {*TABLES, *SMALL, *KERNELS}):
        raise UsageError(f"{model.name}: the HTML page cannot run a model with {', '.join(unknown)}")
    layers = {name: list(range(model.config.depth)) for name in KERNELS}
    layers |= dict.fromkeys(("value_embedding", "ve_gate"), value_layers(model.config))
    quantize = jax.jit(quantize_int8)
    for name, array in flat.items():
        rows = None if name == "bigram_embedding" else model.config.vocab_size  # without the vocabulary's padding
        named = {f"{name}.{i}": array[j] for j, i in enumerate(layers[name])} if name in layers else {name: array}
        for key, one in named.items():
            if name in SMALL:
                yield key, one.astype(np.float32).reshape(1, -1)
            else:
                int8 = quantize(jnp.asarray(one[:rows].T if name in TABLES else one, jnp.float32))
                yield key, np.asarray(int8.values).T, np.asarray(int8.scale)


def facts(model: Trained, parameters: int) -> dict[str, str]:
    """Return what the page tells of the model: names, which it translates where it can, and values."""
    config, exams, stages = model.config, (model.report or {}).get("exams", {}), list(KINDS)
    rows = {"parameters": f"{parameters:,}", "layers": str(config.depth), "context": f"{config.seq_len:,}"}
    for stage in stages[: stages.index(model.stage) + 1]:  # of the furthest stage, as on the served page
        for name, exam in exams.get(stage, {}).items():
            if "accuracy" in exam:
                rows[exam["title"]] = f"{exam['metric']:.1%}"
            elif name == "bits_per_byte" and stage == "base":
                rows[exam["title"]] = f"{exam['metric']:.3f}"
    return rows


# ---- tokenizer

# what JavaScript lacks or means in another way -> the same in it (nothing could take back what `?+` and `++` match)
ANY_CASE = "'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"
JAVASCRIPT = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": ANY_CASE, "'(?i:[sdmt]|ll|ve|re)": ANY_CASE, r"\p{N}]?+\p{L}": r"\p{N}]?\p{L}",
    r"\p{N}]++[\r\n]": r"\p{N}]+[\r\n]", r"\s": r"\p{White_Space}", r"\S": r"\P{White_Space}",
}  # fmt: skip
UNDERSTOOD = re.compile(r"(?:\\[pP]\{\w+\}|\\[rn]|\(\?[:!]|[^\\(+*?}&]|[+*?}](?!\+))*")
REFUSED = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def tokenizer_tables(tokenizer: Tokenizer) -> tuple[dict[str, Any], list[tuple[str, np.ndarray]]]:
    """Return settings and named arrays of the page's tokenizer. `UsageError` names what it cannot do."""
    content = json.loads(tokenizer.to_json())
    model, vocab, alphabet = content["model"], content["model"]["vocab"], byte_alphabet()
    unknown = [token["content"] for token in content["added_tokens"] if not token["special"]]
    unknown += [key for key in REFUSED if model.get(key)] + sorted(alphabet.keys() - vocab.keys())
    normalizer, splits = (content["normalizer"] or {"type": ""})["type"], list[str]()
    unknown += [normalizer] if normalizer not in ("", "NFC", "NFD", "NFKC", "NFKD") else []
    first = content["pre_tokenizer"] or {"type": "none"}
    for step in first.get("pretokenizers", [first]):
        pattern: Any = step.get("pattern", {}).get("Regex") if step.get("behavior") == "Isolated" else None
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            pattern = GPT2_SPLIT if step["use_regex"] else ""
        for theirs, ours in JAVASCRIPT.items() if pattern else ():
            pattern = pattern.replace(theirs, ours)
        if pattern is None or step.get("invert") or not UNDERSTOOD.fullmatch(pattern):
            unknown.append(pattern or step["type"])
        splits += [pattern] if pattern else []
    if unknown:
        raise UsageError(f"the HTML page cannot do what this tokenizer needs: {', '.join(map(repr, unknown))}")
    texts = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    numbers = {
        "token_lengths": [len(text) for text in texts],
        "byte_ids": [vocab[character] for character in sorted(alphabet, key=lambda c: alphabet[c])],
        "merges": [(vocab[a], vocab[b], vocab[a + b]) for a, b in pairs],
    }
    arrays = [(name, np.array(values, np.int32).reshape(1, -1)) for name, values in numbers.items()]
    settings = {"special": tokenizer.special, "splits": splits, "normalize": normalizer}
    settings["whole_words"] = bool(model.get("ignore_merges"))
    return settings, [("token_bytes", np.frombuffer(b"".join(texts), np.uint8).reshape(1, -1)), *arrays]
