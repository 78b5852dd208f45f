"""A run's model for EleutherAI's lm-evaluation-harness, under the name "jaxchat".

    python -m jaxchat.interop.lm_eval --model_args run_dir=runs/nano --tasks arc_easy

takes the harness's own arguments. Needs `pip install lm-eval`; nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxchat.engine import Engine, load_run
from jaxchat.engine.scoring import Scorer, Span, rows_at_once
from jaxchat.errors import UsageError
from jaxchat.run_dir import RunDir

MAX_TOKENS = 256  # of an answer, where a task names no number
HARNESS = {"batch_size", "max_batch_size", "device"}  # what the harness adds by itself; JAX decides these


@register_model("jaxchat")
class JaxChat(LM):
    """A model of the harness, with these `--model_args`.

    run_dir: a finished run; stage: base, sft or rl, by default the furthest trained one.
    batch_rows: rows scored and answers written at once, -1: by the device.
    chat: put questions as a user's message.
    """

    def __init__(
        self, run_dir: str, stage: str | None = None, batch_rows: int = -1, chat: bool = False, **others: Any
    ) -> None:
        super().__init__()
        if unknown := others.keys() - HARNESS:
            raise UsageError(f"--model_args: {', '.join(sorted(unknown))}: only run_dir, stage, batch_rows and chat")
        self.config, self.params, self.tokenizer, _serve = load_run(RunDir(run_dir), stage)
        rows = rows_at_once(self.config, int(batch_rows))
        self.scorer = Scorer(self.config, self.params, batch_rows=rows)
        self.slots, self.chat = 1 << max(0, rows.bit_length() - 1), chat

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (log-probability, greedy) of each continuation. Neighbours with one context share its work."""
        pairs = [request.args for request in requests]
        groups = [[self._span(*pair) for pair in same] for _, same in itertools.groupby(pairs, key=lambda p: p[0])]
        return [(-score.loss, score.best) for scores in self.scorer.spans(groups) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-probability of each whole text, in chunks where it is longer than the context."""
        groups = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.tokenizer.bos, self.config.seq_len - 1, 1)
            chunks = (make_disjoint_window(window) for window in windows)
            groups.append([Span([*before, *said], len(before), len(before) + len(said)) for before, said in chunks])
        return [-sum(score.loss for score in scores) for scores in self.scorer.spans(groups)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return answers, each up to the first of its request's `until` texts."""
        engine, asked = Engine(self.config, self.params, self.tokenizer, slots=self.slots), []
        for text, settings in (request.args for request in requests):
            until, temperature = settings.get("until") or [], settings.get("temperature") or 0.0
            options: dict[str, Any] = {
                "max_tokens": int(settings.get("max_gen_toks", MAX_TOKENS)),
                "temperature": float(temperature or 1.0) if settings.get("do_sample", temperature > 0) else 0.0,
                "seed": 0,
                "stop_texts": tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            }
            if self.chat:
                request = engine.chat_request([{"role": "user", "content": text}], **options)
            else:
                request = engine.text_request(text, **options)
            room = max(engine.capacity - options["max_tokens"], engine.capacity // 2)  # for the prompt
            asked.append(dataclasses.replace(request, tokens=request.tokens[-room:]))
        return [result.text for result in engine.generate(asked)]

    def _span(self, context: str, continuation: str) -> Span:
        """Tokenize both together. Spaces at the context's end belong to the continuation, as in the harness."""
        before = [self.tokenizer.bos, *self.tokenizer.encode(context.rstrip())]
        whole = [self.tokenizer.bos, *self.tokenizer.encode(context + continuation)]
        return Span(whole, min(len(before), len(whole)), len(whole))


if __name__ == "__main__":
    import sys

    from lm_eval.__main__ import cli_evaluate

    if "--model" not in sys.argv:
        sys.argv += ["--model", "jaxchat"]
    cli_evaluate()
