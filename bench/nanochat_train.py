"""nanochat's own pretraining, run by bench/nanochat_ladder.py in nanochat's interpreter.

Model, initialization, optimizer and best-fit rows are imported from the checkout. Its `scripts/base_train.py` is a
script, so its arguments with their defaults and its schedules are taken from the file's syntax tree and executed; the
batch rule and the step are written after it. Only where documents come from is replaced: token ids from a file, in an
order that follows the seed. Settings come as one JSON argument; each line on standard input is an order, the answer is
one JSON line. Needs torch, filelock, requests and pyarrow.
"""

import argparse
import ast
import gc
import json
import math
import sys
import time
from pathlib import Path

from nanochat_step import answer, describe

REFERENCE = 2**19  # B_REF there
SCHEDULES = ("get_lr_multiplier", "get_muon_momentum", "get_weight_decay")


def base_train(directory: str, **values) -> dict:
    """Return `args` (the defaults) and the schedules of base_train.py; `values`: the globals that these read."""
    tree = ast.parse((Path(directory) / "scripts" / "base_train.py").read_text(encoding="utf-8"))

    def wanted(node) -> bool:
        text = ast.unparse(node)
        return text.startswith(("parser = ", "parser.add_argument(")) or getattr(node, "name", "") in SCHEDULES

    names = {"argparse": argparse, "math": math} | values
    exec(compile(ast.Module([node for node in tree.body if wanted(node)], []), "base_train.py", "exec"), names)
    names["args"] = names["parser"].parse_args([])
    return names


class Ids:
    """Stands for nanochat's tokenizer: documents are tokenized already, `<|bos|>` first."""

    def __init__(self, bos: int):
        self.bos = bos

    def get_bos_token_id(self) -> int:
        return self.bos

    def encode(self, documents, prepend, num_threads):
        assert prepend == self.bos and all(document[0] == prepend for document in documents)
        return documents


def documents(file: str, seed: int):
    """Yield batches of documents without end, as `_document_batches` does."""
    import numpy as np

    held = np.load(file)
    ids, ends = held["ids"], held["ends"]
    order, epoch = np.random.default_rng(seed).permutation(len(ends) - 1), 1
    while True:
        for start in range(0, len(order), 128):
            yield [ids[ends[i] : ends[i + 1]].tolist() for i in order[start : start + 128]], (0, start, epoch)
        epoch += 1


class Run:
    """One pretraining; `steps(n)` runs n optimizer steps."""

    def __init__(self, settings: dict, torch, device: str):
        from nanochat import dataloader
        from nanochat.gpt import GPT, GPTConfig

        self.torch, self.device, self.s = torch, device, settings
        torch.manual_seed(settings["seed"])
        with torch.device("meta"):
            model = GPT(GPTConfig(**settings["config"]))
        model.to_empty(device=device)
        model.init_weights()
        self.model, self.compiled = model, torch.compile(model, dynamic=False)
        self.accumulate, rows, length = settings["batch"]
        batch = self.accumulate * rows * length
        scale, steps = math.sqrt(batch / REFERENCE), settings["steps"]
        args = base_train(settings["directory"])["args"]
        # the horizon of d12 at the same ratio of tokens to parameters, over ours
        decay = args.weight_decay * scale * settings["reference_tokens"] / settings["target_tokens"]
        decay *= settings["decay_factor"]
        self.script = base_train(settings["directory"], num_iterations=steps, weight_decay_scaled=decay)
        names = ("unembedding_lr", "embedding_lr", "scalar_lr", "matrix_lr")
        rates = {name: getattr(args, name) * scale * settings["lr_factor"] for name in names}
        self.optimizer = model.setup_optimizer(**rates, weight_decay=decay)
        dataloader._document_batches = lambda *_: documents(settings["documents"], settings["seed"])
        make = dataloader.tokenizing_distributed_data_loader_bos_bestfit
        self.loader = make(Ids(settings["bos"]), rows, length, split="train", device=device)
        self.count = 0
        if settings["resume"]:
            state = torch.load(settings["resume"], map_location=device, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.count = state["count"]
        for _ in range(self.count * self.accumulate):  # the rows before
            next(self.loader)

    def step(self) -> tuple[float, float]:
        """One step of base_train.py; returns its seconds (reading the next batch included, as there) and loss."""
        it = self.count
        if it == 0 or not hasattr(self, "next"):
            self.next = next(self.loader)
        begin = time.perf_counter()
        for _ in range(self.accumulate):
            loss = self.compiled(*self.next)
            value = loss.detach()
            (loss / self.accumulate).backward()
            self.next = next(self.loader)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.script["get_lr_multiplier"](it)
            if group["kind"] == "muon":
                group["momentum"] = self.script["get_muon_momentum"](it)
                group["weight_decay"] = self.script["get_weight_decay"](it)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        value = value.item()
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if it == 0:
            gc.collect()  # as there
            gc.freeze()
            gc.disable()
        self.count += 1
        return seconds, value

    def save(self, folder: str) -> None:
        """Write weights as nanochat does."""
        self.torch.save(self.model.state_dict(), Path(folder) / f"model_{self.count:06d}.pt")
        meta = {"step": self.count, "model_config": self.s["config"]}
        (Path(folder) / f"meta_{self.count:06d}.json").write_text(json.dumps(meta))

    def checkpoint(self, file: str) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "count": self.count}
        self.torch.save(state, f"{file}.new")
        Path(f"{file}.new").replace(file)

    def nats(self, spans: list) -> list[float]:
        """Loss of each span (tokens, first scored, end), one at a time: slow, to check the other scorer by."""
        found = []
        with self.torch.inference_mode():
            for ids, start, end in spans:
                tokens = self.torch.tensor([ids], device=self.device)
                targets = tokens[:, 1:].clone()
                targets[:, : start - 1] = -1
                targets[:, end - 1 :] = -1
                found.append(self.model(tokens[:, :-1], targets, loss_reduction="sum").item())
        return found


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path.insert(0, settings["directory"])
    import torch
    from nanochat.common import compute_init

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute_init(device)
    run = Run(settings, torch, device)
    counts = run.model.num_scaling_params()
    scaling = counts["transformer_matrices"] + counts["lm_head"]
    about = {"flops_per_token": run.model.estimate_flops(), "parameters": counts["total"], "scaling": scaling}
    answer(describe(torch, device) | about | {"done": run.count})
    for line in sys.stdin:
        order = json.loads(line)
        if "steps" in order:
            seconds, losses = zip(*(run.step() for _ in range(order["steps"])), strict=True)
            answer({"seconds": seconds, "losses": losses, "done": run.count})
        elif "checkpoint" in order:
            run.checkpoint(order["checkpoint"])
            answer({})
        elif "save" in order:
            run.save(order["save"])
            answer({})
        else:
            answer({"nats": run.nats(order["nats"])})


if __name__ == "__main__":
    main()
