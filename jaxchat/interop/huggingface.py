"""Hugging Face's format, out and in: safetensors, config, tokenizer, chat template, model card.

What the stock NanoChat architecture can hold goes out as that one and needs nothing of ours to run; everything else
goes out with one file of code, `modeling_jaxchat.py`. Nothing is dropped on the way: the other one is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxchat.errors import DataError, UsageError
from jaxchat.interop.card import model_card
from jaxchat.interop.hf_config import MODULE, architecture_of, from_hf, to_hf, token_ids
from jaxchat.interop.names import Place, assemble, places, tensor
from jaxchat.interop.tokenizer_files import read_tokenizer, tokenizer_files
from jaxchat.interop.trained import STAGES, Trained, appearing, load_trained, write_run
from jaxchat.paths import RunDir, atomic_write, read_json, sha256_file, write_json
from jaxchat.text.tokenizer import BOS

SHARD_BYTES = 1_000_000_000  # of one safetensors file; what is written at once is also held once more in memory
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CODE = Path(__file__).parent / "exported" / f"{MODULE}.py"
HOW = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
{ask}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))
```"""
CHAT = """messages = [{"role": "user", "content": "Hello!"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
CONTINUE = 'ids = tokenizer("<|bos|>Once upon a time", return_tensors="pt")'


def export_hf(
    run: RunDir, out: str | Path, stage: str | None = None, dtype: str = "auto", architecture: str = "auto"
) -> dict[str, Any]:
    """Write a run's model to the new folder `out`; facts: architecture, dtype, bytes.

    dtype: "auto" (as stored) | "float32" | "bfloat16". `UsageError` where `architecture` "nanochat" cannot hold it.
    """
    return write_hf(load_trained(run, stage, dtype), Path(out), architecture)


def write_hf(model: Trained, out: Path, architecture: str = "auto") -> dict[str, Any]:
    """As `export_hf`, of a model at hand."""
    architecture, dtype = architecture_of(model.config, architecture), model.dtype
    ids = token_ids(model.tokenizer, model.chats)
    trust = ", trust_remote_code=True" if architecture == "jaxchat" else ""
    how = HOW.replace("{trust}", trust).replace("{ask}", CHAT if model.chats else CONTINUE)
    with appearing(out) as folder:
        write_json(folder / "config.json", to_hf(model.config, architecture, dtype, ids))
        write_json(folder / "generation_config.json", ids)
        for name, text in tokenizer_files(model.tokenizer, model.chats, model.config.seq_len).items():
            atomic_write(folder / name, text)
        if architecture == "jaxchat":
            atomic_write(folder / CODE.name, CODE.read_text(encoding="utf-8"))
        atomic_write(folder / "README.md", model_card(model, how, "transformers"))
        size = _write_tensors(model, folder, dtype)
    return {"architecture": architecture, "dtype": dtype, "bytes": size}


def _write_tensors(model: Trained, folder: Path, dtype: str) -> int:
    """safetensors of at most `SHARD_BYTES` each, with an index where there are several; returns their bytes."""
    item = np.dtype(dtype).itemsize
    shards: list[dict[str, Place]] = [{}]
    full = total = 0
    for name, place in places(model.config, "hf").items():
        size = int(np.prod(place.shape)) * item
        if shards[-1] and full + size > SHARD_BYTES:
            shards.append({})
            full = 0
        shards[-1][name] = place
        full, total = full + size, total + size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        arrays = {
            name: tensor(model.config, model.params, place).astype(dtype, copy=False) for name, place in shard.items()
        }
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise DataError(f"{folder / file}: could not be written ({error}); make room and try again") from None
        (folder / file).chmod(0o644)  # the library leaves it to its owner alone
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


def import_hf(source: str | Path, out: str | Path, stage: str | None = None) -> Trained:
    """A folder of stock NanoChat, or of our own export, into the new run directory `out`.

    `stage` "base" or "sft": what the weights are; from the tokenizer's end token where it is not given. `DataError`
    names what cannot be read; then nothing is written.
    """
    model = read_hf(Path(source), stage)
    files = {path.name: sha256_file(path) for path in sorted(Path(source).glob("*.safetensors"))}
    write_run(model, Path(out), {"format": "hf", "from": model.name, "sha256": files})
    return model


def read_hf(source: Path, stage: str | None = None) -> Trained:
    """As `import_hf`, without writing it down."""
    if stage is not None and stage not in STAGES:
        raise UsageError(f"stage {stage!r} is unknown; choose from {', '.join(STAGES)}")
    if not source.is_dir():
        raise DataError(f"{source}: not a folder; give the one that holds config.json and the safetensors")
    config = from_hf(read_json(source / "config.json"), source / "config.json")
    tokenizer = read_tokenizer(source / "tokenizer.json")
    settings_file, card = source / "tokenizer_config.json", source / "README.md"
    settings = read_json(settings_file) if settings_file.exists() else {}
    end = settings.get("eos_token") if isinstance(settings, dict) else None
    end = end.get("content") if isinstance(end, dict) else end
    with _open_tensors(source) as (shapes, read):
        params = assemble(config, "hf", shapes, read, source)
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
    stage = stage or ("base" if end == BOS else "sft")
    return Trained(config, params, tokenizer, stage, source.resolve().name, text)


@contextlib.contextmanager
def _open_tensors(source: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Any]]:
    """(shapes by name, a function that reads one) of all safetensors of a folder; rotary tables are left out."""
    files = _tensor_files(source)
    where: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safe_open(file, framework="numpy"))
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    if name in where:
                        raise DataError(f"{file}: {name} stands in another file too")
                    if not name.endswith("rotary_emb.inv_freq"):
                        where[name], shapes[name] = opened, tuple(opened.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise DataError(f"{file}: damaged or no safetensors ({error}); get it once more") from None

        def read(name: str) -> np.ndarray:
            try:
                return np.asarray(where[name].get_tensor(name))
            except (SafetensorError, TypeError, AttributeError, OSError) as error:
                raise DataError(f"{source}: {name} cannot be read ({error})") from None

        yield shapes, read


def _tensor_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if index.exists():
        found = read_json(index)
        named = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(named, dict) or not all(isinstance(f, str) and Path(f).name == f for f in named.values()):
            raise DataError(f"{index}: has no weight_map of file names")
        files = [source / name for name in sorted(set(named.values()))]
    else:
        files = sorted(source.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file, though the index names it; get it once more")
    if not files:
        pickles = sorted(p.name for pattern in PICKLES for p in source.glob(pattern))
        only = f", only {', '.join(pickles[:3])}, which as pickles can run code and are not opened" if pickles else ""
        raise DataError(f"{source}: no safetensors there{only}")
    return files
