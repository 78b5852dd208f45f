"""nanochat's own ladder on the text, tokenizer, shapes and token counts of one of ours, scored by the same scorer.

    python -m bench.nanochat_ladder --nanochat DIR --python PY --ladder runs/ladder --out runs/nanochat-ladder
        [--depths 2,3,4,5] [--seeds 3] [--lr-factor 1,2,4] [--decay-factor F] [--batch-tokens N] [--check]

DIR is a checkout of karpathy/nanochat, PY an interpreter with torch, filelock, requests and pyarrow. --ladder: a folder
of `launch.py ladder`; its tokenizer and text are used, and made where they are not there (--tier, --data, --set as
there). Every run (depth, seed, factor) lies in a folder of its own below --out, goes on after a kill, and is not
repeated. --lr-factor multiplies the four rates of its base_train.py; weight decay is divided by it, so that rate times
decay stays, unless --decay-factor says another factor. --out/ladder.json has the best factor of each depth (by windows
from a document's start), "sweep" all of them; compare: python launch.py ladder --against FILE.
--check scores each model by torch, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import nanochat_config
from bench.peer import Program
from bench.train_step import batch_shape
from jaxchat.config import Config, ModelConfig, load_config, replaced
from jaxchat.data.shards import read_documents
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.interop.nanochat import read_nanochat
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.scaling import horizon_parameters, resolve_model
from jaxchat.sizes import count_parameters, flops_per_token
from jaxchat.tokenizer import Tokenizer
from train import ladder
from train.compare import windows

WORKER = Path(__file__).with_name("nanochat_train.py")
BLOCK = 50  # steps of an order, and between checkpoints
WARM_UP = 10  # steps that no median counts


def documents(args: argparse.Namespace, held: ladder.HeldOut) -> Path:
    """Return where the training documents of this text and tokenizer lie."""
    return args.out / f"documents-{held.corpus['held_out'][:8]}-{held.corpus['tokenizer'][:8]}.npz"


def write_documents(data: RunDir, path: Path) -> None:
    """Write the training documents of a ladder as one array of ids, and where each begins and ends."""
    tokenizer = Tokenizer.load(data.tokenizer)
    folders = sorted((data.data / "tokens").glob("*"))
    parts = [tokens for folder in folders for tokens, _ in read_documents(folder, "train", tokenizer.digest)]
    with open(path.with_suffix(".new"), "wb") as file:
        np.savez(file, ids=np.concatenate(parts), ends=np.cumsum([0, *map(len, parts)]))
    path.with_suffix(".new").replace(path)


def train(args: argparse.Namespace, given: Config, data: RunDir, held: ladder.HeldOut, depth: int, seed: int,
          factor: float) -> dict[str, Any]:  # fmt: skip
    """Train one model, or find it done, and return its point."""
    config = ladder.rung(given, depth, seed)
    decay = args.decay_factor or 1 / factor
    name = f"d{depth}_s{seed}_x{factor:g}" + (f"_decay{decay:g}" if args.decay_factor else "")
    folder = args.out / (name + (f"_b{args.batch_tokens}" if args.batch_tokens else ""))
    result, checkpoint = folder / "result.json", folder / "checkpoint.pt"
    key = {"corpus": held.corpus, "tokens": config.train.steps * config.train.batch_tokens,
           "batch_tokens": config.train.batch_tokens}  # fmt: skip
    if result.exists():
        found = read_json(result)
        if {name: found.get(name) for name in key} != key:
            raise UsageError(f"{folder}: was made with other text, tokens or batch; choose another --out")
        return found["point"]
    folder.mkdir(parents=True, exist_ok=True)
    d12 = resolve_model(ModelConfig(depth=12, seq_len=2048, vocab_size=config.model.vocab_size))
    settings = {
        "directory": str(args.nanochat.resolve()),
        "config": nanochat_config(config),
        "batch": batch_shape(config),
        "seed": seed,
        "steps": config.train.steps,
        "reference_tokens": config.train.token_ratio * horizon_parameters(d12),
        "target_tokens": config.train.token_ratio * horizon_parameters(config.model),
        "lr_factor": factor,
        "decay_factor": decay,
        "documents": str(documents(args, held).resolve()),
        "bos": Tokenizer.load(data.tokenizer).bos,
        "resume": str(checkpoint.resolve()) if checkpoint.exists() else "",
    }
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "NANOCHAT_BASE_DIR": str(folder.resolve())}
    times = read_json(folder / "times.json") if settings["resume"] else []
    with tempfile.TemporaryFile("w+") as errors:
        peer = Program([args.python, "-u", str(WORKER), json.dumps(settings)], errors, env=environment)
        try:
            model = config.model
            ours = {"flops_per_token": flops_per_token(model), "parameters": count_parameters(model).total,
                    "scaling": count_parameters(model).scaling}  # fmt: skip
            if any(peer.about[name] != value for name, value in ours.items()):
                raise UsageError(f"nanochat counts {peer.about}, and we {ours}: not the same model")
            done = peer.about["done"]
            times, last = times[:done], 0.0
            while done < config.train.steps:
                block = peer.order({"steps": min(BLOCK, config.train.steps - done)})
                done = block["done"]
                times, last = times + block["seconds"], block["losses"][-1]
                say = f"{folder.name}: step {done:,} of {config.train.steps:,}, loss {last:.3f}, "
                print(say + f"{statistics.median(block['seconds']):.3f} s a step", file=sys.stderr, flush=True)
                if not math.isfinite(last):  # it stays so
                    break
                write_json(folder / "times.json", times)
                peer.order({"checkpoint": str(checkpoint.resolve())})
            bits: dict[str, list[float]] | None = None
            if done == config.train.steps and math.isfinite(last):
                peer.order({"save": str(folder.resolve())})
                imported = read_nanochat(folder, tokenizer=data.tokenizer / "tokenizer.json", allow_pickle=True)
                bits = held.score(imported.config, imported.params)
                if args.check:
                    check(peer, held, bits)
        finally:
            peer.close()
    step = statistics.median(times[WARM_UP:] or times)
    one: dict[str, Any] = {"depth": depth, "seed": seed, "step_seconds": step}
    one |= held.point(config, key["tokens"], step, bits) if bits else dict.fromkeys(ladder.MEASURES, math.inf)
    one |= {"run": folder.name, "lr_factor": factor, "decay_factor": decay, "peer": peer.about}
    one |= {"batch_tokens": config.train.batch_tokens}
    write_json(result, key | {"point": one})
    for path in (checkpoint, *([] if args.keep else folder.glob("m*_*"))):
        path.unlink(missing_ok=True)
    return one


def best(args: argparse.Namespace, given: Config, held: ladder.HeldOut) -> ladder.Ladder:
    """Write the ladder of all finished runs of this text in --out: each depth's best factor, all means in "sweep"."""
    results = [read_json(path) for path in sorted(args.out.glob("*/result.json"))]
    points = [found["point"] for found in results if found["corpus"] == held.corpus]
    names, groups = ("depth", "lr_factor", "decay_factor", "batch_tokens"), dict[Any, list[dict[str, Any]]]()
    for one in points:
        groups.setdefault(tuple(one[name] for name in names), []).append(one)
    sweep, chosen = list[dict[str, Any]](), dict[int, list[dict[str, Any]]]()
    for key, group in sorted(groups.items()):
        depth = key[0]
        mean = {m: statistics.fmean(one[m] for one in group) for m in ladder.MEASURES}
        shown = {m: value if math.isfinite(value) else "diverged" for m, value in mean.items()}
        sweep.append(dict(zip(names, key, strict=True)) | {"seeds": len(group)} | shown)
        if mean["start"] < statistics.fmean(one["start"] for one in chosen.get(depth, [{"start": math.inf}])):
            chosen[depth] = group
    card = ladder.blank(args.name, given, held) | {"sweep": sweep}
    card["points"] = [one for group in chosen.values() for one in group]
    ladder.write(args.out, card)
    return card


def check(peer: Program, held: ladder.HeldOut, bits: dict[str, list[float]], documents: int = 20) -> None:
    """Score the first documents in torch, too, and raise where the bits per byte differ by more than 1e-4."""
    context = held.corpus["context"] + 1
    groups = [windows(ids, context) for ids in held.documents[:documents]]
    nats = iter(peer.order({"nats": [[s.tokens, s.start, s.end] for group in groups for s in group]})["nats"])
    theirs = [[next(nats) / math.log(2) for _ in group] for group in groups]
    sums = {"start": [one[0] for one in theirs], "every": [sum(one) for one in theirs]}
    for measure, values in sums.items():
        size = held.sizes[measure][:documents].sum()
        a, b = (sum(side[:documents]) / size for side in (bits[measure], values))
        print(f"  {measure}: {a:.6f} by JAX, {b:.6f} by torch, bits per byte", file=sys.stderr, flush=True)
        if abs(a - b) > 1e-4:
            raise UsageError(f"{measure}: {a} by JAX and {b} by torch bits per byte; the two scorers differ")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanochat", type=Path, required=True, metavar="DIR")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--ladder", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--out", type=Path, default=Path("runs/nanochat-ladder"))
    parser.add_argument("--depths")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--seed", type=int, help="of the first run; the others follow")
    parser.add_argument("--lr-factor", default="1", metavar="A,B")
    parser.add_argument("--decay-factor", type=float)
    parser.add_argument("--batch-tokens", type=int, help="another batch than the ladder's; the tokens stay")
    parser.add_argument("--tier", default="ladder")
    parser.add_argument("--data")
    parser.add_argument("--set", action="append", default=[], metavar="K=V")
    parser.add_argument("--name", default="nanochat 92d63d4", help="of the ladder, in tables")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the weights")
    args = parser.parse_args(arguments)
    if not (args.nanochat / "nanochat" / "gpt.py").is_file():
        raise UsageError(f"{args.nanochat}: no nanochat/gpt.py there; give a checkout of karpathy/nanochat")
    own = args.ladder / "config.toml"
    sets = [*args.set, *([f"data.source={json.dumps(args.data)}"] if args.data else [])]
    given = load_config(own if own.exists() else args.tier, sets)
    depths, following, seeds = ladder.shape(args.ladder, given, args.depths, args.seeds)
    depths += [] if args.depths else [following]
    given = ladder.opened(given, args.ladder, max(given.model.depth, *depths))
    data, held = ladder.prepared(given, args.ladder, depths[0])
    given = replaced(given, "model", recipe="modern", bigram_rows=-1, key_offset=None)  # what nanochat has
    if args.batch_tokens:
        given = replaced(given, "train", batch_tokens=args.batch_tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    if not documents(args, held).exists():
        write_documents(data, documents(args, held))
    first = given.seed if args.seed is None else args.seed
    for depth in depths:
        for seed in range(first, first + seeds):
            for factor in map(float, args.lr_factor.split(",")):
                one = train(args, given, data, held, depth, seed, factor)
                print(json.dumps({k: one[k] for k in ("run", "start", "every", "step_seconds")}), flush=True)
    card = best(args, given, held)
    print(json.dumps(card["fit"]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except JaxchatError as error:
        sys.exit(f"error: {error}")
