"""nanochat's own checkpoints: `model_NNNNNN.pt`, `meta_NNNNNN.json` and `tokenizer.pkl`, of 2025 and of 2026.

The first layout (October to December 2025) is our recipe `classic`, the present one (since March 2026) `modern`. What
was written in between has other gates and windows, of which the files do not tell, and is refused.
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
from jaxchat.interop.trained import STAGES, Trained, write_run
from jaxchat.run_dir import read_json, sha256_file
from jaxchat.scaling import resolve_model
from jaxchat.sizes import VE_GATE_CHANNELS
from jaxchat.tokenizer import Tokenizer

FOLDERS = {"base": "base", "mid": "sft", "chatsft": "sft", "sft": "sft", "chatrl": "rl", "rl": "rl"}  # X_checkpoints
SAFE_TORCH = (2, 10)  # before 2.6 weights_only runs code (CVE-2025-32434), before 2.10 it corrupts memory
MODEL = re.compile(r"model_(\d+)\.pt")
# what the present layout has beside the first one's, one name of each kind
EXTRAS = ("resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda", "value_embeds.")
SHAPES = {
    "sequence_len": "seq_len", "vocab_size": "vocab_size", "n_layer": "depth", "n_head": "n_heads",
    "n_kv_head": "n_kv_heads", "n_embd": "width",
}  # fmt: skip


def import_nanochat(
    source: str | Path,
    out: str | Path,
    stage: str | None = None,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
) -> Trained:
    """The newest checkpoint of a folder into the new run directory `out`.

    `stage` "base", "sft" or "rl": what it is, by the folder's name where it is not given. `tokenizer`: a tokenizer.pkl
    or tokenizer.json, looked for beside the checkpoint and where nanochat keeps it. `DataError` names what cannot be
    read, also that these files are pickles and `allow_pickle` is off; then nothing is written.
    """
    model, file = read_nanochat(Path(source), stage, Path(tokenizer) if tokenizer else None, allow_pickle)
    write_run(model, Path(out), {"format": "nanochat", "from": model.name, "sha256": {file.name: sha256_file(file)}})
    return model


def read_nanochat(
    source: Path, stage: str | None = None, tokenizer: Path | None = None, allow_pickle: bool = False
) -> tuple[Trained, Path]:
    """As `import_nanochat`, without writing it down; and the file of the weights."""
    if stage is not None and stage not in STAGES:
        raise UsageError(f"stage {stage!r} is unknown; choose from {', '.join(STAGES)}")
    file, step = _newest(source)
    meta = read_json(file.with_name(file.name.replace("model_", "meta_").replace(".pt", ".json")))
    if not allow_pickle:
        raise DataError(
            f"{file}: is a pickle, which can run code; if you trust where it comes from, say --allow-pickle (even "
            "then only tensors are read from it, and only ranks from tokenizer.pkl)"
        )
    text = _tokenizer(tokenizer or _find_tokenizer(file))
    tensors = _tensors(file)
    config = _config(meta, tensors, file)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    params = assemble(config, "nanochat", shapes, lambda name: _array(tensors.pop(name)), file)
    stage = stage or _stage(file, meta)
    return Trained(config, params, text, stage, file.parent.resolve().name, step=step), file


def _newest(source: Path) -> tuple[Path, int]:
    if source.is_file() and (match := MODEL.fullmatch(source.name)):
        return source, int(match[1])
    files = [(int(match[1]), p) for p in source.glob("model_*.pt") if (match := MODEL.fullmatch(p.name))]
    if not files:
        inner = sorted({p.parent.name for p in source.glob("*/model_*.pt")}) if source.is_dir() else []
        hint = f"; there are some in {', '.join(inner)}" if inner else ""
        raise DataError(f"{source}: no model_NNNNNN.pt there{hint}")
    step, file = max(files)
    return file, step


def _config(meta: Any, tensors: dict[str, Any], file: Path) -> ModelConfig:
    given = meta.get("model_config") if isinstance(meta, dict) else None
    if not isinstance(given, dict) or not all(isinstance(given.get(key), int) and given[key] > 0 for key in SHAPES):
        raise DataError(f"{file}: its meta file has no model_config with {', '.join(SHAPES)}")
    there = [name for name in EXTRAS if any(t.startswith(name) for t in tensors)]
    gates = {tuple(t.shape)[-1] for name, t in tensors.items() if name.endswith("attn.ve_gate.weight")}
    if there and (len(there) < len(EXTRAS) or gates != {VE_GATE_CHANNELS}):
        lacking = [name for name in EXTRAS if name not in there] or [f"gates of {VE_GATE_CHANNELS} channels"]
        raise DataError(
            f"{file}: has {', '.join(there)} but no {', '.join(lacking)}: written by nanochat between January and "
            "March 2026, whose models these files do not fully describe; older and newer ones can be read"
        )
    values: dict[str, Any] = {ours: given[theirs] for theirs, ours in SHAPES.items()}
    values |= {"recipe": "modern" if there else "classic", "head_width": given["n_embd"] // given["n_head"]}
    if there and "window_pattern" in given:
        values["window_pattern"] = str(given["window_pattern"]).upper()
    elif there:
        values["window_pattern"] = "L"  # as nanochat reads it
    try:
        return resolve_model(ModelConfig(**values))
    except UsageError as error:
        raise DataError(f"{file}: {error}") from None


def _tensors(file: Path) -> dict[str, Any]:
    """Name -> torch tensor, mapped into memory; nothing but tensors is unpickled."""
    try:
        import torch
    except ImportError:
        raise UsageError("to read nanochat's .pt files: pip install 'torch>=2.10' (or the extra 'hf-check')") from None
    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < SAFE_TORCH:
        raise UsageError(f"torch {torch.__version__}: its weights_only loading is not safe yet; take 2.10 or newer")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(f"{file}: cannot be read as tensors ({first})") from None
    plain = (torch.float32, torch.bfloat16, torch.float16)
    if not isinstance(found, dict) or not all(
        isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu" and t.dtype in plain
        for t in found.values()
    ):
        raise DataError(f"{file}: holds other things than plain floating-point tensors by name")
    return {str(name).removeprefix("_orig_mod."): t for name, t in found.items()}


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())


def _find_tokenizer(file: Path) -> Path:
    folders = [file.parent, *(p / "tokenizer" for p in (file.parent, *file.resolve().parents[1:3]))]
    candidates = [folder / name for folder in folders for name in ("tokenizer.pkl", "tokenizer.json")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"{file}: no tokenizer.pkl beside it or in {folders[-1]}; give its place with --tokenizer")


def _tokenizer(path: Path) -> Tokenizer:
    return read_tokenizer(path) if path.suffix == ".json" else read_tiktoken(path)


def _stage(file: Path, meta: dict[str, Any]) -> str:
    """By nanochat's folder names; a folder of another name holds a chat model, which is what people pass on."""
    for part in reversed(file.resolve().parts[:-1]):
        if part.endswith("_checkpoints") and (found := FOLDERS.get(part.removesuffix("_checkpoints"))):
            return found
    return "sft"
