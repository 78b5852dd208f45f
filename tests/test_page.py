"""The chat page in a real headless Chromium, served as a person gets it."""

import asyncio
import re
import sys
import time

import httpx
import pytest
from live_service import live
from small_model import GREETING, QUESTION, tokenizer, write_run
from starlette.testclient import TestClient

import serve.page
from jaxchat.config import ServeConfig
from jaxchat.engine import Engine, QueueFull
from jaxchat.engine.request import Token
from jaxchat.errors import UsageError
from serve.page import BREAK, TEXTS, answer, complaint, mounted_page, token_spans, turn
from serve.schemas import ApiError
from serve.service import Clients
from serve.worker import Unavailable


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
def running(tmp_path_factory, calls_out):
    """The whole service with the page on a free port, answering with the small model, token by token."""
    run = write_run(tmp_path_factory.mktemp("run"))
    with live(
        make_engine=lambda worker: Engine.from_pretrained(run.root, slots=4, chunk=1),
        make_page=lambda service: mounted_page(run, service),
        max_tokens=40,
    ) as running:
        running.worker.loaded.result(120)
        wait_for_page(running.url)
        running.run = run
        yield running
    assert not calls_out, f"the service itself called {calls_out}"


@pytest.fixture(scope="module")
def service(running):
    return running.url, running.worker, running.service, running.run


def wait_for_page(url):
    end = time.monotonic() + 60
    while (seen := httpx.get(url).status_code) == 503:
        assert time.monotonic() < end, "the page does not come"
        time.sleep(0.1)
    return seen


def collect(service, before, text, **settings):
    async def pieces():
        return [(messages[-1], note) async for messages, note in answer(service, "", before, text, settings)]

    return asyncio.run(pieces())


def test_answers_grow_and_end_with_the_speed(service):
    pieces = collect(service[2], [], QUESTION[0]["content"], max_tokens=40)
    assert len(pieces) > 5 and "speed" in pieces[-1][1] and not pieces[0][1]
    assert [part["text"] for part in pieces[-1][0]["content"]] == ["12+30", "42", "That is it."]


def test_a_full_context_is_is_news(service):
    long = turn("hello there " * 5, [{"type": "text", "text": "Hi"}]) * 8
    assert "forgotten" in collect(service[2], long, GREETING[0]["content"], max_tokens=40)[-1][1]
    with pytest.raises(UsageError, match="context holds 128"):
        collect(service[2], [], "word " * 500)


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


def finish(page, words=TEXTS["en"]["speed"]):
    """Until the answer is complete."""
    page.locator("#status").get_by_text(words).wait_for(timeout=20_000)


@pytest.fixture
def slow(service, monkeypatch):
    """0.05 s a token: time to do something before the answer ends by itself. Returns what the engine was asked."""
    engine, asked = service[1].engine, []
    step, submit = engine.step, engine.submit_group
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05 if engine.running else 0), step())[1])
    monkeypatch.setattr(engine, "submit_group", lambda *args: (asked.append(args[0]), submit(*args))[1])
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
    page.get_by_role("button", name="New chat").click()
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
    page.wait_for_timeout(500)
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
    page.get_by_role("alert").get_by_text(TEXTS["en"]["too_long"]).wait_for()
    assert re.search(r"5\d\d > 128", page.get_by_role("alert").inner_text())
    assert page.locator("#box textarea").input_value() == "word " * 500
    say(page, "x" * 9000)
    page.get_by_role("alert").get_by_text("9,000 > 8,000").wait_for()
    say(page, GREETING[0]["content"])
    hear(page, "안녕!")


def test_a_phone_sized_window_in_korean(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, locale="ko-KR", has_touch=True, is_mobile=True)
    words = TEXTS["ko"]
    page.get_by_placeholder(words["placeholder"]).wait_for(timeout=20_000)
    hear(page, words["greeting"])
    say(page, GREETING[0]["content"])
    finish(page, words["speed"])
    assert page.get_by_text(words["parameters"]).is_visible() and page.get_by_text(words["settings"]).is_visible()
    for name in ("다시 시도", "보내기", "복사", words["new_chat"]):
        assert page.get_by_role("button", name=name).first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#box").bounding_box()["y"] < 800 and page.evaluate("scrollY") == 0
    small = """() => [...document.querySelectorAll("button, input, textarea")].filter(e => e.checkVisibility())
        .map(e => [e.getAttribute("aria-label") ?? e.type, (e.closest("label") ?? e).getBoundingClientRect()])
        .filter(([name, r]) => r.width && Math.min(r.width, r.height) < 24)
        .map(([name, r]) => [name, r.width, r.height])"""
    assert page.evaluate(small) == []  # WCAG 2.5.8
    say(page, "word " * 500)
    page.get_by_role("alert").get_by_text(words["too_long"]).wait_for()


def switch_on(page):
    page.get_by_label(TEXTS["en"]["probabilities"]).check()


def test_every_token_tells_its_probability_and_what_else_could_have_come(open_page):
    page = open_page()
    switch_on(page)
    say(page, GREETING[0]["content"])
    finish(page)
    tokens = page.locator("#chat .token")
    assert "".join(tokens.all_text_contents()) == "Hi 🙂 안녕!"
    tip = page.get_by_role("tooltip")
    for act in (tokens.first.hover, tokens.first.focus):
        act()
        tip.wait_for()
        assert tip.locator("tr").count() == 5 and tip.locator("tr.taken").inner_text().split()[0] == "H"
        shares = [float(text.removesuffix(" %")) for text in tip.locator(".number").all_inner_texts()]
        assert shares == sorted(shares, reverse=True) and 90 < shares[0] and sum(shares) < 101
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        page.mouse.move(0, 0)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == tokens.nth(1).text_content()
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.get_by_label(TEXTS["en"]["probabilities"]).uncheck()
    tokens.first.hover()
    assert tip.is_hidden()
    say(page, GREETING[0]["content"])
    finish(page)
    assert page.locator("[data-testid=bot]").nth(0).locator(".token").count() == tokens.count() > 0
    assert page.locator("[data-testid=bot]").nth(1).locator(".token").count() == 0


HOSTILE = "<img src=x onerror=attack()><script>attack()</script>\"'>${attack()}{{attack()}}`&lt;b&gt; __i18n__{}"


def test_nothing_that_a_model_says_is_markup(open_page, monkeypatch):
    """In the places where the page shows HTML: tokens, their tables and tool calls."""
    tokens = [Token(i, -1.0, ((i, -1.0), (tokenizer().bos, -2.0))) for i in tokenizer().encode(HOSTILE)]
    spans = {"type": "text", "text": HOSTILE, "html": token_spans(tokenizer(), tokens)[0]}

    async def hostile(service, client, before, text, settings):
        parts = [{"type": "python", "text": HOSTILE}, spans] if not before else [{"type": "text", "text": HOSTILE}]
        yield [*before, *turn(text, parts)], "0 __i18n__"

    monkeypatch.setattr(serve.page, "answer", hostile)
    page = open_page()
    page.evaluate("void (window.attack = () => window.attacked = true)")
    switch_on(page)
    say(page, HOSTILE)
    page.locator("#chat .token").first.wait_for()
    assert "".join(page.locator("#chat .token").all_text_contents()) == HOSTILE
    assert page.locator("#chat code").inner_text() == HOSTILE
    for token in page.locator("#chat .token").all()[:12]:
        token.hover()
        page.locator("#tip .taken").wait_for()
    page.locator("button.submit-button").wait_for()
    say(page, "x")
    page.locator("[data-testid=user]").nth(1).wait_for()
    page.wait_for_timeout(300)
    for line in ("[data-testid=user]", "[data-testid=bot]"):
        texts = [text.replace(BREAK, "").strip() for text in page.locator(f"#chat {line}").all_inner_texts()]
        assert HOSTILE in texts
    assert page.locator("#chat img, #tip img").count() == 0 and not page.evaluate("window.attacked")


def test_a_reload_leaves_nothing_behind(open_page):
    page = open_page()
    say(page, GREETING[0]["content"])
    finish(page)
    page.reload()
    hear(page, TEXTS["en"]["greeting"])
    assert page.locator("[data-testid=user]").count() == 0 and page.locator("#box textarea").input_value() == ""
    stores = """async () => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie,
        (await indexedDB.databases()).map(d => d.name), await caches.keys().catch(() => [])])"""
    assert page.evaluate(stores) == '[{},{},"",[],[]]'
    assert page.context.cookies() == []


def test_settings_are_below_the_card_on_a_low_screen(open_page):
    page = open_page(viewport={"width": 1100, "height": 420})
    page.locator("#side input[type=range]").last.wait_for()
    places = [page.locator(f"#side {what}").last.bounding_box() for what in ("#card", "h2", "input[type=range]")]
    assert places[0]["y"] < places[1]["y"] < places[2]["y"] and places[2]["x"] < 1100
    assert page.evaluate("() => { const s = document.querySelector('#side'); return s.scrollWidth <= s.clientWidth }")


def test_tab_goes_through_the_page_in_reading_order(open_page):
    page = open_page()
    say(page, QUESTION[0]["content"])
    finish(page)
    assert page.evaluate("document.activeElement.id || document.activeElement.tagName") == "TEXTAREA"
    page.locator("#title h1").click()
    name = """() => { const e = document.activeElement, box = e.closest("label")?.innerText
        return e.getAttribute("aria-label") || e.innerText || box || e.type }"""
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate(name).split("\n")[0])
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        border = page.evaluate("getComputedStyle(document.activeElement.closest('#box') ?? document.body).borderColor")
        assert outline == "solid" or border == "rgb(15, 118, 110)", names  # one sees where one is
    seen = iter(names)
    order = ["New chat", "Copy", "Edit", "Retry", "Undo", TEXTS["en"]["placeholder"], "Send", "Token probabilities"]
    assert all(any(wanted in name for name in seen) for wanted in order), names


CONTRAST = """selector => {
    const parse = text => { const c = text.match(/[\\d.]+/g).map(Number); return [...c.slice(0, 3), c[3] ?? 1] }
    const over = (a, b) => a.slice(0, 3).map((v, i) => v * a[3] + b[i] * (1 - a[3])).concat(1)
    const light = c => c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
    const element = document.querySelector(selector), layers = []
    for (let e = element; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor))
    const ground = layers.reduce((below, layer) => over(layer, below), [255, 255, 255, 1])
    const placeholder = element.placeholder ? "::placeholder" : undefined
    let [a, b] = [over(parse(getComputedStyle(element, placeholder).color), ground), ground].map(light)
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(open_page, scheme):
    """Contrast of WCAG 2.2 AA: 4.5 for text, 3 for the signs on buttons."""
    page = open_page(color_scheme=scheme)
    switch_on(page)
    found = {selector: page.evaluate(CONTRAST, selector) for selector in (
        "#title h1", "#title span", "#new", "#chat .placeholder p", "#chat .example-text", "#box textarea", "#card dt",
        "#card dd", "#side h2", "#legend span", "#side .block label span", "#side [id^=range]",
    ) if page.locator(selector).count()}  # fmt: skip
    assert len(found) >= 10
    say(page, QUESTION[0]["content"])
    finish(page)
    for selector in ("#chat .user .md", "#chat code", "#chat .token", "#status .prose"):
        found[selector] = page.evaluate(CONTRAST, selector)
    say(page, "word " * 500)
    page.get_by_role("alert").wait_for()
    found["#status [role=alert]"] = page.evaluate(CONTRAST, "#status [role=alert]")
    assert {selector: ratio for selector, ratio in found.items() if ratio < 4.5} == {}
    page.evaluate("document.querySelector('#chat .token').style.setProperty('--p', 0)")
    assert page.evaluate(CONTRAST, "#chat .token") >= 4.5  # on the strongest tint
    for selector in ("#box button", "#chat .message-buttons button"):
        assert page.evaluate(CONTRAST, selector) >= 3, selector


def test_with_api_keys_the_page_asks_for_one(service, monkeypatch):
    _, _, own, run = service
    monkeypatch.setattr(own, "clients", Clients(ServeConfig(api_keys=("secret",))))
    with TestClient(mounted_page(run, own)) as client:
        assert client.get("/config").status_code == 401
        assert client.post("/gradio_api/queue/join", json={"fn_index": 0, "data": []}).status_code == 401
        wrong = client.post("/login", data={"username": "me", "password": "no"})
        assert wrong.status_code == 400 and client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
        config = client.get("/config")
        assert config.status_code == 200 and "secret" not in config.text


def test_what_the_page_does_not_offer_is_not_there(service):
    url = service[0]
    upload = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.txt", b"more than one byte")})
    assert upload.status_code == 413, upload.text
    for path in ("/monitoring", "/gradio_api/file=/etc/passwd", "/gradio_api/runs", "/openapi.json/../docs", "/docs"):
        reply = httpx.get(url + path)
        assert reply.status_code >= 400, path
    assert httpx.get(f"{url}/gradio_api/info").json()["named_endpoints"] == {}


def test_too_many_messages_a_minute_are_refused(service, monkeypatch):
    monkeypatch.setattr(service[2], "clients", Clients(ServeConfig(requests_per_minute=1)))
    service[2].clients.count("")
    with pytest.raises(ApiError) as refused:
        anext(answer(service[2], "", [], "a", {})).send(None)
    assert "rate_limit_exceeded" in complaint(refused.value, service[2], "a")


@pytest.mark.parametrize(
    ("error", "words"),
    [(QueueFull("full"), "queue_full"), (Unavailable("loading"), "loading"), (Unavailable("dead"), "engine_dead"),
     (UsageError("<b>"), "failed")],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_ones_own_language(service, error, words):
    line = complaint(error, service[2], "hello")
    assert f'"{words}"' in line and "<b>" not in line and line.startswith('<span role="alert">')
    assert all(words in texts for texts in TEXTS.values())
