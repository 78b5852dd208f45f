"""Training and using a tokenizer: python -m bench.tokenizer --data SOURCE [--megabytes 100] [--vocab-size 32768]

Trains ours on the first so many megabytes of the source and counts the tokens that it makes of that very text; then
tokenizes the same text as stage prepare does, in files of equal size, with one process and with one for every core.
With --peer PYTHON, an interpreter that has rustbpe and tiktoken, nanochat's tokenizer is trained on the same text with
its own pattern and as many tokens. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxchat.data.shards import Job, parallel_map, tokenize_unit
from jaxchat.data.sources import Unit, iterate_documents
from jaxchat.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

FILES = 8
PEER = r'''
import json, sys, time
import rustbpe, tiktoken
pattern = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"""
pattern += r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
texts = [json.loads(line)["text"] for path in sys.argv[2:] for line in open(path)]
begin = time.perf_counter()
bpe = rustbpe.Tokenizer()
bpe.train_from_iterator(iter(texts), int(sys.argv[1]), pattern=pattern)
seconds = time.perf_counter() - begin
ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
encoding = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
tokens = sum(len(ids) for ids in encoding.encode_ordinary_batch(texts, num_threads=2))
print(json.dumps({"seconds": seconds, "tokens": tokens}))
'''


def files_of(source: str, megabytes: float, folder: Path) -> list[Path]:
    """The first documents of the source in `FILES` files, round robin."""
    paths = [folder / f"{i}.jsonl" for i in range(FILES)]
    files, size = [open(path, "w", encoding="utf-8") for path in paths], 0
    for number, text in enumerate(iterate_documents(source)):
        if size >= megabytes * 1e6:
            break
        size += len(text.encode("utf-8", "replace"))
        files[number % FILES].write(json.dumps({"text": text}) + "\n")
    for file in files:
        file.close()
    return paths


def _with_peak(job: Job) -> tuple[dict[str, Any], int]:
    """The unit's manifest, and the largest memory of the process so far (Linux; 0 elsewhere)."""
    manifest, status = tokenize_unit(job), Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return manifest, next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def tokenized(paths: list[Path], tokenizer: Path, folder: Path, workers: int) -> dict[str, Any]:
    """Seconds and tokens of stage prepare's first half, and the largest of its processes."""
    jobs = [
        Job(Unit("files", str(path)), 0.01, str(tokenizer), str(folder / f"{workers}-{path.stem}"), 10**8, "bench")
        for path in paths
    ]
    begin = time.perf_counter()
    found = list(parallel_map(_with_peak, jobs, "local", workers))
    seconds = time.perf_counter() - begin
    size = sum(split["bytes"] for manifest, _ in found for split in manifest["splits"].values())
    peak = max(peak for _, peak in found)
    return {"workers": workers, "seconds": seconds, "mb_per_second": size / 1e6 / seconds, "peak_process_bytes": peak}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    paths = files_of(args.data, args.megabytes, folder)
    texts = [json.loads(line)["text"] for path in paths for line in open(path, encoding="utf-8")]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    begin = time.perf_counter()
    ours = train_tokenizer(iter(texts), args.vocab_size, 10**12, 10**12)
    seconds = time.perf_counter() - begin
    tokens = sum(len(ids) for i in range(0, len(texts), 4096) for ids in ours.encode_batch(texts[i : i + 4096]))
    ours.save(folder / "tokenizer")
    assert Tokenizer.load(folder / "tokenizer").digest == ours.digest
    result = {"bytes": size, "train_seconds": seconds, "tokens": tokens, "bytes_per_token": size / tokens}
    print(f"ours: trained in {seconds:.1f} s, {size / tokens:.4f} bytes per token on its own corpus of {size:,} bytes")
    result["prepare"] = []
    for workers in sorted({1, os.cpu_count() or 1}):
        result["prepare"].append(found := tokenized(paths, folder / "tokenizer", folder, workers))
        peak = found["peak_process_bytes"]
        print(f"{workers} processes: {found['mb_per_second']:.2f} MB/s, at most {peak:,} bytes each")
    if args.peer:
        count = str(args.vocab_size - len(SPECIAL_TOKENS))
        command = [args.peer, "-c", PEER, count, *map(str, paths)]
        peer = json.loads(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)
        result["peer"] = peer | {"bytes_per_token": size / peer["tokens"]}
        print(f"rustbpe: trained in {peer['seconds']:.1f} s, {size / peer['tokens']:.4f} bytes per token")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="chitchat")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has rustbpe and tiktoken")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    from train.doctor import hardware, versions  # not above: every process of `tokenized` would load JAX with it

    facts = {"bench": "tokenizer"} | vars(args) | result
    print(json.dumps(facts | {"versions": versions(), "hardware": hardware()}))


if __name__ == "__main__":
    main()
