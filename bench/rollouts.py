"""Answers in writing: all slots full against one question at a time.

    python -m bench.rollouts --data DIR [--run-dir RUN] [--questions 64] [--rounds 3]

GSM8K's questions, answered by a run's model or by one of random weights in the shape of nano, each to a length of its
own between a quarter of `--max-tokens` and all of it (a random model never stops). Blocks of both ways take turns. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from bench.exams import about, load
from jaxchat.engine import Engine, Request
from jaxchat.errors import JaxchatError
from jaxchat.tasks import get_task
from jaxchat.tasks.base import TaskFiles, WrittenTask

ALONE = 8  # questions of a block that are answered one after the other
SLOTS = 32  # as `eval.batch_rows`


def requests_of(engine: Engine, task: WrittenTask, count: int, max_tokens: int) -> list[Request]:
    """The first questions that fit, without stop ids: how much is written does not depend on the weights."""
    draw = random.Random(0)
    found: list[Request] = []
    for example in task.examples():
        request = engine.chat_request(example.prompt, stop=())
        if len(request.tokens) + max_tokens <= engine.capacity and len(found) < count:
            found.append(dataclasses.replace(request, max_tokens=draw.randint(max_tokens // 4, max_tokens)))
    return found


def seconds(engine: Engine, blocks: Sequence[Sequence[Request]]) -> tuple[float, int]:
    """(wall clock, tokens made) of one `generate` after the other."""
    begin = time.perf_counter()
    made = sum(len(result.tokens) for block in blocks for result in engine.generate(block))
    return time.perf_counter() - begin, made


def measure(engine: Engine, single: Engine, requests: Sequence[Request], rounds: int) -> dict[str, Any]:
    """Seconds a question both ways, medians of the rounds, and how many times the first is faster."""
    alone = [[request] for request in requests[:ALONE]]
    seconds(engine, [requests])  # compiles
    seconds(single, alone)
    together, apart, ratios = [], [], []
    for _ in range(rounds):
        spent, made = seconds(engine, [requests])
        together.append(spent / made)
        spent, made = seconds(single, alone)
        apart.append(spent / made)
        ratios.append(apart[-1] / together[-1])
    return {
        "tokens_per_second": round(1 / statistics.median(together), 1),
        "tokens_per_second_alone": round(1 / statistics.median(apart), 1),
        "times_faster": round(statistics.median(ratios), 2),
        "times_faster_range": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a mirror of the exams' data, as tasks.data_dir")
    parser.add_argument("--run-dir", help="a finished run; default: random weights in the shape of nano")
    parser.add_argument("--stage", default="sft", help="of the run")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="of the random model")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    try:
        config, params, tokenizer = load(args.run_dir, args.stage, args.data, args.set)
        task = get_task("gsm8k", TaskFiles(args.data))
        assert isinstance(task, WrittenTask)
        engine, single = (Engine(config.model, params, tokenizer, slots=slots) for slots in (args.slots, 1))
        requests = requests_of(engine, task, args.questions, args.max_tokens)
        asked = {"questions": len(requests), "slots": args.slots, "max_tokens": args.max_tokens}
        result = about(config, args.run_dir) | asked | measure(engine, single, requests, args.rounds)
    except JaxchatError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
