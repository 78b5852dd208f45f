"""nanochat's own decisions in exams, made by `bench.exams --compare nanochat DIR` in nanochat's interpreter.

Builds its model from the weights given, runs its `core_eval.py` and `chat_eval.py` as they are, and writes down every
single decision. Settings come as a JSON file, the result is one JSON line. Needs torch, jinja2, filelock, pyarrow
and tokenizers; no JAX.
"""

import json
import os
import random
import sys
import types

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what their code prints goes to standard error

KINDS = {"multiple choice": "multiple_choice", "schema": "schema", "language modelling": "language_modeling"}


def load_model(settings: dict):
    """Their GPT with our weights; kernels are (out, in) there and (in, out) here, a stack over the layers."""
    import numpy as np
    import torch
    from nanochat.gpt import GPT, GPTConfig

    ours = np.load(settings["weights"])
    with torch.device("meta"):
        model = GPT(GPTConfig(**settings["config"]))
    model.to_empty(device="cpu")
    model.init_weights()  # also the rotary tables
    names = {"attn.c_q": "q", "attn.c_k": "k", "attn.c_v": "v", "attn.c_proj": "o", "mlp.c_fc": "fc",
             "mlp.c_proj": "proj", "attn.ve_gate": "ve_gate"}  # fmt: skip
    weights = {"transformer.wte.weight": ours["embedding"], "lm_head.weight": ours["unembedding"]}
    weights |= {"resid_lambdas": ours["blocks.residual_scale"], "x0_lambdas": ours["blocks.x0_scale"]}
    weights |= {"smear_gate.weight": ours["smear_gate"].T, "smear_lambda": ours["smear_scale"].reshape(1)}
    weights |= {"backout_lambda": ours["backout_scale"].reshape(1)}
    layers = settings["config"]["n_layer"]
    with_value = [i for i in range(layers) if i % 2 == (layers - 1) % 2]
    for i in range(layers):
        for theirs, name in names.items():
            if name != "ve_gate":
                weights[f"transformer.h.{i}.{theirs}.weight"] = ours[f"blocks.{name}"][i].T
    for j, i in enumerate(with_value):
        weights[f"transformer.h.{i}.attn.ve_gate.weight"] = ours["blocks.ve_gate"][j].T
        weights[f"value_embeds.{i}.weight"] = ours["value_embedding"][j]
    state = {name: torch.from_numpy(np.ascontiguousarray(array)).float() for name, array in weights.items()}
    found = model.load_state_dict(state, strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    return model.eval()


def load_tokenizer(settings: dict):
    """Their tokenizer class, with its chat format, over our vocabulary."""
    for name in ("rustbpe", "tiktoken"):  # imported by theirs at the top, not used for what is asked here
        sys.modules.setdefault(name, types.ModuleType(name))
    from nanochat.tokenizer import RustBPETokenizer
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(settings["tokenizer"])
    backend.encode_special_tokens = True

    class Encoding:
        def encode_ordinary(self, text):
            return backend.encode(text, add_special_tokens=False).ids

        def encode_ordinary_batch(self, texts, num_threads):
            return [self.encode_ordinary(text) for text in texts]

        def encode_single_token(self, text):
            return backend.token_to_id(text)

    return RustBPETokenizer(Encoding(), "<|bos|>")


def core(model, tokenizer, task: dict) -> list:
    """As their `base_eval.py` reads, orders and caps; True where an item is right."""
    from nanochat.core_eval import evaluate_example

    with open(task["path"], encoding="utf-8") as file:
        data = [json.loads(line.strip()) for line in file]
    random.Random(1337).shuffle(data)
    data = data[: task["limit"]]
    meta = {"task_type": KINDS[task["kind"]], "num_fewshot": task["shots"], "continuation_delimiter": task["delimiter"]}
    return [bool(evaluate_example(i, model, tokenizer, data, "cpu", meta)) for i in range(len(data))]


def letters(model, tokenizer, exam: dict) -> list:
    """The letter that their categorical evaluation chooses for every row."""
    from scripts.chat_eval import run_categorical_eval
    from tasks.arc import ARC
    from tasks.mmlu import MMLU

    kind, chosen = (MMLU if exam["exam"] == "mmlu" else ARC), []

    class Recorded(kind):
        def __init__(self, rows):  # theirs would download; rows are what the download holds
            self.ds, self.start, self.stop, self.step = rows, 0, None, 1

        def evaluate(self, conversation, letter):
            chosen.append(letter)
            return super().evaluate(conversation, letter)

    run_categorical_eval(Recorded(exam["rows"]), tokenizer, model, batch_size=8)
    return chosen


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = json.load(file)
    sys.path.insert(0, settings["directory"])
    model, tokenizer = load_model(settings), load_tokenizer(settings)
    result = {
        name: (letters if "exam" in asked else core)(model, tokenizer, asked)
        for name, asked in settings["asked"].items()
    }
    print(json.dumps(result), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
