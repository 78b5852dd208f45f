"""What the chat model of a run says to everyday questions, and whether it knows the next turn: the exams' figures.

    python -m bench.answers runs/nano --stage rl --kind tuning --min-p 0.05

Settings are tuned with `--kind tuning`; the report card asks the questions of `judging`.
"""

import argparse
import json
import time

from jaxchat.checkpoint import trained_params
from jaxchat.config import load_config
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tasks.base import TaskFiles
from jaxchat.tasks.speech import FreeAnswers, NextTurn
from jaxchat.tokenizer import Tokenizer
from train.evaluate import UNKNOWN, Model, sft_conversations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--stage", default="sft", choices=("sft", "rl"))
    parser.add_argument("--kind", default="tuning", choices=("tuning", "judging"))
    parser.add_argument("--temperature", type=float, default=FreeAnswers.temperature)
    parser.add_argument("--top-k", type=int, default=FreeAnswers.top_k)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, help="by default the tier's")
    parser.add_argument("--no-turns", action="store_true", help="leave the next turns out")
    parser.add_argument("--show", type=int, default=0, help="answers to print")
    args = parser.parse_args()
    run = RunDir(args.run)
    config, tokenizer = resolve(load_config(run.config)), Tokenizer.load(run.tokenizer)
    model = Model(config, run, args.stage, trained_params(run, args.stage), tokenizer)
    task, turns = FreeAnswers(TaskFiles.of(config, download=False), args.kind), NextTurn()
    turns.most = 400
    task.each = 200 // (len(task.examples()) // task.each)
    begin = time.perf_counter()
    min_p = config.serve.min_p if args.min_p is None else args.min_p
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": min_p}
    scores, decisions = model.free_answers(task, task.examples(), **sampling)
    for decision in decisions[: args.show]:
        print(decision["prompt"][0]["content"], "->", decision["answer"], decision["unknown"])
    middle = time.perf_counter()
    turns.conversations = [] if args.no_turns else sft_conversations(run, tokenizer, "val")
    choice, _ = model.exam(turns, range(len(turns.examples()))) if turns.examples() else ({"metric": None, "n": 0}, [])
    figures = {name: round(figure["metric"], 4) for name, figure in scores["figures"].items()}
    figures |= {"words": scores["figures"][UNKNOWN]["n"], "next turn": choice["metric"], "turns": choice["n"]}
    seconds = {"answers": round(middle - begin, 1), "turns": round(time.perf_counter() - middle, 1)}
    print(json.dumps({"run": args.run, "stage": args.stage, "kind": args.kind} | sampling | figures | seconds))


if __name__ == "__main__":
    main()
