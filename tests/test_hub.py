"""Downloads against a real server that misbehaves: verified, kept, as many as needed; archives; mirrors; task files."""

import errno
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, FakeHub

from jaxchat.config import DataConfig
from jaxchat.data import hub as module
from jaxchat.data import sources
from jaxchat.data.hub import Archive, HubFiles
from jaxchat.data.sources import count_rows, hub_files, parse_hub, read_records, text_size
from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.base import MissingData, TaskFiles, listing, parse_rows, sample

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
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    with FakeHub(FILES) as server:
        yield server


def names(paths):
    return [path.name for path in paths]


def check_all(paths):
    assert [p.read_bytes() for p in paths] == [FILES[f"data/{i:03d}.parquet"] for i in range(6)]


def test_files_are_downloaded_once_and_verified_then_read_without_a_network(server, tmp_path, capsys):
    paths = hub_files(SOURCE, 0, tmp_path, endpoint=server.url)
    check_all(paths)
    assert "texts at 01234567: 6 of 6 files; 6 to download, " in capsys.readouterr().err
    mark = json.loads(paths[0].with_name("000.parquet.verified.json").read_text())
    assert mark == {"sha256": server.digest("data/000.parquet"), "size": len(FILES["data/000.parquet"])}
    asked = len(server.asked)
    server.close()
    assert hub_files(SOURCE, 0, tmp_path, endpoint=server.url) == paths and len(server.asked) == asked
    assert capsys.readouterr().err == ""


def test_no_more_files_than_the_text_needs(server, tmp_path, capsys):
    one = text_size(hub_files(SOURCE, 1, tmp_path, endpoint=server.url)[0])
    true = sum(len(t) for t in pq.read_table(io.BytesIO(FILES["data/000.parquet"]))["text"].to_pylist())
    assert 0.9 * true < one < 1.3 * true
    paths = hub_files(SOURCE, round(2.5 * one), tmp_path, endpoint=server.url)
    assert names(paths) == [f"{i:03d}.parquet" for i in range(3)]
    assert "3 of 6 files; " in capsys.readouterr().err
    assert len(hub_files(SOURCE, 100 * one, tmp_path, endpoint=server.url)) == 6  # all there are


def test_a_branch_keeps_the_commit_it_had(server, tmp_path):
    paths = hub_files("hf:someone/texts:data/00[01]*", 0, tmp_path, endpoint=server.url)
    assert names(paths) == ["000.parquet", "001.parquet"]
    assert json.loads((paths[0].parents[1] / "commit.json").read_text()) == COMMIT
    server.close()
    assert hub_files("hf:someone/texts:data/00[01]*", 0, tmp_path, endpoint=server.url) == paths


@pytest.mark.parametrize("fault", ["429", "503", "drop", "wrong", "slow"])
def test_passing_faults_are_survived(server, tmp_path, fault):
    server.faults = {name: [fault] for name in FILES} | {"api": [fault] * 2 if fault.isdigit() else []}
    check_all(hub_files(SOURCE, 0, tmp_path, endpoint=server.url))


@pytest.mark.parametrize("fault", ["500", "wrong"])
def test_lasting_faults_are_named_with_what_to_do(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(module, "TRIES", 3)
    server.faults["data/002.parquet"] = [fault] * 99
    with pytest.raises(DataError) as caught:
        hub_files(SOURCE, 0, tmp_path, endpoint=server.url)
    text = str(caught.value)
    assert "data/002.parquet could not be downloaded" in text and "data.mirror" in text and COMMIT[:8] in text
    assert "\n" not in text
    kept = [path.name for path in tmp_path.rglob("*.verified.json")]
    assert kept and not any("002" in name for name in kept)
    server.faults, before = {}, len(server.gets("000.parquet"))
    check_all(hub_files(SOURCE, 0, tmp_path, endpoint=server.url))
    assert len(server.gets("000.parquet")) == before  # not a second time


def test_missing_things_are_named_at_once(server, tmp_path):
    server.faults["data/001.parquet"] = ["404"] * 9
    with pytest.raises(DataError, match=r"data/001\.parquet could not be downloaded \(.*404"):
        hub_files(SOURCE, 0, tmp_path, endpoint=server.url)
    assert len(server.gets("001.parquet")) == 1
    with pytest.raises(DataError, match=r"hf:no/where could not be downloaded \(.*404"):
        hub_files("hf:no/where", 0, tmp_path, endpoint=server.url)
    with pytest.raises(DataError, match="404.* v9"):
        hub_files("hf:someone/texts@v9", 0, tmp_path, endpoint=server.url)


@pytest.mark.parametrize("token", ["", "hf_mine"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [("403 GatedRepo", "accept its terms on {page}"), ("401 RepoNotFound", "{page}"), ("403 Other", "{page}")],
)
def test_a_closed_door_is_named_with_the_step_that_opens_it(server, tmp_path, monkeypatch, token, fault, words):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    for place, source in (("api", "hf:someone/texts"), ("data/000.parquet", SOURCE)):
        server.faults = {place: [fault]}
        with pytest.raises(DataError) as caught:
            hub_files(source, 1, tmp_path, endpoint=server.url)
        text = str(caught.value)
        assert words.format(page=f"{server.url}/datasets/someone/texts") in text and "Said by the hub" in text
        assert ("HF_TOKEN" in text) == (not token) and ("your token has no access" in text) == bool(token)
        assert "same command" not in text and not server.faults[place]


def test_an_unreachable_hub_is_named(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    server.close()
    with pytest.raises(DataError, match="someone/other could not be downloaded"):
        hub_files("hf:someone/other", 0, tmp_path, endpoint=server.url)


def test_an_unreachable_hub_is_asked_for_a_known_commit_without_the_waits_of_the_client(server, tmp_path, caplog):
    server.close()
    begin = time.monotonic()
    with pytest.raises(DataError, match="someone/other could not be downloaded"):
        hub_files(f"hf:someone/other@{'a' * 40}", 0, tmp_path, endpoint=server.url)
    assert time.monotonic() - begin < 5 and not caplog.records


def test_a_full_disk_is_noticed_before_and_during_a_download(server, tmp_path, monkeypatch):
    hub_files(SOURCE, 1, tmp_path, endpoint=server.url)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(DataError, match=r"1e-08 GB are free, .* are needed; choose another --cache-dir"):
            hub_files(SOURCE, 0, tmp_path, endpoint=server.url)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", full)
    with pytest.raises(DataError, match="No space left on device; complete files are kept"):
        hub_files(SOURCE, 0, tmp_path, endpoint=server.url)


def test_after_kill_9_the_same_call_completes(server, tmp_path):
    server.pause, server.faults = 0.5, {f"data/{i:03d}.parquet": ["slow"] for i in range(1, 6)}
    code = "from pathlib import Path\nfrom jaxchat.data.sources import hub_files\n"
    code += f"hub_files({SOURCE!r}, 0, Path({str(tmp_path)!r}), endpoint={server.url!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(server, tmp_path))
    end = time.monotonic() + 60
    while not list(tmp_path.rglob("000.parquet.verified.json")) and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.wait()
    server.faults = {}
    check_all(hub_files(SOURCE, 0, tmp_path, endpoint=server.url))
    assert len(server.gets("000.parquet")) == 1


def test_small_files_are_compared_with_gits_hash_and_damaged_ones_replaced(server, tmp_path):
    server.small = {"data/000.parquet"}
    server.faults["data/000.parquet"] = ["wrong"]
    (path,) = hub_files("hf:someone/texts:data/000*", 0, tmp_path, endpoint=server.url)
    assert path.read_bytes() == FILES["data/000.parquet"] and len(server.gets("000.parquet")) == 2
    path.write_bytes(path.read_bytes()[:-1])  # shortened since
    (path,) = hub_files("hf:someone/texts:data/000*", 0, tmp_path, endpoint=server.url)
    assert path.read_bytes() == FILES["data/000.parquet"]


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (pa.table({"content": ["text"] * 50}), r"no column `text` \(it has content\)"),
        (pa.schema({"text": pa.string()}).empty_table(), "no text"),
    ],
)
def test_a_first_file_without_text_is_named_and_no_other_fetched(server, tmp_path, table, fault):
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as file:
        for batch in table.to_batches():
            file.write_batch(batch)
    server.files["data/000.parquet"] = sink.getvalue()
    with pytest.raises(DataError, match=rf"000\.parquet: {fault}"):
        hub_files(SOURCE, 10_000, tmp_path, endpoint=server.url)
    assert not server.gets("001.parquet")


# sources and mirrors


@pytest.mark.parametrize(
    "source", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/b:", "hf:a /b", "hf:a/../b", "hf:https://x/y"]
)
def test_a_malformed_source_is_refused(source):
    with pytest.raises(UsageError, match=r"data\.source: .*hf:OWNER/NAME"):
        sources.parse(source)


def test_a_source_is_parsed():
    assert parse_hub("hf:a/b") == ("a/b", "main", "")
    assert parse_hub("hf:a-1/b.c@v1.0:data/x_[0-9]*.parquet") == ("a-1/b.c", "v1.0", "data/x_[0-9]*.parquet")


def test_a_mirror_is_read_without_any_request(tmp_path):
    folder = tmp_path / "mirror" / "someone" / "texts" / "data"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i:03d}.parquet").write_bytes(FILES[f"data/{i:03d}.parquet"])
    (folder.parent / "README.md").write_text("# not a document")
    for mirror in (tmp_path / "mirror", folder.parent):
        paths = hub_files("hf:someone/texts", 0, tmp_path / "none", str(mirror))
        assert names(paths) == [f"{i:03d}.parquet" for i in range(3)]
    one = text_size(folder / "000.parquet")
    assert len(hub_files(SOURCE, one, tmp_path / "none", str(tmp_path / "mirror"))) == 2  # with the margin
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match=r"'\*\.txt'.*data/000\.parquet"):
        hub_files("hf:someone/texts:*.txt", 0, tmp_path, str(tmp_path / "mirror"))
    with pytest.raises(DataError, match="data.mirror: no folder"):
        hub_files(SOURCE, 0, tmp_path, str(tmp_path / "nowhere"))
    data = DataConfig(source="hf:someone/texts", mirror=str(tmp_path / "mirror"), text_bytes=0)
    assert len(list(sources.iterate_documents(data))) == 600


def test_of_two_forms_of_the_same_text_one_is_taken(tmp_path):
    folder = tmp_path / "some" / "one"
    for name in ("a.txt", "data/b.jsonl", "data/c.parquet", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(FILES["data/000.parquet"] if name.endswith("parquet") else b"text")
    for name in ("c.parquet", "b.jsonl", "a.txt"):
        assert names(hub_files("hf:some/one", 0, tmp_path, str(tmp_path))) == [name]
        next(tmp_path.rglob(name)).unlink()
    (folder / "c.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"\.jsonl.*c\.csv"):
        hub_files("hf:some/one", 0, tmp_path, str(tmp_path))
    with pytest.raises(DataError, match=r"data\.mirror: no folder .*some/other"):
        hub_files("hf:some/other", 0, tmp_path, str(tmp_path))  # never another repository's files


# files of tasks


HUB = HubFiles("someone/questions", COMMIT, ("all/test.jsonl", "all/more.jsonl"))
FETCH = """
import sys
from pathlib import Path
from jaxchat.data import hub
from jaxchat.tasks.base import MissingData, TaskFiles
hub.FIRST_WAIT = 0.01
source = hub.HubFiles("someone/questions", sys.argv[2], ("all/test.jsonl", "all/more.jsonl"))
try:
    for path in TaskFiles(download=True, cache=Path(sys.argv[1])).find(("nothing",), source):
        print(path.stat().st_size)
except MissingData as error:
    print("missing:", error)
"""


def environment(server, cache):
    """HF_ENDPOINT is read when the hub's client is imported, so it needs a new process."""
    return os.environ | {
        "HF_ENDPOINT": server.url, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(cache / "home"),
    }  # fmt: skip


def start_fetch(server, cache, revision=COMMIT):
    command = [sys.executable, "-c", FETCH, str(cache), revision]
    return subprocess.Popen(command, env=environment(server, cache), text=True, stdout=-1, stderr=-1)


def output(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split("\n")[:-1]


def test_of_two_processes_one_downloads(tmp_path):
    with FakeHub({name: name.encode() * 1000 for name in HUB.files}, HUB.repo) as server:
        both = [start_fetch(server, tmp_path), start_fetch(server, tmp_path)]
        assert [output(process) for process in both] == [["14000", "14000"]] * 2
        assert len(server.gets("test.jsonl")) == len(server.gets("more.jsonl")) == 1
        (line,) = output(start_fetch(server, tmp_path, "f" * 40))
        assert line.startswith("missing: ") and "the download failed: " in line
        server.close()
        assert output(start_fetch(server, tmp_path)) == ["14000", "14000"]  # without any request


def test_the_first_pattern_that_matches_wins(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    files = TaskFiles(str(tmp_path))
    assert names(files.find(("*.parquet", "*.jsonl", "**/*.csv"))) == ["a.jsonl", "b.jsonl"]
    assert names(files.find(("**/*.csv",))) == ["c.csv"]


def test_a_missing_file_is_named_with_where_to_get_it(tmp_path):
    with pytest.raises(MissingData, match=r"no file x\.csv found; .*all/test.jsonl .*someone/questions.*01234567"):
        TaskFiles(str(tmp_path)).find(("x.csv",), HUB)
    with pytest.raises(MissingData, match="set tasks.data_dir to it"):
        TaskFiles().find(("x.csv",), HUB)
    with pytest.raises(MissingData, match="unpack https://x/y.zip and put it into"):
        TaskFiles(str(tmp_path)).find(("x.csv",), Archive("https://x/y.zip", (".csv",)))
    with pytest.raises(MissingData, match="is no directory"):
        TaskFiles(str(tmp_path / "nowhere")).find(("x.csv",), HUB)


def test_rows_are_parsed_and_a_bad_one_named(tmp_path):
    path, table, broken = (tmp_path / name for name in ("a.jsonl", "a.parquet", "broken.parquet"))
    path.write_text('{"a": "one\u2028line"}\n\n{"a": 2}', encoding="utf-8")
    assert list(read_records(path)) == [(f"{path}:1", {"a": "one\u2028line"}), (f"{path}:3", {"a": 2})]
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*TypeError"):
        parse_rows(path, lambda row: len(row["a"]))
    pq.write_table(pa.table({"a": list(range(3000)), "b": ["x"] * 3000}), table)
    assert (
        list(read_records(table, columns=["a"]))[2999] == (f"{table}:3000", {"a": 2999}) and count_rows(table) == 3000
    )
    broken.write_bytes(b"PAR1 nothing PAR1")
    for bad, words in ((table, "no column `c`"), (broken, "broken")):
        with pytest.raises(DataError, match=words):
            list(read_records(bad, columns=["c"]))


def test_a_sample_is_the_same_for_the_same_seed():
    assert list(sample(range(4), None, 0)) == list(sample(range(4), 99, 2)) == [0, 1, 2, 3]
    some = sample(range(10), 3, 5)
    assert some == sample(range(10), 3, 5) != sample(range(10), 3, 6) and len(set(some)) == 3


def test_a_changed_mirror_is_noticed(tmp_path):
    assert listing("") == listing(str(tmp_path / "none")) == ""
    before = listing(str(tmp_path))
    (tmp_path / "copa.jsonl").write_text("{}\n")
    assert before != listing(str(tmp_path)) == listing(str(tmp_path))


# archives


class Response(io.BytesIO):
    headers: ClassVar[dict[str, str]] = {}


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Put members into the archive that is served; returns a function that asks for one of them."""
    asked = []

    def ask(members, pattern="**/a.jsonl", url="https://somewhere/bundle.zip"):
        data = zipped(members)
        monkeypatch.setattr(module.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Response(data))
        return TaskFiles(download=True, cache=tmp_path / "cache").find((pattern,), Archive(url, (".jsonl",)))

    ask.asked = asked
    return ask


def test_an_archive_is_downloaded_once_and_verified(archive, tmp_path):
    members = {"bundle/a.jsonl": '{"a": 1}\n', "bundle/run.sh": "rm", "__MACOSX/bundle/._a.jsonl": "x"}
    with pytest.raises(MissingData, match="only https"):
        archive(members, url="http://somewhere/bundle.zip")
    (path,) = archive(members)
    assert path.read_text() == '{"a": 1}\n'
    unpacked = [p.relative_to(tmp_path / "cache" / "bundle").as_posix() for p in path.parents[1].rglob("*")]
    assert sorted(unpacked) == ["bundle", "bundle/a.jsonl", "source.json"]
    count = len(archive.asked)
    assert archive(members) == [path] and len(archive.asked) == count
    with pytest.raises(MissingData, match="holds none of b.jsonl"):
        archive(members, "b.jsonl")


@pytest.mark.parametrize("name", ["../out.jsonl", "/out.jsonl", "a/../../out.jsonl", "a\\..\\out.jsonl"])
def test_members_stay_inside(archive, tmp_path, name):
    archive({"a.jsonl": "{}", name: "{}"})
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"bundle", "bundle.lock"}


def test_a_giant_archive_is_refused_and_a_broken_one_named(archive, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_ARCHIVE", 10_000)
    with pytest.raises(MissingData, match="unpacks to more than"):
        archive({"a.jsonl": " " * 20_000})
    for broken in (
        b"PK nothing",
        zipped({"a.jsonl": "text"})[:-30],
        zipped({"a.jsonl": "text"}).replace(b"text", b"next"),
    ):
        monkeypatch.setattr(sys.modules[__name__], "zipped", lambda members, broken=broken: broken)
        with pytest.raises(MissingData, match="not a whole zip file"):
            archive({})
