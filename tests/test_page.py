"""The chat page: its parts alone, and the whole in a real headless Chromium."""

import asyncio
import json
import shutil
import socket
import sys
import time

import gradio as gr
import pytest
from small_model import GREETING, QUESTION, write_run

from jaxchat.config import load_config
from jaxchat.engine import Engine
from jaxchat.errors import UsageError
from jaxchat.optim.horizon import resolve
from serve.page import BREAK, answer, build_page, check_port, launch_options, model_card, next_turn, show, turn, undo
from serve.texts import TEXTS
from serve.worker import Worker

CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
PARTS = [{"type": "python", "text": "12+30"}, {"type": "python_output", "text": "42"}, {"type": "text", "text": "So."}]
TALK = [*turn("a", [{"type": "text", "text": "A"}]), *turn("b", PARTS), *turn("c")]


@pytest.fixture(scope="module")
def calls_out():
    """Addresses outside this machine that this process has wanted to reach."""
    addresses, here = [], ("127.", "::1", "localhost", "0.0.0.0")

    def hook(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[0] if event.endswith("info") else arguments[1]
            host = host[0] if isinstance(host, tuple) else host
            if host and not str(host).startswith((*here, "/")):
                addresses.append((event, host))

    sys.addaudithook(hook)
    return addresses


@pytest.fixture(scope="module")
def service(tmp_path_factory, calls_out):
    """The page on a free port, answering with the small model, token by token."""
    run = write_run(tmp_path_factory.mktemp("run"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = resolve(load_config(run.config, [f"serve.port={port}", "serve.temperature=0"]))
    worker = Worker(Engine.from_pretrained(run.root, slots=4, chunk=1))
    page = build_page(worker, config)
    page.launch(**launch_options(run, config), prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}", worker, run, config
    page.close()
    worker.close()
    assert not calls_out, f"the service itself called {calls_out}"


def test_every_language_has_every_text():
    assert set(TEXTS["en"]) == set(TEXTS["ko"]) and all(all(words.values()) for words in TEXTS.values())


def test_a_tool_call_is_a_line_of_its_own():
    assert show(TALK) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "metadata": {"title": "12+30 = 42", "status": "done"}},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "…"},
    ]
    assert show(turn("x", PARTS[1:]))[1:] == [{"role": "assistant", "content": "So."}]  # output without a call


@pytest.mark.parametrize(
    ("data", "before", "text"),
    [
        (None, 6, "typed"),
        ({"index": 2, "value": {"text": "example"}}, 6, "example"),
        ({"index": 5, "value": "c"}, 4, "c"),  # again; a tool call makes a line more
        ({"index": 2, "value": "new", "previous_value": "b"}, 2, "new"),
        ({"index": 0, "value": "new", "previous_value": "a"}, 0, "new"),
        ({"index": 2, "value": "  ", "previous_value": "b"}, 6, ""),  # edited to nothing: nothing happens
    ],
)
def test_where_a_conversation_goes_on(data, before, text):
    assert next_turn(TALK, "typed", gr.EventData(None, data)) == (TALK[:before], text)


def test_an_edited_message_is_the_one_written():
    lines = show(turn("a <b> &amp; 1<2\n  c"))
    assert lines[0]["content"] == f"a <{BREAK}b> &{BREAK}amp; 1<2\n{BREAK}  c"
    data = {"index": 0, "value": lines[0]["content"], "previous_value": lines[0]["content"]}
    assert next_turn(turn("x"), "", gr.EventData(None, data))[1] == "a <b> &amp; 1<2\n  c"


def test_undo_gives_the_question_back():
    messages, shown, box, _ = undo(TALK)
    assert messages == TALK[:4] and shown == show(TALK[:4]) and box["value"] == "c"
    assert undo([])[0] == []


def test_a_taken_port_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError):
        check_port("127.0.0.1", 70_000)


def collect(worker, before, text, **settings):
    async def pieces():
        return [(messages[-1], note) async for messages, note in answer(worker, before, text, settings)]

    return asyncio.run(pieces())


def test_answers_grow_and_end_with_the_speed(service):
    pieces = collect(service[1], [], QUESTION[0]["content"], max_tokens=40)
    assert len(pieces) > 5 and "speed" in pieces[-1][1] and not pieces[0][1]
    assert [part["text"] for part in pieces[-1][0]["content"]] == ["12+30", "42", "That is it."]


def test_a_full_context_is_told(service):
    long = turn("hello there " * 5, [{"type": "text", "text": "Hi"}]) * 8
    assert "forgotten" in collect(service[1], long, GREETING[0]["content"], max_tokens=40)[-1][1]
    with pytest.raises(UsageError, match="context holds 128"):
        collect(service[1], [], "word " * 500)


def test_the_model_card_tells_size_time_and_scores(service, tmp_path):
    _, _, run, config = service
    card = model_card(run, config, TEXTS["en"])
    assert "nano" in card and '<dd title="">2</dd>' in card and "trained in" not in card
    scores = {"tasks": {"word_problems": {"metric": 0.953, "accuracy": 0.953, "n": 256},
                        "spelling_bee": {"metric": 2, "n": 3},
                        "bits_per_byte": {"metric": 1.9, "n": 1}}}  # fmt: skip
    own = type(run)(tmp_path)
    own.eval("sft").parent.mkdir()
    own.eval("sft").write_text(json.dumps(scores))
    own.eval("base").write_text(json.dumps({"tasks": {"bits_per_byte": {"metric": 1.6054, "n": 1}}}))
    own.stages.write_text(json.dumps({"pretrain": {"seconds": 251.4}, "sft": {"seconds": 65}, "eval": {"seconds": 9}}))
    card = model_card(own, config, TEXTS["ko"])
    assert "문장제" in card and "95.3%" in card and "n = 256" in card and "spelling bee" in card
    assert "1.605" in card and "1.900" not in card and "0:05:16" in card
    own.stages.write_text("{")
    assert "학습 시간" not in model_card(own, config, TEXTS["ko"])


@pytest.fixture(scope="module")
def browser():
    """A real Chromium; the test is skipped with the reason where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the dev extra: pip install -e '.[dev]'")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, service):
    """Opens the page and fails the test if anything but this machine is asked for anything."""
    outside, contexts = [], []

    def guard(route):
        url = route.request.url
        if url.startswith((service[0], "data:", "blob:")):
            route.continue_()
        else:
            outside.append(url)
            route.abort()

    def opened(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].route("**/*", guard)
        page = contexts[-1].new_page()
        page.goto(service[0])
        page.get_by_role("textbox").first.wait_for(timeout=30_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not outside, f"requests left the machine: {outside}"


def say(page, text):
    box = page.locator("textarea").first
    box.fill(text)
    box.press("Enter")


def hear(page, text):
    page.get_by_text(text).first.wait_for(timeout=20_000)


def finish(page):
    """Until the answer is complete."""
    page.locator("#status").get_by_text("tokens/s").wait_for(timeout=20_000)


@pytest.fixture
def slow(service, monkeypatch):
    """0.1 s a token: time to do something before the answer ends by itself. Returns what the engine was asked."""
    engine, asked = service[1].engine, []
    step, submit = engine.step, engine.submit
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.1 if engine.running else 0), step())[1])
    monkeypatch.setattr(engine, "submit", lambda request: (asked.append(request), submit(request))[1])
    return asked


def seconds_until_free(worker, page):
    """How long until nothing is being answered."""
    begin = time.monotonic()
    while worker.engine.running or worker.engine.waiting:
        assert time.monotonic() < begin + 20
        page.wait_for_timeout(20)  # not `sleep`: the requests of all pages pass through this thread
    return time.monotonic() - begin


def test_a_person_types_and_sees_the_answer_grow(open_page, slow):
    page = open_page()
    say(page, GREETING[0]["content"])
    seen = set()
    while not page.locator("#status").get_by_text("tokens/s").count():
        seen |= set(page.locator("[data-testid=bot]").all_inner_texts())
        page.wait_for_timeout(50)
    assert len(seen) >= 5 and "Hi 🙂 안녕!" in page.locator("[data-testid=bot]").last.inner_text()
    assert all("Hi 🙂 안녕!".startswith(text.strip()) for text in seen - {"…"})


def test_tool_calls_are_marked_retried_edited_undone_and_cleared(open_page, slow, monkeypatch, service):
    page = open_page()
    page.get_by_text(QUESTION[0]["content"]).click()  # an example
    hear(page, "12+30 = 42")
    hear(page, "That is it.")
    finish(page)
    page.get_by_role("button", name="Retry").click()
    page.locator("[data-testid=bot]").get_by_text("That is it.").wait_for(state="detached")
    hear(page, "That is it.")
    finish(page)
    assert len(slow) == 2 and slow[0].tokens == slow[1].tokens
    page.get_by_role("button", name="Edit").click()
    page.locator("#chat textarea").fill(GREETING[0]["content"])
    page.get_by_role("button", name="Submit").first.click()
    hear(page, "안녕!")
    finish(page)
    assert len(slow) == 3 and page.locator("[data-testid=user]").count() == 1
    assert slow[2].tokens == service[1].engine.chat_request(GREETING).tokens
    page.get_by_role("button", name="Undo").click()
    page.locator("[data-testid=user]").wait_for(state="detached")
    assert page.locator("#box textarea").input_value() == GREETING[0]["content"]
    say(page, "hello 🙂")
    finish(page)
    page.get_by_role("button", name="Clear").click()
    page.locator("[data-testid=user]").wait_for(state="detached")
    say(page, "hello 🙂")
    finish(page)
    assert slow[-1].tokens == slow[2].tokens  # nothing of before is remembered


def test_stop_keeps_what_has_come_and_frees_the_slot(open_page, slow, service):
    page = open_page()
    say(page, GREETING[0]["content"])
    page.locator("[data-testid=bot]").get_by_text("Hi").wait_for()
    page.locator("button.stop-button").click()
    assert seconds_until_free(service[1], page) < 1
    page.wait_for_timeout(1500)
    assert page.locator("[data-testid=bot]").inner_text().strip() in ("Hi", "Hi 🙂")
    say(page, QUESTION[0]["content"])
    finish(page)
    assert slow[1].tokens[: len(slow[0].tokens)] == slow[0].tokens and len(slow[1].tokens) > len(slow[0].tokens) + 20


def test_a_closed_window_frees_the_slot(open_page, slow, service):
    page = open_page()
    say(page, GREETING[0]["content"])
    page.locator("[data-testid=bot]").get_by_text("Hi").wait_for()
    other = open_page()
    page.close()
    assert seconds_until_free(service[1], other) < 1


def test_two_people_are_answered_at_once(open_page, slow, service):
    pages, most = [open_page(), open_page()], 0
    for page in pages:
        say(page, GREETING[0]["content"])
    while not pages[1].locator("#status").get_by_text("tokens/s").count():
        most = max(most, service[1].engine.running)
        pages[1].wait_for_timeout(20)
    assert most == 2
    assert all("안녕!" in page.locator("[data-testid=bot]").inner_text() for page in pages)


def test_what_is_typed_is_shown_letter_by_letter(open_page):
    page = open_page()
    text = "2*3*4 <b>x</b> ![](http://example.org/x.png) # a\n  line"
    say(page, text)
    finish(page)
    assert page.locator("[data-testid=user]").inner_text().replace(BREAK, "").strip() == text
    page.get_by_role("button", name="Edit").click()
    assert page.locator("#chat textarea").input_value().replace(BREAK, "") == text
    blocked = "new Promise(done => { addEventListener('securitypolicyviolation', e => done(e.blockedURI));"
    assert "example.org" in page.evaluate(blocked + " new Image().src = 'http://example.org/y.png' })")


def test_a_message_too_long_comes_back_with_the_reason(open_page):
    page = open_page()
    say(page, "word " * 500)
    hear(page, "this model's context holds 128")
    assert page.locator("#box textarea").input_value() == "word " * 500
    say(page, GREETING[0]["content"])
    hear(page, "안녕!")


def test_a_phone_sized_window_in_korean(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, locale="ko-KR", has_touch=True, is_mobile=True)
    page.get_by_placeholder(TEXTS["ko"]["placeholder"]).wait_for(timeout=20_000)
    hear(page, TEXTS["ko"]["greeting"])
    say(page, GREETING[0]["content"])
    page.locator("#status").get_by_text(TEXTS["ko"]["speed"]).wait_for(timeout=20_000)
    assert (
        page.get_by_text(TEXTS["ko"]["parameters"]).is_visible()
        and page.get_by_text(TEXTS["ko"]["settings"]).is_visible()
    )
    assert page.get_by_role("button", name="다시 시도").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#box").bounding_box()["y"] < 800
