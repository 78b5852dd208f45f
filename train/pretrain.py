"""Pretraining: packed rows of the corpus -> base model."""

from __future__ import annotations

from typing import Any

import jax

from jaxchat import distributed as hosts
from jaxchat.config import Config
from jaxchat.data.loader import epoch_rows
from jaxchat.data.packing import Rows
from jaxchat.engine import Engine
from jaxchat.log import say
from jaxchat.run_dir import RunDir, atomic_write
from jaxchat.sizes import count_parameters, flops_per_token
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import TrainState

from .evaluate import held_out_openings, samples, samples_markdown
from .loop import Job, fit

MANY_EPOCHS = 4  # up to which repeated text is nearly worth as much as new text (2305.16264)


def run(config: Config, run: RunDir, limit: int = 0) -> dict[str, Any]:
    """Train the base model in `base/`; facts: sizes, tokens, scores, seconds, `params_sha256`.

    `limit`: as of a `Job`.
    """
    tokenizer = Tokenizer.load(run.tokenizer)
    check = hosts.index() == 0  # one process reads all of it
    rows, val_rows = (Rows(run.data / "rows" / split, tokenizer.digest, check) for split in ("train", "val"))
    count, train = count_parameters(config.model), config.train
    tokens = train.steps * train.batch_tokens
    epochs = tokens / max(1, epoch_rows(rows) * config.model.seq_len)
    say(
        f"  {count.total:,} parameters ({count.scaling:,} in products), {config.model.depth} layers of width "
        f"{config.model.width}; {tokens:,} tokens in {train.steps:,} steps, "
        f"{epochs:.2f} epochs"
    )

    if epochs > MANY_EPOCHS * 1.1:  # not where it was meant, and the held-out part came out a little larger
        fewer = max(1, int(train.steps * MANY_EPOCHS / epochs))
        advice = f"--set train.steps={fewer} and another --run-dir would read it {MANY_EPOCHS} times"
        say(f"  {epochs:.1f} passes over the same text: it will partly be learned by heart; {advice}", style="yellow")

    def sample(state: TrainState, step: int) -> None:
        params = jax.tree.map(hosts.gathered, state.params)

        def write() -> None:
            engine = Engine(config.model, params, tokenizer, slots=8)
            turns = samples(
                engine,
                held_out_openings(val_rows, tokenizer, min(3, config.eval.sample_prompts)),
                False,
                config.eval.sample_tokens,
                config.eval.sample_temperatures,
            )
            text = f"# Step {step}\n\n{samples_markdown(turns)}"
            atomic_write(run.stage("base") / "samples" / f"step_{step:06d}.md", text)

        hosts.on_first(write)

    job = Job(
        config=config,
        directory=run.stage("base"),
        rows=rows,
        val_rows=val_rows,
        byte_lengths=tokenizer.byte_lengths(),
        sampler=sample,
        title="pretrain",
        limit=limit,
    )
    facts = fit(job)
    return facts | {
        "digest": facts["params_sha256"],
        "parameters": count.total,
        "scaling_parameters": count.scaling,
        "tokens": tokens,
        "epochs": epochs,
        "flops_per_token": flops_per_token(config.model),
        "flops": flops_per_token(config.model) * tokens,
        "tokens_per_second": tokens / max(facts["seconds"], 1e-9),
    }
