"""Scoring exams: batched against one question at a time, and how many programs a whole CORE run compiles.

    python -m bench.exams --data DIR [--run-dir RUN] [--items 200] [--rounds 3]
    python -m bench.exams --data DIR --compare nanochat CHECKOUT --python PYTHON [--items 150]

The model is a run's, or one of random weights in the shape of nano. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import machine
from bench.peer import add_peer_arguments, check_peer
from jaxchat import model as gpt
from jaxchat.chat import render_prompt
from jaxchat.checkpoint import restore_params
from jaxchat.config import Config, load_config
from jaxchat.engine.scoring import Scorer, crop, score_targets
from jaxchat.errors import JaxchatError
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tasks import core, get_task
from jaxchat.tasks.base import MissingData, TaskFiles
from jaxchat.tokenizer import Tokenizer, train_tokenizer
from train.evaluate import capped

NOISE = 0.2  # added to fresh weights: zero matrices would make every answer equally likely


def load(run_dir: str | None, stage: str | None, data: str, changes: list[str]) -> tuple[Config, Any, Tokenizer]:
    """A run's model, or one in the shape of nano with random weights and a tokenizer trained on the questions."""
    if run_dir:
        run = RunDir(run_dir)
        config = resolve(load_config(run.config))
        return config, restore_params(run.stage(stage or "base"))[0], Tokenizer.load(run.tokenizer)
    config = resolve(load_config("nano", changes))
    texts = (
        text
        for task in core.CORE_TASKS[2:8]
        for i, item in enumerate(core.Core(TaskFiles(data)).load(task))
        for text in core.prompts(task, [item, *[item] * task.shots], 0)
        if i < 300
    )
    tokenizer = train_tokenizer(texts, config.model.vocab_size, 1_000_000, 2000)
    leaves, tree = jax.tree.flatten(gpt.init_params(config.model, config.seed))
    draw = np.random.default_rng(0)
    noisy = [np.asarray(leaf) + NOISE * draw.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return config, jax.tree.unflatten(tree, noisy), tokenizer


def speed(config: Config, params: Any, tokenizer: Tokenizer, data: str, items: int, rounds: int) -> dict[str, Any]:
    """ARC-Easy as a chat exam and as CORE asks it, batched and one question at a time, in turns."""
    examples = get_task("arc_easy", TaskFiles(data)).examples()  # type: ignore[attr-defined]
    examples = [examples[i] for i in capped(len(examples), items)]
    prompts = [render_prompt(tokenizer, e.prompt) for e in examples]
    letters = [[tokenizer.encode(x)[0] for x in e.letters] for e in examples]
    task = next(t for t in core.CORE_TASKS if t.label == "arc_easy")
    loaded = core.Core(TaskFiles(data)).load(task)
    whole = core.groups(task, loaded[:items], tokenizer, range(min(items, len(loaded))))
    groups = [crop(group, config.model.seq_len)[0] for group in whole]
    batched, single = (Scorer(config.model, params, batch_rows=n) for n in (config.eval.batch_rows, 0))

    def one_letter() -> Any:
        return [single.letters([p], [x])[0][0] for p, x in zip(prompts, letters, strict=True)]

    def one_item() -> Any:  # every option by itself: what a plain forward pass of a question costs
        return [[single.spans([[span]])[0][0] for span in group] for group in groups]

    exams: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "letters": (lambda: batched.letters(prompts, letters)[0], one_letter),
        "core": (lambda: batched.spans(groups), one_item),
    }
    result = {}
    for name, (together, alone) in exams.items():
        seconds: dict[str, list[float]] = {"batched": [], "one": []}
        processor: dict[str, list[float]] = {"batched": [], "one": []}  # all threads; other programs hardly show in it
        found = {"batched": together(), "one": alone()}  # compiles
        for _ in range(rounds):
            for side, work in (("batched", together), ("one", alone)):
                begin, used = time.perf_counter(), time.process_time()
                work()
                seconds[side].append(time.perf_counter() - begin)
                processor[side].append(time.process_time() - used)
        ratios = [one / many for one, many in zip(seconds["one"], seconds["batched"], strict=True)]
        choose = _letter if name == "letters" else _option
        same = sum(choose(a) == choose(b) for a, b in zip(found["batched"], found["one"], strict=True))
        result[name] = {
            "questions": len(found["one"]),
            "same_choice": same,
            "seconds": {side: round(statistics.median(s), 3) for side, s in seconds.items()},
            "times_faster": round(statistics.median(ratios), 2),
            "times_faster_rounds": [round(ratio, 2) for ratio in ratios],
            "processor_seconds": {side: round(statistics.median(s), 3) for side, s in processor.items()},
        }
    return result


def _letter(logits: list[float]) -> int:
    return logits.index(max(logits))


def _option(scores: list[Any]) -> int:
    means = [score.mean for score in scores]
    return means.index(min(means))


def whole_core(config: Config, params: Any, tokenizer: Tokenizer, data: str, cap: int) -> dict[str, Any]:
    """Every task of CORE that is at hand: programs compiled, seconds, and the mean of the centred accuracies."""
    scorer = Scorer(config.model, params, batch_rows=config.eval.batch_rows)
    before = score_targets._cache_size()  # type: ignore[attr-defined]
    begin, tokens, asked = time.perf_counter(), 0, 0
    centred: list[float] = []
    for task in core.CORE_TASKS:
        try:
            items = core.Core(TaskFiles(data)).load(task)[: cap if cap >= 0 else None]
        except MissingData:
            continue
        groups = core.groups(task, items, tokenizer, range(len(items)))
        tokens += sum(len(span.tokens) for group in groups for span in group)
        scores = scorer.spans(groups)
        asked += len(items)
        right = sum(core.decide(task, i, s)[1] for i, s in zip(items, scores, strict=True))
        centred.append(core.centred(task, right / len(items)))
    compiled = score_targets._cache_size() - before  # type: ignore[attr-defined]
    return {
        "tasks": len(centred),
        "questions": asked,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - begin, 1),
        "shapes": sorted(scorer.shapes),
        "compiled": compiled,
        "goal_compiled": 12,
        "mean_centred": round(statistics.fmean(centred), 4),
    }


def about(config: Config, run_dir: str | None) -> dict[str, Any]:
    """What was measured, and on what."""
    return machine.about() | {
        "model": {k: getattr(config.model, k) for k in ("depth", "width", "seq_len", "vocab_size")},
        "weights": run_dir or "random",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a mirror of the exams' data, as tasks.data_dir")
    parser.add_argument("--run-dir", help="a finished run; default: random weights in the shape of nano")
    parser.add_argument("--stage", help="of the run; default: base")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="of the random model")
    parser.add_argument("--items", type=int, default=200, help="questions of an exam")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--core-items", type=int, default=-1, help="of each task in the whole CORE run; 0: leave it out"
    )
    add_peer_arguments(parser)
    args = parser.parse_args(argv)
    check_peer(parser, args)
    try:
        config, params, tokenizer = load(args.run_dir, args.stage, args.data, args.set)
        result = about(config, args.run_dir)
        if args.compare:
            from bench.exam_parity import compare

            directory = Path(args.compare[1])
            result |= compare(config, params, tokenizer, args.data, directory, args.python, args.items)
        else:
            result["arc_easy"] = speed(config, params, tokenizer, args.data, args.items, args.rounds)
            if args.core_items:
                result["core"] = whole_core(config, params, tokenizer, args.data, args.core_items)
    except JaxchatError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
