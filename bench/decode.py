"""Time the engine: python -m bench.decode --tier d20 [--batch-sizes 1,8,32,128] [--prompt 1024] [--tokens 256]

Random weights in the shape of a tier, or those of --run-dir. As many answers as each batch size says start at once;
reported are the time to the first token, the time per token, tokens a second once all answers run, and how near that
comes to the memory's limit: the bytes that a step must read over the bandwidth measured here. The last line is one JSON
object.

--weights float32,int8 takes each in turn; with --run-dir, also their bits per byte on the run's held-out text.
--compare nanochat DIR runs the engine of a checkout of karpathy/nanochat in turns with ours: the same weights and
prompts; --python is an interpreter with torch.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import machine, trace
from bench.peer import add_peer_arguments, check_peer
from jaxchat import model as gpt
from jaxchat.checkpoint import restore_params
from jaxchat.config import Config, MeshConfig, load_config
from jaxchat.data.packing import Rows
from jaxchat.engine import Engine, Handle, Request, trained_stages
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.sizes import count_parameters, kv_values_per_row, looked_up, matmul_parameters
from jaxchat.tokenizer import Tokenizer, train_tokenizer

NOISE = 0.02  # added to fresh weights, whose zero matrices would make every token equally likely
GOALS = {("d20", 1): 0.40, ("d32", 1): 0.55, ("d20", 128): 0.60}  # shares of the limit of one H200, bfloat16
HELD_OUT_ROWS = 32  # of a run's held-out text, for bits per byte


class Sampler:
    """Our engine with its weights; `run` times one batch."""

    def __init__(self, config: Config, params: Any, tokenizer: Tokenizer, slots: int, args: Any, kind: str):
        self.args, devices = args, jax.local_devices()
        mesh = make_mesh(MeshConfig(), devices) if len(devices) > 1 else None
        self.engine = Engine(
            config.model,
            params,
            tokenizer,
            slots=max(slots, len(devices)),
            capacity=args.prompt + args.tokens,
            weights=kind,
            mesh=mesh,
            reuse=False,  # every round has the same prompt
        )

    def start(self, prompt: list[int], rows: int) -> list[Handle]:
        """Submit `rows` answers to one prompt (which is prefilled once for all, as the peer does); returns when all
        of them run."""
        args, engine = self.args, self.engine
        request = Request(
            prompt, max_tokens=args.tokens, temperature=args.temperature, top_k=args.top_k, tools=False, stop=()
        )
        handles = engine.submit_group(request, range(rows))
        while any(handle.first_token is None for handle in handles):
            engine.step()
        return handles

    def finish(self, handles: list[Handle]) -> int:
        """Run all answers to their end; returns the tokens made."""
        before = sum(handle.made for handle in handles)
        while not all(handle.done for handle in handles):
            self.engine.step()
        return sum(handle.made for handle in handles) - before

    def run(self, prompt: list[int], rows: int) -> dict[str, float]:
        begin, processor = time.perf_counter(), time.process_time()
        handles = self.start(prompt, rows)
        all_run = time.perf_counter()
        made = self.finish(handles)
        end = time.perf_counter()
        return {
            "tokens_per_second": made / (end - all_run),
            "with_prompt": sum(handle.made for handle in handles) / (end - begin),
            "first_token_seconds": statistics.median(h.first_token - h.submitted for h in handles),
            "seconds_per_token": statistics.median(
                (h.finished - h.first_token) / max(1, h.made - self.engine.chunk) for h in handles
            ),
            "processor_seconds": time.process_time() - processor,
        }

    def profile(self, prompt: list[int], rows: int, tokens_per_second: float) -> dict[str, float]:
        """Return kernels and busy time of a decoding step from a profile, and the rest of an unprofiled step: the
        time that launches and the host cost."""
        handles, made = self.start(prompt, rows), 0

        def finish() -> None:
            nonlocal made
            made = self.finish(handles)

        kernels = trace.record(finish)
        classify = trace.Classifier()
        leaves = [kernel for kernel in kernels if classify(kernel)]
        steps = made / rows
        seconds, busy = rows / tokens_per_second, trace.busy_seconds(leaves) / steps
        return {
            "kernels_per_step": round(len(leaves) / steps, 1),
            "step_seconds": round(seconds, 7),
            "busy_seconds": round(busy, 7),
            "gap_seconds": round(seconds - busy, 7),
            "gap_microseconds_per_kernel": round(1e6 * (seconds - busy) * steps / max(1, len(leaves)), 3),
        }


def step_bytes(config: Config, rows: int, context: int, kind: str, item_bytes: int) -> int:
    """Return the bytes that one decoding step must read: weights that take part, table rows, the live cache.

    Of int8 weights one byte a kernel's value.
    """
    weights = (1 if kind == "int8" else item_bytes) * matmul_parameters(config.model)
    return weights + item_bytes * rows * (looked_up(config.model) + kv_values_per_row(config.model, context))


def load(args: argparse.Namespace) -> tuple[Config, Any, Tokenizer]:
    run = RunDir(args.run_dir) if args.run_dir else None
    config = resolve(load_config(run.config if run else args.tier, args.set))
    if args.prompt + args.tokens > config.model.seq_len:
        raise UsageError(
            f"--prompt {args.prompt} and --tokens {args.tokens} are more than the context of "
            f"{config.model.seq_len} (model.seq_len)"
        )
    if run:
        stage = trained_stages(run)[0]  # the one that is served
        return config, restore_params(run.stage(stage))[0], Tokenizer.load(run.tokenizer)
    leaves, tree = jax.tree.flatten(gpt.init_params(config.model, config.seed))
    draw = np.random.default_rng(0)
    for i, leaf in enumerate(leaves):
        if not np.any(leaf):
            leaves[i] = jnp.asarray(NOISE * draw.standard_normal(leaf.shape, np.float32))
    tokenizer = train_tokenizer(["some words for a small vocabulary"] * 3, 266, 1000, 1000)
    return config, jax.tree.unflatten(tree, leaves), tokenizer


def bits_per_byte(engine: Engine, run: RunDir) -> float | None:
    """Of a run's held-out text, each row by itself; None where there is none."""
    folder = run.data / "rows" / "val"
    if not (folder / "meta.json").exists():
        return None
    rows, lengths = Rows(folder, engine.tokenizer.digest), np.asarray(engine.tokenizer.byte_lengths())
    texts = [rows[i][0][: engine.capacity].tolist() for i in range(min(HELD_OUT_ROWS, len(rows)))]
    nats = -sum(token.logprob for scores in engine.score(texts) for token in scores if token and lengths[token.id])
    return nats / math.log(2) / sum(int(lengths[ids[1:]].sum()) for ids in texts)


def measure(config: Config, params: Any, tokenizer: Tokenizer, args: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Yield one entry for each batch size, medians over the rounds."""
    prompt = np.random.default_rng(1).integers(0, tokenizer.vocab_size, args.prompt).tolist()
    most = machine.bandwidth()
    ours = Sampler(config, params, tokenizer, max(args.batch_sizes), args, kind)
    peer = None
    if args.compare:
        from bench.decode_peer import Peer

        peer = Peer(config, params, tokenizer, Path(args.compare[1]), args.python)
    try:
        for rows in args.batch_sizes:
            sides: dict[str, list[dict[str, float]]] = {"jaxchat": [], "nanochat": []}
            for turn in range(args.rounds + 1):  # the first one compiles
                results = {"jaxchat": ours.run(prompt, rows)}
                if peer:
                    results["nanochat"] = peer.run(prompt, rows, args)
                if turn:
                    for side, result in results.items():
                        sides[side].append(result)
            must = step_bytes(config, rows, args.prompt + args.tokens // 2, kind, np.dtype(ours.engine.dtype).itemsize)
            entry = _summary(config, rows, most, must, sides)
            if args.profile:
                entry["launches"] = ours.profile(prompt, rows, entry["tokens_per_second"])
            yield entry
    finally:
        if peer:
            peer.close()
    if args.run_dir:
        yield {"bits_per_byte": bits_per_byte(ours.engine, RunDir(args.run_dir))}


def _summary(config: Config, rows: int, most: float, must: int, sides: dict[str, Any]) -> dict[str, Any]:
    def median(side: str) -> dict[str, float]:
        return {name: round(statistics.median(r[name] for r in sides[side]), 5) for name in sides[side][0]}

    ours = median("jaxchat")
    limit = rows * most / must
    entry: dict[str, Any] = {
        "rows": rows,
        **ours,
        "bytes_per_step": must,
        "bandwidth": round(most),
        "limit_tokens_per_second": round(limit, 1),
        "share_of_limit": round(ours["tokens_per_second"] / limit, 4),
        "goal_share": GOALS.get((config.tier, rows)),
    }
    if sides["nanochat"]:
        pairs = zip(sides["jaxchat"], sides["nanochat"], strict=True)
        ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]
        entry |= {"nanochat": median("nanochat"), "times_nanochat": round(statistics.median(ratios), 2)}
        entry["times_nanochat_rounds"] = [round(ratio, 2) for ratio in ratios]
    return entry


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", default="nano")
    parser.add_argument("--run-dir", help="a finished run; default: random weights in the shape of the tier")
    parser.add_argument("--set", action="append", default=[], metavar="K=V")
    parser.add_argument("--batch-sizes", type=machine.numbers, default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--weights", default="auto", help="auto, float32, bfloat16 or int8, or several of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also kernels a step, and the time between them")
    add_peer_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_peer(parser, args)
    try:
        config, params, tokenizer = load(args)
        result: dict[str, Any] = machine.about() | {
            "tier": config.tier,
            "model": {k: getattr(config.model, k) for k in ("depth", "width", "seq_len", "vocab_size")},
            "parameters": count_parameters(config.model).total,
            "prompt": args.prompt,
            "tokens": args.tokens,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "rounds": args.rounds,
        }
        for kind in args.weights.split(","):
            result[kind] = list(measure(config, params, tokenizer, args, kind))
            print(json.dumps({kind: result[kind]}), flush=True)
    except JaxchatError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
