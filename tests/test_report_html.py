"""The page of a report card: the same numbers, nothing fetched, nothing of the run taken for markup."""

import base64
import dataclasses
import re
from html.parser import HTMLParser

import pytest
from report_runs import EXAMS, make_config, make_run

from jaxchat.run_dir import read_json
from train import report
from train import report as report_html
from train.report import Mono, Paragraph, Table

VOID = {"meta", "source", "img"}
LOADING = {"src", "srcset", "href", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Every element must be closed; collects what a reader sees and what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.urls, self.tags, self.cells = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in LOADING]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag
        if tag in ("td", "th"):
            self.cells[-1] = self.cells[-1].strip()

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.cells[-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "whole")
    report.run(config, run)
    text = (run.root / "report.html").read_text(encoding="utf-8")
    return run, text, Page(text), read_json(run.root / "report.json")


def test_it_is_one_page_that_fetches_nothing(whole):
    _, text, page, _ = whole
    assert page.open == [] and text.startswith("<!doctype html>") and page.tags.count("main") == 1
    assert len(page.urls) >= 8 and all(url.startswith("data:image/svg+xml;base64,") for url in page.urls)
    for url in page.urls:
        svg = base64.b64decode(url.partition(",")[2]).decode()
        assert svg.lstrip().startswith("<?xml") and svg.rstrip().endswith("</svg>")
        assert not re.search(r"(?:href|src)\s*=\s*\"(?!#)", svg) and "<script" not in svg
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert "default-src 'none'" in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_every_number_of_the_exams_is_in_it(whole):
    _, _, page, card = whole
    seen = 0
    for stage, tasks in EXAMS.items():
        assert card["exams"][stage] == tasks
        for task in tasks.values():
            for scores in (task, *task.get("groups", {}).values()):
                if "accuracy" in scores:
                    low, high = scores["interval"]
                    shown = f"{scores['metric']:.1%} ({low:.1%} to {high:.1%})"
                else:
                    shown = f"{scores['metric']:.4f}"
                    if "bits_per_byte" in scores:
                        shown += f" ± {scores['se']:.4f}" if "se" in scores else ""
                    elif "interval" in scores:
                        shown += " ({:.4f} to {:.4f})".format(*scores["interval"])
                assert shown in page.cells, shown
                assert f"{scores['n']:,}" in page.cells
                seen += 1
    assert seen > 15


def test_both_cards_have_the_same_tables(whole):
    run, _, page, _ = whole
    text = run.report.read_text(encoding="utf-8")
    text = re.sub(r"## (Samples|Configuration)\n.*?(?=\n## |\Z)", "", text, flags=re.S)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [c.strip() for line in rows for c in re.split(r"(?<!\\)\|", line)[1:-1]]
    cells = [re.sub(r"\\(.)|\*\*|`", r"\1", c) for c in cells]
    assert len(cells) > 150
    for cell in cells:
        assert " ".join(cell.split()) in page.text, cell


HOSTILE = (
    "<script>alert(1)</script>",
    "</bdi></main><img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp; \"quoted' `x`",
    "<style>*{display:none}</style><!-- ",
    "\u202egnp.exe \u2028 ]]> \x00\x1b[31m",
)


def test_hostile_samples_and_settings_are_text(config, tmp_path):
    together = " ".join(HOSTILE)
    run = make_run(tmp_path / "run", reasons={"mmlu": together})
    said = [f"`` {text} ``" for text in HOSTILE]
    lines = "".join(f"> {text}\n\n- **0**: {text}\n\n" for text in said)
    (run.stage("sft") / "samples.md").write_text(f"## After\n\n{lines}", encoding="utf-8")
    config = dataclasses.replace(config, tier=f"x{together}", data=dataclasses.replace(config.data, source=together))
    report.run(config, run)
    page = Page((run.root / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and "script" not in page.tags and page.tags.count("style") == 1
    assert page.tags.count("img") == 4
    for text in (together, *HOSTILE):
        plain = " ".join(re.sub("[\x00\x1b]", "\ufffd", text).split())
        assert page.text.count(plain) >= (4 if text == together else 6), text
    heading = run.report.read_text(encoding="utf-8").splitlines()[0]
    assert "<script" not in heading.replace("\\<", "")


def test_rows_of_another_length_than_the_head_are_a_fault():
    with pytest.raises(ValueError, match="shorter|longer"):
        report_html.page("x", [Table(["a", "b"], [["1", "2", "3"]])], {})


def test_inline_pieces_are_escaped():
    text = report_html.page("a < b", [Paragraph(["1 & 2 ", Mono("<i>")])], {})
    assert "<title>a &lt; b</title>" in text and "<p>1 &amp; 2 <code>&lt;i&gt;</code></p>" in text
