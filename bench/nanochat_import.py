"""An imported checkpoint against the torch code that it comes from: logits and greedy continuations.

    python -O -m bench.nanochat_import --nanochat DIR [--depth 5] [--tokens 200] [--greedy 64]

DIR is a checkout of karpathy/nanochat, of 2025 (up to December) or of March 2026 and later; its model is filled with
random numbers, every parameter, saved as nanochat saves it, and imported. Needs torch. -O leaves out an assertion of
2025's code that its rotary tables are bfloat16; here both sides compute in float32.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from jaxchat import model as gpt
from jaxchat.errors import UsageError
from jaxchat.interop.nanochat import read_nanochat
from jaxchat.tokenizer import train_tokenizer

SEQ_LEN, VOCAB = 256, 293


def their_model(shapes: dict[str, Any], modern: bool) -> torch.nn.Module:
    """nanochat's GPT with random parameters, none of them zero, and rotary tables in float32."""
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    model = GPT(GPTConfig(**shapes)).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            table = "wte" in name or "value_embeds" in name
            scale = p.shape[-1] ** -0.5 if p.ndim > 1 and not table else 0.3
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (0.5 if p.ndim < 2 else 0))
    width = shapes["n_embd"] // shapes["n_head"]
    frequency = (100_000 if modern else 10_000) ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(10 * SEQ_LEN).float(), frequency)[None, :, None]
    model.cos, model.sin = angles.cos(), angles.sin()
    return model.eval()


def compare(folder: Path, depth: int, tokens: int, greedy: int) -> dict[str, Any]:
    """Largest difference of the logits, and how many greedy tokens are the same."""
    from nanochat import gpt as theirs_code

    modern = "smear" in inspect.getsource(theirs_code)
    shapes: dict[str, Any] = {"sequence_len": SEQ_LEN, "vocab_size": VOCAB, "n_layer": depth, "n_head": 6}
    shapes |= {"n_kv_head": 2, "n_embd": 96} | ({"window_pattern": "SSSL"} if modern else {})
    model = their_model(shapes, modern)
    torch.save(model.state_dict(), folder / "model_000001.pt")
    (folder / "meta_000001.json").write_text(json.dumps({"model_config": shapes}))
    train_tokenizer(["a b c d e f g h"] * 50, 265, 1000, 1000).save(folder)
    imported = read_nanochat(folder, tokenizer=folder / "tokenizer.json", allow_pickle=True)

    @jax.jit
    def ours(ids: np.ndarray) -> jax.Array:
        hidden = gpt.hidden(imported.config, imported.params, ids)
        return gpt.logits(imported.config, imported.params, hidden)

    def theirs(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(model(torch.tensor(ids)).float().numpy()[..., :VOCAB])

    ids = np.random.default_rng(1).integers(0, VOCAB, (2, tokens))
    difference = float(np.abs(np.asarray(ours(ids)) - theirs(ids)).max())
    text = np.zeros((1, 8 + greedy), np.int64)
    text[:, :8] = ids[:1, :8]
    same = 0
    for t in range(8, 8 + greedy):
        a, b = (int(f(text)[0, t - 1].argmax()) for f in (ours, theirs))
        same += a == b
        text[0, t] = b
    return {"recipe": imported.config.recipe, "max_difference": difference, "greedy_same": same, "greedy": greedy}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -O -m bench.nanochat_import", description=__doc__.splitlines()[0])
    parser.add_argument("--nanochat", required=True, metavar="DIR")
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--greedy", type=int, default=64)
    args = parser.parse_args(arguments)
    if not (Path(args.nanochat) / "nanochat" / "gpt.py").is_file():
        raise SystemExit(str(UsageError(f"{args.nanochat}: no nanochat/gpt.py there")))
    os.environ["NANOCHAT_DTYPE"] = "float32"
    sys.path.insert(0, args.nanochat)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), args.depth, args.tokens, args.greedy)
    versions = {"torch": torch.__version__, "jax": jax.__version__}
    print(json.dumps({"bench": "nanochat_import", "device": jax.devices()[0].device_kind, **versions, **found}))


if __name__ == "__main__":
    main(sys.argv[1:])
