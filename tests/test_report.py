"""The report card: its numbers by hand, in both files, from whole and from partial runs."""

import json
import re

import pytest

from jaxchat.config import load_config
from jaxchat.optim.horizon import resolve
from jaxchat.paths import RunDir, read_json, write_json
from train import report
from train.plots import loss_plot

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
    return {
        "metric": right / n,
        "accuracy": right / n,
        "right": right,
        "n": n,
        "interval": interval,
        "chance": 0.0,
    } | more


EXAMS = {
    "base": {"bits_per_byte": bits(1.6057, 64.94, conversations={"n": 131, "bits_per_byte": 1.9502})},
    "sft": {
        "bits_per_byte": bits(1.9257, 150.66, conversations={"n": 131, "bits_per_byte": 1.6099}),
        "word_problems": share(
            244, 256, [0.91987, 0.97299], groups={"kind: gain": share(40, 46, [0.74334, 0.93882])}, too_long=0
        ),
        "identity": share(83, 83, [0.95577, 1.0], groups={}),
    },
}
SAMPLES = (
    "# Samples: {0}\n\nTemperature in bold.\n\n## Before\n\n> ` hi `\n\n- **0**: ` old `\n\n## After\n\n> ` {0} `\n"
)


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
            loss_plot(run.stage(stage) / "metrics.jsonl", run.stage(stage) / "loss.png", stage)
        if "eval" in stages:
            (run.stage(stage) / "samples.md").write_text(SAMPLES.format(stage), encoding="utf-8")
            write_json(run.eval(stage), {"tasks": EXAMS[stage], "core": None, "chatcore": None, "inputs": {}})
    return run


@pytest.fixture(scope="module")
def config():
    return resolve(load_config("nano"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "whole")
    facts = report.run(config, run)
    return run, facts, run.report.read_text(encoding="utf-8"), read_json(run.root / "report.json")


def row(text, section, name):
    """Cells of the table row of that section that starts with that name."""
    body = text.split(f"## {section}\n")[1].split("\n##")[0]
    (line,) = [line for line in body.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_exams_are_one_table(whole):
    text = whole[2]
    assert row(text, "Exams", "exam") == ["BASE", "SFT", "chance", "cases"]
    assert row(text, "Exams", "bits_per_byte") == ["1.6057", "1.9257", "-", "226"]
    assert row(text, "Exams", "perplexity")[:2] == ["64.9", "150.7"]
    assert row(text, "Exams", "bits_per_byte, conversations")[:2] == ["1.9502", "1.6099"]
    assert row(text, "Exams", "word_problems") == ["-", "95.3% (92.0% to 97.3%)", "0%", "256"]
    assert row(text, "Exams", "identity") == ["-", "100.0% (95.6% to 100.0%)", "0%", "83"]


def test_time_is_told_by_stage_and_in_all(whole):
    text, card = whole[2], whole[3]
    assert row(text, "Time", "tokenizer") == ["2 s"] and row(text, "Time", "pretrain") == ["4 min 11 s"]
    assert row(text, "Time", r"**total**") == ["**5 min 49 s**"]
    assert card["seconds"] == SECONDS and card["seconds_total"] == pytest.approx(349)


def test_every_picture_of_the_card_is_there(whole):
    run, _, text, _ = whole
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) >= 2
    for name in pictures:
        assert (run.root / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", name


def test_the_digest_is_of_the_card(whole, config):
    run, facts, _, _ = whole
    assert re.fullmatch("[0-9a-f]{64}", facts["digest"])
    assert report.run(config, run)["digest"] == facts["digest"]


@pytest.mark.parametrize("count", range(1, 6))
def test_a_part_of_a_run_has_a_card_too(config, tmp_path, count):
    stages = list(FACTS)[:count]
    run = make_run(tmp_path / "run", stages)
    report.run(config, run)
    text, card = run.report.read_text(encoding="utf-8"), read_json(run.root / "report.json")
    assert list(card["seconds"]) == stages
    assert ("## Exams" in text) == ("eval" in stages)
    assert ("parameters" in text) == ("pretrain" in stages)
    assert not re.search(r"\b(None|nan|inf)\b", text)


def test_code_size_counts_what_a_reader_reads(tmp_path):
    source = '"""Doc."""\n\n# comment\nX = (\n    1,\n    2,\n)\n\n\ndef f():\n    """Doc\n    more."""\n    return X\n'
    assert report._code_lines(source) >= {4, 5, 6, 10, 13}
    assert not report._code_lines(source) & {1, 2, 3, 8, 9, 11, 12}
    size = report.code_size()
    assert size["files"] > 30 and 0.4 * size["lines"] < size["code_lines"] < 0.9 * size["lines"]
    assert size["dependencies"] >= 10
