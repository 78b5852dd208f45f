"""Documents that stay true: commands parse, keys and links exist, both languages have every page."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

import launch
from jaxchat import errors
from jaxchat import scaling as horizon
from jaxchat.config import Config, flatten, load_config, tier_files
from jaxchat.data.sources import iterate_documents
from jaxchat.engine import Request
from jaxchat.optimizer import GROUPS
from jaxchat.scaling import RECIPES
from train.plan import parse_target
from train.stages import FREE_KEYS, select

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*ENGLISH, ROOT / "README.ko.md", *sorted((ROOT / "docs/ko").glob("*.md"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def lines_of(path):
    """Lines of a page, those that a backslash continues joined."""
    return re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8")).splitlines()


def commands(path):
    for line in lines_of(path):
        found = re.search(r"python launch\.py[^`|]*", line)
        if found:
            yield found[0].split("  #")[0].split("   ")[0].split(" > ")[0].split(" 2>")[0].strip()


def test_there_are_commands_to_check():
    assert sum(len(list(commands(path))) for path in PAGES) > 20


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_parses_and_its_keys_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was the best of times. " * 20_000)
    (tmp_path / "소설.txt").write_bytes("옛날에 한 사람이 살았습니다. ".encode("cp949") * 2_000)
    for command in commands(path):
        args = launch.make_parser().parse_args(shlex.split(command)[2:])
        args.config = args.run_dir = None  # a run that this machine may have or not
        config, _, _ = launch.resolve_arguments(args)
        assert config.tier == (args.tier or "nano")
        select(args.stages, args.start)
        parse_target(args.target if args.target != "auto" else "cpu:1")


def test_keys_in_commands_of_the_benchmark_exist():
    found = [re.findall(r"--set (\S+)", line) for page in PAGES for line in lines_of(page)
             if "-m bench.train_step" in line]  # fmt: skip
    assert len(found) >= 2
    for overrides in found:
        horizon.resolve(load_config("nano", overrides))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_file_named_in_the_text_exists(path):
    for name in re.findall(
        r"`((?:jaxchat|train|serve|bench|tests|configs)/[\w/.]+\.(?:py|toml))`", path.read_text("utf-8")
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", ENGLISH, ids=name_of)
def test_every_page_has_its_korean_twin(path):
    twin = ROOT / "README.ko.md" if path.name == "README.md" else ROOT / "docs/ko" / path.name
    text = twin.read_text(encoding="utf-8")
    assert len(re.findall("[가-힣]", text)) > 100
    assert list(commands(twin)) == list(commands(path))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_nothing_is_left_to_fill_in(path):
    assert not re.findall(r"TODO|FIXME|NUMBERS|FIGURES", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page, twin, section", [
    ("README.md", "README.ko.md", 1),
    *[("docs/performance.md", "docs/ko/performance.md", n) for n in (1, 2, 3, 5, 6, 7)],
])  # fmt: skip
def test_measured_figures_are_the_same_in_both_languages(page, twin, section):
    figures = []
    for name in (page, twin):
        lines = (ROOT / name).read_text(encoding="utf-8").split("\n## ")[section].splitlines()
        figures.append([sorted(_figures(line)) for line in lines if line.startswith("|")])
    assert figures[0] == figures[1] and sum(map(len, figures[0])) > 2


def _figures(text):
    """The numbers of a text, whether large ones are counted in millions or in ten thousands."""
    units = {"": 1, "M": 1e6, "만": 1e4}
    found = re.findall(r"(\d[\d,]*(?:\.\d+)?)(?:\s?(M\b|만))?", text)
    return [round(float(number.replace(",", "")) * units[unit], 6) for number, unit in found]


@pytest.mark.parametrize("page", ["docs/configuration.md", "docs/ko/configuration.md"])
def test_every_key_is_documented_with_its_default(page):
    rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert [key for key, _ in rows] == list(flatten(Config()))
    for (key, text), value in zip(rows, flatten(Config()).values(), strict=True):
        assert (None if text == "none" else json.loads(text)) == value, key


@pytest.mark.parametrize("page", ["docs/training.md", "docs/ko/training.md"])
def test_exit_codes(page):
    documented = {int(c) for c in re.findall(r"^\| (\d+) \|", (ROOT / page).read_text(encoding="utf-8"), re.M)}
    real = {e.exit_code for e in vars(errors).values() if hasattr(e, "exit_code")}
    assert documented == real | {0}


@pytest.mark.parametrize("page", ["docs/training.md", "docs/ko/training.md"])
def test_keys_that_may_change_and_optimizer_groups(page):
    stages, _, _, optimizer, *_ = (ROOT / page).read_text(encoding="utf-8").split("\n## ")[1:]
    free = re.findall(r"`([a-z_.*]+)`", " ".join(re.findall(r"^\| (`\w+\.[^|]*)\|", stages, re.M)))
    assert sorted(free) == sorted(key + "*" if key[-1] in "._" else key for key in FREE_KEYS)
    assert [group for _, group in GROUPS] == re.findall(r"^\| `(\w+)` \|", optimizer, re.M)


@pytest.mark.parametrize("page", ["docs/training.md", "docs/ko/training.md"])
def test_schedules(page):
    """The numbers of the table, in whatever language stands around them: warm-up, fall, clipping of every column."""
    rows = [line.split("|")[2:5] for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    start = next(i for i, row in enumerate(rows) if [cell.strip() for cell in row[:2]] == ["modern", "classic"])
    warmup, fall, _, _, clip = rows[start + 2 : start + 7]
    columns = [RECIPES["modern"]["optim"], RECIPES["classic"]["optim"], horizon.ADAMW]
    for column, values in enumerate(columns):
        ratio = [] if column == 2 else [values["warmdown_ratio"] * 100]
        assert _numbers(warmup[column]) == [values["warmup_steps"]] * (values["warmup_steps"] > 0)
        assert _numbers(fall[column]) == pytest.approx([*ratio, values["final_lr"] * 100])
        assert _numbers(clip[column]) == [values["grad_clip"]] * (values["grad_clip"] > 0)


def _numbers(cell):
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", cell)]


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_the_two_commands_and_every_tier(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "pip install -r requirements.txt && python launch.py --tier nano" in text
    assert "pip install -r requirements.txt && python -m pytest" in text
    for path in tier_files():
        assert f"| `{path.stem}` |" in text


@pytest.mark.parametrize("page", ["docs/run-directory.md", "docs/ko/run-directory.md"])
def test_every_file_of_a_run_is_documented(page, finished):
    listed = re.findall(r"^\| `([\w./<>]+)` \|", (ROOT / page).read_text(encoding="utf-8").split("\n## ")[0], re.M)
    files = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    patterns = {name: re.sub(r"<\w+>", "[^/]+", re.escape(name)) + (".*" if name[-1] == "/" else "") for name in listed}
    unknown = [file for file in files if not any(re.fullmatch(p, file) for p in patterns.values())]
    assert not unknown
    never = [name for name, p in patterns.items() if not any(re.fullmatch(p, file) for file in files)]
    # the tiny run is shorter than train.sample_every, and has no trackers
    assert never == ["base/samples/step_<step>.md", "tensorboard/<stage>/", "wandb/"]


@pytest.mark.parametrize("page", ["docs/run-directory.md", "docs/ko/run-directory.md"])
def test_every_field_of_a_record_is_documented(page, finished):
    section = (ROOT / page).read_text(encoding="utf-8").split("\n## ")[1]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    documented = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    records = json.loads((finished / "stages.json").read_text())
    assert documented == {field for record in records.values() for field in record} | {"imported"}


@pytest.mark.parametrize("page", ["docs/chat.md", "docs/ko/chat.md"])
def test_the_python_examples_run(page, finished, capsys):
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert len(examples) == 2
    for example in examples:
        assert example.count("runs/nano") == 1
        exec(compile(example.replace("runs/nano", str(finished)), page, "exec"), {})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", ["docs/chat.md", "docs/ko/chat.md"])
def test_settings_of_a_request(page):
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / page).read_text(encoding="utf-8"), re.M))
    fields = {f.name: f.default for f in dataclasses.fields(Request) if f.name not in ("tokens", "stop", "tools")}
    assert rows.keys() == fields.keys()
    numbers = {name: value for name, value in fields.items() if isinstance(value, float | int)}
    assert {name: float(rows[name]) for name in numbers} == numbers


def test_the_lines_of_json_are_read_as_the_page_says(tmp_path):
    lines = re.findall(r"^ {4}(\{.*\})$", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.M)
    assert lines == re.findall(r"^ {4}(\{.*\})$", (ROOT / "docs/ko/data.md").read_text(encoding="utf-8"), re.M)
    (tmp_path / "some.jsonl").write_text("\n".join(lines), encoding="utf-8")
    documents = list(iterate_documents(f"files:{tmp_path}"))
    assert documents == ["Once upon a time there was a river.", "hello\nHi! How are you?"]


@pytest.mark.parametrize("page", ["docs/start.md", "docs/ko/start.md"])
def test_messages_of_the_troubleshooting_table_exist(page):
    code = "".join(p.read_text() for folder in ("jaxchat", "train", "serve") for p in (ROOT / folder).rglob("*.py"))
    code += (ROOT / "launch.py").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert len(messages) == 9
    for message in messages:
        first, *rest = message.split(", did you")  # the hint is put together from two places
        assert first in code and (not rest or "did you mean" in code), message
