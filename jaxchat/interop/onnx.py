"""ONNX, out: one graph that runs with and without a KV cache, by `torch.onnx` from our modelling file."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from jaxchat.errors import UsageError, install_command
from jaxchat.interop.huggingface import config_to_hf, places, tensor
from jaxchat.interop.trained import Trained, atomic_directory, model_card, tokenizer_files
from jaxchat.run_dir import atomic_write

HOW = """In this folder, with `onnxruntime` and `transformers` (for the tokenizer: no torch) installed:

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("model.onnx")
{ask}
new, answer = np.array([ids]), []
axes = {"batch": 1, "past": 0}
types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
cache = {i.name: np.zeros([axes.get(n, n) for n in i.shape], types[i.type]) for i in session.get_inputs()[2:]}
while len(answer) < 64 and answer[-1:] != [tokenizer.eos_token_id]:
    mask = np.ones((1, len(ids) + len(answer)), np.int64)
    logits, *present = session.run(None, {"input_ids": new, "attention_mask": mask, **cache})
    cache = dict(zip(cache, present))
    answer.append(int(logits[0, -1].argmax()))
    new = np.array([answer[-1:]])
print(tokenizer.decode(answer))
```

`attention_mask` covers cached and new tokens; it is 0 on padding, which stands on the left. To run without a cache,
give all ids and an empty cache every time."""
CHAT = """messages = [{"role": "user", "content": "Hello!"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)"""
CONTINUE = 'ids = tokenizer.encode("<|bos|>Once upon a time")'


def write_onnx(model: Trained, out: Path) -> dict[str, Any]:
    """Write a model in float32 as `model.onnx`, with its tokenizer, into the new folder `out`; facts: dtype, bytes.

    Inputs: input_ids (B, T), attention_mask (B, P + T) and, of the P tokens before, each layer's keys and values
    (B, K, P, N), and with smear or bigrams ids (B, 1, P, 1). Outputs: logits (B, T, V), and the same of P + T tokens.
    `UsageError` names a package that is missing.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx uses it
        import torch
        from transformers import DynamicCache

        from jaxchat.interop.exported.modeling_jaxchat import JaxchatConfig, JaxchatForCausalLM
    except ImportError as error:
        raise UsageError(f"--format onnx needs the package {error.name}: {install_command('onnx')}") from None

    class Step(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, past: list[Any]) -> tuple[Any, ...]:
            past = [*past, *(x[..., :0] for x in past[2 * c.depth :])]  # ids: no values
            cache: Any = DynamicCache()
            for i in range(0, len(past), 2):
                cache.update(past[i], past[i + 1], i // 2)
            logits = self.model(ids, mask, past_key_values=cache, use_cache=True).logits
            present = [x for layer in cache.layers for x in (layer.keys, layer.values)]
            return logits, *present[: len(names)]

    c, tokenizer = model.config, tokenizer_files(model)
    names = [f"{i}.{kind}" for i in range(c.depth) for kind in ("key", "value")] + ["ids"] * (
        c.smear or c.bigram_rows > 0
    )
    flat = flatten_dict(model.params, sep=".")
    inner = JaxchatForCausalLM(JaxchatConfig(**config_to_hf(c, "jaxchat"))).eval()
    weights = {name: tensor(flat, place).astype(np.float32) for name, place in places(c, "hf").items()}
    inner.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, strict=not c.tie_embeddings)
    B, T, P, S = (torch.export.Dim(name) for name in ("batch", "new", "past", "all"))
    example = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)
    pairs = [torch.zeros(2, c.n_kv_heads, 3, c.head_width) for _ in range(2 * c.depth)]  # one tensor is one input
    ids = [torch.zeros(2, 1, 3, 1, dtype=torch.long)] * (len(names) - len(pairs))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program: Any = torch.onnx.export(
            Step(inner).eval(),
            (*example, [*pairs, *ids]),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: B, 1: T}, {0: B, 1: S}, [{0: B, 2: P}] * len(names)),
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
        )
    how = HOW.replace("{ask}", CHAT if model.chats else CONTINUE)
    with atomic_directory(out) as folder:
        program.save(folder / "model.onnx")
        for name, text in (tokenizer | {"README.md": model_card(model, how, "onnx")}).items():
            atomic_write(folder / name, text)
    return {"dtype": "float32", "bytes": sum(x.nbytes for x in weights.values())}
