"""Pretraining: packed rows of the corpus -> base model."""

from __future__ import annotations

import shutil
from typing import Any

import jax
import numpy as np

from jaxchat import distributed
from jaxchat.checkpoint import save_params
from jaxchat.config import Config
from jaxchat.data.loader import epoch_rows
from jaxchat.data.packing import Rows
from jaxchat.interop.initial import find, read_init
from jaxchat.log import say
from jaxchat.run_dir import RunDir, link
from jaxchat.sizes import count_parameters, flops_per_token
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import TrainState

from .evaluate import sampler
from .loop import Trainer

MANY_EPOCHS = 4  # up to which repeated text is nearly worth as much as new text (2305.16264)


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train the base model in `base/`; facts: sizes, tokens, scores, seconds, `params_sha256`.

    `limit`: see `Trainer`.
    """
    if config.train.init and config.train.steps == 0:
        return distributed.on_first(lambda: take_over(config, run))
    tokenizer = Tokenizer.load(run.tokenizer)
    verify = distributed.index() == 0  # one process reads all of it
    rows, val_rows = (Rows(run.data / "rows" / split, tokenizer.digest, verify) for split in ("train", "val"))
    count, train = count_parameters(config.model), config.train
    tokens = train.steps * train.batch_tokens
    epochs = tokens / max(1, epoch_rows(rows) * config.model.seq_len)
    say(
        f"  {count.total:,} parameters ({count.scaling:,} in products), {config.model.depth} layers of width "
        f"{config.model.width}; {tokens:,} tokens in {train.steps:,} steps, {epochs:.2f} epochs"
    )
    if epochs > MANY_EPOCHS * 1.1:  # a tenth of slack: the held-out part may be a little larger than planned
        fewer = max(1, int(train.steps * MANY_EPOCHS / epochs))
        advice = f"--set train.steps={fewer} and another --run-dir would read it {MANY_EPOCHS} times"
        say(f"  {epochs:.1f} passes over the same text: some of it will be memorized; {advice}", style="yellow")

    trainer = Trainer(
        config,
        run.stage("base"),
        tokenizer.byte_lengths(),
        rows,
        val_rows,
        sampler=sampler(config, run, tokenizer, "base"),
        title="pretrain",
        limit=limit,
    )

    def given(state: TrainState) -> TrainState:
        """Return the state with the weights of `train.init`; optimizer and schedules begin anew."""
        model = read_init(config)
        trainer.origin["init"] = model.imported
        say(f"  from the weights of {config.train.init}, stage {model.stage}")

        def placed(host: np.ndarray, like: jax.Array) -> jax.Array:
            return jax.make_array_from_callback(like.shape, like.sharding, lambda i: host[i].astype(like.dtype))

        return TrainState(jax.tree.map(placed, model.params, state.params), state.opt_state, state.step)

    if config.train.init:
        trainer.start = given
    facts = trainer.run()
    return facts | {
        "parameters": count.total,
        "scaling_parameters": count.scaling,
        "tokens": tokens,
        "epochs": epochs,
        "flops_per_token": flops_per_token(config.model),
        "flops": flops_per_token(config.model) * tokens,
        "tokens_per_second": tokens / max(facts["seconds"], 1e-9),
    }


def take_over(config: Config, run: RunDir) -> dict[str, Any]:
    """Write the weights of `train.init` to `base/` as they are; facts: `imported`, `params_sha256`.

    Of a run the held-out text comes along, to see what fine-tuning forgets.
    """
    model = read_init(config)
    say(f"  the weights of {config.train.init}, stage {model.stage}, as they are")
    shutil.rmtree(run.stage("base"), ignore_errors=True)
    save_params(run.stage("base"), 0, model.params, {"imported": model.imported, "tokens": 0})
    held_out, target = find(config.train.init)[0] / "data" / "rows" / "val", run.data / "rows" / "val"
    if held_out.is_dir() and config.model.seq_len == model.config.seq_len and not target.exists():
        shutil.copytree(held_out, target, copy_function=link)
    assert model.imported
    return {"imported": model.imported, "params_sha256": model.imported["params_sha256"]}
