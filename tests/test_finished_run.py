"""The report card of a real tiny run."""

import json
import re

from jaxchat.log import read_metrics
from train.plots import loss_plot
from train.report import code_size


def test_every_number_of_the_card_is_in_the_json(finished):
    card = json.loads((finished / "report.json").read_text())
    records = json.loads((finished / "stages.json").read_text())
    assert card["pretrain"]["params_sha256"] == records["pretrain"]["params_sha256"]
    assert card["seconds"].keys() == records.keys() - {"report", "export"}
    assert len(card["curves"]["base"]["loss"]) == len(read_metrics(finished / "base/metrics.jsonl"))
    exams = json.loads((finished / "eval/sft.json").read_text())["tasks"]
    assert card["exams"]["sft"] == exams


def test_the_card_reads_well(finished):
    text = (finished / "report.md").read_text()
    parts = ("Exams", "Samples", "Curves", "Reinforcement learning", "Training", "Data", "Time", "Machine and code")
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert all(f"## {part}\n" in text and f"<h2>{part}</h2>" in page for part in parts)
    for part in ("# Report card: nano", "| exam | BASE | SFT | RL | chance | cases |", "word_problems", "95 % interval",
                 "### Exam text in the pretraining text"):  # fmt: skip
        assert part in text, part
    for picture in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert (finished / picture).stat().st_size > 1000
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1, table
    assert "nan" not in text.lower().split("## samples")[0].replace("nano", "")


def test_code_is_counted_without_comments_and_docstrings():
    size = code_size()
    assert 30 < size["files"] < 200 and size["code_lines"] < size["lines"]
    assert size["dependencies"] > 10


def test_loss_plot_of_nothing_draws_nothing(tmp_path):
    loss_plot(tmp_path / "none.jsonl", tmp_path / "loss.png", "none")
    assert not (tmp_path / "loss.png").exists()
