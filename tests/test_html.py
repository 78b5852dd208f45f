"""The HTML file with a model in it: the same numbers, ids and answers as jaxchat's engine, in a real browser."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
from html_file import params_of, parts
from random_model import KINDS, logits_of, random_model, tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from jaxchat.config import Config, ServeConfig, load_config
from jaxchat.engine import Engine
from jaxchat.engine.request import Turn
from jaxchat.errors import UsageError
from jaxchat.interop import html_page
from jaxchat.interop.__main__ import main, make_parser
from jaxchat.interop.html_page import write_html
from jaxchat.interop.trained import load_trained
from jaxchat.kv_cache import serving_params
from jaxchat.low_precision import KERNELS
from jaxchat.run_dir import RunDir
from jaxchat.tokenizer import Tokenizer, byte_level
from jaxchat.tools.calculator import calculate
from serve.worker import fitting_request
from train.stages import run_export

MODEL_JS = Path(html_page.__file__).with_name("html") / "model.js"
LOAD = "([model, pieces]) => { chat = new Chat(model, readTensors(model.tensors, pieces, model.bytes)); }"
NANOCHAT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TEXTS = [
    "", "hello", "it's 'S 'ſ I'LL", "  two  spaces\n\n\ttabs \r\n ", "한국어 한국어", "e\u0301 \u1112\u1161\u11ab",
    "🙂🙂", "<|user_end|><|bos|>", "\ud83d \ude00x", "\ufeffbom\x85\u200b\u3000.", "12345 1,000", "\x00", "a" * 300,
    "😀" * 60,
]  # fmt: skip


@pytest.fixture(scope="module")
def core(browser):
    """A page with the worker's functions."""
    page = browser.new_page()
    page.add_script_tag(path=MODEL_JS)
    yield page
    page.close()


def load(core, path):
    core.evaluate(LOAD, parts(path)[:2])


def answer(core, messages, **settings):
    """(ids of the prompt, ids of the answer, events) of the page's model."""
    settings = {"temperature": 0, "top_k": 0, "max_tokens": 48} | settings
    return core.evaluate(
        """(request) => {
          const ids = [], original = chat.tokens;
          chat.tokens = function* (...all) {
            for (const id of original.apply(chat, all)) { if (id >= 0) ids.push(id); yield id; }
          };
          const events = [...chat.answer(request)].filter(Boolean);
          chat.tokens = original;
          return [chat.render(request.messages), ids, events];
        }""",
        {"messages": messages, **settings},
    )


def logits(core, ids):
    run = "(ids) => (chat.model.ids = [], ids.map((id) => [...chat.model.append(id, true)]))"
    return np.array(core.evaluate(run, ids))


def check_answers(core, engine, conversations, most=48):
    """Greedy answers are the engine's, or the two logits at the first difference are within 1e-3."""
    requests = [engine.chat_request(messages, max_tokens=most) for messages in conversations]
    for messages, request, handle in zip(conversations, requests, engine.generate(requests), strict=True):
        prompt, ids, events = answer(core, messages, max_tokens=most)
        assert prompt == request.tokens
        if ids != handle.tokens:
            same = next(i for i, (a, b) in enumerate(zip(ids, handle.tokens, strict=False)) if a != b)
            last = logits(core, prompt + ids[:same])[-1]
            assert abs(last[ids[same]] - last[handle.tokens[same]]) < 1e-3, messages
            continue
        merged = []
        for event in events[:-1]:
            if merged and merged[-1]["type"] == event["kind"]:
                merged[-1]["text"] += event["text"]
            else:
                merged.append({"type": event["kind"], "text": event["text"]})
        assert merged == [part for part in handle.parts if part["text"]]
        assert events[-1]["reason"] == handle.finish_reason


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_the_engines_numbers_and_computes_its_logits(core, tmp_path, kind):
    model = random_model(kind)
    facts = write_html(model, tmp_path / "it.html")
    assert facts["bytes"] == (tmp_path / "it.html").stat().st_size
    stored = params_of(tmp_path / "it.html", model.config)
    int8 = serving_params(model.config, model.params, np.float32, "int8")
    for i, layer in enumerate(int8["layers"]):
        for name in KERNELS:
            kernel = np.asarray(layer[name].values, np.float32) * np.asarray(layer[name].scale)
            assert np.array_equal(kernel, stored["blocks"][name][i]), name
    load(core, tmp_path / "it.html")
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 60))  # longer than the short window
    ours, exact = logits(core, ids[0].tolist()), logits_of(model.config, model.params, ids)[0]
    assert np.abs(ours - logits_of(model.config, stored, ids)[0]).max() < 2e-4
    assert 0 < np.abs(ours - exact).mean() < 0.25  # of logits up to 15


def foreign(pattern=None, **more):
    """A tokenizer as other programs have it."""
    backend = Backend(models.BPE(**more))
    if pattern:
        byte_level(backend, pattern)
    else:  # GPT-2's
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizer()._backend.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["hello it's we'll \n  12 34 한국어 " * 9, "tabs\t\t.. ++\n"], trainer)
    return Tokenizer(backend)


@pytest.mark.parametrize("name", ["own", "nfc", "nanochat", "gpt2"])
def test_the_page_encodes_as_the_tokenizer_does(core, tmp_path, name):
    encoder = {
        "own": tokenizer,
        "nfc": lambda: tokenizer("nfc"),
        "nanochat": lambda: foreign(NANOCHAT, ignore_merges=True),
        "gpt2": foreign,
    }[name]()
    model = dataclasses.replace(random_model("tied", vocab_size=512), tokenizer=encoder)
    write_html(model, tmp_path / "it.html")
    load(core, tmp_path / "it.html")
    pool = random.Random(0)
    letters = " \n\t\r  abzSsſkK'’12345,.!<|>한국어🙂é\u0301\u200b\ufeff\x85\xa0\u3000"
    texts = TEXTS + ["".join(pool.choices(letters, k=pool.randint(1, 30))) for _ in range(300)]
    if name == "own":  # every character of the first plane, and the newer scripts and emoji
        texts += ["".join(map(chr, range(i, i + 64))) for i in range(0, 0x10000, 64)]
        texts += [" ".join(map(chr, range(i, i + 64))) for i in range(0x1E000, 0x20000, 64)]
    # JSON carries a lone surrogate, the protocol between the processes may not
    found = core.evaluate("(texts) => JSON.parse(texts).map((text) => chat.tokenizer.encode(text))", json.dumps(texts))
    for text, ids in zip(texts, found, strict=True):
        assert ids == encoder.encode(text), ascii(text)


def test_the_page_calculates_as_the_calculator_does(core):
    pool = random.Random(0)
    bits = ["1", "2", "12", "0", "007", "1.5", ".5", "5.", "1,000", "12,345", "+", "-", "*", "/", "(", ")", " ", "'a'",
            '"berry"', ".count(", "'r'", ")", "**", "//", "'", '"', "e5", "9" * 20, "0.000001", "3", "\n"]  # fmt: skip
    texts = ["".join(pool.choices(bits, k=pool.randint(1, 8))) for _ in range(3000)]
    for _ in range(2000):
        sizes = [10 ** pool.randint(0, 20) for _ in range(pool.randint(2, 5))]
        terms = [f"{pool.choice(['', '-'])}{pool.randint(0, size)}{pool.choice(['', '.25', '.003'])}" for size in sizes]
        texts.append("".join(t + pool.choice("+-*/") for t in terms[:-1]) + terms[-1])
    wanted = [calculate(text) for text in texts]
    assert sum(value is not None for value in wanted) > 1000
    assert core.evaluate("(texts) => texts.map(calculate)", texts) == wanted


def test_an_answer_has_the_parts_that_the_engine_makes(core, tmp_path):
    """Any sequence of ids, calls of the calculator among them, gives the engine's parts and forced tokens."""
    model = random_model("classic")
    write_html(model, tmp_path / "it.html")
    load(core, tmp_path / "it.html")
    encoder, special, pool = model.tokenizer, model.tokenizer.special, random.Random(0)
    names = ("python_start", "python_end", "output_start", "output_end", "user_end")
    marks = [special[f"<|{name}|>"] for name in names]
    run = """(script) => {
      const turn = new Turn(chat.tokenizer), made = [];
      for (let forced = []; script.length || forced.length; ) {
        const forcing = forced.length > 0, id = (forcing ? forced : script).shift();
        made.push(id);
        turn.add(id);
        if (id === chat.special("python_end") && !forcing) forced = turn.toolOutput();
      }
      turn.flush();
      return [made, turn.parts];
    }"""
    sums = 0
    for n in range(60):
        script = pool.choices([*marks, *encoder.encode("1+2 한")], k=20)
        if n % 3 == 0:
            script = [marks[0], *encoder.encode(f"{n}*3"), marks[1], *script]
        turn, forced, left = Turn(encoder), list[int](), list(script)
        while left or forced:
            forcing = bool(forced)
            token = (forced or left).pop(0)
            turn.add(token)
            if token == marks[1] and not forcing:
                forced = turn.tool_output()
        turn.flush()
        assert core.evaluate(run, script) == [turn.tokens, turn.parts]
        sums += {"type": "python_output", "text": str(3 * n)} in turn.parts
    assert sums >= 20


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """(trained model of the whole tiny run, its file, the engine with the file's numbers)."""
    model, path = load_trained(RunDir(finished)), tmp_path_factory.mktemp("html") / "it.html"
    write_html(model, path)
    params = params_of(path, model.config)
    return model, path, Engine(model.config, params, model.tokenizer, slots=8, weights="int8", chats=model.chats)


def conversations(count, seed=0):
    pool = random.Random(seed)
    words = ["who", "are", "you", "hello", "Tom", "has", "12", "apples", "buys", "30", "more?", "한국어", "🙂", "3*4"]
    for n in range(count):
        text = " ".join(pool.choices(words, k=pool.randint(1, 8)))
        user = {"role": "user", "content": pool.choice(TEXTS[:11]) if n % 6 == 0 else text}
        said = [("python", "1+2"), ("python_output", "3"), ("text", text)]
        parts = [{"type": kind, "text": said} for kind, said in said]
        yield [user] if n % 3 else [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}, user]


@pytest.mark.parametrize(("count", "seed", "length"), [(12, 0, 16), pytest.param(100, 1, 64, marks=pytest.mark.slow)])
def test_greedy_answers_are_the_engines(core, exported, count, seed, length):
    _, path, engine = exported
    load(core, path)
    asked = [
        talk for talk in conversations(2 * count, seed) if len(engine.chat_request(talk).tokens) < engine.capacity - 32
    ]
    check_answers(core, engine, asked[:count], length)


@pytest.mark.slow
def test_a_learned_calculation_is_shown_with_its_result(core, tmp_path):
    from small_model import CONFIG, QUESTION, learned
    from small_model import tokenizer as own

    model = dataclasses.replace(random_model("modern"), config=CONFIG, params=learned(), tokenizer=own())
    write_html(model, tmp_path / "it.html")
    load(core, tmp_path / "it.html")
    _, _, events = answer(core, QUESTION)
    for kind, text in (("python", "12+30"), ("python_output", "42"), ("text", "That is it.")):
        assert "".join(event["text"] for event in events if event["kind"] == kind) == text


def test_a_full_context_forgets_the_oldest_turns_and_refuses_a_long_message(core, exported):
    _, path, engine = exported
    load(core, path)
    long = "word 12 " * engine.capacity
    _, _, events = answer(core, [{"role": "user", "content": long}])
    assert events[-1]["reason"] == "too_long" and events[-1]["tokens"] > events[-1]["capacity"] == engine.capacity
    said = {"role": "assistant", "content": [{"type": "text", "text": "hi " * 9}]}
    talk = [*[{"role": "user", "content": "hello"}, said] * 12, {"role": "user", "content": "and now"}]
    request, dropped = fitting_request(engine, talk, max_tokens=4)
    _, ids, events = answer(core, talk, max_tokens=4)
    assert events[-1]["dropped"] == dropped > 0 and ids == engine.generate([request])[0].tokens


def test_sampling_keeps_the_likeliest_and_draws_by_their_probability(core):
    z = [2.0, 1.0, 1.0, 0.0, -9.0]
    draw = """([z, t, k]) => {
      const counts = z.map(() => 0), logits = Float32Array.from(z);
      for (let i = 0; i < 4000; i++) counts[sample(logits, t, k, () => (i + 0.5) / 4000)]++;
      return counts;
    }"""
    assert core.evaluate(draw, [z, 0, 0]) == [4000, 0, 0, 0, 0]
    p = np.exp(np.array(z) / 0.7)
    assert np.abs(np.array(core.evaluate(draw, [z, 0.7, 0])) / 4000 - p / p.sum()).max() < 1e-3
    p[3:] = 0  # the second and the third are equally likely
    assert np.abs(np.array(core.evaluate(draw, [z, 0.7, 2])) / 4000 - p / p.sum()).max() < 1e-3


# --- the page


def opened(browser, path, **options):
    """A page of the file, ready to chat; every request for anything else fails the test."""
    page = browser.new_context(**options).new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("file:", "blob:", "data:")) or page.problems.append(r.url))
    page.goto(path.as_uri())
    until(page, "ready")
    return page


def until(page, condition):
    for _ in range(3000):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(10)
    raise AssertionError(condition)


def test_the_page_chats_from_a_file_and_escapes_all_text(browser, tmp_path):
    hostile = "</script><script>document.title = 'x'</script><img src=x onerror=\"document.title = 'x'\">"
    serve = ServeConfig(max_tokens=24, temperature=0.0, message_chars=400)
    model = dataclasses.replace(
        random_model("modern"), name=hostile, card=hostile, run_config=dataclasses.replace(Config(), serve=serve)
    )
    write_html(model, tmp_path / "it.html")
    page = opened(browser, tmp_path / "it.html", viewport={"width": 360, "height": 700}, locale="ko-KR")
    assert page.title() == hostile and page.inner_text("h1") == hostile and hostile in page.text_content("#card")
    assert page.get_attribute("html", "lang") == "ko"
    page.click("#language")
    assert page.get_attribute("html", "lang") == "en"
    page.fill("#box", hostile)
    page.keyboard.press("Enter")
    until(page, "!answering")
    assert page.inner_text(".user") == hostile and page.locator("#log img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    first = page.inner_text(".answer")
    page.fill("#box", "y" * 401)
    page.keyboard.press("Enter")
    assert page.locator(".user").count() == 1 and "401" in page.inner_text("#status")
    page.click("#new")
    page.fill("#box", hostile)
    page.click("#send")
    until(page, "!answering")
    assert page.inner_text(".answer") == first and not page.problems


def test_an_answer_can_be_stopped_and_another_page_is_not_disturbed(browser, tmp_path):
    serve = ServeConfig(max_tokens=100_000, temperature=1.0, top_k=0)
    shape = {"seq_len": 8192, "vocab_size": 293}  # an answer that takes a while
    model = dataclasses.replace(random_model("classic", **shape), run_config=dataclasses.replace(Config(), serve=serve))
    write_html(model, tmp_path / "it.html")
    pages = [opened(browser, tmp_path / "it.html") for _ in range(2)]
    for page in pages:
        for _ in range(2):  # a random model may stop by itself at once
            page.fill("#box", "hello")
            page.keyboard.press("Enter")
            page.wait_for_timeout(200)
            page.keyboard.press("Escape")
            until(page, "!answering")
        assert page.evaluate("messages.length") == 4 and not page.problems
    kept = pages[0].evaluate("messages")
    assert [m["role"] for m in kept] == ["user", "assistant"] * 2


def test_a_base_model_goes_on_with_the_text(core, browser, tmp_path):
    model = random_model("smear", "base")
    write_html(model, tmp_path / "it.html")
    load(core, tmp_path / "it.html")
    prompt, _, _ = answer(core, [{"role": "user", "content": "hello 한국어"}])
    assert prompt == [model.tokenizer.bos, *model.tokenizer.encode("hello 한국어")]
    page = opened(browser, tmp_path / "it.html", locale="en-US")
    assert "base" in page.inner_text("#kind") and page.locator("#greeting button").count() == 0


# --- what is refused


def test_refusals_name_what_is_wrong(tmp_path, monkeypatch):
    model, out = random_model("modern"), tmp_path / "it.html"
    with pytest.raises(UsageError, match="mystery"):
        write_html(dataclasses.replace(model, params=model.params | {"mystery": np.zeros((2, 2))}), out)
    backend = foreign()._backend
    backend.add_tokens(["<think>"])
    with pytest.raises(UsageError, match="<think>"):
        write_html(dataclasses.replace(model, tokenizer=Tokenizer(backend)), out)
    with pytest.raises(UsageError, match="possessive|pattern|needs"):
        write_html(dataclasses.replace(model, tokenizer=foreign(r"(\p{L}+)\1|.")), out)
    monkeypatch.setattr(html_page, "MAX_PARAMETERS", 1000)
    with pytest.raises(UsageError, match="1,000"):
        write_html(model, out)
    assert not list(tmp_path.iterdir())


def test_the_command_and_the_stage_write_it(finished, tmp_path, monkeypatch, capsys):
    def export(*words):
        words = ("export", "--run-dir", str(finished), "--format", "html", *words)
        return main(lambda: make_parser().parse_args(words))

    monkeypatch.chdir(tmp_path)
    assert export("--out", "mine.html") == 0 and export() == 0
    assert {path.suffix for path in (tmp_path / "exported").glob("*/*")} == {".html"}
    assert export("--out", "mine.html") == 2 and export("--architecture", "nanochat") == 2
    capsys.readouterr()
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    for name in ("config.toml", "tokenizer", "base"):
        (run.root / name).symlink_to(finished / name)
    settings = load_config("nano", ['export.formats=["html"]'])
    assert "html" in run_export(settings, run) and (run.export / "html" / "chat.html").is_file()
    monkeypatch.setattr(html_page, "MAX_PARAMETERS", 1000)
    assert "html" not in run_export(settings, run) and run.export.is_dir(), "it is left out, and the run goes on"
