"""What the documents say of the code: numbers of tiers, names in the walk; and the site."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxchat.config import load_config, tier_files
from jaxchat.scaling import resolve
from jaxchat.sizes import count_parameters, flops_per_token

ROOT = Path(__file__).resolve().parent.parent
BOTH = ("docs", "docs/ko")
PAGE_OF = {"ko-nano": "korean", "ko-d12": "korean"}
DIAL = ("nano", "d12", "d20", "d26", "d32")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", BOTH)
def test_every_tier_has_a_page_with_its_command(folder):
    for path in tier_files():
        page = read(f"{folder}/{PAGE_OF.get(path.stem, path.stem)}.md")
        assert f"--tier {path.stem}" in page


@pytest.mark.parametrize("folder", BOTH)
@pytest.mark.parametrize("tier", DIAL)
def test_the_numbers_of_a_tier_are_those_of_its_configuration(folder, tier):
    page, config = read(f"{folder}/{tier}.md"), resolve(load_config(tier))
    model, train, count = config.model, config.train, count_parameters(config.model)
    tokens = train.steps * train.batch_tokens
    rows = [[int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?![\d.])", line)] for line in page.splitlines()
            if line.startswith("| ")]  # fmt: skip
    assert [model.depth, model.width, model.n_heads, model.head_width, model.seq_len, model.vocab_size] in rows
    assert any(sorted(row) == sorted([count.total, count.scaling]) for row in rows)
    assert any(sorted(row) == sorted([tokens, train.steps, train.batch_tokens]) for row in rows)
    if tier != "nano":
        said = float(re.search(r"(\d\.\d)e\d\d FLOP", page)[0].split(" ")[0])
        assert said == pytest.approx(flops_per_token(model) * tokens, rel=0.03)


@pytest.mark.parametrize("folder", BOTH)
def test_the_walk_leads_to_ten_places_that_exist(folder):
    places = re.split(r"^## ", read(f"{folder}/walk.md"), flags=re.M)[1:]
    assert [p.split(".")[0] for p in places] == [str(n) for n in range(1, 11)]
    for place in places:
        where = place.split("\n")[2]
        named = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", where)
        assert named and len(place.splitlines()) < 60 and re.search(r"\d{4}\.\d{5}|GPT-2", place)
        for path, names in named:
            tree = ast.parse(read(path))
            known = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            known |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            assert {part for name in re.findall(r"`([\w.]+)`", names) for part in name.split(".")} <= known, path


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra dev")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "한국어" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
