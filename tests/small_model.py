"""A tiny model that has learned two conversations by heart, for tests of everything that talks."""

import functools

import jax
import numpy as np
import optax

from jaxchat import model as gpt
from jaxchat.chat import render
from jaxchat.checkpoint import save_params
from jaxchat.config import ModelConfig, load_config, to_toml
from jaxchat.run_dir import RunDir, atomic_write
from jaxchat.scaling import resolve, resolve_model
from jaxchat.tokenizer import Tokenizer, train_tokenizer

QUESTION = [{"role": "user", "content": "Tom has 12 apples and buys 30 more. How many?"}]
GREETING = [{"role": "user", "content": "hello 🙂"}]
CONVERSATIONS = [
    [*QUESTION, {"role": "assistant", "content": [
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},  # carries no loss: the model cannot have learned to say it
        {"type": "text", "text": "That is it."},
    ]}],
    [*GREETING, {"role": "assistant", "content": "Hi 🙂 안녕!"}],
]  # fmt: skip
CAPACITY = 128
SHAPES = ("recipe", "depth", "seq_len", "vocab_size", "width", "n_heads", "n_kv_heads", "head_width", "window_short")


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([m["content"] for c in CONVERSATIONS for m in c[:1]] * 2, 280, 1000, 1000)


CONFIG = resolve_model(
    ModelConfig(
        recipe="modern", depth=2, seq_len=CAPACITY, vocab_size=280, width=32, n_heads=2, n_kv_heads=1, head_width=16,
        window_short=16,
    )
)  # fmt: skip


@functools.cache
def learned():
    """Parameters that have learned the two conversations by heart."""
    rows = np.zeros((2, 97), np.int32)
    weights = np.zeros((2, 97), np.float32)
    for i, conversation in enumerate(CONVERSATIONS):
        ids, mask = render(tokenizer(), conversation)
        rows[i, : len(ids)], weights[i, : len(ids)] = ids, mask
    params = gpt.init_params(CONFIG, seed=0)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        def loss(params):
            z = gpt.logits(CONFIG, params, gpt.hidden(CONFIG, params, rows[:, :-1]))
            nll = optax.softmax_cross_entropy_with_integer_labels(z, rows[:, 1:])
            return (nll * weights[:, 1:]).sum() / weights.sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state, value = optimizer.init(params), 1.0
    for _ in range(400):
        params, state, value = step(params, state)
        if value < 0.02:
            return params
    raise AssertionError(f"the tiny model did not learn: loss {value}")


def write_run(root) -> RunDir:
    """A run directory whose SFT stage is the learned model: real files, as a finished run leaves them."""
    run = RunDir(root)
    sets = [f"model.{k}={getattr(CONFIG, k)}" for k in SHAPES] + ["train.batch_tokens=128", "train.steps=1"]
    config = resolve(load_config("nano", [*sets, "serve.slots=4", "serve.max_tokens=40"]))
    atomic_write(run.config, to_toml(config))
    tokenizer().save(run.tokenizer)
    save_params(run.stage("sft"), 1, learned(), {"imported": {"format": "test"}})  # without an optimizer's moments
    return run
