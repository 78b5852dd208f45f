"""The page that follows a run: what it reads while another process writes, whom it answers, and the lens."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from whole_run import ROOT, arguments, start

from jaxchat.checkpoint import restore_params
from jaxchat.config import load_config
from jaxchat.errors import UsageError
from jaxchat.lens import lens
from jaxchat.log import MetricsFile
from jaxchat.model import hidden, logits
from jaxchat.run_dir import RunDir
from serve.watch import POINTS, Curves, Lines, Watch, Watched, watch


def client(root, beside=None, keys=(), base_url="http://127.0.0.1"):
    return TestClient(Watch(root, beside, keys, "127.0.0.1"), base_url=base_url, follow_redirects=False)


def read(lines):
    lines.read()
    return lines.records


def test_lines_that_are_cut_wait_for_their_rest(tmp_path):
    lines = Lines(tmp_path / "x.jsonl")
    assert read(lines) == []
    lines.path.write_text('{"a": 1}\n{"a"')
    assert read(lines) == [{"a": 1}]
    with open(lines.path, "a") as file:
        file.write(': 2}\nnot json\n{"a": 3}\n')
    assert read(lines) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize("replace", [True, False], ids=["replaced", "shortened"])
def test_a_file_that_begins_anew_is_read_anew(tmp_path, replace):
    lines = Lines(tmp_path / "x.jsonl")
    lines.path.write_text('{"a": 1}\n{"a": 2}\n')
    assert len(read(lines)) == 2
    if replace:
        (tmp_path / "new").write_text('{"b": 1}\n{"b": 2}\n{"b": 3}\n')
        (tmp_path / "new").rename(lines.path)
    else:
        lines.path.write_text('{"b": 1}\n')
    assert read(lines) == [{"b": i + 1} for i in range(3 if replace else 1)]
    lines.path.unlink()
    assert read(lines) == []


def test_scores_that_are_added_to_the_last_line_are_taken_in_without_reading_all_again(tmp_path):
    curves, seen = Curves(tmp_path / "metrics.jsonl"), []
    metrics = MetricsFile(curves.path)
    curves.add = lambda record: (seen.append(record), Curves.add(curves, record))
    for step in range(3):
        metrics.append({"step": step, "loss": 1.0})
    curves.read()
    metrics.amend({"val_bpb": 2.0})
    metrics.append({"step": 3, "loss": 2.0})
    curves.read()
    assert [record["step"] for record in seen] == [0, 1, 2, 2, 3]
    assert curves.points() == {"loss": [[1, 1.0], [2, 1.0], [3, 1.0], [4, 2.0]], "val_bpb": [[3, 2.0]]}
    metrics.truncate_to(1)
    curves.read()
    assert curves.points() == {"loss": [[1, 1.0]]}


def test_curves_have_few_points_that_are_means_and_keep_gaps(tmp_path):
    curves = Curves(tmp_path / "metrics.jsonl")
    n = 10 * POINTS
    losses = [None if i < 32 else float(i) for i in range(n)]
    curves.path.write_text(
        "".join(json.dumps({"step": i, "loss": x, "tokens": i}) + "\n" for i, x in enumerate(losses))
    )
    curves.read()
    points = curves.points()["loss"]
    assert POINTS / 2 < len(points) <= POINTS and points[:3] == [[16, None], [32, None], [48, 39.5]]
    assert points[-1] == [n, n - 8.5] and "tokens" not in curves.points()


def test_a_directory_without_a_run_is_waited_for(tmp_path):
    state = client(tmp_path / "nothing").get("/watch/state").json()
    assert state["status"] == "waiting" and state["stages"] == [] and not state["error"]


def test_the_status_follows_the_messages(tmp_path):
    def after(*messages):
        lines = ({"time": time.time(), "text": ""} | message for message in messages)
        (tmp_path / "messages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Watched(tmp_path).state()["status"]

    begun = {"stage": "pretrain", "stages": ["pretrain"], "usd_per_hour": 24.0}
    assert after(begun, {"text": "a checkpoint"}) == "training"
    assert after(begun, {"text": "not finite", "ended": "failed"}) == "stopped"
    assert after(begun, {"ended": "done"}, {"text": "a summary"}) == "done"
    assert after(begun, {"ended": "done"}, begun) == "training"
    os.utime(tmp_path / "messages.jsonl", (time.time() - 1000,) * 2)
    assert Watched(tmp_path).state()["status"] == "silent"


def test_a_damaged_record_is_said(tmp_path):
    (tmp_path / "stages.json").write_text('{"pretrain": {"format": 99}}')
    assert "format" in client(tmp_path).get("/watch/state").json()["error"]


def test_only_this_machine_or_who_has_a_key(tmp_path):
    assert client(tmp_path, base_url="http://evil.example:8001").get("/watch/state").status_code == 403
    assert client(tmp_path, base_url="http://localhost:8001").get("/watch/state").status_code == 200
    page = Watch(tmp_path, None, [], "127.0.0.1")
    page.chat = JSONResponse("the chat")  # it is for this machine only, too
    for host, code in (("127.0.0.1", 200), ("evil.example", 403)):
        assert TestClient(page, base_url=f"http://{host}").get("/v1/models").status_code == code
    closed = client(tmp_path, keys=["secret"], base_url="http://elsewhere:8001")
    assert closed.get("/watch").status_code == 401
    basic = base64.b64encode(b"anybody:secret").decode()
    assert closed.get("/watch", headers={"Authorization": f"Basic {basic}"}).status_code == 200
    assert closed.get("/watch/state", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert closed.get("/watch/state", headers={"Authorization": "Bearer wrong"}).status_code == 401
    with pytest.raises(UsageError, match="JAXCHAT_API_KEYS"):
        watch(tmp_path, "0.0.0.0", 0, [])


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"stage": "../x", "step": 1, "ids": [1]}', b'{"stage": "base", "step": 1}']
)
def test_a_question_that_is_none_is_refused(tmp_path, body):
    assert client(tmp_path).post("/watch/lens", content=body).status_code == 400


def test_another_sites_page_cannot_ask(tmp_path):
    headers = {"Sec-Fetch-Site": "cross-site"}
    assert client(tmp_path).post("/watch/chat", headers=headers).status_code == 403
    assert client(tmp_path).post("/watch/chat").status_code == 409  # nothing is trained


def test_samples_cannot_leave_the_run(tmp_path):
    (tmp_path / "secret_000001.json").write_text("{}")
    for stage, step in (("..", "1"), ("base/..", "1"), ("base", "-1"), ("base", "x"), ("base", "7")):
        assert client(tmp_path).get("/watch/sample", params={"stage": stage, "step": step}).status_code == 404


def test_the_lens_last_layer_is_the_model_and_attention_sums_to_one(finished):
    run = RunDir(finished)
    config = load_config(run.config).model
    params, _ = restore_params(run.stage("base"))
    ids = [1, 5, 9, 40, 7, 7]
    layers, weights = lens(config, params, ids)
    z = logits(config, params, hidden(config, params, jnp.asarray([ids])))[0, -1]
    expected = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    assert layers.shape == (config.depth, config.vocab_size)
    np.testing.assert_allclose(layers[-1], expected, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert weights.shape == (config.depth, config.n_heads, len(ids))


def test_samples_of_a_step_tell_what_else_could_have_come(finished):
    page = client(finished, beside=finished)
    state = page.get("/watch/state").json()
    assert state["status"] == "done" and state["beside"] == finished.name and state["exams"]["base"]["bits_per_byte"]
    last = max((s for s in state["samples"] if s["folder"] == "base"), key=lambda s: s["step"])
    assert last["kept"] and any(s["step"] == 0 for s in state["samples"])
    sample = page.get("/watch/sample", params={"stage": "base", "step": last["step"]}).json()
    for turn in sample["turns"]:
        tokens = turn["answers"][0]["tokens"]  # at temperature 0
        assert all(token["p"] == token["top"][0][1] for token in tokens) and turn["ids"]
    curves = page.get("/watch/curves", params={"stage": "base"}).json()
    assert curves["run"]["loss"] and curves["run"] == curves["beside"]
    turn = sample["turns"][0]
    ids = turn["ids"] + [token["id"] for token in turn["answers"][0]["tokens"][:2]]
    answer = page.post("/watch/lens", json={"stage": "base", "step": last["step"], "ids": ids}).json()
    best, token = answer["layers"][-1][0], turn["answers"][0]["tokens"][2]
    assert best[1] == pytest.approx(token["p"], abs=2e-3) and best[0] == token["text"]
    gone = page.post("/watch/lens", json={"stage": "base", "step": 99, "ids": ids}).json()
    assert "99" in gone["error"]


@contextlib.contextmanager
def page_of(browser, run, **options):
    """The page in a browser, served by the command; yields it and its errors."""
    command = [sys.executable, ROOT / "launch.py", "watch", str(run), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE) as process:
        try:
            url = next(word for word in process.stderr.readline().split() if word.startswith("http"))
            page = browser.new_page(**options)
            errors, addresses = [], set()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: addresses.add(request.url.split("/")[2]))
            page.goto(url)
            yield page
            assert not errors and addresses == {url.split("/")[2]}
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            page.close()


def shows(page, selector, text):
    page.wait_for_function(
        "([s, t]) => document.querySelector(s)?.textContent.includes(t)", arg=[selector, text], timeout=60_000
    )


def test_the_page_waits_for_a_run_shows_it_and_says_that_it_is_gone(browser, finished, tmp_path):
    run = tmp_path / "run"
    with page_of(browser, run, locale="ko-KR", viewport={"width": 390, "height": 844}) as page:
        shows(page, "#status", "기다리는")
        shutil.copytree(finished, run)
        shows(page, "#status", "완료")
        shows(page, "#charts", "평균 보상")
        assert page.locator("#charts svg polyline").count() > 4 and page.locator(".turn").count() == 5
        first = page.locator("#when").text_content()
        page.locator("#time input").fill("0")
        page.wait_for_function("before => document.querySelector('#when').textContent != before", arg=first)
        page.locator(".turn .token").first.click()
        assert page.locator("#about .row").count() == 5
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        shutil.rmtree(run)
        shows(page, "#status", "기다리는")


@pytest.mark.slow
def test_the_page_follows_a_run_through_its_end_and_its_restart(browser, corpus, tmp_path):
    run = tmp_path / "run"
    command = arguments(corpus, run, "--set", "train.steps=3000", "--set", "train.checkpoint_every=50")
    with page_of(browser, run) as page:
        training = start(command)
        shows(page, "#tiles", "/ 3,000")
        training.kill()
        training.wait()
        done = start(command)
        shows(page, "#messages", "resumed from step")
        done.communicate(timeout=300)
        shows(page, "#status", "done")
        page.locator("#go").click()
        box = page.frame_locator("#chat iframe").locator("#box textarea")
        box.fill("hello", timeout=90_000)
        assert page.locator("#tabs button").count() == 3
