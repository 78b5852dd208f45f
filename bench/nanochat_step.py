"""nanochat's own training step, run by `bench.train_step --compare nanochat DIR` in nanochat's interpreter.

Imports their model, optimizer and initialization from the checkout and changes nothing; the step is the body of their
`scripts/base_train.py`. On random tokens its rates are the optimizer's defaults; a run (bench/curve.py) has its own
tokens, and the rates of that script's defaults. Settings come as one JSON argument. Each line on standard input is an
order, a number of steps; the answer is one JSON line. Between orders the process sleeps. Needs torch and filelock, no
JAX.
"""

import gc
import json
import math
import os
import sys
import time

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what their code prints goes to standard error


def answer(value: dict) -> None:
    print(json.dumps(value), file=ANSWERS, flush=True)


def describe(torch, device: str) -> dict:
    """Versions, and the attention it could use."""
    from nanochat import flash_attention
    from nanochat.common import COMPUTE_DTYPE

    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(COMPUTE_DTYPE).removeprefix("torch."),
        "attention": "Flash Attention 3" if flash_attention.USE_FA3 else "torch scaled_dot_product_attention",
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
    }


class Trainer:
    """Model, optimizer and compiled step of one run; `step()` returns the seconds of one optimizer step."""

    def __init__(self, settings: dict, torch, device: str):
        import numpy as np
        from nanochat.gpt import GPT, GPTConfig

        self.torch, self.device = torch, device
        self.shape, self.vocab = tuple(settings["batch"]), settings["config"]["vocab_size"]
        with torch.device("meta"):
            model = GPT(GPTConfig(**settings["config"]))
        model.to_empty(device=device)
        model.init_weights()
        self.run = settings["run"]
        self.optimizer = model.setup_optimizer(**rates(self.run, self.shape))
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model = torch.compile(model, dynamic=False)
        self.draw = np.random.default_rng(settings["seed"])
        self.rows = np.load(self.run["rows"], mmap_mode="r") if self.run else None
        self.count, self.loss, self.checksum = 0, None, None

    def batch(self):
        import numpy as np

        if self.rows is None:
            inputs = self.draw.integers(0, self.vocab, self.shape, np.int32)
            targets = np.roll(inputs, -1, -1)
        else:
            row = np.array(self.rows[self.count])
            inputs, targets = row[..., :-1], row[..., 1:]
        self.checksum = self.checksum or int(inputs.sum(dtype=np.int64))
        return tuple(torch_of(self.torch, a, self.device) for a in (inputs, targets))

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def step(self) -> float:
        inputs, targets = self.batch()
        self.synchronize()
        begin = time.perf_counter()
        accumulate, total = self.shape[0], 0.0
        for x, y in zip(inputs, targets, strict=True):
            loss = self.model(x, y)
            total = total + loss.detach() / accumulate
            (loss / accumulate).backward()
        for group in self.optimizer.param_groups:  # their schedules, on the way up
            group["lr"] = group["initial_lr"] * min(1.0, (self.count + 1) / 40)
            if group["kind"] == "muon":
                group["momentum"] = 0.85 + 0.12 * min(self.count / 400, 1)
                if self.run:
                    group["weight_decay"] = self.run["weight_decay"] * cosine(self.count / self.run["steps"])
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.loss = total.item()
        self.synchronize()
        self.count += 1
        return time.perf_counter() - begin


def rates(run: dict | None, shape: tuple) -> dict:
    """Arguments of `setup_optimizer`: what `base_train.py` passes by default, scaled by the batch as there."""
    if not run:
        return {}
    scale = math.sqrt(math.prod(shape) / 2**19)
    found = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
    return {name: rate * scale for name, rate in found.items()} | {"weight_decay": run["weight_decay"]}


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def torch_of(torch, array, device: str):
    return torch.from_numpy(array).to(device=device, dtype=torch.long)


def main() -> None:
    settings = json.loads(sys.argv[1])
    sys.path.insert(0, settings["directory"])
    import torch
    from nanochat.common import compute_init

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute_init(device)
    answer(describe(torch, device))
    trainer = None
    for line in sys.stdin:
        begin = time.perf_counter()
        if trainer is None:  # the first order: everything up to the first step's result
            trainer = Trainer(settings, torch, device)
            trainer.step()
            first = time.perf_counter() - begin
            gc.collect()  # as base_train.py does after its first step
            gc.freeze()
            gc.disable()
            made = {"parameters": trainer.parameters, "checksum": trainer.checksum, "loss": trainer.loss}
            answer({"first": first} | made)
            continue
        processor = time.process_time()
        seconds, losses = [], []
        for _ in range(int(line)):
            seconds.append(trainer.step())
            losses.append(trainer.loss)
        processor = time.process_time() - processor
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        answer({"seconds": seconds, "processor": processor, "loss": trainer.loss, "losses": losses,
                "peak_bytes": peak})  # fmt: skip


if __name__ == "__main__":
    main()
