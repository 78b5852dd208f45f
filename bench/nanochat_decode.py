"""nanochat's own engine, timed by `bench.decode --compare nanochat DIR` in nanochat's interpreter.

Builds its model from the weights given and runs `nanochat/engine.py` as it is; an order is a JSON line, and so is the
answer. Needs torch, filelock, jinja2, pyarrow and tokenizers; no JAX.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(__file__))

from nanochat_exams import ANSWERS, load_model, load_tokenizer


def timed(engine, order: dict) -> dict:
    begin, processor = time.perf_counter(), time.process_time()
    made = engine.generate(
        order["prompt"], num_samples=order["rows"], max_tokens=order["tokens"], temperature=order["temperature"],
        top_k=order["top_k"],
    )  # fmt: skip
    next(made)
    first, steps = time.perf_counter(), sum(1 for _ in made)
    end = time.perf_counter()
    return {
        "tokens_per_second": order["rows"] * steps / (end - first),
        "with_prompt": order["rows"] * (steps + 1) / (end - begin),
        "first_token_seconds": first - begin,
        "seconds_per_token": (end - first) / max(1, steps),
        "processor_seconds": time.process_time() - processor,
    }


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = json.load(file)
    sys.path.insert(0, settings["directory"])
    model, tokenizer = load_model(settings), load_tokenizer(settings)  # also stands in for what is missing
    import torch
    from nanochat.engine import Engine

    if torch.cuda.is_available():
        model = model.cuda()
    engine = Engine(model, tokenizer)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(about), file=ANSWERS, flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(engine, json.loads(line))), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
