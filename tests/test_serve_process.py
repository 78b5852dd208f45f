"""`launch.py --serve` as a process: loading, ready, stopped by a signal; and what keeps it from starting."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from live_service import live, slowed
from small_model import GREETING, write_run

from jaxchat.engine import trained_stages
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import RunDir
from serve.app import bind

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(run_dir, port, *more, **options):
    command = [sys.executable, ROOT / "launch.py", "--run-dir", str(run_dir), "--serve", "--port", str(port), *more]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **given)


def until(condition, seconds=120.0):
    begin = time.monotonic()
    while True:
        try:
            found = condition()
        except httpx.TransportError:
            found = None
        if found:
            return found
        assert time.monotonic() < begin + seconds
        time.sleep(0.1)


def test_from_start_to_drained_end(run):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = start(run.root, port, "--set", "serve.slots=2", "--set", "serve.max_tokens=120")
    try:
        first = until(lambda: httpx.get(f"{url}/health"))
        assert (first.status_code, first.json()["status"]) == (503, "loading")
        assert httpx.post(url + CHAT, json={"messages": GREETING}).json()["error"]["code"] == "loading"
        assert httpx.get(url).status_code == 503 and "loading" in httpx.get(url).text
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        answer = httpx.post(url + CHAT, json={"messages": GREETING, "temperature": 0}, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "Hi 🙂 안녕!"
        page = until(lambda: (found := httpx.get(url, timeout=30)).status_code == 200 and found)
        assert '"title":"jaxchat nano"' in page.text
        bodies, ask = [], {"messages": GREETING, "ignore_eos": True, "stream": True, "max_tokens": 110, "n": 8}

        def one():
            with httpx.stream("POST", url + CHAT, json=ask, timeout=60) as stream:
                bodies.append((stream.status_code, b"".join(stream.iter_bytes())))

        clients = [threading.Thread(target=one) for _ in range(12)]
        for client in clients:
            client.start()
        until(lambda: 'num_requests_running{model_name="nano"} 2' in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        health = until(lambda: (found := httpx.get(f"{url}/health")).status_code == 503 and found)
        assert health.json() == {"status": "draining", "page": "ready"}
        refused = httpx.post(url + CHAT, json={"messages": GREETING})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        for client in clients:
            client.join()
        done = [body for status, body in bodies if status == 200]
        late = [body for status, body in bodies if status == 503]  # came after the signal
        assert done and len(done) + len(late) == 12 and all(b'"draining"' in body for body in late)
        assert all(body.endswith(b"data: [DONE]\n\n") for body in done)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "Traceback" not in err and '"event":"draining"' in err and '"event":"stopped"' in err
    finally:
        process.kill()


def test_a_signal_while_loading_ends_it_too(run):
    port = free_port()
    process = start(run.root, port)
    try:
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/health"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in err, err
    finally:
        process.kill()


def test_what_keeps_it_from_starting_is_one_line(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [(run.root, port, 2, "choose another --port"), (tmp_path / "none", 1, 3, "not a run directory")]
        half = RunDir(tmp_path / "half")
        half.config.parent.mkdir()
        half.config.write_bytes(run.config.read_bytes())
        cases.append((half.root, 1, 3, "no trained stage"))
        for process, (_, _, code, message) in [(start(*case[:2]), case) for case in cases]:
            _, err = process.communicate(timeout=60)
            assert process.returncode == code, err
            assert (
                message in err and err.count("error: ") == 1 and "Traceback" not in err and len(err.splitlines()) == 1
            )
        with pytest.raises(UsageError, match="choose another --port"):
            bind("127.0.0.1", port)
    with pytest.raises(UsageError):
        bind("127.0.0.1", 70_000)
    with pytest.raises(UsageError):
        bind("no.such.host.invalid", 80)
    with pytest.raises(DataError, match="no trained stage"):
        trained_stages(half)


def test_a_damaged_run_is_one_line_too(run, tmp_path):
    """It is found while loading: the port is open already."""
    half = RunDir(tmp_path / "damaged")
    half.config.parent.mkdir()
    half.config.write_bytes(run.config.read_bytes())
    (half.stage("sft") / "1").mkdir(parents=True)
    process = start(half.root, free_port())
    _, err = process.communicate(timeout=100)
    assert process.returncode == 3 and "Traceback" not in err, err
    assert err.count("error: ") == 1


def test_draining_ends_by_its_limit():
    with live(drain_seconds=0.5) as service:
        service.post(CHAT, {"messages": GREETING})  # compiles
        body = {"messages": GREETING, "ignore_eos": True}
        with slowed(service.worker, 0.2), service.stream(CHAT, body) as stream:
            chunks = stream.iter_bytes()
            next(chunks)
            begin = time.monotonic()
            service.server.handle_exit(signal.SIGTERM, None)
            rest = b"".join(chunks)
            assert 0.3 < time.monotonic() - begin < 5
            assert b'"code":"engine_dead"' in rest and rest.endswith(b"data: [DONE]\n\n")
        assert service.worker.state == "dead"
