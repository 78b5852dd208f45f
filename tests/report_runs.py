"""Run directories as the stages leave them, for tests of the report card."""

import json

from jaxchat.config import load_config
from jaxchat.run_dir import RunDir, write_json
from jaxchat.scaling import resolve
from train.curves import plot

HARDWARE = {"platform": "cpu", "device": "x86_64", "devices": 1, "hosts": 1, "cpu_cores": 2, "memory_bytes": 2**33}
VERSIONS = {"python": "3.11.7", "jax": "0.10.2"}
SPLIT = {"cuts": 31, "fill": 0.99951, "tokenizer": "t" * 64, "sha256": {"rows.bin": "r" * 64}}
STEPS, BATCH = 40, 2048
FACTS = {
    "tokenizer": {"vocab_size": 4096, "trained": True, "bytes_per_token": 3.7512, "digest": "t"},
    "prepare": {
        "train": {"documents": 7028, "tokens": 163_840, "bytes": 614_400, "chars": 600_000, "rows": 640} | SPLIT,
        "val": {"documents": 140, "tokens": 5776, "bytes": 21_600, "chars": 21_000, "rows": 23} | SPLIT,
        "digest": "p",
    },
    "pretrain": {
        "seconds": 20.0, "bad_steps": 1, "val_bpb": 1.62, "val_loss": 4.2, "eval_seconds": 3.0, "digest": "b" * 64,
        "params_sha256": "b" * 64, "parameters": 4_915_306, "scaling_parameters": 2_555_976,
        "tokens": STEPS * BATCH, "epochs": 0.5, "flops_per_token": 16_810_560,
        "flops": 16_810_560 * STEPS * BATCH, "tokens_per_second": STEPS * BATCH / 20,
    },
    "sft": {
        "conversations": {"chitchat:500": 500, "identity:3000": 2928}, "seconds": 5.0, "bad_steps": 0,
        "train": {"rows": 320, "conversations": 3428, "cut": 46, "fill": 0.9956},
        "val": {"rows": 13, "conversations": 60, "cut": 2, "fill": 0.99}, "digest": "s" * 64,
        "params_sha256": "s" * 64, "tokens": 81_920, "steps": STEPS,
    },
    "eval": {"digest": "e"},
}  # fmt: skip
SECONDS = {"tokenizer": 2.4, "prepare": 3.6, "pretrain": 251.0, "sft": 65.0, "eval": 27.0}


def bits(value, perplexity, **more):
    return {"metric": value, "bits_per_byte": value, "perplexity": perplexity, "n": 226, "seconds": 6.9} | more


def share(right, n, interval, **more):
    scores = {"metric": right / n, "accuracy": right / n, "right": right, "n": n, "interval": interval, "chance": 0.0}
    return scores | more


PARTIAL = "core_partial (mean of 2 of CORE's 22 tasks)"
CORE_TASKS = {
    "jeopardy": share(3, 30, [0.03460, 0.25621], centred=0.1, shots=10, cropped=0),
    "boolq": share(18, 30, [0.42320, 0.75408], chance=0.62, centred=-0.05263, shots=10, cropped=4),
}
SUBJECTS = {
    f"subject: college_{chr(97 + i)}": share(i % 2, 1, [0.20654 * (i % 2), 1 - 0.20654 * (1 - i % 2)], chance=0.25)
    for i in range(24)
}
MEAN = {"title": PARTIAL, "metric": 0.02368, "n": 60, "interval": [-0.19, 0.24], "chance": 0.0, "groups": CORE_TASKS}
KINDS = {"kind: gain": share(40, 46, [0.74334, 0.93882])}
EXAMS = {
    "base": {
        "bits_per_byte": bits(1.6057, 64.94, conversations={"n": 131, "bits_per_byte": 1.9502}),
        "core_partial": MEAN,
    },
    "sft": {
        "bits_per_byte": bits(1.9257, 150.66, conversations={"n": 131, "bits_per_byte": 1.6099}),
        "mmlu": share(8, 24, [0.17966, 0.53289], chance=0.25, cropped=3, groups=SUBJECTS),
        "gsm8k": share(1, 40, [0.00442, 0.12882], endless=7, readings={"lenient": share(3, 40, [0.02582, 0.19862])}),
        "humaneval": share(2, 164, [0.00335, 0.04342], facts={"sandbox": "namespaces"}, groups={}),
        "word_problems": share(244, 256, [0.91987, 0.97299], groups=KINDS, too_long=0),
        "identity": share(83, 83, [0.95577, 1.0], groups={}),
    },
}


def samples(stage):
    turn = lambda prompt, text: {"prompt": prompt, "answers": [{"temperature": 0.0, "text": text}]}  # noqa: E731
    return {"before": [turn("hi", "old")], "after": [turn(stage, f"new {stage}")]}


def standing(stage, changes):
    """What an evaluation says beside the scores."""
    partial = {"metric": 0.02368, "tasks": 2, "missing": {"squad": "no file"}}
    beside = {"core": None, "core_partial": partial if stage == "base" else None,
              "chatcore": 0.0123 if stage == "sft" else None}  # fmt: skip
    reasons = {"arc_easy": "no file core/arc_easy.jsonl at hand"} | changes.get("reasons", {})
    return beside | {"not_run": reasons if stage == "sft" else {}}


def metrics(path, steps=STEPS, mfu=None):
    path.parent.mkdir(parents=True)
    lines = []
    for step in range(steps):
        record = {"step": step, "tokens": (step + 1) * BATCH, "loss": 8 - step / 10, "lr_mult": 1.0, "grad_norm": 0.4,
                  "step_seconds": 0.5, "tokens_per_second": 4000.0 + step, "mfu": mfu}  # fmt: skip
        record |= {"val_bpb": 2.0 - step / 100, "val_loss": 4.5} if step % 20 == 19 else {}
        lines.append(json.dumps(record | ({"loss": None, "grad_norm": None} if step == 7 else {})) + "\n")
    path.write_text("".join(lines) + '{"step": 99, "tor', encoding="utf-8")  # the last one torn by a kill


def make_run(folder, stages=tuple(FACTS), **changes):
    """A run directory as the stages leave it."""
    run = RunDir(folder)
    records = {
        name: {
            "status": "done", "start": "2026-01-02T03:04:05+00:00", "end": "2026-01-02T03:05:05+00:00",
            "seconds": SECONDS[name], "commit": "abc1234", "versions": VERSIONS, "hardware": HARDWARE, "inputs": {},
            "inputs_digest": "i", "facts": FACTS[name], "peak_rss_bytes": 2**30 + 2**29,
        } | changes.get(name, {})
        for name in stages
    }  # fmt: skip
    records["report"] = {"status": "running", "start": "2026-01-02T03:05:05+00:00", "end": None, "seconds": 0.0,
                         "commit": "abc1234", "versions": VERSIONS, "hardware": HARDWARE, "inputs": {},
                         "inputs_digest": "i", "facts": {}}  # fmt: skip
    write_json(run.stages, records)
    for stage, needed in (("base", "pretrain"), ("sft", "sft")):
        if needed in stages:
            metrics(run.stage(stage) / "metrics.jsonl", mfu=changes.get("mfu"))
            plot(run.stage(stage) / "metrics.jsonl", "loss", run.stage(stage) / "loss.png", stage)
        if "eval" in stages:
            write_json(run.stage(stage) / "samples.json", samples(stage))
            write_json(run.eval(stage), {"tasks": EXAMS[stage], "inputs": {}} | standing(stage, changes))
    return run


def make_config():
    """nano's, without the look for exam text in the training text."""
    return resolve(load_config("nano", ["eval.overlap_documents=0"]))
