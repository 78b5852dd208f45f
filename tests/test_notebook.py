"""The notebooks for hosted machines: as generated, their commands parse, and they run from top to bottom in little.

python -m pytest tests/test_notebook.py -m slow -n0      the runs, some minutes
"""

import ast
import io
import json
import os
import signal
import site
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from whole_run import ROOT, TINY

import launch
from bench import notebooks
from train import doctor

nbformat = pytest.importorskip("nbformat", reason="needs the extra dev")
NAMES, LANGUAGES = sorted(notebooks.NOTEBOOKS), {"en": ROOT / "docs", "ko": ROOT / "docs" / "ko"}
LITTLE = [t for t in TINY if t.startswith(("model.", "train.", "eval.sample", "data."))] + ["model.vocab_size=384"]
each_notebook = pytest.mark.parametrize("name", NAMES)


def cells(name, language="en"):
    return nbformat.read(LANGUAGES[language] / f"{name}.ipynb", as_version=4).cells


@each_notebook
@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_kept_is_what_was_generated(name, language):
    path = LANGUAGES[language] / f"{name}.ipynb"
    assert path.read_text(encoding="utf-8") == notebooks.notebook(name, language), "run python -m bench.notebooks"
    nbformat.validate(nbformat.read(path, as_version=4))
    text = "".join(cell.source for cell in cells(name, language) if cell.cell_type == "markdown")
    assert (len([c for c in text if "가" <= c <= "힣"]) > 200) == (language == "ko")


def test_a_public_address_gives_badges_and_the_clone(monkeypatch):
    monkeypatch.setattr(notebooks, "ADDRESS", "https://github.com/me/mine")
    text = notebooks.notebook("nano", "ko")
    assert "colab.research.google.com/github/me/mine/blob/main/docs/ko/nano.ipynb" in text
    assert "src=https://github.com/me/mine/blob/main/docs/ko/nano.ipynb" in text
    assert json.dumps('REPOSITORY = "https://github.com/me/mine"')[1:-1] in text
    nbformat.validate(nbformat.reads(text, as_version=4))


class Notebook:
    """Run a notebook's cells here, one after the other; every command is noted instead of run."""

    def __init__(self, name, monkeypatch, folder, found=(), **settings):
        self.commands, self.namespace = [], {}
        monkeypatch.chdir(folder)
        monkeypatch.setattr(subprocess, "Popen", self.popen)
        monkeypatch.setattr(subprocess, "check_output", lambda words, **options: json.dumps(found))
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder / "tmp"))
        self.code = [(cell.source, cell.metadata.get("tags", [])) for cell in cells(name) if cell.cell_type == "code"]
        self.settings = settings

    def popen(self, words, cwd, **options):
        self.commands.append([str(word) for word in words])
        if words[0] == "git":
            (Path(words[-1])).mkdir(parents=True)
            (Path(words[-1]) / "launch.py").touch()
        return types.SimpleNamespace(stdout=io.StringIO("a line\n"), wait=lambda: 0)

    def run(self, until=None):
        for source, tags in self.code:
            if until in tags:
                break
            exec(compile(source, "cell", "exec"), self.namespace)
            self.namespace |= self.settings if "settings" in tags else {}
        return self


@each_notebook
def test_every_command_parses_and_reads_the_clone(name, monkeypatch, tmp_path, finished):
    runs = tmp_path / "runs"
    runs.mkdir()
    for run in (name, "tinystories-muon"):  # what the cells that look would find
        (runs / run).symlink_to(finished)
    (tmp_path / "own.txt").write_text("It was the best of times. " * 20_000)
    settings = {"REPOSITORY": "https://example.org/mine.git", "BOOK": "own.txt", "ON_CPU": True}
    notebook = Notebook(name, monkeypatch, tmp_path, **settings).run()
    assert notebook.commands[0][:2] == ["git", "clone"] and notebook.namespace["CODE"] == tmp_path / "tmp/jaxchat-code"
    python = str(tmp_path / "tmp" / "jaxchat-env" / "bin" / "python")
    ours = [words[1:] for words in notebook.commands if words[0] == python]
    for words in ours:
        if words[0] == "-c":
            ast.parse(words[1])
            continue
        args = launch.parse(words[1:])
        if args.command == "train":
            args.run_dir = None
            assert launch.given_config(args)[0].tier == name
    trained = [words for words in ours if "--tier" in words]
    assert len(trained) == (3 if name == "tinystories" else 1)
    assert all(Path(words[words.index("--run-dir") + 1]).parent == runs for words in trained)
    if name == "book":
        assert (runs / "texts" / "own.txt").exists() and f"files:{runs / 'texts'}" in trained[0]
    if name != "tinystories":
        assert (runs / f"{name}-export.zip").stat().st_size > 1000


def install(name, monkeypatch, folder, found, **settings):
    """Run the cells up to the installation; the words of every pip, and what was printed."""
    (folder / "launch.py").touch()
    notebook = Notebook(name, monkeypatch, folder, found, **settings)
    last = next(i for i, (_, tags) in enumerate(notebook.code) if "install" in tags)
    notebook.code = notebook.code[: last + 1]
    notebook.code = [(source, tags) for source, tags in notebook.code if "upload" not in tags]
    notebook.run()
    return [words for words in notebook.commands if "pip" in words]


@pytest.mark.parametrize(
    ("driver", "capability", "extra"),
    [("580.1", "7.5", "cuda"), ("550.54", "7.5", "cuda12"), ("580.1", "6.0", "cuda12"), (None, None, "tpu")],
)
def test_the_jax_of_the_accelerator_is_installed(driver, capability, extra, monkeypatch, tmp_path):
    """T4, P100 and others as nvidia-smi names them, a TPU; into an environment of its own: no other pip is run."""
    machine = tmp_path / "machine"
    (machine / "usr/bin").mkdir(parents=True)
    (machine / "dev").mkdir()
    if driver:
        (machine / "usr/bin/nvidia-smi").write_text(f"#!/bin/sh\necho 'Tesla T4, {driver}, {capability}'\n")
        (machine / "usr/bin/nvidia-smi").chmod(0o755)
    else:
        (machine / "dev" / "accel0").touch()
    monkeypatch.chdir(ROOT)  # where pyproject.toml is, as for the notebook's command
    pips = install("nano", monkeypatch, tmp_path, doctor.accelerators(machine))
    target = str(tmp_path / "tmp" / "jaxchat-env" / "bin" / "python")
    assert all(words[words.index("--python") + 1] == target for words in pips)
    assert [words[words.index("install") + 2 :] for words in pips] == [
        ["-r", "requirements.txt"],
        ["-e", f".[{extra}]"],
    ]


@each_notebook
def test_a_machine_without_an_accelerator_gets_one_line(name, monkeypatch, tmp_path, capsys):
    if name == "tinystories":
        with pytest.raises(SystemExit, match="no GPU or TPU here: .*ON_CPU"):
            install(name, monkeypatch, tmp_path, [])
    pips = install(name, monkeypatch, tmp_path, [], ON_CPU=True)
    assert len(pips) == 1
    assert capsys.readouterr().out.count("no GPU or TPU here") == (name != "tinystories")


def test_what_is_missing_is_one_line(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="REPOSITORY"):
        Notebook("nano", monkeypatch, tmp_path).run(until="install")
    (tmp_path / "launch.py").touch()
    for book in ("", "nowhere.txt"):
        with pytest.raises(SystemExit, match="BOOK"):
            Notebook("book", monkeypatch, tmp_path, BOOK=book).run(until="install")
        assert not (tmp_path / "runs").exists()


def test_colab_uploads_the_book_and_mounts_the_drive(monkeypatch, tmp_path):
    def upload():
        (tmp_path / "my book.txt").write_text("It was the best of times.")
        return {"my book.txt": b"It was the best of times."}

    mounted = []
    colab = types.SimpleNamespace(
        files=types.SimpleNamespace(upload=upload), drive=types.SimpleNamespace(mount=mounted.append)
    )
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    (tmp_path / "launch.py").touch()
    for _ in range(2):  # the second time, on another machine, it is there already
        notebook = Notebook("book", monkeypatch, tmp_path).run(until="install")
        assert [path.name for path in (tmp_path / "runs" / "texts").iterdir()] == ["my book.txt"]
        colab.files.upload = None
    notebook = Notebook("tinystories", monkeypatch, tmp_path).run(until="install")
    assert mounted == ["/content/drive"] and notebook.namespace["RUNS"] == Path("/content/drive/MyDrive/jaxchat-runs")


def prepared(name, folder, corpus):
    """The notebook with tiny settings, whose environment has the packages of this one instead of new ones."""
    notebook = nbformat.read(LANGUAGES["en"] / f"{name}.ipynb", as_version=4)
    sets = [word for setting in (TINY if name == "nano" else LITTLE) for word in ("--set", setting)]
    data = [] if name == "book" else ["--data", f"files:{corpus}/*.txt"]
    given = {"SETTINGS": [*data, *sets], "BOOK": str(corpus / "tale.txt"), "ON_CPU": True}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", ())
        if "settings" in tags:
            cell.source += f"\nRUNS = Path({str(folder)!r})\n" + "".join(f"{k} = {v!r}\n" for k, v in given.items())
            cell.source += f"import tempfile\ntempfile.tempdir = {str(folder)!r}\n"
        if "install" in tags:
            packages = "next(PYTHON.parent.parent.glob('lib/python*/site-packages'), None).joinpath('tests.pth')"
            assert cell.source.count('pip("-r", "requirements.txt")') == 1
            lines = "\n".join([*site.getsitepackages(), str(ROOT)])
            cell.source = cell.source.replace('pip("-r", "requirements.txt")', f"{packages}.write_text({lines!r})")
    return notebook


def execute(notebook):
    """What every code cell printed."""
    nbclient = pytest.importorskip("nbclient", reason="needs the extra dev")
    pytest.importorskip("ipykernel", reason="needs the extra dev")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert {key for cell in code for out in cell.outputs for key in out.get("data", ())} >= {
        "image/png",
        "text/markdown",
    }
    return ["".join(out.get("text", "") for out in cell.outputs) for cell in code]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "book"])
def test_it_runs_from_top_to_bottom(name, corpus, tmp_path):
    said = execute(prepared(name, tmp_path, corpus))
    assert "no GPU or TPU here" in "".join(said) or doctor.accelerators()
    assert (tmp_path / name / "report.md").exists() and (tmp_path / f"{name}-export.zip").exists()
    assert ("> who are you?" if name == "nano" else "It was") in said[-2]


@pytest.mark.slow
def test_a_killed_training_goes_on_from_the_drive(corpus, tmp_path):
    """The machine goes away in the middle of training; the notebook is run on another one."""
    notebook = prepared("tinystories", tmp_path, corpus)
    given = {}
    exec(next(cell.source for cell in notebook.cells if "settings" in cell.metadata.get("tags", ())), given)
    words = [sys.executable, ROOT / "launch.py", "--tier", "tinystories", "--run-dir", tmp_path / "tinystories"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [*words, *given["SETTINGS"]], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        end = time.monotonic() + 200
        while not list((tmp_path / "tinystories" / "base").glob("*/SHA256SUMS")) and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "tinystories" / "base" / "24").exists(), (tmp_path / "log").read_text()
    said = execute(notebook)
    assert (tmp_path / "tinystories" / "base" / "24" / "SHA256SUMS").exists()
    assert "resumed from step" in said[5] and "muon" in said[7] and "Once upon a time there was a robot who" in said[8]
    assert "pretrain   done (" in said[9] and "nothing to do" in said[9]
