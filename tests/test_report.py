"""The report card: its numbers by hand, in both files, from whole and from partial runs."""

import json
import re

import pytest
from report_runs import BATCH, EXAMS, FACTS, HARDWARE, SECONDS, make_config, make_run, metrics

from jaxchat.config import load_config
from jaxchat.run_dir import read_json, write_json
from jaxchat.scaling import resolve
from train import report
from train import report as report_exams
from train import targets as cost
from train.evaluate import quote
from train.report import Fold, Listing, Table, Turn, card_blocks, code, duration, dynamics_plot, markdown, turns


@pytest.fixture(scope="module")
def config():
    return make_config()


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


def leaves(value):
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v)]
    return [value]


def in_words(text):
    """Seconds of every time in the text, and the text without them."""
    found, units = [], {"d": 86400, "h": 3600, "min": 60, "s": 1}
    for match in re.finditer(r"\b\d+ (d|h|min|s)\b( \d+ (h|min|s)\b)?", text):
        pairs = re.findall(r"(\d+) (\w+)", match.group())
        found.append((sum(int(n) * units[unit] for n, unit in pairs), units[pairs[-1][1]]))
        text = text.replace(match.group(), "", 1)
    return found, text


def test_every_number_of_the_card_is_in_the_json(whole):
    """As printed: rounded, in percent, in millions or in GiB."""
    text, card = whole[2], whole[3]
    text = re.sub(r"## (Samples|Configuration)\n.*?(?=\n## |\Z)", "", text, flags=re.S)
    text = re.sub(r"\| versions .*|`[^`]*`|\]\([^)]*\)|95 % intervals|SHA-256|GiB|float32|95 %", "", text)
    values = leaves(card)
    known = [abs(v) * f for v in values if type(v) in (int, float) for f in (1, 100, 1e-6, 2.0**-30)]
    known += [abs(float(n)) for v in values if isinstance(v, str) for n in re.findall(r"\d+", v)]
    known += [float(n) for key in card["sft"]["conversations"] for n in re.findall(r"\d+", key)]
    times, text = in_words(text)
    for seconds, unit in times:
        assert any(abs(seconds - v) <= unit for v in values if type(v) in (int, float)), seconds
    numbers = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", re.sub(r"(?<=\d)\.(?=\D|$)", " ", text))
    assert len(numbers) > 60
    for number in numbers:
        digits = number.replace(",", "")
        size = float(f"1e{digits.partition('e')[2] or 0}") * 10.0 ** -len(digits.partition("e")[0].partition(".")[2])
        assert any(abs(float(digits) - v) <= 0.5001 * size for v in known), number


def test_speed_is_the_steps_median_and_mean(whole):
    card = whole[3]
    assert card["speed"]["base"] == pytest.approx(
        {"steps": 40, "tokens_per_second": 4019.5, "mean_tokens_per_second": 4096, "step_seconds": 0.5,
         "first_step_seconds": 0.5, "mfu": None}
    )  # fmt: skip
    assert "MFU" not in whole[2]
    assert card["corpus_share"] == 0.5 and row(whole[2], "Data", "training text used") == ["50.0% (0.50 epochs)"]


def test_mfu_is_told_where_it_is_known(config, tmp_path):
    run = make_run(tmp_path / "run", mfu=0.4321)
    report.run(config, run)
    assert "MFU 43.2%" in run.report.read_text(encoding="utf-8")


def test_stages_from_different_machines_are_told_apart(config, tmp_path):
    gpu = HARDWARE | {"platform": "gpu", "device": "NVIDIA H100", "devices": 8}
    run = make_run(tmp_path / "run", pretrain={"hardware": gpu, "commit": None})
    report.run(config, run)
    text = run.report.read_text(encoding="utf-8")
    assert "on 8 x NVIDIA H100." in text
    (hardware,) = row(text, "Machine and code", "hardware")
    assert hardware == "2 CPU cores (x86_64) (tokenizer, prepare, sft, eval); 8 x NVIDIA H100 (pretrain)"
    assert row(text, "Machine and code", "commit") == ["`abc1234` (tokenizer, prepare, sft, eval); - (pretrain)"]


def test_a_killed_stage_counts_the_time_its_checkpoints_know(config, tmp_path):
    run = make_run(tmp_path / "run", pretrain={"seconds": 4.0})
    report.run(config, run)
    assert read_json(run.root / "report.json")["seconds"]["pretrain"] == 23.0  # 20 in steps, 3 in evaluations


def test_no_key_or_address_of_the_service_is_shown_around(tmp_path):
    config = resolve(load_config("nano", ['serve.api_keys=["sk-private"]', "serve.host=10.1.2.3"]))
    run = make_run(tmp_path / "run")
    report.run(config, run)
    for name in ("report.md", "report.json"):
        text = (run.root / name).read_text(encoding="utf-8")
        assert "model.depth" in text and "sk-private" not in text and "10.1.2.3" not in text


def test_samples_come_furthest_first_and_cannot_break_the_card(config, tmp_path):
    run = make_run(tmp_path / "run")
    path = run.stage("sft") / "samples.md"
    path.write_bytes(path.read_bytes() + "\n- **0**: ` one\r# two\u2028## three `\n".encode())
    report.run(config, run)
    text = run.report.read_text(encoding="utf-8")
    titles = [line for line in text.split("\n") if "After" in line or line.startswith("<summary>Before")]
    assert titles == [
        "### After SFT",
        "<summary>Before SFT</summary>",
        "### After BASE",
        "<summary>Before BASE</summary>",
    ]
    assert "` one # two\u2028## three `" in text and text.count("<details>") == text.count("</details>") == 4


def test_long_runs_have_short_curves(config, tmp_path):
    run = make_run(tmp_path / "run", list(FACTS)[:3])
    (run.stage("base") / "metrics.jsonl").unlink()
    run.stage("base").joinpath("loss.png").unlink()
    run.stage("base").rmdir()
    metrics(run.stage("base") / "metrics.jsonl", steps=1234)
    report.run(config, run)
    curve = read_json(run.root / "report.json")["curves"]["base"]
    assert 400 <= len(curve["loss"]) <= report.CURVE_POINTS + 1
    assert curve["loss"][0] == [BATCH, 8] and curve["loss"][-1][0] == 1234 * BATCH
    assert len(curve["val_bpb"]) == 61


def test_a_run_that_never_had_a_loss_has_no_curve(config, tmp_path):
    run = make_run(tmp_path / "run", list(FACTS)[:3])
    path = run.stage("base") / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[7] + "\n")  # the step that was not finite
    report.run(config, run)
    assert "![" not in run.report.read_text(encoding="utf-8") and not list(run.plots.iterdir())


def test_pictures_show_gaps_where_nothing_was_measured(tmp_path):
    records = [{"tokens": i, "grad_norm": None, "lr_mult": 1.0, "tokens_per_second": 5.0} for i in range(3)]
    dynamics_plot(records, tmp_path / "x.png", "none")
    empty = (tmp_path / "x.png").read_bytes()
    dynamics_plot([r | {"grad_norm": 1.0} for r in records], tmp_path / "x.png", "none")
    assert empty != (tmp_path / "x.png").read_bytes()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (90061, "1 d 1 h"), (349, "5 min 49 s")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


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


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_part_of_a_run_has_a_card_too(config, tmp_path, count):
    stages = list(FACTS)[:count]
    run = make_run(tmp_path / "run", stages)
    report.run(config, run)
    text, card = run.report.read_text(encoding="utf-8"), read_json(run.root / "report.json")
    assert list(card["seconds"]) == stages
    assert ("## Exams" in text) == ("eval" in stages)
    assert ("parameters" in text) == ("pretrain" in stages)
    assert not re.search(r"\b(None|nan|inf)\b", text)


def test_code_size_counts_what_a_reader_reads():
    source = '"""Doc."""\n\n# comment\nX = (\n    1,\n    2,\n)\n\n\ndef f():\n    """Doc\n    more."""\n    return X\n'
    assert report.code_lines(source) == {4, 5, 6, 7, 10, 13}
    size = report.code_size()
    assert size["files"] > 30 and 0.4 * size["lines"] < size["code_lines"] < 0.9 * size["lines"]
    assert size["dependencies"] >= 10


def rl_metrics(path, steps=30):
    """As stage rl leaves them: pass@k and KL at evaluations only, no loss where no answer was of use."""
    path.parent.mkdir(parents=True)
    lines = []
    for step in range(steps):
        record = {"step": step, "tokens": 100 * (step + 1), "loss": None if step == 3 else 0.5, "lr_mult": 1.0,
                  "grad_norm": None, "step_seconds": 0.2, "tokens_per_second": 500.0, "mfu": None,
                  "reward": step / 30, "right": step / 60, "length": 40.0 - step, "endless": 0.25}  # fmt: skip
        record |= {"pass@1": 0.125 + step / 100, "pass@8": 0.5, "kl": step / 1000} if step % 10 == 9 else {}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def test_reinforcement_learning_has_its_column_curves_and_table(config, tmp_path):
    run = make_run(tmp_path / "run")
    records = read_json(run.stages)
    facts = {"environment": "gsm8k", "steps": 30, "tokens": 3000, "start": {"pass@1": 0.0625, "kl": 0.0}}
    records["rl"] = records["sft"] | {"facts": facts | {"digest": "c" * 64, "params_sha256": "c" * 64}}
    write_json(run.stages, records)
    rl_metrics(run.stage("rl") / "metrics.jsonl")
    write_json(run.eval("rl"), {"tasks": {"gsm8k": EXAMS["sft"]["gsm8k"]}, "chatcore": 0.25, "core": None})
    report.run(config, run)
    text, card = run.report.read_text(encoding="utf-8"), read_json(run.root / "report.json")
    assert row(text, "Exams", "exam") == ["BASE", "SFT", "RL", "chance", "cases"]
    assert row(text, "Exams", "gsm8k") == ["-", "2.5% (0.4% to 12.9%)", "2.5% (0.4% to 12.9%)", "0%", "40"]
    assert row(text, "Exams", "ChatCORE") == ["-", "0.0123", "0.2500", "0", "-"]
    assert row(text, "Reinforcement learning", "reward") == ["0.03333", "0.9333", "0.9667", "30"]
    assert row(text, "Reinforcement learning", "pass@1") == ["0.0625", "0.415", "0.415", "4"]
    assert row(text, "Reinforcement learning", "KL to the start, nats per token") == ["0", "0.029", "0.029", "4"]
    assert row(text, "Training", "RL environment") == ["gsm8k"]
    assert card["curves"]["rl"]["pass@1"] == [[9, 0.215], [19, 0.315], [29, 0.415]]
    assert card["curves"]["rl"]["length"][0] == [0, 40.0]
    assert (run.plots / "rl_rl.png").stat().st_size > 5000 and "plots/rl_rl.png" in text


def test_what_was_not_run_is_named_and_a_part_of_core_is_not_called_core(whole):
    text, card = whole[2], whole[3]
    assert "### Not run" in text and "| arc_easy | SFT | no file core/arc_easy.jsonl at hand |" in text
    assert not re.search(r"^\| CORE", text, re.M) and card["standing"]["base"]["core"] is None
    partial = "core_partial (mean of 2 of CORE's 22 tasks)"
    assert row(text, "Exams", re.escape(partial).replace("\\", "")) == [
        "0.0237 (-0.1900 to 0.2400)", "-", "0", "60",
    ]  # fmt: skip
    assert f"### {partial}, task by task" in text
    assert "| boolq | 10 | 60.0% (42.3% to 75.4%) | 62% | -0.0526 | 30 |" in text
    assert row(text, "Exams", "gsm8k, read as lenient")[1] == "7.5% (2.6% to 19.9%)"
    for words in ("Sandbox of the model's code: namespaces.", "7 answers had no end", "7 prompts lost their beginning"):
        assert words in text


def test_a_whole_core_is_called_core(config, tmp_path):
    run = make_run(tmp_path / "run")
    record = read_json(run.eval("base"))
    record["tasks"]["core"] = record["tasks"].pop("core_partial")
    write_json(run.eval("base"), record | {"core": 0.02368, "core_partial": None})
    report.run(config, run)
    text = run.report.read_text(encoding="utf-8")
    assert row(text, "Exams", "CORE")[0] == "0.0237 (-0.1900 to 0.2400)" and "core_partial" not in text
    assert "### CORE, task by task" in text


def test_mmlu_is_told_by_subject(whole):
    text = whole[2]
    assert "### MMLU by subject" in text and "<summary>All 24 of MMLU</summary>" in text
    assert "| college b | 100.0% (20.7% to 100.0%) | 1 |" in text and "| college x |" in text


def test_a_record_that_says_less_has_a_card_too(config, tmp_path):
    """Exams that only say why they were not run, scores without counts, stages whose metrics lack the usual keys."""
    run = make_run(tmp_path / "run")
    tasks = {"bits_per_byte": {"metric": 1.5}, "x|y": {"metric": 0.5, "accuracy": 0.5}}
    write_json(run.eval("rl"), {"tasks": tasks, "core_partial": {"tasks": 3}, "not_run": {"gsm8k": "no file"}})
    run.stage("rl").mkdir()
    (run.stage("rl") / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "reward": 0.5}\n')
    report.run(config, run)
    text = run.report.read_text(encoding="utf-8")
    assert "| gsm8k | RL | no file |" in text and "| x\\|y | - | - | 50.0% | - | - |" in text
    assert row(text, "Exams", "bits_per_byte")[2] == "1.5000"


def test_cost_is_devices_times_hours_times_price(config, tmp_path):
    gpu = HARDWARE | {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3", "devices": 8}
    run = make_run(tmp_path / "run", pretrain={"hardware": gpu, "seconds": 3600.0})
    report.run(config, run)
    text, card = run.report.read_text(encoding="utf-8"), read_json(run.root / "report.json")
    assert card["cost"]["usd"] == pytest.approx(24.0) and card["cost"]["stages"]["sft"] == 0
    assert row(text, "Time", "pretrain") == ["1 h 0 min", "24.00 USD"]
    assert "3 USD for NVIDIA H100 80GB HBM3" in text


def test_what_has_no_price_costs_nobody_knows_what(config, tmp_path):
    odd = HARDWARE | {"platform": "gpu", "device": "Abacus 9"}
    run = make_run(tmp_path / "run", pretrain={"hardware": odd})
    report.run(config, run)
    assert read_json(run.root / "report.json")["cost"]["usd"] is None
    assert "not known: no price of Abacus 9 at hand" in run.report.read_text(encoding="utf-8")


@pytest.mark.parametrize(("kind", "name"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
])  # fmt: skip
def test_prices_are_found_by_the_names_that_devices_give(kind, name):
    assert cost.chip_of(kind).name == name


def test_samples_are_read_back_as_they_were_meant():
    found = turns(["> ` hi `", "", "- **0**: `` a ` b ``", "- **0.8**: (nothing)", "", "> (nothing)", "stray"])
    assert found == [Turn("hi", [("0", "a ` b"), ("0.8", "(nothing)")]), Turn("(nothing)", [])]
    assert turns([quote("plain"), f"- **0**: {code('a b')}"]) == [Turn("plain", [("0", "a b")])]


def test_no_text_of_the_run_is_markup():
    text = markdown("a`b", [Table(["x"], [["<b>|*c*[d](e)\nf"]]), Fold("<s>", [Listing(["```", "x"])])])
    assert "# a\\`b" in text and "\\<b>\\|\\*c\\*\\[d\\](e) f" in text
    assert "<summary>\\<s></summary>" in text and "````toml\n```\nx\n````" in text


def test_exams_come_in_a_fixed_order_whatever_was_run_first():
    tasks = {name: {"metric": 0.5} for name in ("identity", "gsm8k", "core", "lottery", "bits_per_byte")}
    order = list(report_exams.taken({"exams": {"base": tasks | {"mmlu": {"not_run": "no file"}}}}, "base"))
    assert order == ["bits_per_byte", "core", "gsm8k", "identity", "lottery"]


def test_other_tokenizers_stand_beside_ours(whole, config):
    card = whole[3] | {"other_tokenizers": [
        {"name": "GPT-2", "vocab_size": 50257, "bytes_per_token": 4.321, "ours_per_token": 1.234},
    ]}  # fmt: skip
    text = markdown("x", card_blocks(card, {}))
    shown = ["50,257 tokens, 4.32 bytes per token; ours needs 1.23 tokens for one of its"]
    assert row(text, "Data", "the same text in GPT-2's tokens") == shown
