"""The report card: its numbers by hand, in all three files, from whole and from partial runs."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from report_runs import BATCH, EXAMS, FACTS, HARDWARE, PARTIAL, SECONDS, make_config, make_run
from whole_run import arguments, finish, records, start

from jaxchat.config import load_config
from jaxchat.log import console, read_metrics
from jaxchat.run_dir import RunDir, read_json, write_json
from jaxchat.scaling import resolve
from train import report
from train.curves import POINTS, curves, draw, kinds, plot
from train.report import collect, duration, headline, plain, render, summarize


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "whole")
    facts = report.run(config, run)
    return run, facts, run.report.read_text(encoding="utf-8"), read_json(run.root / "report.json")


def text_of(config, run):
    """The Markdown of a run's card, without pictures."""
    return render(collect(config, run) | {"curves": {}})[0]


def row(text, section, name):
    """Cells of the table row of that section that starts with that name."""
    body = text.split(f"## {section}\n")[1].split("\n##")[0]
    (line,) = [line for line in body.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_exams_are_one_table(whole):
    text = whole[2]
    assert row(text, "Exams", "exam") == ["BASE", "SFT", "chance", "cases"]
    assert row(text, "Exams", "bits per byte") == ["1.6057", "1.9257", "-", "226"]
    assert row(text, "Exams", "bits per byte, perplexity")[:2] == ["64.9", "150.7"]
    assert row(text, "Exams", "bits per byte, conversations")[:2] == ["1.9502", "1.6099"]
    assert row(text, "Exams", "word problems") == ["-", "95.3% (92.0% to 97.3%)", "0%", "256"]
    assert row(text, "Exams", "gsm8k, read as lenient")[1] == "7.5% (2.6% to 19.9%)"
    assert "| subject: college b | 100.0% (20.7% to 100.0%) | 25% | 1 |" in text


def test_part_of_core_is_not_called_core(whole, config):
    text, card = whole[2], whole[3]
    assert row(text, "Exams", PARTIAL) == ["0.0237 (-0.1900 to 0.2400)", "-", "0", "60"]
    assert not re.search(r"^\| CORE", text, re.M) and card["standing"]["base"]["core"] is None
    assert "| core | boolq | 60.0% (42.3% to 75.4%, centred -0.0526) | - | 62% | 30 |" in text
    assert "| arc_easy | SFT | no file core/arc_easy.jsonl at hand |" in text
    exams = {"base": {"core": EXAMS["base"]["core_partial"] | {"title": "CORE"}}}
    text = render(card | {"exams": exams, "curves": {}})[0]
    assert row(text, "Exams", "CORE")[0] == "0.0237 (-0.1900 to 0.2400)" and "core_partial" not in text


def test_an_exam_is_called_by_its_own_title(whole):
    exams = {"sft": {"new_exam": EXAMS["sft"]["identity"] | {"title": "A New Exam", "chance": 0.2}}}
    text, page = render(whole[3] | {"exams": exams, "curves": {}})
    assert row(text, "Exams", "A New Exam") == ["100.0% (95.6% to 100.0%)", "20%", "83"]
    assert "A New Exam" in page


def test_times_are_those_of_the_records(config, tmp_path, whole):
    text, card = whole[2], whole[3]
    assert row(text, "Stages", "pretrain")[0] == "4 min 11 s" and row(text, "Stages", "total")[0] == "5 min 49 s"
    assert card["seconds"] == SECONDS and card["seconds_total"] == pytest.approx(349)
    run = make_run(tmp_path / "run", pretrain={"seconds": 4.0})  # killed: its checkpoints know more
    assert collect(config, run)["seconds"]["pretrain"] == 23.0  # 20 in steps, 3 in evaluations


def test_speed_is_the_steps_median_and_mean(whole, config, tmp_path):
    card = whole[3]
    assert card["speed"]["base"] == pytest.approx(
        {"steps": 40, "tokens_per_second": 4019.5, "mean_tokens_per_second": 4096, "step_seconds": 0.5,
         "first_step_seconds": 0.5, "mfu": None}
    )  # fmt: skip
    assert row(whole[2], "Stages", "pretrain")[2:] == ["81,920", "40", "4,020", "-", "0.5 s", "0.5 s"]
    assert row(text_of(config, make_run(tmp_path / "run", mfu=0.4321)), "Stages", "pretrain")[5] == "43.2%"
    assert row(whole[2], "Model and machine", "training text used") == ["50.0% (0.50 epochs)"]


def test_different_machines_are_told_apart_and_have_their_price(config, tmp_path):
    gpu = HARDWARE | {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3", "devices": 8}
    run = make_run(tmp_path / "run", pretrain={"hardware": gpu, "seconds": 3600.0, "commit": None})
    text = text_of(config, run)
    (hardware,) = row(text, "Model and machine", "hardware")
    assert hardware == "2 CPU cores (x86_64) (tokenizer, prepare, sft, eval); 8 x NVIDIA H100 80GB HBM3 (pretrain)"
    assert row(text, "Model and machine", "commit") == ["abc1234 (tokenizer, prepare, sft, eval); - (pretrain)"]
    assert row(text, "Stages", "pretrain")[:2] == ["1 h 0 min", "24.00 USD"]
    run = make_run(tmp_path / "odd", pretrain={"hardware": gpu | {"device": "Abacus 9"}})
    assert collect(config, run)["cost"]["usd"] is None
    assert "not known: no price of Abacus 9 at hand" in text_of(config, run)


def test_no_key_or_address_of_the_service_is_published(tmp_path):
    config = resolve(load_config("nano", ['serve.api_keys=["sk-private"]', "serve.host=10.1.2.3"]))
    text = json.dumps(collect(config, make_run(tmp_path / "run")))
    assert "model.depth" in text and "sk-private" not in text and "10.1.2.3" not in text


def test_long_runs_have_short_curves():
    steps = [{"step": i, "tokens": (i + 1) * BATCH, "loss": 8.0} | ({"val_bpb": 1} if i % 20 == 19 else {})
             for i in range(1234)]  # fmt: skip
    points = curves(steps)
    assert 400 <= len(points["loss"]) <= POINTS + 1 and len(points["val_bpb"]) == 61
    assert points["loss"][0] == [BATCH, 8] and points["loss"][-1][0] == 1234 * BATCH


def test_pictures(whole, tmp_path):
    run, _, text, _ = whole
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 4
    for name in pictures:
        assert (run.root / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", name
    steps = [{"step": 0, "tokens": 1, "loss": None}]
    assert kinds(curves(steps)) == kinds({}) == []
    gap = {"step": 0, "tokens": 1, "loss": 1.0, "grad_norm": None, "lr_mult": 1.0, "tokens_per_second": None}
    assert kinds(curves([gap, gap])) == ["loss", "dynamics"] and draw(curves([gap, gap]), "dynamics", "gaps")
    plot(tmp_path / "none.jsonl", "loss", tmp_path / "loss.png", "none")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (90061, "1 d 1 h"), (349, "5 min 49 s")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_cards_come_from_report_json_alone(whole, tmp_path):
    run, facts, text, card = whole
    assert re.fullmatch("[0-9a-f]{64}", facts["digest"])
    alone = RunDir(tmp_path)
    assert report.write_cards(alone, card) == text
    assert (tmp_path / "report.html").read_bytes() == (run.root / "report.html").read_bytes()


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_part_of_a_run_has_a_card_too(config, tmp_path, count):
    stages = list(FACTS)[:count]
    run = make_run(tmp_path / "run", stages)
    text = text_of(config, run)
    assert list(collect(config, run)["seconds"]) == stages
    assert ("## Exams" in text) == ("eval" in stages) and ("parameters" in text) == ("pretrain" in stages)
    assert not re.search(r"\b(None|nan|inf)\b", text)


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
    stages = read_json(run.stages)
    facts = {"environment": "gsm8k", "steps": 30, "tokens": 3000, "start": {"pass@1": 0.0625, "kl": 0.0}}
    stages["rl"] = stages["sft"] | {"facts": facts | {"digest": "c" * 64, "params_sha256": "c" * 64}}
    write_json(run.stages, stages)
    rl_metrics(run.stage("rl") / "metrics.jsonl")
    write_json(run.eval("rl"), {"tasks": {"gsm8k": EXAMS["sft"]["gsm8k"]}, "chatcore": 0.25, "core": None})
    report.run(config, run)
    text, card = run.report.read_text(encoding="utf-8"), read_json(run.root / "report.json")
    assert row(text, "Exams", "exam") == ["BASE", "SFT", "RL", "chance", "cases"]
    assert row(text, "Exams", "gsm8k") == ["-", "2.5% (0.4% to 12.9%)", "2.5% (0.4% to 12.9%)", "0%", "40"]
    assert row(text, "Exams", "ChatCORE") == ["-", "0.0123", "0.2500", "0", "-"]
    assert row(text, "Reinforcement learning", "mean reward") == ["0.03333", "0.9333", "0.9667", "30"]
    assert row(text, "Reinforcement learning", "pass@1") == ["0.0625", "0.415", "0.415", "4"]
    assert row(text, "Model and machine", "RL environment") == ["gsm8k"]
    assert card["curves"]["rl"]["pass@1"] == [[9, 0.215], [19, 0.315], [29, 0.415]]
    assert (run.plots / "rl_rl.png").stat().st_size > 5000 and "plots/rl_rl.png" in text


def test_preferences_have_their_figures_in_the_card(config, tmp_path):
    run = make_run(tmp_path / "run")
    stages = read_json(run.stages)
    facts = {"environment": "files:pairs.jsonl", "steps": 30, "start": {"preferred": 0.5, "margin": 0.0}}
    stages["rl"] = stages["sft"] | {"facts": facts | {"digest": "c" * 64, "params_sha256": "c" * 64}}
    write_json(run.stages, stages)
    path = run.stage("rl") / "metrics.jsonl"
    rl_metrics(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["reward"], lines[-1] = -0.5, lines[-1] | {"preferred": 0.875, "margin": 1.25}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.run(config, run)
    table = run.report.read_text(encoding="utf-8").partition("## Reinforcement learning")[2].partition("##")[0]
    assert "| 0.5 | 0.875 | 0.875 | 2 |" in table and "| 0 | 1.25 | 1.25 | 2 |" in table
    assert read_json(run.root / "report.json")["curves"]["rl"]["preferred"] == [[29, 0.875]]


def test_a_record_that_says_less_has_a_card_too(config, tmp_path):
    """Exams that only say why they were not run, scores without counts."""
    run = make_run(tmp_path / "run")
    tasks = {"bits_per_byte": {"metric": 1.5}, "x|y": {"metric": 0.5, "accuracy": 0.5}}
    write_json(run.eval("rl"), {"tasks": tasks, "not_run": {"gsm8k": "no file"}})
    text = render(collect(config, run))[0]
    assert "| gsm8k | RL | no file |" in text and "| x\\|y | - | - | 50.0% | - | - |" in text
    assert row(text, "Exams", "bits per byte")[2] == "1.5000"


# The page

VOID = {"meta", "source", "img"}
LOADING = {"src", "srcset", "href", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Every element must be closed; collects what a reader sees and what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.urls, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in LOADING]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.words.append(data)


def test_it_is_one_page_that_fetches_nothing(whole):
    text = (whole[0].root / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and text.startswith("<!doctype html>") and page.tags.count("main") == 1
    assert len(page.urls) == 4 and all(url.startswith("data:image/png;base64,") for url in page.urls)
    files = {path.read_bytes() for path in whole[0].plots.iterdir()}
    assert {base64.b64decode(url.partition(",")[2]) for url in page.urls} == files
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    for words in ("default-src 'none'", 'name="viewport"', "prefers-color-scheme: dark", "@media print"):
        assert words in text


HOSTILE = (
    "<script>alert(1)</script>",
    "</bdi></main><img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; \"quoted' `x`",
    "<style>*{display:none}</style><!-- {{ 7 * 7 }} {% raw %}",
    "\u202egnp.exe \u2028 ]]> \x00\x1b[31m",
)


def test_hostile_samples_and_settings_are_text(whole):
    together = " ".join(HOSTILE)
    turn = {"prompt": HOSTILE[0], "answers": [{"temperature": 0.0, "text": text} for text in (*HOSTILE, "a\r# b\n# c")]}
    card = whole[3] | {"tier": f"x{together}", "samples": {"sft": {"before": [turn], "after": [turn]}}}
    card["standing"] = card["standing"] | {"sft": {"not_run": {"mmlu": together}}}
    card["config"] = {"data.source": together}
    card["data"] = card["data"] | {"source": together}
    text, html = render(card)
    page = Page(html)
    assert page.open == [] and "script" not in page.tags and page.tags.count("style") == 1
    assert page.tags.count("img") == 4
    for hostile in (together, *HOSTILE):
        shown = " ".join(re.sub("[\x00\x1b]", "\ufffd", hostile).split())
        assert page.text.count(shown) >= (4 if hostile == together else 6), hostile
    assert "<script" not in text.splitlines()[0].replace("\\<", "")
    assert not re.search("^# [bc]", text, re.M), "a sample cannot break out of its line"
    assert text.count("<details>") == text.count("</details>") == 3
    assert plain("a`b <b>|*c*[d](e)\nf") == r"a\`b \<b>\|\*c\*\[d\](e) f"


# A real run, and what a person is left with at the end of a command


def test_the_card_of_a_real_run(finished):
    card = read_json(finished / "report.json")
    assert card["pretrain"]["params_sha256"] == records(finished)["pretrain"]["params_sha256"]
    assert card["seconds"].keys() == records(finished).keys() - {"report", "export"}
    assert len(card["curves"]["base"]["loss"]) == len(read_metrics(finished / "base/metrics.jsonl"))
    assert card["exams"]["sft"] == read_json(finished / "eval/sft.json")["tasks"]
    text, page = (finished / "report.md").read_text("utf-8"), (finished / "report.html").read_text("utf-8")
    parts = ("Exams", "Samples", "Curves", "Reinforcement learning", "Stages", "Data", "Model and machine")
    assert all(f"## {part}\n" in text and f"<h2>{part}</h2>" in page for part in parts)
    answers = [a["text"] for turn in card["samples"]["sft"]["after"] for a in turn["answers"]]
    assert answers and "### Exam text in the pretraining text" in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1, table
    assert "nan" not in text.lower().split("## samples")[0].replace("nano", "")


def test_a_figure_never_stands_without_its_warning(config, tmp_path, whole):
    assert "Warning" not in whole[2] and whole[3]["warnings"] == []
    line = "a batch of 65,536 tokens is larger than all <b>of</b> the data"
    run = make_run(tmp_path / "run")
    stages = read_json(run.stages)
    stages["sft"]["facts"]["warnings"] = [line]
    write_json(run.stages, stages)
    report.run(config, run)
    card, page = read_json(run.root / "report.json"), (run.root / "report.html").read_text(encoding="utf-8")
    assert card["warnings"] == [f"sft: {line}"] and "a batch of 65,536 tokens" in run.report.read_text(encoding="utf-8")
    before = page.split("<h2")[0]
    assert "a batch of 65,536 tokens" in before and "<b>of</b>" not in before
    assert "65,536" in said(run, [])


def said(run, left):
    with console.capture() as captured:
        summarize(run, left)
    return captured.get()


def test_the_end_of_a_command_says_where_everything_is_and_what_comes_next(finished, tmp_path):
    text = said(RunDir(finished), [])
    assert headline(read_json(finished / "report.json")) in text
    for path in ("report.md", "report.html", "export/hf", "export/orbax"):
        assert str(finished / path) in text
    assert f"python launch.py chat {finished}" in text and "launch.py serve" in text and "go on" not in text
    text = said(RunDir(finished), ["report"])  # the card is an older one
    assert "A chat model of" not in text and "launch.py chat" in text and "(next: report)" in text
    text = said(RunDir(tmp_path / "my run"), ["prepare", "pretrain"])
    assert f"python launch.py --run-dir '{tmp_path / 'my run'}'   (next: prepare)" in text
    assert "launch.py chat" not in text and "report card" not in text


def test_a_setting_that_is_newer_than_a_run_repeats_nothing(finished, corpus, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = records(run_dir)
    del before["pretrain"]["inputs"]["train.deterministic"]
    (run_dir / "stages.json").write_text(json.dumps(before))
    code, _, err = finish(start(arguments(corpus, run_dir, "--stages", "pretrain,sft")))
    assert code == 0 and "starts" not in err and "goes on" not in err, err
    assert records(run_dir) == before
