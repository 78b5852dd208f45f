"""What a rehearsal says of the whole run: seconds, disk and dollars of every stage, and what would go wrong.

Arithmetic alone, on what `rehearse.py` has measured; each function says what it multiplies and why. Download is not
counted anywhere: its speed is not measured.
"""

from __future__ import annotations

from typing import Any

from jaxchat.config import Config
from jaxchat.data.hub import COMPRESSION
from train.targets import chip_of

Measured = dict[str, Any]
LIVE = 0.5  # share of RL's groups that have right and wrong answers; the rehearsal makes all of them so


def forecast(config: Config, measured: Measured) -> dict[str, dict[str, Any]]:
    """Of every stage that was rehearsed: `seconds`, `disk_bytes`, `usd` (None: no price known) and `how`."""
    parts = {
        "tokenizer": (tokenizer_seconds, "seconds x text that the BPE sees / sample; at most"),
        "prepare": (prepare_seconds, "seconds x text / sample; download not counted"),
        "pretrain": (pretrain_seconds, "start + compile + steps + evaluations + saves + samples"),
        "sft": (sft_seconds, "rendering x conversations / rehearsed + as pretrain"),
        "rl": (rl_seconds, f"start + compile + steps of {LIVE:.0%} live groups + pass@k; answers as long as SFT's"),
        "eval": (eval_seconds, "compile + batches of every exam of every model; answers as long as SFT's"),
        "report": (report_seconds, "seconds x documents searched / rehearsed; at most"),
        "export": (lambda config, m: m["export"]["seconds"], "as rehearsed"),
    }
    disk, found = disk_bytes(config, measured), {}
    for name, (seconds, how) in parts.items():
        if name in measured:
            spent = float(seconds(config, measured))
            found[name] = {
                "rehearsed_seconds": measured[name]["seconds"],
                "seconds": spent,
                "disk_bytes": disk.get(name, 0),
                "usd": usd(measured["machine"], spent),
                "how": how,
            }
    return found


def usd(machine: dict[str, Any], seconds: float) -> float | None:
    """Devices x hours x the price of one; 0 on CPUs, None where the device has no price here."""
    if machine["platform"] == "cpu":
        return 0.0
    chip = chip_of(machine["device"])
    return None if chip is None else machine["devices"] * seconds / 3600 * chip.price


def text_ratio(measured: Measured) -> float:
    """Text of the run over text of the rehearsal."""
    return measured["text"]["bytes"] / max(1, measured["text"]["sample_bytes"])


def tokenizer_seconds(config: Config, m: Measured) -> float:
    """Counting words grows with the text; merging grows less, so this is a bound."""
    seen, sample = (min(config.tokenizer.train_chars, m["text"][key]) for key in ("bytes", "sample_bytes"))
    return m["tokenizer"]["seconds"] * (1.0 if config.tokenizer.path else max(1.0, seen / max(1, sample)))


def prepare_seconds(config: Config, m: Measured) -> float:
    """Tokenizing and packing read every byte once."""
    work = m["prepare"]["tokenize_seconds"] + m["prepare"]["pack_seconds"]
    return max(0.0, m["prepare"]["seconds"] - work) + work * text_ratio(m)


def loop_seconds(m: Measured, steps: int, compile_share: float) -> float:
    """What every training has: its start, the first step's compiling and the steps."""
    return m["fixed_seconds"] + compile_share * m["compile_seconds"] + steps * m["step_seconds"]


def repeated(times: list[float], count: int, scale: float, compile_share: float) -> float:
    """`count` repetitions of something whose first time compiles and whose last does not."""
    if not times or not count:
        return 0.0
    return max(0.0, times[0] - times[-1]) * compile_share + count * times[-1] * scale


def pretrain_seconds(config: Config, m: Measured) -> float:
    """Evaluations by their rows; saves by the time that they hold up the steps."""
    train, found, share = config.train, m["pretrain"], m["compile_share"]
    evaluations = len(marks(train.steps, train.eval_every, train.steps))
    rows = min(train.eval_rows, max(1, round(m["prepare"]["val_rows"] * text_ratio(m))))
    samples = train.steps // train.sample_every if train.sample_every else 0
    return (
        loop_seconds(found, train.steps, share)
        + repeated(found["timings"].get("validate", []), evaluations, rows / found["eval_rows"], share)
        + repeated(found["timings"].get("sample", []), samples, 1.0, share)
        + saves(train.steps, train.eval_every, train.checkpoint_every, train.sample_every) * found["save_seconds"]
    )


def sft_seconds(config: Config, m: Measured) -> float:
    """As pretraining; the rows are rendered from every conversation first, and exams are asked on the way."""
    sft, found, share = config.sft, m["sft"], m["compile_share"]
    steps = found["steps"]
    evaluations = len(marks(steps, sft.eval_every, steps))
    rows = min(config.train.eval_rows, max(1, round(found["val_rows"] * found["ratio"])))
    questions = sft.exam_cases / found["exam_cases"] if found["exam_cases"] else 0.0
    return (
        found["rows_seconds"] * found["ratio"]
        + loop_seconds(found, steps, share)
        + repeated(found["timings"].get("validate", []), evaluations, rows / found["eval_rows"], share)
        + repeated(found["timings"].get("evaluate", []), evaluations, questions, share)
        + saves(steps, sft.eval_every, config.train.checkpoint_every) * found["save_seconds"]
    )


def rl_seconds(config: Config, m: Measured) -> float:
    """Sampling by tokens: a trained model ends its answers as SFT's end, the rehearsal's writes on to the limit.

    An evaluation is its answers, and what it takes beside them: compiling, the KL divergence.
    """
    rl, found, share = config.rl, m["rl"], m["compile_share"]
    per_answer = found["rollout_seconds"] / found["answers"]
    shorter = min(1.0, found["expected_length"] / max(1.0, found["length"]))
    step = found["rollout_seconds"] * shorter + found["update_seconds"] * LIVE
    answers = min(rl.eval_prompts, found["exam_questions"]) * rl.eval_samples
    beside = [max(0.0, spent - per_answer * found["eval_answers"]) for spent in found["timings"].get("evaluate", [])]
    evaluations = len(marks(found["steps"], rl.eval_every, found["steps"]))
    first, later = (beside[0], beside[-1]) if beside else (0.0, 0.0)
    return (
        loop_seconds(found | {"step_seconds": step}, found["steps"], share)
        + (first + later) * share
        + (1 + evaluations) * answers * per_answer * shorter
        + saves(found["steps"], rl.eval_every, rl.checkpoint_every) * found["save_seconds"]
    )


def eval_seconds(config: Config, m: Measured) -> float:
    """Every exam's batches at the second batch's pace, and what the first took longer: compiling, loading."""
    found = m["eval"]
    exams = [exam for exams in found["exams"].values() for exam in exams.values()]
    rehearsed = sum(exam["seconds"] + exam["again_seconds"] for exam in exams)
    return max(0.0, found["seconds"] - rehearsed) + sum(exam_seconds(exam, m["compile_share"]) for exam in exams)


def exam_seconds(exam: dict[str, Any], compile_share: float) -> float:
    """`shorter`: tokens of an answer that is expected over those of the rehearsal's."""
    first = max(0.0, exam["seconds"] - exam["again_seconds"]) * compile_share
    return first + exam["again_seconds"] * exam["questions"] / max(1, exam["n"]) * exam["shorter"]


def report_seconds(config: Config, m: Measured) -> float:
    """The search for the exams' text in the training text reads `eval.overlap_documents` documents."""
    limit, documents = config.eval.overlap_documents, m["prepare"]["documents"]
    wanted = documents * text_ratio(m)
    searched = wanted if limit < 0 else min(limit, wanted)
    return m["report"]["seconds"] * max(1.0, searched / max(1, documents))


def marks(steps: int, every: int, last: int) -> set[int]:
    """Step counts at which something that comes `every` so many steps (0: never), and at the `last`, is due."""
    return {*range(every, steps + 1, every)} | {last} if every > 0 else {last}


def saves(steps: int, *every: int) -> int:
    """Checkpoints that a training writes: before every evaluation and sample, and where they are due by themselves."""
    return len(set().union(*(marks(steps, each, steps) for each in every)))


def disk_bytes(config: Config, m: Measured) -> dict[str, int]:
    """Bytes by stage at the end: shards, rows, checkpoints that are kept, exports; `download` of the hub's files."""
    ratio, found = text_ratio(m), {}
    if m["text"].get("hub_bytes"):
        found["download"] = round(m["text"]["hub_bytes"] / COMPRESSION)
    if "prepare" in m:
        found["prepare"] = round(m["prepare"]["disk_bytes"] * ratio)
    for name in ("pretrain", "sft", "rl"):
        if name in m:
            train, steps = config.train, m[name]["steps"]
            every = config.rl.checkpoint_every if name == "rl" else train.checkpoint_every
            kept = min(train.keep_last, saves(steps, every)) + (steps // train.keep_every if train.keep_every else 0)
            found[name] = m[name]["checkpoint_bytes"] * kept
    if "sft" in m:
        found["sft"] += round(m["sft"]["rows_bytes"] * m["sft"]["ratio"])
    if "export" in m:
        found["export"] = m["export"]["disk_bytes"]
    return found


def most_disk(config: Config, m: Measured) -> int:
    """Bytes at the worst moment: everything, and a checkpoint that is being written before an old one goes."""
    writing = max((m[name]["checkpoint_bytes"] for name in ("pretrain", "sft", "rl") if name in m), default=0)
    return sum(disk_bytes(config, m).values()) + writing


def problems(config: Config, m: Measured) -> list[dict[str, str]]:
    """What the measurements say would go wrong; failures and missing data are listed by whoever met them."""
    found = []
    if m["attention"]["fallback"]:
        text = f"attention falls back to XLA's, which is slow: {m['attention']['fallback']}"
        found.append({"kind": "attention", "stage": "pretrain", "text": text})
    if (needed := most_disk(config, m)) > m["free_bytes"]:
        text = f"the run needs {needed / 1e9:,.3g} GB of disk, and {m['free_bytes'] / 1e9:,.3g} GB are free"
        found.append({"kind": "disk", "stage": "pretrain", "text": text})
    every = {"pretrain": config.train.checkpoint_every, "sft": config.train.checkpoint_every}
    for name, steps in (every | {"rl": config.rl.checkpoint_every}).items():
        if name not in m:
            continue
        if saves(m[name]["steps"], steps) < 2:
            continue
        between, written = steps * m[name]["step_seconds"], m[name]["checkpoint_seconds"]
        if written > between:
            text = f"a save takes {written:.3g} s, and {steps} steps between two saves take {between:.3g} s"
            found.append({"kind": "save", "stage": name, "text": text})
    loader = m.get("pretrain", {}).get("loader_seconds", 0.0)
    if loader > m.get("pretrain", {}).get("step_seconds", 0.0):
        text = f"the loader needs {loader:.3g} s for a batch, a step takes {m['pretrain']['step_seconds']:.3g} s"
        found.append({"kind": "loader", "stage": "pretrain", "text": text})
    return found
