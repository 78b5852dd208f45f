"""The wheel: what is in it, and that its command does all that launch.py does, in an empty environment and folder.

python -m pytest tests/test_wheel.py -m slow -n0      build, install, run; needs a package index for the build
"""

import fnmatch
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
from whole_run import ROOT, TINY, records

PARTS = ("jaxchat", "train", "serve", "configs")
DEPLOYMENT = ("Dockerfile*", "*.yaml", "requirements.txt")  # in serve/, for clones
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def files():
    """The product's files, relative to the clone."""
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*")):
            deployment = part == "serve" and any(fnmatch.fnmatch(path.name, name) for name in DEPLOYMENT)
            if path.is_file() and "__pycache__" not in path.parts and not deployment:
                yield path.relative_to(ROOT)
    yield Path("launch.py")


def installed_name(path):
    return path.as_posix() if path.parts[0] == "jaxchat" else f"jaxchat_app/{path.as_posix()}"


def test_every_file_of_the_product_is_declared():
    """A new package or kind of data needs a word in pyproject.toml."""
    settings = PROJECT["tool"]["setuptools"]
    folders = {name: Path(settings["package-dir"].get(name, name.replace(".", "/"))) for name in settings["packages"]}
    data = {
        path.relative_to(ROOT)
        for name, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / folders[name]).glob(pattern)
    }
    missing = [p for p in files() if p not in data and not (p.suffix == ".py" and p.parent in folders.values())]
    assert not missing
    assert all(name.split(".")[0] in ("jaxchat", "jaxchat_app") for name in folders)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Of an sdist that is built from the files that a wheel needs, and nothing else."""
    pytest.importorskip("build", reason="needs the extra dev")
    folder = tmp_path_factory.mktemp("build")
    for name in (*PARTS, "launch.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "build", str(folder)], check=True, capture_output=True, env=clean())
    return next((folder / "dist").glob("*.whl"))


def clean():
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    """An environment that has the wheel, and whose other packages are those of this one; its commands' folder."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, env=clean())
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([commands / "pip", "install", "-q", "--no-deps", wheel], check=True, env=clean())
    own = subprocess.run(
        [commands / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True, env=clean(),
    )  # fmt: skip
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(own.stdout.strip()) / "others.pth").write_text("\n".join(others))
    return commands, Path(own.stdout.strip())


def run(place, folder, *words, code=0, **options):
    done = subprocess.run(
        [place[0] / "jaxchat", *words], cwd=folder, capture_output=True, text=True, timeout=500, env=clean(), **options
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.slow
def test_a_wheel_has_all_of_it_and_other_names_for_nothing(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {installed_name(path) for path in files()} | {"jaxchat_app/requirements.txt"}


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory, corpus):
    """A folder in which the command has trained, and what it said."""
    folder = tmp_path_factory.mktemp("empty")
    words = [word for setting in TINY for word in ("--set", setting)]
    persona = "sft.identity=configs/identity/example.toml"  # as in a clone
    done = run(place, folder, "--tier", "nano", "--data", f"files:{corpus}/*.txt", *words, "--set", persona)
    return folder, done.stderr


@pytest.mark.slow
def test_the_command_trains_chats_and_exports_from_an_empty_folder(place, trained):
    folder, said = trained
    assert all(record["status"] == "done" for record in records(folder / "runs" / "nano").values())
    assert "jaxchat chat runs/nano" in said and "launch.py" not in said
    assert run(place, folder, "chat", "runs/nano", input="hello\n").stdout.strip()
    run(place, folder, "export", "runs/nano")
    assert list(folder.glob("exported/*/model.safetensors"))
    code = json.loads((folder / "runs" / "nano" / "report.json").read_text())["code"]
    assert code["files"] == sum(path.suffix == ".py" for path in files()) and code["dependencies"] > 10
    assert (folder / "runs" / "nano" / "stages.json").read_text().count('"commit": null') > 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve", "watch"])
def test_its_pages_have_their_assets(place, trained, command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [place[0] / "jaxchat", command, "runs/nano", "--port", str(port)]
    page = subprocess.Popen(words, cwd=trained[0], env=clean(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(600):
            time.sleep(0.2)
            assert page.poll() is None, page.stderr.read()
            try:
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20)
                break
            except OSError:
                continue
        assert answer.status == 200 and b"<html" in answer.read().lower()
    finally:
        page.send_signal(signal.SIGINT)
        page.wait(30)


@pytest.mark.slow
def test_the_command_speaks_of_itself(place, tmp_path):
    assert run(place, tmp_path, "--help").stdout.startswith("usage: jaxchat ")
    assert "launch.py" not in run(place, tmp_path, "tiers").stdout
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("1 / 0")  # somebody's own
    code = "import jaxchat.errors as e; print(e.install_command('ray'), e.install_command(), e.command_line('plan'))"
    done = subprocess.run([place[0] / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, env=clean())
    assert done.stdout.strip() == "pip install 'jaxchat[ray]' pip install jaxchat jaxchat plan"
    assert "jaxchat --help" in run(place, tmp_path, "train", "--nonsense", code=2).stderr
    run(place, tmp_path, "doctor", "--json")
    run(place, tmp_path, "compare", "a", "b", code=3)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["jaxchat_app/configs", "jaxchat/recipes.toml", "jaxchat_app/train/devices.toml"])
def test_a_wheel_without_its_data_says_so(place, tmp_path, lost):
    path = place[1] / lost
    path.rename(tmp_path / "aside")
    try:
        said = run(place, tmp_path, "plan", code=3).stderr
    finally:
        (tmp_path / "aside").rename(path)
    assert said.count("\n") == 1 and path.name in said and "install" in said
