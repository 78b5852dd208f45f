"""The chat page: its parts alone, and the whole in a real headless Chromium."""

import asyncio
import shutil
import socket

import pytest
from small_model import GREETING, QUESTION, write_run

from jaxchat.config import load_config
from jaxchat.engine import Engine
from jaxchat.errors import UsageError
from jaxchat.optim.horizon import resolve
from serve.page import build_page, check_port, escape, launch_options, model_card, plain_history, show, stream, unshow
from serve.worker import Worker

CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """The page on a free port, answering with the small model."""
    run = write_run(tmp_path_factory.mktemp("run"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = resolve(load_config(run.config, [f"serve.port={port}", "serve.temperature=0"]))
    worker = Worker(Engine.from_pretrained(run.root, slots=4))
    page = build_page(worker, run, config)
    page.launch(**launch_options(config), prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}", worker, run, config
    page.close()
    worker.close()


@pytest.mark.parametrize(
    "text", ["a *b* _c_ `d`", "# no heading\n- no list\n1. none", "<b>&amp;</b> [x](http://y)", "한국어 $x$"]
)
def test_text_is_never_markup_and_comes_back_whole(text):
    shown = show([("text", text)])
    assert "<b>" not in shown and "*" not in shown and "[" not in shown and "http:" not in shown
    assert unshow(shown) == text


def test_escape_touches_each_sign_once():
    assert escape("#&") == "&#35;&#38;"


def test_tool_calls_are_marked_and_not_taken_for_words():
    shown = show([("python", "12+30"), ("python_output", "42"), ("text", "That is it.")])
    assert "class='tool'" in shown and unshow(shown) == "That is it."


def test_history_comes_as_text_or_parts_and_in_turn():
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b<br>c <span class='speed'>5 tokens/s</span>"},
        {"role": "user", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    assert plain_history(history) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\nc"},
        {"role": "user", "content": "d\ne"},
        {"role": "assistant", "content": ""},
    ]


def test_a_taken_port_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another --port"):
            check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UsageError):
        check_port("127.0.0.1", 70_000)


def test_streams_grow_and_end_with_the_speed(service):
    _, worker, _, _ = service

    async def collect():
        return [text async for text in stream(worker, QUESTION, {"temperature": 0.0, "max_tokens": 40})]

    pieces = asyncio.run(collect())
    assert len(pieces) > 3 and pieces[-1].endswith("tokens/s</span>")
    assert unshow(pieces[-1]) == "That is it."


def test_the_model_card_tells_the_size(service):
    _, _, run, config = service
    assert "nano" in model_card(run, config) and "parameters" in model_card(run, config)


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


def test_a_person_types_and_reads_the_answer(open_page):
    page = open_page()
    say(page, QUESTION[0]["content"])
    page.get_by_text("That is it.").first.wait_for(timeout=30_000)
    page.get_by_text("12+30 = 42").first.wait_for(timeout=5_000)
    say(page, "hello 🙂")
    page.locator(".bot").nth(1).wait_for(timeout=30_000)


def test_retry_answers_again(open_page):
    page = open_page()
    say(page, GREETING[0]["content"])
    page.get_by_text("안녕!").first.wait_for(timeout=30_000)
    page.get_by_text("tokens/s").first.wait_for(timeout=30_000)
    page.get_by_role("button", name="retry").first.click()
    page.get_by_text("안녕!").first.wait_for(timeout=30_000)


def test_a_phone_sized_window_in_korean(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, locale="ko-KR")
    page.get_by_placeholder("메시지를 입력하세요").wait_for(timeout=30_000)
    say(page, GREETING[0]["content"])
    page.get_by_text("안녕!").first.wait_for(timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_stop_ends_the_answer_and_frees_the_slot(open_page, service):
    worker = service[1]
    engine_step, page = worker.engine.step, open_page()

    def slow_step():
        import time

        time.sleep(0.3)
        return engine_step()

    worker.engine.step = slow_step
    try:
        say(page, "word " * 10)
        page.locator("button.stop-button").click(timeout=10_000)
        for _ in range(50):
            page.wait_for_timeout(100)
            if not worker.engine.running and not worker.engine.waiting:
                break
        assert not worker.engine.running and not worker.engine.waiting
    finally:
        worker.engine.step = engine_step
