"""Export a model as an Orbax tree of host arrays, with one file of code that runs it in JAX, on any topology."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxchat import __version__
from jaxchat.checkpoint import this_process
from jaxchat.errors import DataError
from jaxchat.interop.tokenizer_files import tokenizer_files
from jaxchat.interop.trained import Trained, atomic_directory, model_card
from jaxchat.log import quiet_libraries
from jaxchat.model import Params, hidden, layer_params, logits
from jaxchat.run_dir import atomic_write, write_checksums, write_json
from jaxchat.sizes import value_layers, windows
from jaxchat.tokenizer import ASSISTANT_END

FORMAT = 1
GOLDEN_TOKENS = 64  # whose logits are kept
CHUNK_BYTES = 2**26  # of a parameter that is compressed at once, which takes as much memory again
CODE = Path(__file__).parent / "exported" / "model.py"
HOW = """In this folder, with `jax`, `flax` and `orbax-checkpoint` installed:

```python
import orbax.checkpoint as ocp
from model import FOLDER, GPT
params = ocp.StandardCheckpointer().restore(FOLDER / "params")
model = GPT(params)
print("largest difference from golden.npz:", model.check())
```

`model.generate(ids, 64)` goes on from token ids; `tokenizer.json` makes them with the package `tokenizers`. `sha256sum
--check SHA256SUMS` tells whether the files arrived whole."""


def write_orbax(model: Trained, out: Path) -> dict[str, Any]:
    """Write a model into the new folder `out`; facts: dtype, bytes."""
    dtype = model.dtype
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype, copy=False), model.params)
    with atomic_directory(out) as folder:
        _write_params(folder.resolve() / "params", params)
        write_json(folder / "config.json", _config(model, dtype))
        for name, text in tokenizer_files(model.tokenizer, model.chats, model.config.seq_len).items():
            if name != "tokenizer_config.json":
                atomic_write(folder / name, text)
        atomic_write(folder / CODE.name, CODE.read_text(encoding="utf-8"))
        atomic_write(folder / "README.md", model_card(dataclasses.replace(model, card=None), HOW, "jax"))
        seen = min(windows(model.config)) + GOLDEN_TOKENS  # long enough for every short window to end somewhere
        length = min(seen, model.config.seq_len)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length), np.int32)
        with open(folder / "golden.npz", "wb") as file:
            found = golden_logits(dataclasses.replace(model, params=params), ids, GOLDEN_TOKENS)
            np.savez(file, ids=ids, logits=found)
        write_checksums(folder)
    return {"dtype": dtype, "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}


def _write_params(path: Path, params: Params) -> None:
    """Write what `StandardCheckpointer` would, in chunks and without its copies: half the time and memory or less."""
    alone, chunks = this_process(), jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    with quiet_libraries():
        numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy))
        handler = ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, save_concurrent_gb=1, use_ocdbt=False, multiprocessing_options=alone
        )
    with quiet_libraries(), contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as writer:
        try:
            writer.save(path, args=ocp.args.PyTreeSave(params, save_args=chunks))  # type: ignore[call-arg]
        except Exception as error:  # Orbax and TensorStore raise all kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise DataError(f"{path}: could not be written ({first}); make room and try again") from error


def _config(model: Trained, dtype: str) -> dict[str, Any]:
    special = model.tokenizer.special
    return {
        "format": FORMAT,
        "jaxchat_version": __version__,
        "stage": model.stage,
        "dtype": dtype,
        "model": dataclasses.asdict(model.config),
        "windows": windows(model.config),
        "value_layers": value_layers(model.config),
        "special_tokens": special,
        "end_tokens": [model.tokenizer.bos, *([special[ASSISTANT_END]] if model.chats else [])],
    }


def golden_logits(model: Trained, ids: np.ndarray, last: int) -> np.ndarray:
    """Return logits (B, `last`, V) of the last positions of ids (B, T) in float32.

    One layer at a time, so that a big model fits in memory once and not twice.
    """

    def float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)

    class Layers:
        def __getitem__(self, i: int) -> Params:
            return float32(layer_params(model.config, model.params, i))

    outer = {k: v for k, v in model.params.items() if k not in ("blocks", "value_embedding")}
    params = float32(outer) | {"layers": Layers()}
    with jax.default_matmul_precision("highest"):
        x = hidden(model.config, params, jnp.asarray(ids))
        return np.asarray(logits(model.config, params, x[:, -last:]))
