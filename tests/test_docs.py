"""Documents stay true: commands parse, keys, files and links exist, examples run, both languages have every page."""

import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from bench import config_docs, tier_table
from jaxchat import errors
from jaxchat.config import KEYS, load_config
from jaxchat.data.sources import iterate_documents
from jaxchat.engine import Request
from jaxchat.interop import __main__ as interop
from jaxchat.scaling import resolve
from jaxchat.sizes import parameters
from train.plan import parse_target
from train.prepare import sized
from train.stages import select

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*ENGLISH, ROOT / "README.ko.md", *sorted((ROOT / "docs/ko").glob("*.md"))]
FOLDERS = ("docs", "docs/ko")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def lines_of(path):
    """Lines of a page; a line that ends with a backslash is joined with the next."""
    return re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8")).splitlines()


def commands(path):
    """Every `python launch.py ...` of a page, without comments and redirections."""
    for line in lines_of(path):
        if match := re.search(r"python launch\.py[^`|]*", line):
            yield match[0].split("  #")[0].split("   ")[0].split(" > ")[0].split(" 2>")[0].strip()


def tables(page):
    """The tables of a page: a list of rows, each a list of cells."""
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(encoding="utf-8") + "\n", re.M):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        yield [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_parses_and_its_keys_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was the best of times. " * 20_000)
    (tmp_path / "소설.txt").write_bytes("옛날에 한 사람이 살았습니다. ".encode("cp949") * 2_000)
    for command in commands(path):
        args = launch.parse(shlex.split(command)[2:])
        if args.command in launch.INTEROP:
            interop.make_parser().parse_args([args.command, *args.words])
        if args.command in ("compare", "tiers", "watch", *launch.INTEROP):
            continue
        args.config = args.run_dir = args.run = args.init = None  # a run that may not exist here
        default = "ladder" if args.command == "ladder" else "nano"
        config = resolve(sized(launch.given_config(args, default)[0]))
        assert config.tier == (args.tier or default)
        if args.command == "train":
            select(args.stages, args.start)
        if args.command == "plan":
            parse_target(args.target if args.target != "auto" else "cpu:1")


SECTIONS = "|".join(sorted({name.partition(".")[0] for name in KEYS if "." in name}))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_named_files_and_keys_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in target or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:jaxchat|train|serve|bench|tests|configs)/[\w/.]+\.(?:py|toml))`", text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"-m ((?:bench|jaxchat)[a-z_.]*)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for name in re.findall(rf"`(?:--set )?((?:{SECTIONS})\.[a-z_]+)(?:`|=| = )", text):
        assert name in KEYS or name.endswith((".pkl", ".json", ".py", ".onnx")), name


@pytest.mark.parametrize("path", ENGLISH, ids=name_of)
def test_every_page_has_its_korean_twin(path):
    twin = ROOT / "README.ko.md" if path.name == "README.md" else ROOT / "docs/ko" / path.name
    text = twin.read_text(encoding="utf-8")
    assert len(re.findall("[가-힣]", text)) > 100
    assert list(commands(twin)) == list(commands(path))
    assert [len(table) for table in tables(twin)] == [len(table) for table in tables(path)]


@pytest.mark.parametrize("page, twin", [
    ("README.md", "README.ko.md"),
    *[(f"docs/{name}.md", f"docs/ko/{name}.md") for name in ("performance", "rl", "small", "korean")],
])  # fmt: skip
def test_measured_figures_are_the_same_in_both_languages(page, twin):
    def figures(row):
        return sorted(re.findall(r"\d[\d,]*\.\d++(?! ?[MB만억])", " ".join(row)))

    for table, other in zip(tables(page), tables(twin), strict=True):
        for row, translated in zip(table, other, strict=True):
            assert figures(row) == figures(translated), row


@pytest.mark.parametrize("language, path", [("en", "docs/configuration.md"), ("ko", "docs/ko/configuration.md")])
def test_the_pages_of_the_configuration_are_those_of_its_declarations(language, path):
    assert config_docs.page(language) == (ROOT / path).read_text("utf-8"), "run python -m bench.config_docs"


@pytest.mark.parametrize("page", ["docs/training.md", "docs/ko/training.md"])
def test_exit_codes_and_optimizer_groups(page):
    first_cells = [[row[0] for row in table] for table in tables(page)]
    codes = next(cells[2:] for cells in first_cells if "75" in cells)
    real = {e.exit_code for e in vars(errors).values() if hasattr(e, "exit_code")}
    assert {int(code) for code in codes} == {0} | real
    groups = next(cells[2:] for cells in first_cells if "`matrix`" in cells)
    declared = parameters(resolve(load_config("nano", ["model.recipe=jaxchat"])).model).values()
    assert set(groups) == {f"`{p.group}`" for p in declared}


@pytest.mark.parametrize(("folder", "language"), [("docs", "en"), ("docs/ko", "ko")])
def test_the_table_of_tiers_has_the_numbers_of_the_configurations(folder, language):
    """`python -m bench.tier_table` writes it."""
    assert tier_table.page(language, {}) == (ROOT / folder / "tiers.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_walk_leads_to_places_that_exist(folder):
    text = (ROOT / folder / "how-it-works.md").read_text(encoding="utf-8")
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        known = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        known |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        assert {part for name in re.findall(r"`([\w.]+)`", names) for part in name.split(".")} <= known, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_records_of_a_run_are_documented(folder, finished):
    tables_of = list(tables(f"{folder}/how-it-works.md"))
    (table,) = [t for t in tables_of if any(row[0] == "`config.toml`" for row in t)]
    names = [row[0].strip("`") for row in table[2:]]
    patterns = [re.sub(r"<\w+>", "[^/]+", re.escape(name)) + (".*" if name[-1] == "/" else "") for name in names]
    files = [path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()]
    assert not [file for file in files if not any(re.fullmatch(p, file) for p in patterns)]
    (table,) = [t for t in tables_of if any(row[0] == "`params_sha256`" for row in t)]
    documented = {name for row in table[2:] for name in re.findall(r"`(\w+)`", row[0])}
    records = json.loads((finished / "stages.json").read_text())
    assert documented == {field for record in records.values() for field in record} | {"imported", "extended"}


@pytest.mark.parametrize("page", ["docs/chat.md", "docs/ko/chat.md"])
def test_the_python_examples_run(page, finished, capsys):
    text = (ROOT / page).read_text(encoding="utf-8")
    examples = [code for code in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "runs/nano" in code]
    assert len(examples) == 3
    for example in examples:
        exec(compile(example.replace("runs/nano", str(finished)), page, "exec"), {})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", ["docs/chat.md", "docs/ko/chat.md"])
def test_settings_of_a_request(page):
    (table,) = [t for t in tables(page) if any(row[0] == "`stop_texts`" for row in t)]
    defaults = {row[0].strip("`"): row[1] for row in table[2:]}
    fields = {f.name: f.default for f in dataclasses.fields(Request) if f.name not in ("tokens", "stop", "tools")}
    assert defaults.keys() == fields.keys()
    numbers = {name: value for name, value in fields.items() if isinstance(value, float | int)}
    assert {name: float(defaults[name]) for name in numbers} == numbers


def test_the_lines_of_json_are_read_as_the_page_says(tmp_path):
    lines = [re.findall(r"^ {4}(\{.*\})$", (ROOT / folder / "data.md").read_text("utf-8"), re.M) for folder in FOLDERS]
    assert lines[0] == lines[1]
    (tmp_path / "some.jsonl").write_text("\n".join(lines[0]), encoding="utf-8")
    documents = list(iterate_documents(f"files:{tmp_path}"))
    assert documents == ["Once upon a time there was a river.", "hello\nHi! How are you?"]


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra dev")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
