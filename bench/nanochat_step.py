"""nanochat's own training step, run by `bench.train_step --compare nanochat DIR` in nanochat's interpreter.

Imports their model, optimizer and initialization from the checkout and changes nothing; the step is the body of their
`scripts/base_train.py`. Settings come as one JSON argument. Each line on standard input is an order, a number of steps;
the answer is one JSON line. Between orders the process sleeps. Needs torch and filelock, no JAX.
"""

import gc
import json
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
        self.optimizer = model.setup_optimizer()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model = torch.compile(model, dynamic=False)
        self.draw = np.random.default_rng(settings["seed"])
        self.count, self.loss, self.checksum = 0, None, None

    def batch(self):
        import numpy as np

        tokens = self.draw.integers(0, self.vocab, self.shape, np.int32)
        self.checksum = self.checksum or int(tokens.sum(dtype=np.int64))
        pair = (torch_of(self.torch, a, self.device) for a in (tokens, np.roll(tokens, -1, -1)))
        return tuple(pair)

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def step(self) -> float:
        inputs, targets = self.batch()
        self.synchronize()
        begin = time.perf_counter()
        accumulate = self.shape[0]
        for x, y in zip(inputs, targets, strict=True):
            loss = self.model(x, y)
            (loss / accumulate).backward()
        for group in self.optimizer.param_groups:  # their schedules, on the way up
            group["lr"] = group["initial_lr"] * min(1.0, (self.count + 1) / 40)
            if group["kind"] == "muon":
                group["momentum"] = 0.85 + 0.12 * min(self.count / 400, 1)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.loss = loss.item()
        self.synchronize()
        self.count += 1
        return time.perf_counter() - begin


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
            answer({"first": first, "parameters": trainer.parameters, "checksum": trainer.checksum})
            continue
        processor = time.process_time()
        seconds = [trainer.step() for _ in range(int(line))]
        processor = time.process_time() - processor
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        answer({"seconds": seconds, "processor": processor, "loss": trainer.loss, "peak_bytes": peak})


if __name__ == "__main__":
    main()
