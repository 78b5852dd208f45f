"""nanochat's own checkpoints: `model_NNNNNN.pt`, `meta_NNNNNN.json` and `tokenizer.pkl`.

The layout of October to December 2025 is our recipe `classic`, the one since March 2026 is `modern`. Models written in
between have other gates and windows, which their files do not describe; they are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.config import ModelConfig
from jaxchat.errors import DataError, UsageError
from jaxchat.interop.huggingface import assemble
from jaxchat.interop.tokenizer_files import read_tiktoken, read_tokenizer
from jaxchat.interop.trained import Trained
from jaxchat.run_dir import read_json, sha256_file
from jaxchat.scaling import resolve_model
from jaxchat.sizes import VE_GATE_CHANNELS

FOLDERS = {"base": "base", "mid": "sft", "chatsft": "sft", "sft": "sft", "chatrl": "rl", "rl": "rl"}  # X_checkpoints
SAFE_TORCH = (2, 10)  # before 2.6 weights_only runs code (CVE-2025-32434), before 2.10 it corrupts memory
MODEL = re.compile(r"model_(\d+)\.pt")
# tensors of the present layout that the first one lacks, one name of each kind
EXTRAS = ("resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda", "value_embeds.")
SHAPES = {
    "sequence_len": "seq_len", "vocab_size": "vocab_size", "n_layer": "depth", "n_head": "n_heads",
    "n_kv_head": "n_kv_heads", "n_embd": "width",
}  # fmt: skip


def read_nanochat(
    source: Path, stage: str | None = None, tokenizer: Path | None = None, allow_pickle: bool = False
) -> Trained:
    """Read the newest checkpoint of a folder.

    `stage`: what it is, by default as the folder's name says. `tokenizer`: a tokenizer.pkl or tokenizer.json, looked
    for beside the checkpoint and where nanochat keeps it. `DataError` names what cannot be read, and says that the
    files are pickles where `allow_pickle` is off.
    """
    files = {int(m[1]): p for p in [source, *source.glob("model_*.pt")] if (m := MODEL.fullmatch(p.name))}
    if not files:
        inner = sorted({p.parent.name for p in source.glob("*/model_*.pt")})
        raise DataError(f"{source}: no model_NNNNNN.pt there{f'; there are some in {inner}' if inner else ''}")
    step, file = max(files.items())
    meta = read_json(file.with_name(file.name.replace("model_", "meta_").replace(".pt", ".json")))
    if not allow_pickle:
        raise DataError(
            f"{file}: is a pickle, which can run code; if you trust where it comes from, say --allow-pickle (even "
            "then only tensors are read from it, and only ranks from tokenizer.pkl)"
        )
    tokenizer = tokenizer or _find_tokenizer(file)
    vocabulary = read_tokenizer(tokenizer) if tokenizer.suffix == ".json" else read_tiktoken(tokenizer)
    tensors = _tensors(file)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    config = _config(meta, shapes, file)
    params = assemble(config, "nanochat", shapes, lambda name: _array(tensors.pop(name)), file)
    name = file.parent.resolve().name
    origin = {"format": "nanochat", "from": name, "sha256": {file.name: sha256_file(file)}}
    return Trained(config, params, vocabulary, stage or _stage(file), name, step=step, imported=origin)


def _find_tokenizer(file: Path) -> Path:
    folders = [file.parent, *(p / "tokenizer" for p in (file.parent, *file.resolve().parents[1:3]))]
    for path in (folder / name for folder in folders for name in ("tokenizer.pkl", "tokenizer.json")):
        if path.is_file():
            return path
    raise DataError(f"{file}: no tokenizer.pkl beside it or in {folders[-1]}; give its place with --tokenizer")


def _stage(file: Path) -> str:
    """By nanochat's folder names. Any other folder holds a chat model, which is what people pass on."""
    for part in reversed(file.resolve().parts[:-1]):
        if part.endswith("_checkpoints") and (stage := FOLDERS.get(part.removesuffix("_checkpoints"))):
            return stage
    return "sft"


def _tensors(file: Path) -> dict[str, Any]:
    """Return torch tensors by name, mapped into memory. Nothing but tensors is unpickled."""
    try:
        import torch
    except ImportError:
        raise UsageError("to read nanochat's .pt files: pip install 'torch>=2.10' (or the extra 'hf-check')") from None
    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < SAFE_TORCH:
        raise UsageError(f"torch {torch.__version__}: its weights_only loading is not safe yet; take 2.10 or newer")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{file}: cannot be read as tensors ({first})") from None
    plain = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(content, dict) or not all(
        isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu" and t.dtype in plain
        for t in content.values()
    ):
        raise DataError(f"{file}: holds other things than plain floating-point tensors by name")
    return {str(name).removeprefix("_orig_mod."): t for name, t in content.items()}


def _array(tensor: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.detach().numpy())


def _config(meta: Any, shapes: dict[str, tuple[int, ...]], file: Path) -> ModelConfig:
    given = meta.get("model_config") if isinstance(meta, dict) else None
    if not isinstance(given, dict) or not all(isinstance(given.get(key), int) and given[key] > 0 for key in SHAPES):
        raise DataError(f"{file}: its meta file has no model_config with {', '.join(SHAPES)}")
    extras = [name for name in EXTRAS if any(t.startswith(name) for t in shapes)]
    gates = {shape[-1] for name, shape in shapes.items() if name.endswith("attn.ve_gate.weight")}
    if extras and (len(extras) < len(EXTRAS) or gates != {VE_GATE_CHANNELS}):
        lacking = [name for name in EXTRAS if name not in extras] or [f"gates of {VE_GATE_CHANNELS} channels"]
        raise DataError(
            f"{file}: has {', '.join(extras)} but no {', '.join(lacking)}: written by nanochat between January and "
            "March 2026, whose files do not fully describe the model; older and newer ones can be read"
        )
    values: dict[str, Any] = {ours: given[theirs] for theirs, ours in SHAPES.items()}
    values |= {"recipe": "modern" if extras else "classic", "head_width": given["n_embd"] // given["n_head"]}
    if extras:
        values["window_pattern"] = str(given.get("window_pattern", "L")).upper()  # nanochat's default for old files
    try:
        return resolve_model(ModelConfig(**values))
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None
