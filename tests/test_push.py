"""Exports to the hub, against a stand-in of its API."""

import dataclasses

import pytest
from fake_hub import FakeRepositories
from random_model import random_model, random_params, random_run

from jaxchat.interop.__main__ import main, make_parser
from jaxchat.interop.push import push
from jaxchat.interop.trained import write_run
from jaxchat.run_dir import RunDir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("run") / "nano", "modern")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeRepositories() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.chdir(tmp_path)
        yield hub


def export(run, *words):
    return main(lambda: make_parser().parse_args(["export", "--run-dir", str(run.root), *words]))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_sent_private_with_its_card_and_licence(hub, run, tmp_path, capsys):
    assert export(run, "--push", "me/nano", "--license", "mit") == 0
    assert [(c["name"], c["organization"], c["visibility"]) for c in hub.created] == [("nano", "me", "private")]
    sent, here = dict(hub.repositories["models/me/nano"]), files_of(tmp_path / "exported" / "nano-hf")
    card, own = sent.pop("README.md").decode(), here.pop("README.md").decode()
    del sent[".gitattributes"]
    assert sent == here and "model.safetensors" in sent and "modeling_jaxchat.py" in sent
    head, own_head = card.split("---\n")[1], own.split("---\n")[1]
    assert "license: mit\n" in head and "license" not in own_head and "- jaxchat\n" in head
    assert card.split("---\n", 2)[2].strip() == own.split("---\n", 2)[2].strip()
    assert hub.url + "/me/nano/commit/" in capsys.readouterr().err


def test_a_dry_run_asks_nobody_and_needs_no_token(hub, run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert export(run, "--push", "me/nano", "--dry-run", "--public") == 0
    out = capsys.readouterr().err
    here = files_of(tmp_path / "exported" / "nano-hf")
    assert len(here) > 6 and all(f"{len(text):,}  {name}" in out for name, text in here.items())
    assert "public model" in out


def test_a_name_that_exists_is_only_updated_when_asked(hub, run, tmp_path, capsys):
    theirs = {"README.md": b"theirs", "old-00001-of-00002.safetensors": b"1", "picture.png": b"2"}
    hub.repositories["models/me/nano"] = dict(theirs)
    assert export(run, "--push", "me/nano") == 2
    assert "me/nano exists already" in capsys.readouterr().err and hub.repositories["models/me/nano"] == theirs
    card = tmp_path / "exported" / "nano-hf" / "README.md"
    card.write_text(card.read_text() + "\nA line of mine.\n")
    assert export(run, "--push", "me/nano", "--update") == 0  # the export is there already, and is sent as it is
    sent = hub.repositories["models/me/nano"]
    assert b"A line of mine." in sent["README.md"] and sent["picture.png"] == b"2"
    assert not hub.created and [name for name in sent if name.endswith(".safetensors")] == ["model.safetensors"]
    hub.repositories["models/me/empty"] = {".gitattributes": b""}  # made on the website, or by a push that was cut off
    assert export(run, "--push", "me/empty") == 0 and "model.safetensors" in hub.repositories["models/me/empty"]


def test_another_model_s_export_is_not_sent(hub, run, tmp_path, capsys):
    assert export(run, "--push", "me/nano") == 0
    model = random_model("modern")
    other = dataclasses.replace(
        model, params=random_params(model.config, seed=1), imported={"format": "x", "from": "y"}
    )
    write_run(other, tmp_path / "runs" / "nano")
    assert export(RunDir(tmp_path / "runs" / "nano"), "--push", "me/nano", "--update") == 2
    assert "exported/nano-hf" in capsys.readouterr().err and hub.commits == 1


@pytest.mark.parametrize("name", [
    "nano", "me/na no", "me/a/b", "me/", "/nano", "me/nano.git", "https://huggingface.co/me/nano", "", "me/한국어",
])  # fmt: skip
def test_bad_names(hub, run, tmp_path, capsys, name):
    assert export(run, "--push", name) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "exported").exists() and not hub.created


def test_flags_that_need_a_push(run, hub):
    for flags in (["--dry-run"], ["--public"], ["--update"], ["--license", "mit"]):
        assert export(run, *flags) == 2


@pytest.mark.parametrize("fault, code", [
    ("no token", 2), ("wrong token", 3), ("another owner", 3), ("hidden", 2), ("/api/models/me/nano/commit", 3),
    ("/lfs/", 3), ("gone", 3), ("offline", 3),
])  # fmt: skip
def test_a_push_that_fails_says_so_in_a_line_and_goes_on_later(hub, run, tmp_path, capsys, monkeypatch, fault, code):
    name = "you/nano" if fault == "another owner" else "me/nano"
    with monkeypatch.context() as broken:
        if fault in ("no token", "wrong token"):
            broken.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
            broken.setenv("HF_TOKEN", "hf_wrong") if fault == "wrong token" else broken.delenv("HF_TOKEN")
        elif fault == "gone":
            broken.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        elif fault == "offline":
            broken.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        elif fault == "hidden":
            hub.faults = {"/api/models/me/nano": 404, "/api/repos/create": 409}
        elif fault.startswith("/"):
            hub.faults = {fault: 400}
        assert export(run, "--push", name) == code
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(err) == 1 and name in err[0]
    assert (tmp_path / "exported" / "nano-hf" / "model.safetensors").exists() == (fault != "no token")
    hub.faults = {}
    assert export(run, "--push", "me/nano") == 0 and "model.safetensors" in hub.repositories["models/me/nano"]


def test_a_page_becomes_a_static_space(hub, tmp_path):
    page = tmp_path / "nano.html"
    page.write_text("<!doctype html><p>안녕")
    push(page, "me/nano", public=True, update=False, license="cc-by-4.0", dry_run=False)
    assert hub.created[0]["type"] == "space" and hub.created[0]["sdk"] == "static"
    assert hub.created[0]["visibility"] == "public"
    sent = hub.repositories["spaces/me/nano"]
    assert sent["index.html"] == page.read_bytes()
    head = dict(line.split(": ") for line in sent["README.md"].decode().split("---\n")[1].splitlines() if ": " in line)
    assert head["title"] == "nano" and head["sdk"] == "static" and head["license"] == "cc-by-4.0"
