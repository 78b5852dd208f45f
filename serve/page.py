"""The chat page, in Gradio: streamed, in English and Korean, nothing leaves the machine.

A conversation is a list of messages as the engine takes them. A part of an answer may also carry `html`: its text as
token spans, made while it came, so that what the browser has shown stays as it is.
"""

from __future__ import annotations

import codecs
import datetime
import html
import json
import math
import re
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.i18n import I18nData

from jaxchat.config import Config, ServeConfig
from jaxchat.engine import Event, Handle, QueueFull, Token
from jaxchat.engine.loading import trained_stages
from jaxchat.errors import DataError, JaxchatError, UsageError
from jaxchat.run_dir import RunDir, read_json
from jaxchat.sizes import count_parameters
from jaxchat.tasks import TASKS
from jaxchat.tokenizer import Tokenizer

from .limits import Keys, Rates
from .schemas import ApiError
from .texts import EXAMPLES, LOGIN, TEXTS, texts
from .worker import Unavailable, Worker, fitting_request

Messages = list[dict[str, Any]]
Finished = Callable[[Sequence[Handle], int], None]  # records (answers, prompt tokens) in the metrics
t = I18nData  # a text by its name, in the language of the browser

ALTERNATIVES = 5  # shown for each token
BREAK = "\u2060"  # word joiner: no width, no meaning
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
TRAINING = ("pretrain", "sft", "rl")
TITLES = {name: task.title for name, task in TASKS.items()} | {"chatcore": "ChatCORE"}
# the browser itself refuses anything from elsewhere
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:\">"
)
CSS, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
LABELS = json.dumps({name: [words[key] for key in ("send", "stop", "log", "copy")] for name, words in TEXTS.items()})
HEAD = f"{POLICY}<script>const LABELS = {LABELS};\n{SCRIPT}</script>"
# the machine's own fonts: nothing is fetched
THEME = gr.themes.Base(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Apple SD Gothic Neo", "Noto Sans KR", "sans-serif"],
    font_mono=["ui-monospace", "SF Mono", "Cascadia Mono", "Noto Sans Mono", "monospace"],
).set(
    body_background_fill="#fafbfc", body_background_fill_dark="#11161c",
    body_text_color="#1b2530", body_text_color_dark="#e5eaf0",
    body_text_color_subdued="#566474", body_text_color_subdued_dark="#9dabba",
    block_background_fill="#ffffff", block_background_fill_dark="#1a212a",
    block_info_text_color="#566474", block_info_text_color_dark="#9dabba",
    block_label_text_color="#566474", block_label_text_color_dark="#9dabba",
    border_color_primary="#dbe1e8", border_color_primary_dark="#2c3742",
    color_accent="#0f766e", color_accent_soft="#e8eef3", color_accent_soft_dark="#25303b",
    input_background_fill="#ffffff", input_background_fill_dark="#1a212a",
    input_border_color="#7c8997", input_border_color_dark="#667585",
    input_placeholder_color="#66737f", input_placeholder_color_dark="#93a0ae",
    button_secondary_background_fill="transparent", button_secondary_background_fill_dark="transparent",
    button_secondary_background_fill_hover="#e8eef3", button_secondary_background_fill_hover_dark="#25303b",
    button_secondary_border_color="#7c8997", button_secondary_border_color_dark="#667585",
    button_primary_text_color="#ffffff", button_primary_text_color_dark="#0b1512",
    button_border_width="1px", block_border_width="0px", block_shadow="none", block_shadow_dark="none",
    checkbox_background_color_selected="#0f766e", checkbox_background_color_selected_dark="#2b8f86",
    checkbox_border_color="#7c8997", checkbox_border_color_dark="#667585",
    error_text_color="#b42318", error_text_color_dark="#f79a90", slider_color="#0f766e", slider_color_dark="#4fb8ad",
)  # fmt: skip


def turn(text: str, parts: list[dict[str, str]] | None = None) -> Messages:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": parts or []}]


def without_html(messages: Messages) -> Messages:
    """The conversation as the engine takes it."""

    def content(message: dict[str, Any]) -> Any:
        if message["role"] == "user":
            return message["content"]
        return [{"type": part["type"], "text": part["text"]} for part in message["content"]]

    return [{"role": message["role"], "content": content(message)} for message in messages]


def next_turn(messages: Messages, text: str, event: gr.EventData) -> tuple[Messages, str]:
    """Return (conversation before, what the person says): typed, an example, an edited message, or asked again."""
    data = event._data
    if data is None:
        return messages, text
    if isinstance(data["value"], dict):
        return messages, data["value"]["text"]
    turns = sum(line["role"] == "user" for line in show(messages)[: data["index"] + 1])
    before = messages[: 2 * max(turns - 1, 0)]
    if "previous_value" in data:
        edited = data["value"].replace(BREAK, "")
        return (before, edited) if edited.strip() else (messages, "")
    return before, messages[len(before)]["content"]


def show(messages: Messages) -> list[dict[str, Any]]:
    """A conversation as lines of the chatbot. A tool call is a line of its own: `12+30 = 42`."""
    lines: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "user":
            lines.append({"role": "user", "content": plain(message["content"])})
            continue
        parts: list[dict[str, str]] = message["content"]
        answer: list[Any] = []
        for part, following in zip(parts, [*parts[1:], {"type": ""}], strict=False):
            if part["type"] == "python":
                call = part["text"] + (f" = {following['text']}" if following["type"] == "python_output" else "")
                answer.append(gr.HTML(f"<code>{html.escape(call)}</code>"))
            elif part["type"] == "text":
                answer.append(gr.HTML(part["html"]) if part.get("html") else plain(part["text"]))
        # "…": nothing has come yet, or it was stopped before
        lines += [{"role": "assistant", "content": content} for content in answer or ["…"]]
    return lines


def plain(text: str) -> str:
    """Text in which a browser finds no tag and no entity, and Gradio no indentation to remove.

    Nothing is escaped: escapes would show in the box where a message is edited.
    """
    return re.sub(r"(?<=[<&])(?=[A-Za-z/!?#])|^(?=[ \t])", BREAK, text, flags=re.M)


class TokenSpans:
    """HTML of an answer's tokens as they come: a span for each, tinted by its probability.

    Tokens that make a character only together share a span. `data-steps` holds, for every token of a span, [text,
    probability, [[text, probability] of each alternative]] as JSON for `page.js`. Tab reaches the first span, the arrow
    keys the others.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {number: name for name, number in tokenizer.special.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._group: list[Token] = []  # tokens of the span to come
        self._text = ""  # of the group so far
        self._tabindex = 0

    def add(self, tokens: Sequence[Token]) -> str:
        """Return the spans that these complete; a special token has none."""
        spans = ""
        for token in tokens:
            if token.id in self._special:
                spans += self.end()
                continue
            self._group.append(token)
            self._text += self._decoder.decode(self._tokenizer.token_bytes(token.id))
            if not self._decoder.getstate()[0]:
                spans += self._close()
        return spans

    def end(self) -> str:
        """Return the span of an incomplete character."""
        self._text += self._decoder.decode(b"", final=True)
        return self._close() if self._group else ""

    def _close(self) -> str:
        steps = [
            [self.readable(token.id), probability(token.logprob),
             [[self.readable(number), probability(logprob)] for number, logprob in token.top]]
            for token in self._group
        ]  # fmt: skip
        likely = probability(sum(token.logprob for token in self._group))
        data = html.escape(json.dumps(steps, ensure_ascii=False, separators=(",", ":")))
        attributes = f'class="token" tabindex="{self._tabindex}" style="--p:{likely}" data-steps="{data}"'
        span = f"<span {attributes}>{html.escape(self._text)}</span>"
        self._tabindex, self._group, self._text = -1, [], ""
        return span

    def readable(self, token: int) -> str:
        """A token for people: spaces as signs, half a character as its bytes."""
        if token in self._special:
            return self._special[token]
        raw = self._tokenizer.token_bytes(token)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return " ".join(f"{byte:02X}" for byte in raw)
        return "".join(c if unicodedata.category(c)[0] != "C" else f"U+{ord(c):04X}" for c in text.translate(VISIBLE))


def probability(logprob: float) -> float:
    return round(math.exp(min(logprob, 0.0)), 4)


def model_card(run: RunDir, config: Config, words: dict[str, str]) -> str:
    """Size, training time and exam scores as HTML, as far as the run has them."""
    model = config.model
    facts = [
        ("parameters", f"{count_parameters(model).total:,}", ""),
        ("layers", str(model.depth), ""),
        ("context", f"{model.seq_len:,}", ""),
    ]
    stages = load_json(run.stages)
    if seconds := sum(stages[name].get("seconds") or 0 for name in TRAINING if name in stages):
        facts.append(("trained", str(datetime.timedelta(seconds=round(seconds))), ""))
    facts += exam_scores(run)
    rows = "".join(
        f"<dt>{html.escape(words.get(name, TITLES.get(name, name.replace('_', ' '))))}</dt>"
        f'<dd title="{html.escape(hint)}">{html.escape(value)}</dd>'
        for name, value, hint in facts
    )
    return f'<dl id="card">{rows}</dl>'


def exam_scores(run: RunDir) -> list[tuple[str, str, str]]:
    """Return (name, score, hint) of every exam of the furthest stage that took it; bits per byte of the base model."""
    means: dict[str, float] = {}  # over many exams
    tasks: dict[str, Any] = {}
    for stage in ("base", "sft", "rl"):
        report = load_json(run.eval(stage))
        taken = report.get("tasks", {})
        means |= {name: report[name] for name in ("core", "chatcore") if report.get(name) is not None}
        tasks |= {n: task for n, task in taken.items() if n not in means and not (n == "bits_per_byte" and n in tasks)}
    scores = [(name, f"{mean:.3f}", "") for name, mean in sorted(means.items())]
    for name, task in sorted(tasks.items()):
        if name not in means and task.get("metric") is not None:
            score = f"{task['metric']:.1%}" if "accuracy" in task else f"{task['metric']:.3f}"
            scores.append((name, score, f"n = {task['n']:,}" if "n" in task else ""))
    return scores


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run; {} where it is missing or damaged, so that people can still chat."""
    try:
        return read_json(path)
    except DataError:
        return {}


def mounted_page(
    run: RunDir,
    config: Config,
    worker: Worker,
    keys: Keys | None = None,
    rates: Rates | None = None,
    finished: Finished | None = None,
) -> FastAPI:
    """An application with the page at its root. Where there are keys, the login asks for one of them as password."""
    clients: dict[str, str] = {}  # by the name that a person gave at login

    def login(person: str, password: str) -> bool:
        client = keys.find(password) if keys else None
        if client:
            clients[person] = client
        return bool(client)

    def client_of(request: gr.Request) -> str:
        return clients.get(request.username or "") or (request.client.host if request.client else "")

    def markup(words: dict[str, str]) -> dict[str, str]:  # a component's text is one translation, so HTML is one too
        return {
            "about_heading": f"<h2>{words['about']}</h2>",
            "settings_heading": f"<h2>{words['settings']}</h2>",
            "card": model_card(run, config, words),
            "legend": f"<span>{words['likely']}</span><i></i><span>{words['unlikely']}</span>",
        }

    is_base = trained_stages(run)[0] == "base"
    rates = rates or Rates(config.serve.requests_per_minute)
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        build_page(worker, config, client_of, rates, finished, is_base),
        path="",
        server_name=config.serve.host,
        server_port=config.serve.port,
        i18n=gr.I18n(**{language: words | markup(words) for language, words in texts(config.serve.language).items()}),
        theme=THEME,
        css=CSS,
        head=HEAD,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        show_error=False,  # unexpected errors stand in the log, not on the page
        enable_monitoring=False,
        max_file_size=1,  # nobody uploads anything here
        auth=login if keys else None,
        auth_message=LOGIN,
    )


def build_page(
    worker: Worker, config: Config, client_of: Callable[[gr.Request], str], rates: Rates,
    finished: Finished | None = None, is_base: bool = False,
) -> gr.Blocks:  # fmt: skip
    """The page as Gradio blocks; `is_base`: a model without SFT, which continues texts."""
    limits = config.serve
    with gr.Blocks(title=f"jaxchat {config.tier}", analytics_enabled=False, fill_height=True) as page:
        conversation = gr.State([])
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>jaxchat</h1><span>{html.escape(config.tier)}</span>", elem_id="title")
            new = gr.Button(t("new_chat"), elem_id="new", size="sm", scale=0)
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=300, elem_id="talk"):
                chatbot, box, status = chat_column([] if is_base else config.eval.chat_prompts or EXAMPLES, is_base)
            with gr.Column(scale=1, min_width=250, elem_id="side"):
                settings = settings_column(config)

        async def talk(
            text: str, messages: Messages, temperature: float, top_k: float, max_tokens: float, probabilities: bool,
            event: gr.EventData, request: gr.Request,
        ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
            before, text = next_turn(messages, text, event)
            if not text.strip():
                yield before, show(before), gr.skip(), gr.skip()
                return
            yield before, show([*before, *turn(text)]), typing(False, "" if event._data is None else None), ""
            chosen: dict[str, Any] = {
                "temperature": float(temperature), "top_k": int(top_k), "max_tokens": int(max_tokens),
                "logprobs": ALTERNATIVES if probabilities else None, "client": client_of(request),
            }  # fmt: skip
            try:
                check(limits, rates, text, client_of(request))
                async with aclosing(answer(worker, before, text, chosen, finished)) as pieces:  # type: ignore[type-var]
                    async for messages, note in pieces:
                        yield messages, show(messages), gr.skip(), note
            except (JaxchatError, ApiError) as error:
                yield before, show(before), typing(True, text), complaint(error, worker, limits, text)
                return
            yield messages, show(messages), typing(True), note

        view = [conversation, chatbot, box, status]
        talking = gr.on(  # one event for all, so that a page has one answer at a time
            [box.submit, chatbot.retry, chatbot.edit, chatbot.example_select], talk, [box, conversation, *settings],
            view, trigger_mode="once", show_progress="hidden",
            concurrency_limit=None, api_visibility="private",  # people wait in the engine's queue
        )  # fmt: skip
        quick: dict[str, Any] = {
            "queue": False, "show_progress": "hidden", "api_visibility": "private", "cancels": [talking]
        }  # fmt: skip
        box.stop(lambda: (typing(True), ""), None, [box, status], **quick)
        chatbot.undo(undo, conversation, view, **quick)
        new.click(lambda: ([], [], typing(True), ""), None, view, **quick)
    page.queue(max_size=limits.queue_length + limits.slots)
    return page


def chat_column(examples: Sequence[str], is_base: bool) -> tuple[gr.Chatbot, gr.Textbox, gr.HTML]:
    """The conversation, the box to type in, and a small line below."""
    greeting, placeholder = (t(name + "_base" * is_base) for name in ("greeting", "placeholder"))
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        buttons=["copy"],
        feedback_options=None,
        render_markdown=False,  # nothing that was typed or generated is markup
        height="100%",
        min_height="14rem",
        editable="user",
        placeholder=greeting,  # type: ignore[arg-type]
        examples=[{"text": text} for text in examples],
    )
    box = gr.Textbox(
        label=placeholder, placeholder=placeholder, show_label=False, container=False, max_lines=6,
        autofocus=True, submit_btn=True, elem_id="box",
    )  # fmt: skip
    return chatbot, box, gr.HTML(elem_id="status")


def settings_column(config: Config) -> tuple[gr.Slider, gr.Slider, gr.Slider, gr.Checkbox]:
    """The model's card, the switch for token probabilities, and sliders that begin at the run's own settings."""
    serve, most = config.serve, min(config.serve.max_tokens, config.model.seq_len)
    gr.HTML(t("about_heading"))
    gr.HTML(t("card"))
    probabilities = gr.Checkbox(
        False, label=t("probabilities"), info=t("probabilities_info"), container=False, elem_id="probabilities"
    )
    gr.HTML(t("legend"), elem_id="legend")
    gr.HTML(t("settings_heading"))

    def slider(name: str, low: float, high: float, value: float, step: float) -> gr.Slider:
        return gr.Slider(low, high, value, step=step, label=t(name), info=t(f"{name}_info"), buttons=[])

    return (
        slider("temperature", 0, max(2, serve.temperature), serve.temperature, 0.05),
        slider("top_k", 0, max(200, serve.top_k), serve.top_k, 1),
        slider("max_tokens", 1, most, most, 1),
        probabilities,
    )


def typing(allowed: bool, text: str | None = None) -> dict[str, Any]:
    """Make the box's button one that sends or one that stops; with `text`, replace what stands in the box."""
    value: dict[str, Any] = {} if text is None else {"value": text}
    return gr.update(submit_btn=allowed, stop_btn=not allowed, **value)


def undo(messages: Messages) -> tuple[Any, ...]:
    """Remove the last turn; its question returns to the box."""
    text = messages[-2]["content"] if messages else ""
    return messages[:-2], show(messages[:-2]), typing(True, text), ""


def check(limits: ServeConfig, rates: Rates, text: str, client: str) -> None:
    """Raise `UsageError` for a message that is too long, `ApiError` 429 for too many messages."""
    if len(text) > limits.message_chars:
        raise UsageError("too many characters")
    rates.take(client)


def complaint(error: Exception, worker: Worker, limits: ServeConfig, text: str) -> str:
    """A line for the person, in their language; HTML."""
    if isinstance(error, QueueFull):
        words = str(t("busy"))
    elif isinstance(error, Unavailable):
        words = str(t(error.state))
    elif isinstance(error, ApiError):
        words = str(t("slow_down"))
    elif len(text) > limits.message_chars:
        words = f"{t('too_many_characters')} {len(text):,} &gt; {limits.message_chars:,}"
    elif (count := len(worker.engine.chat_request(turn(text)[:1]).tokens)) > worker.engine.capacity:
        words = f"{t('too_long')} {count:,} &gt; {worker.engine.capacity:,}"
    else:
        words = f"{t('failed')} {html.escape(str(error))}"
    return f'<span role="alert">{words}</span>'


async def answer(
    worker: Worker, before: Messages, text: str, settings: dict[str, Any], finished: Finished | None = None
) -> AsyncIterator[tuple[Messages, str]]:
    """Yield (conversation, status line) while the answer grows; the last line has the speed."""
    messages = [*without_html(before), {"role": "user", "content": text}]
    request, dropped = fitting_request(worker.engine, messages, **settings)
    parts: list[dict[str, str]] = []
    spans = TokenSpans(worker.engine.tokenizer)
    answers = await worker.submit([(request, [request.seed])])
    handle = answers.handles[0]
    try:
        with closing(answers):  # frees the slot
            if worker.engine.running >= worker.engine.slots:
                yield [*before, *turn(text)], str(t("waiting"))
            async for events in answers:
                for _, event in events:
                    grow(parts, event, spans)
                yield [*before, *turn(text, parts)], ""
    finally:
        if finished:
            finished([handle], handle.prompt_tokens)
    rate = handle.made / max(time.perf_counter() - (handle.started or 0.0), 1e-9)
    yield [*before, *turn(text, parts)], f"{rate:.0f} {t('speed_forgotten' if dropped else 'speed')}"


def grow(parts: list[dict[str, str]], event: Event, spans: TokenSpans) -> None:
    """Add an event to an answer."""
    shown = spans.add(event.tokens)
    if event.kind == "done":
        if parts and parts[-1]["html"]:
            parts[-1]["html"] += shown + spans.end()
        return
    if not parts or parts[-1]["type"] != event.kind:
        parts.append({"type": event.kind, "text": "", "html": ""})
    parts[-1]["text"] += event.text
    parts[-1]["html"] += shown
