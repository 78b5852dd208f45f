"""Data sets from a mirror, and downloads against real local servers: pinned, verified, resumed, one at a time."""

import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, FakeHub

from jaxchat.errors import DataError
from jaxchat.tasks import files as module
from jaxchat.tasks.base import drawn
from jaxchat.tasks.files import Archive, HubFiles, MissingData, TaskFiles, count_rows, listing, read_jsonl, read_parquet

ROOT = Path(__file__).resolve().parent.parent
HUB = HubFiles("someone/questions", COMMIT, ("all/test.jsonl", "all/more.jsonl"))
SHA = {name: hashlib.sha256(name.encode() * 1000).hexdigest() for name in HUB.files}


def test_the_first_pattern_that_matches_wins(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    files = TaskFiles(str(tmp_path))
    assert [p.name for p in files.find(("*.parquet", "*.jsonl", "**/*.csv"))] == ["a.jsonl", "b.jsonl"]
    assert [p.name for p in files.find(("**/*.csv",))] == ["c.csv"]


def test_what_is_missing_says_which_file_and_where_to_put_it(tmp_path):
    with pytest.raises(MissingData, match=r"no file x\.csv at hand; get all/test.jsonl, .*someone/questions.*01234567"):
        TaskFiles(str(tmp_path)).find(("x.csv",), HUB)
    with pytest.raises(MissingData, match="set tasks.data_dir to that"):
        TaskFiles().find(("x.csv",), HUB)
    with pytest.raises(MissingData, match="unpack https://x/y.zip and put it into"):
        TaskFiles(str(tmp_path)).find(("x.csv",), Archive("https://x/y.zip", (".csv",)))
    with pytest.raises(MissingData, match="is no directory"):
        TaskFiles(str(tmp_path / "nowhere")).find(("x.csv",), HUB)


def test_lines_are_told_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "one\u2028line"}\n\n{"a": 2}', encoding="utf-8")
    assert list(read_jsonl(path)) == [(1, {"a": "one\u2028line"}), (3, {"a": 2})]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "deep", "list"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"a": "%s"}\n' % bytes(range(97, 123)) * 20)
    if damage == "flipped":
        for place in range(10, len(whole), 3):  # wherever it is: named, or found by no checksum
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
            with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
                list(read_jsonl(path))
        return
    text = {"empty": b"\n \n", "deep": b"[" * 100_000, "list": b"[]"}.get(damage, b"")
    path.write_bytes(whole[:-9] if damage == "cut" else gzip.compress(text))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz"):
        list(read_jsonl(path))


def test_tables(tmp_path):
    path, empty, broken = (tmp_path / name for name in ("a.parquet", "empty.parquet", "broken.parquet"))
    pq.write_table(pa.table({"a": list(range(3000)), "b": ["x"] * 3000}), path)
    pq.write_table(pa.table({"a": pa.array([], pa.int32())}), empty)
    broken.write_bytes(b"PAR1 nothing PAR1")
    assert [n for n, row in read_parquet(path, ["a"]) if row == {"a": n - 1}] == list(range(1, 3001))
    assert count_rows(path) == 3000
    for bad, columns, said in (
        (path, ["c"], "no column c; it has a, b"),
        (empty, ["a"], "no rows"),
        (broken, ["a"], "broken"),
    ):
        with pytest.raises(DataError, match=said):
            list(read_parquet(bad, columns))
    with pytest.raises(DataError, match="broken"):
        count_rows(broken)


def test_more_than_there_is_takes_all():
    assert list(drawn(None, 4, 0)) == list(drawn(4, 4, 1)) == list(drawn(99, 4, 2)) == [0, 1, 2, 3]
    some = drawn(3, 10, 5)
    assert some == drawn(3, 10, 5) != drawn(3, 10, 6) and len(set(some)) == 3


class Web(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` under one name, by ranges; sends only `server.cut` bytes of an answer once."""

    def do_GET(self):
        server, body, first = self.server, self.server.content, 0
        server.asked.append(self.headers.get("Range"))
        if self.headers.get("Range") and self.headers.get("If-Range") == server.etag:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if first >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if first else 200)
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        self.wfile.write(body[first : first + server.cut] if server.cut else body[first:])
        server.cut = 0

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.content, server.etag, server.cut, server.asked = b"0123456789" * 1000, '"first"', 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/bundle.zip"
    yield server
    server.shutdown()


def test_a_download_that_breaks_off_goes_on(web, tmp_path):
    part, tag = tmp_path / "x.part", tmp_path / "x.etag"
    web.cut = 4321
    with pytest.raises((ValueError, OSError), match="4321 bytes came of 10000"):
        module._fetch_web(web.url, part, tag)
    assert part.stat().st_size == 4321
    facts = module._fetch_web(web.url, part, tag)
    assert web.asked == [None, "bytes=4321-"] and part.read_bytes() == web.content
    assert facts == {"url": web.url, "size": 10000, "sha256": hashlib.sha256(web.content).hexdigest()}
    assert module._fetch_web(web.url, part, tag) == facts  # whole already, but not yet unpacked
    web.content, web.etag = b"another file", '"second"'
    part.write_bytes(b"0123")
    module._fetch_web(web.url, part, tag)
    assert part.read_bytes() == b"another file"  # the rest of one file is not put behind the beginning of another


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


def test_only_wanted_members_are_unpacked(tmp_path):
    archive = tmp_path / "bundle.zip"
    archive.write_bytes(zipped({"b/a.jsonl": "{}", "b/run.sh": "rm", "__MACOSX/b/._a.jsonl": "x"}))
    module._unpack(archive, (".jsonl",), tmp_path / "bundle", {"sha256": "s"})
    found = sorted(p.relative_to(tmp_path / "bundle").as_posix() for p in (tmp_path / "bundle").rglob("*"))
    assert found == ["b", "b/a.jsonl", "source.json"]


@pytest.mark.parametrize("name", ["../out.jsonl", "/out.jsonl", "a/../../out.jsonl", "a\\..\\out.jsonl"])
def test_a_member_that_leads_outside_is_refused(tmp_path, name):
    archive = tmp_path / "in" / "bundle.zip"
    archive.parent.mkdir()
    archive.write_bytes(zipped({"good.jsonl": "{}", name: "{}"}))
    with pytest.raises(ValueError, match="leads outside"):
        module._unpack(archive, (".jsonl",), archive.parent / "bundle", {})
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "bundle.zip"]


def test_a_giant_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_BUNDLE", 10_000)
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.jsonl", " " * 20_000)
    with pytest.raises(ValueError, match="unpacks to more than"):
        module._unpack(archive, (".jsonl",), tmp_path / "bundle", {})


def test_an_archive_is_taken_over_https_only_and_compared(web, tmp_path, monkeypatch):
    files = TaskFiles(download=True, cache=tmp_path)
    with pytest.raises(MissingData, match="only https is taken"):
        files.find(("a.jsonl",), Archive(web.url, (".jsonl",)))
    web.content = zipped({"bundle/a.jsonl": '{"a": 1}\n'})
    plain = module._fetch_web  # what stands between is the certificate of a server that no test has
    monkeypatch.setattr(module, "_fetch_web", lambda url, part, tag: plain(web.url, part, tag))
    url = "https://somewhere/bundle.zip"
    with pytest.raises(
        MissingData, match=r"its SHA-256 is .*, not 0000.*the download failed|the download failed.*not 0"
    ):
        files.find(("**/a.jsonl",), Archive(url, (".jsonl",), "0" * 64))
    assert not list(tmp_path.glob("*.part"))
    digest = hashlib.sha256(web.content).hexdigest()
    (found,) = files.find(("**/a.jsonl",), Archive(url, (".jsonl",), digest))
    assert found.read_text() == '{"a": 1}\n'
    assert json.loads((tmp_path / "bundle" / "source.json").read_text())["sha256"] == digest
    asked = len(web.asked)
    assert files.find(("**/a.jsonl",), Archive(url, (".jsonl",))) == [found] and len(web.asked) == asked
    with pytest.raises(MissingData, match="holds none of b.jsonl"):
        files.find(("b.jsonl",), Archive(url, (".jsonl",)))


FETCH = """
import sys
from pathlib import Path
from jaxchat.data import hub_files
from jaxchat.tasks.files import HubFiles, MissingData, TaskFiles
hub_files.FIRST_WAIT = 0.01
source = HubFiles("someone/questions", sys.argv[2], ("all/test.jsonl", "all/more.jsonl"))
try:
    for path in TaskFiles(download=True, cache=Path(sys.argv[1])).find(("nothing",), source):
        print(path.stat().st_size)
except MissingData as error:
    print("missing:", error)
"""


@pytest.fixture
def hub():
    with FakeHub({name: name.encode() * 1000 for name in HUB.files}, HUB.repo) as server:
        server.small.add(HUB.files[1])
        yield server


def start_fetch(hub, cache, revision=COMMIT):
    """In a process of its own: the hub's client reads HF_ENDPOINT when it is imported."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(cache / "home"),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(cache), revision], env=env, text=True, stdout=-1, stderr=-1
    )  # fmt: skip


def said(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split("\n")[:-1]


def test_the_hubs_files_come_once_and_are_compared_with_its_digests(hub, tmp_path):
    both = [start_fetch(hub, tmp_path), start_fetch(hub, tmp_path)]  # two processes, one download
    assert [said(process) for process in both] == [["14000", "14000"]] * 2
    assert sorted(path.rpartition(COMMIT)[2] for _, path, _ in hub.asked if "/resolve/" in path) == [
        "/all/more.jsonl", "/all/test.jsonl",
    ]  # fmt: skip
    mark = json.loads(next(tmp_path.rglob("test.jsonl.verified.json")).read_text())
    assert mark == {"sha256": SHA["all/test.jsonl"], "size": 14000, "compared_with": "sha256", "commit": COMMIT}
    assert json.loads(next(tmp_path.rglob("more.jsonl.verified.json")).read_text())["compared_with"] == "git"
    hub.close()
    assert said(start_fetch(hub, tmp_path)) == ["14000", "14000"]  # nothing is asked any more


def test_a_file_that_is_not_the_hubs_is_thrown_away(hub, tmp_path):
    hub.lie = True
    (line,) = said(start_fetch(hub, tmp_path))
    assert line.startswith("missing: no file nothing at hand; get all/test.jsonl")
    assert "came damaged, and was thrown away" in line
    assert not list(tmp_path.rglob("*.verified.json"))
    hub.lie = False
    assert said(start_fetch(hub, tmp_path, "main")) == ["14000", "14000"]  # a branch: at the commit that it names
    assert json.loads(next(tmp_path.rglob("test.jsonl.verified.json")).read_text())["commit"] == COMMIT


def test_a_hub_that_does_not_answer_is_one_line(hub, tmp_path):
    (line,) = said(start_fetch(hub, tmp_path, "f" * 40))
    assert line.startswith("missing: ") and "the download failed: " in line


def test_a_mirror_that_changed_is_seen(tmp_path):
    assert listing("") == listing(str(tmp_path / "none")) == ""
    (tmp_path / "core").mkdir()
    before = listing(str(tmp_path))
    (tmp_path / "core" / "copa.jsonl").write_text("{}\n")
    after = listing(str(tmp_path))
    assert before != after == listing(str(tmp_path))
