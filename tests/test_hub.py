"""The hub's files against a real server that misbehaves: verified, resumed, kept, as many as are needed."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, FakeHub

from jaxchat.config import DataConfig
from jaxchat.data import hub
from jaxchat.data import hub as hub_files
from jaxchat.data import sources as corpus
from jaxchat.data.hub import fetch, parse, text_size
from jaxchat.data.sources import iterate_documents
from jaxchat.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parent.parent
SOURCE = f"hf:someone/texts@{COMMIT}:data/*.parquet"


def shard(number, rows=200):
    texts = [f"Shard {number}, document {i}: " + " ".join(str(i * k) for k in range(60)) for i in range(rows)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(rows), "text": texts}), sink, compression="zstd")
    return sink.getvalue()


FILES = {f"data/{i:03d}.parquet": shard(i) for i in range(6)} | {"README.md": b"# texts", "data/notes.pdf": b"%PDF"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(hub_files, "FIRST_WAIT", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is on the disk is whole pieces
    with FakeHub(FILES) as server:
        yield server


def names(paths):
    return [path.name for path in paths]


def test_files_come_once_verified_and_are_read_without_a_network(server, tmp_path, capsys):
    found = fetch(SOURCE, 0, tmp_path, endpoint=server.url)
    assert [p.read_bytes() for p in found] == [FILES[f"data/{i:03d}.parquet"] for i in range(6)]
    assert "texts at 01234567: 6 of 6 files; 5 to download, " in capsys.readouterr().err
    mark = json.loads(found[0].with_name("000.parquet.verified.json").read_text())
    assert mark == {
        "sha256": server.digest("data/000.parquet"), "size": len(FILES["data/000.parquet"]),
        "compared_with": "sha256", "commit": COMMIT,
    }  # fmt: skip
    asked = len(server.asked)
    server.close()
    assert fetch(SOURCE, 0, tmp_path, endpoint=server.url) == found and len(server.asked) == asked
    assert capsys.readouterr().err == ""


def test_no_more_files_than_the_text_needs(server, tmp_path, capsys):
    one = text_size(fetch(SOURCE, 1, tmp_path, endpoint=server.url)[0])
    true = sum(len(t) for t in pq.read_table(io.BytesIO(FILES["data/000.parquet"]))["text"].to_pylist())
    assert 0.9 * true < one < 1.3 * true
    assert names(fetch(SOURCE, round(2.5 * one), tmp_path, endpoint=server.url)) == [
        f"{i:03d}.parquet" for i in range(3)
    ]
    assert "3 of 6 files for " in capsys.readouterr().err
    assert len(fetch(SOURCE, 100 * one, tmp_path, endpoint=server.url)) == 6  # all there are


def test_a_branch_keeps_the_commit_it_had(server, tmp_path):
    found = fetch("hf:someone/texts:data/00[01]*", 0, tmp_path, endpoint=server.url)
    assert names(found) == ["000.parquet", "001.parquet"]
    assert json.loads((found[0].parents[1] / "commit.json").read_text()) == COMMIT
    server.close()
    assert fetch("hf:someone/texts:data/00[01]*", 0, tmp_path, endpoint=server.url) == found


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "wrong", "slow"])
def test_what_passes_is_survived(server, tmp_path, fault):
    server.faults = {name: [fault] for name in FILES} | {"api": [fault] * 2 if fault.isdigit() else []}
    found = fetch(SOURCE, 0, tmp_path, endpoint=server.url)
    assert [p.read_bytes() for p in found] == [FILES[f"data/{i:03d}.parquet"] for i in range(6)]
    again = [reach for _, reach in server.gets("000.parquet")]
    if fault == "drop":  # goes on where it stopped
        assert again == [None, f"bytes={len(FILES['data/000.parquet']) // 2 // 1000 * 1000}-"]
    elif fault in ("wrong", "500"):
        assert again == [None, None]


def test_the_wait_that_the_hub_asks_for_is_kept(server, tmp_path):
    server.retry_after, server.faults = 1, {"api": ["429"]}
    begin = time.monotonic()
    fetch(SOURCE, 1, tmp_path, endpoint=server.url)
    assert time.monotonic() - begin >= 1


@pytest.mark.parametrize("fault", ["500", "wrong", "drop"])
def test_what_does_not_pass_is_told_with_what_to_do(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(
        hub_files, "TRIES", 1 if fault == "drop" else 3
    )  # a dropped one the client tries again by itself
    server.faults["data/002.parquet"] = [fault] * 99
    with pytest.raises(DataError) as caught:
        fetch(SOURCE, 0, tmp_path, endpoint=server.url)
    text = str(caught.value)
    assert "data/002.parquet cannot be had" in text and "data.mirror" in text and COMMIT[:8] in text
    assert "\n" not in text and "Traceback" not in text
    kept = list(tmp_path.rglob("*.verified.json"))
    assert kept and not [p for p in kept if "002" in p.name]
    server.faults, before = {}, len(server.gets("000.parquet"))
    assert len(fetch(SOURCE, 0, tmp_path, endpoint=server.url)) == 6
    assert len(server.gets("000.parquet")) == before  # not a second time


def test_what_is_gone_is_told_at_once(server, tmp_path):
    server.faults["data/001.parquet"] = ["404"] * 9
    with pytest.raises(DataError, match=r"data/001\.parquet cannot be had \(HTTP 404\)"):
        fetch(SOURCE, 0, tmp_path, endpoint=server.url)
    assert len(server.gets("001.parquet")) == 1
    with pytest.raises(DataError, match=r"hf:no/where: no/where cannot be had \(HTTP 404\)"):
        fetch("hf:no/where", 0, tmp_path, endpoint=server.url)
    with pytest.raises(DataError, match=r"HTTP 404"):
        fetch("hf:someone/texts@v9", 0, tmp_path, endpoint=server.url)
    server.close()
    with pytest.raises(DataError, match=r"someone/other cannot be had \((?!HTTP)"):
        fetch("hf:someone/other", 0, tmp_path, endpoint=server.url)


def test_a_full_disk_is_said_before_and_while(server, tmp_path, monkeypatch):
    fetch(SOURCE, 1, tmp_path, endpoint=server.url)
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(DataError, match=r"1e-08 GB are free, .* are needed; choose another --cache-dir"):
            fetch(SOURCE, 0, tmp_path, endpoint=server.url)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(DataError, match="No space left on device; what was complete is kept"):
        fetch(SOURCE, 0, tmp_path, endpoint=server.url)


def test_a_download_killed_half_way_goes_on(server, tmp_path):
    """kill -9 while the second file comes slowly; the bytes that were there are not asked for again."""
    server.pause, server.faults = 0.5, {f"data/{i:03d}.parquet": ["slow"] for i in range(1, 6)}
    code = f"""
import huggingface_hub.constants
from pathlib import Path
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
from jaxchat.data.hub import fetch
fetch({SOURCE!r}, 0, Path({str(tmp_path)!r}), endpoint={server.url!r})
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    end = time.monotonic() + 60
    while not any(p.stat().st_size for p in tmp_path.rglob(".*.part")) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    process.wait()
    server.faults = {}
    found = fetch(SOURCE, 0, tmp_path, endpoint=server.url)
    assert [p.read_bytes() for p in found] == [FILES[f"data/{i:03d}.parquet"] for i in range(6)]
    reaches = [reach for name in FILES for _, reach in server.gets(name.rpartition("/")[2]) if reach]
    assert reaches and all(int(reach[6:-1]) > 0 for reach in reaches)


def test_a_mirror_is_read_and_nobody_asked(tmp_path):
    folder = tmp_path / "mirror" / "someone" / "texts" / "data"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i:03d}.parquet").write_bytes(FILES[f"data/{i:03d}.parquet"])
    (folder.parent / "README.md").write_text("# not a document")
    for mirror in (tmp_path / "mirror", folder.parent):
        assert names(fetch("hf:someone/texts", 0, tmp_path / "none", str(mirror))) == [
            f"{i:03d}.parquet" for i in range(3)
        ]
    one = text_size(folder / "000.parquet")
    assert len(fetch(SOURCE, one, tmp_path / "none", str(tmp_path / "mirror"))) == 2  # with the margin
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match=r"no file matches '\*\.txt' in data\.mirror .*the first: data/000\.parquet"):
        fetch("hf:someone/texts:*.txt", 0, tmp_path, str(tmp_path / "mirror"))
    with pytest.raises(DataError, match="is no folder"):
        fetch(SOURCE, 0, tmp_path, str(tmp_path / "nowhere"))
    data = DataConfig(source="hf:someone/texts", mirror=str(tmp_path / "mirror"), text_bytes=0)
    assert len(list(iterate_documents(data))) == 600


@pytest.mark.parametrize(
    "source", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/b:", "hf:a /b", "hf:a/../b", "hf:https://x/y"]
)
def test_a_malformed_source_is_refused(source):
    with pytest.raises(UsageError, match=r"data\.source: .*write hf:OWNER/NAME"):
        corpus.parse(source)


def test_a_source_is_read():
    assert parse("hf:a/b") == hub.HubSource("a/b", "main", "")
    assert parse("hf:a-1/b.c@v1.0:data/x_[0-9]*.parquet") == hub.HubSource("a-1/b.c", "v1.0", "data/x_[0-9]*.parquet")


def test_of_two_forms_of_the_same_text_one_is_taken(tmp_path):
    folder = tmp_path / "some" / "one"
    for name in ("a.txt", "data/b.jsonl", "data/c.parquet", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(FILES["data/000.parquet"] if name.endswith("parquet") else b"text")
    for name in ("c.parquet", "b.jsonl", "a.txt"):
        assert names(fetch("hf:some/one", 0, tmp_path, str(tmp_path))) == [name]
        next(tmp_path.rglob(name)).unlink()
    with pytest.raises(DataError, match="of 0 files of a known kind the first: none at all"):
        fetch("hf:some/one", 0, tmp_path, str(tmp_path))
    with pytest.raises(DataError, match=r"data\.mirror: .*some/other is not there; put the files of hf:some/other"):
        fetch("hf:some/other", 0, tmp_path, str(tmp_path))  # never another repository's files


def test_files_without_text_are_told_from_the_first(server, tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"content": ["text"] * 50}), sink)
    server.files["data/000.parquet"] = sink.getvalue()
    with pytest.raises(DataError, match=r"000\.parquet: no column `text` \(it has content\)"):
        fetch(SOURCE, 10_000, tmp_path, endpoint=server.url)
    assert not server.gets("001.parquet")


def test_small_files_are_compared_with_gits_hash(server, tmp_path):
    server.small = {"data/000.parquet"}
    server.faults["data/000.parquet"] = ["wrong"]
    (path,) = fetch("hf:someone/texts:data/000*", 0, tmp_path, endpoint=server.url)
    assert path.read_bytes() == FILES["data/000.parquet"] and len(server.gets("000.parquet")) == 2
    path.write_bytes(path.read_bytes()[:-1])  # shortened since
    (path,) = fetch("hf:someone/texts:data/000*", 0, tmp_path, endpoint=server.url)
    assert path.read_bytes() == FILES["data/000.parquet"]


def test_one_that_is_gone_stops_the_slow_ones(server, tmp_path):
    server.pause = 3.0
    server.faults = {f"data/{i:03d}.parquet": ["slow"] for i in (2, 3, 4)} | {"data/001.parquet": ["404"]}
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"001\.parquet cannot be had"):
        fetch(SOURCE, 0, tmp_path, endpoint=server.url)
    assert time.monotonic() - begin < 12  # eight pieces of three seconds would be 24
