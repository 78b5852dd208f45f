"""The chat page. Gradio, streamed, nothing leaves the machine; `app.py` serves it beside the API."""

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
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.i18n import I18nData

from jaxchat.config import Config, ServeConfig
from jaxchat.engine import Event, Handle, QueueFull
from jaxchat.engine.loading import trained_stages
from jaxchat.engine.request import Token
from jaxchat.errors import DataError, JaxchatError, UsageError
from jaxchat.run_dir import RunDir, read_json
from jaxchat.sizes import count_parameters
from jaxchat.tokenizer import Tokenizer

from .errors import ApiError
from .limits import Keys, Rates, key_name
from .texts import EXAMPLES, LOGIN, texts
from .worker import Unavailable, Worker, fitting_request

# What the chat page shows of a conversation: lines of the chatbot, tool calls, tokens with their probabilities.
#
# A conversation is a list of messages as the engine takes it; a part of an answer may carry `html` besides: its text as
# token spans, made while it came, so that what the browser has shown stays as it is.


Messages = list[dict[str, Any]]

BREAK = "\u2060"  # word joiner: no width, no meaning
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def turn(text: str, parts: list[dict[str, str]] | None = None) -> Messages:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": parts or []}]


def spoken(messages: Messages) -> Messages:
    """The conversation as the engine takes it."""
    return [
        message
        if message["role"] == "user"
        else {
            "role": "assistant",
            "content": [{"type": part["type"], "text": part["text"]} for part in message["content"]],
        }
        for message in messages
    ]


def next_turn(messages: Messages, text: str, event: gr.EventData) -> tuple[Messages, str]:
    """(conversation to go on from, what the person says): typed, an example, a message edited or asked again."""
    data = event._data
    if data is None:
        return messages, text
    if isinstance(data["value"], dict):
        return messages, data["value"]["text"]
    before = messages[: 2 * turns_before(messages, data["index"])]
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
        parts = message["content"]
        for i, part in enumerate(parts):
            if part["type"] == "python":
                output = parts[i + 1]["text"] if parts[i + 1 :] and parts[i + 1]["type"] == "python_output" else None
                lines.append({"role": "assistant", "content": gr.HTML(tool_call(part["text"], output))})
            elif part["type"] == "text":
                content = gr.HTML(part["html"]) if part.get("html") else plain(part["text"])
                lines.append({"role": "assistant", "content": content})
        if not any(part["type"] != "python_output" for part in parts):
            lines.append({"role": "assistant", "content": "…"})  # nothing has come yet, or it was stopped before
    return lines


def turns_before(messages: Messages, index: int) -> int:
    """Number of the turn to which line `index` of the shown conversation belongs."""
    return max(sum(line["role"] == "user" for line in show(messages)[: index + 1]) - 1, 0)


def plain(text: str) -> str:
    """Text in which a browser finds no tag and no entity, and Gradio no indentation to remove.

    Every sign stands as it was written: escaped signs would show in the box where a message is edited.
    """
    return re.sub(r"(?<=[<&])(?=[A-Za-z/!?#])|^(?=[ \t])", BREAK, text, flags=re.M)


def tool_call(call: str, output: str | None) -> str:
    return f"<code>{html.escape(call if output is None else f'{call} = {output}')}</code>"


class TokenSpans:
    """HTML of an answer's tokens as they come: a span for each, tinted by its probability.

    Tokens that make a character only together share a span. `data-steps` holds, for every token of a span, [its text,
    its probability, [[text, probability] of each alternative]] as JSON, which `page.js` shows beside it. The first span
    can be reached by Tab, the others by the arrow keys.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {number: name for name, number in tokenizer.special.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._group: list[Token] = []
        self._held, self._any = "", False  # text of the group so far; whether there has been a span

    def add(self, tokens: Sequence[Token]) -> str:
        """The spans that these complete; a special token is none."""
        spans = []
        for token in tokens:
            if token.id in self._special:
                spans.append(self.end())
                continue
            self._group.append(token)
            text = self._decoder.decode(self._tokenizer.token_bytes(token.id))
            self._held = text if len(self._group) == 1 else self._held + text
            if not self._decoder.getstate()[0]:
                spans.append(self._close(self._held))
        return "".join(spans)

    def end(self) -> str:
        """The span of what will not be completed any more."""
        return self._close(self._held + self._decoder.decode(b"", final=True)) if self._group else ""

    def _close(self, text: str) -> str:
        steps = [
            [self.readable(token.id), probability(token.logprob),
             [[self.readable(number), probability(logprob)] for number, logprob in token.top]]
            for token in self._group
        ]  # fmt: skip
        likely = probability(sum(token.logprob for token in self._group))
        data = html.escape(json.dumps(steps, ensure_ascii=False, separators=(",", ":")))
        index, self._any, self._group = -self._any, True, []
        attributes = f'class="token" tabindex="{index}" style="--p:{likely}" data-steps="{data}"'
        return f"<span {attributes}>{html.escape(text)}</span>"

    def readable(self, token: int) -> str:
        """A token by itself, so that a person sees what it is: spaces as signs, half a character as its bytes."""
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


# The model's card beside the chat: size, training time, exam scores, as far as the run has them.


TRAINING = ("pretrain", "sft", "rl")
TOGETHER = ("core", "chatcore")  # scores over many exams
PROPER = {"core": "CORE", "chatcore": "ChatCORE", "mmlu": "MMLU", "arc_easy": "ARC-Easy",
          "arc_challenge": "ARC-Challenge", "gsm8k": "GSM8K", "humaneval": "HumanEval"}  # fmt: skip


def is_base(run: RunDir) -> bool:
    """Whether the model had no SFT: it goes on with texts, and answers nothing."""
    return trained_stages(run)[0] == "base"


def model_card(run: RunDir, config: Config, words: dict[str, str]) -> str:
    """Size, training time and exam scores as HTML."""
    model = config.model
    facts = [
        ("parameters", f"{count_parameters(model).total:,}", ""),
        ("layers", str(model.depth), ""),
        ("context", f"{model.seq_len:,}", ""),
    ]
    if seconds := training_seconds(run):
        facts.append(("trained", str(datetime.timedelta(seconds=round(seconds))), ""))
    facts += exam_scores(run)
    rows = "".join(
        f"<dt>{html.escape(words.get(name, PROPER.get(name, name.replace('_', ' '))))}</dt>"
        f'<dd title="{html.escape(hint)}">{html.escape(value)}</dd>'
        for name, value, hint in facts
    )
    return f'<dl id="card">{rows}</dl>'


def training_seconds(run: RunDir) -> float:
    """Of all trained stages together; 0 where it is not known."""
    stages = saved(run.stages)
    return sum(_number(stage.get("seconds")) or 0.0 for name in TRAINING if isinstance(stage := stages.get(name), dict))


def exam_scores(run: RunDir) -> list[tuple[str, str, str]]:
    """(name, value, hint) of every exam: of the furthest stage that took it, of bits per byte the base model."""
    tasks: dict[str, Any] = {}
    together: list[tuple[str, str, str]] = []
    for stage in ("rl", "sft", "base"):
        report = saved(run.eval(stage))
        taken = report.get("tasks")
        for name, task in taken.items() if isinstance(taken, dict) else ():
            if name not in TOGETHER and (name not in tasks or name == "bits_per_byte"):
                tasks[name] = task
        for name in TOGETHER:
            if (score := _number(report.get(name))) is not None and name not in {known for known, *_ in together}:
                together.append((name, f"{score:.3f}", ""))
    facts = []
    for name, task in sorted(tasks.items()):
        metric = _number(task.get("metric")) if isinstance(task, dict) else None
        if metric is not None:
            count = task.get("n")
            hint = f"n = {count:,}" if isinstance(count, int) else ""
            facts.append((name, f"{metric:.1%}" if "accuracy" in task else f"{metric:.3f}", hint))
    return sorted(together) + facts


def saved(path: Path) -> dict[str, Any]:
    """A JSON object of the run; a missing or damaged file keeps nobody from talking."""
    try:
        content = read_json(path)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


t = I18nData  # a text by its name, in the language of the browser

Ended = Callable[[Sequence[Handle], int], None]  # (answers, tokens of the prompt), for the metrics
ALTERNATIVES = 5  # shown for each token
# belt and braces: the browser itself refuses anything from elsewhere
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:\">"
)
CSS, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
HEAD = f"{POLICY}<script>{SCRIPT}</script>"
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


def mounted_page(
    run: RunDir,
    config: Config,
    worker: Worker,
    keys: Keys | None = None,
    rates: Rates | None = None,
    ended: Ended | None = None,
) -> FastAPI:
    """An application with the page at its root. Where there are keys, one of them opens it; `rates`: of the API."""
    names: dict[str, str] = {}  # of the API's clients, by the name that a person gave at login

    def login(person: str, password: str) -> bool:
        if not keys or (number := keys.find(password)) is None:
            return False
        names[person] = key_name(number)
        return True

    def who(request: gr.Request) -> str:
        return names.get(request.username or "") or (request.client.host if request.client else "")

    guard: dict[str, Any] = {"auth": login, "auth_message": LOGIN} if keys else {}
    found = texts(config.serve.language)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    return gr.mount_gradio_app(
        app,
        build_page(worker, config, who, rates or Rates(config.serve.requests_per_minute), ended, is_base(run)),
        path="",
        server_name=config.serve.host,
        server_port=config.serve.port,
        i18n=gr.I18n(**{name: words | markup(run, config, words) for name, words in found.items()}),
        theme=THEME,
        css=CSS,
        head=HEAD,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        show_error=False,  # what nobody expected stands in the log, not on the page
        enable_monitoring=False,
        max_file_size=1,  # nobody uploads anything here
        **guard,
    )


def markup(run: RunDir, config: Config, words: dict[str, str]) -> dict[str, str]:
    """HTML in one language. A text of Gradio's holds one translation at most, so each is translated as a whole."""
    return {
        "about_heading": f"<h2>{words['about']}</h2>",
        "settings_heading": f"<h2>{words['settings']}</h2>",
        "card": model_card(run, config, words),
        "legend": f"<span>{words['likely']}</span><i></i><span>{words['unlikely']}</span>",
    }


def build_page(
    worker: Worker, config: Config, who: Callable[[gr.Request], str], rates: Rates, ended: Ended | None = None,
    base: bool = False,
) -> gr.Blocks:  # fmt: skip
    """The page as Gradio blocks; `worker` answers, `ended` hears of every answer that has ended; `base`: there was no
    SFT."""
    limits = config.serve
    with gr.Blocks(title=f"jaxchat {config.tier}", analytics_enabled=False, fill_height=True) as page:
        conversation = gr.State([])  # as the engine takes it; the chatbot shows it
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>jaxchat</h1><span>{html.escape(config.tier)}</span>", elem_id="title")
            new = gr.Button(t("new_chat"), elem_id="new", size="sm", scale=0)
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=300, elem_id="talk"):
                chatbot, box, status = chat_column([] if base else config.eval.chat_prompts or EXAMPLES, base)
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
                "logprobs": ALTERNATIVES if probabilities else None, "client": who(request),
            }  # fmt: skip
            try:
                check(limits, rates, text, who(request))
                async with aclosing(answer(worker, before, text, chosen, ended)) as pieces:  # type: ignore[type-var]
                    async for messages, note in pieces:
                        yield messages, show(messages), gr.skip(), note
            except (JaxchatError, ApiError) as error:
                yield before, show(before), typing(True, text), complaint(error, worker, limits, text)
                return
            yield messages, show(messages), typing(True), note

        talking = gr.on(  # one event for all, so that a page has one answer at a time
            [box.submit, chatbot.retry, chatbot.edit, chatbot.example_select], talk, [box, conversation, *settings],
            [conversation, chatbot, box, status], trigger_mode="once", show_progress="hidden",
            concurrency_limit=None, api_visibility="private",  # who waits, waits in the engine's queue
        )  # fmt: skip
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        box.stop(lambda: (typing(True), ""), None, [box, status], cancels=[talking], **quick)
        chatbot.undo(undo, conversation, [conversation, chatbot, box, status], cancels=[talking], **quick)
        new.click(
            lambda: ([], [], typing(True), ""), None, [conversation, chatbot, box, status], cancels=[talking], **quick
        )
    page.queue(max_size=limits.queue_length + limits.slots)
    return page


def chat_column(examples: Sequence[str], base: bool) -> tuple[gr.Chatbot, gr.Textbox, gr.HTML]:
    """The conversation, what is typed, and a small line below."""
    greeting, placeholder = (t(name + "_base" * base) for name in ("greeting", "placeholder"))
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        buttons=["copy"],
        feedback_options=None,
        render_markdown=False,  # what was typed and what the model said, letter by letter; nothing in it is markup
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
    """The model's card; temperature, top-k and longest answer, from the run's own settings; the tokens' switch."""
    serve, most = config.serve, min(config.serve.max_tokens, config.model.seq_len)
    gr.HTML(t("about_heading"))
    gr.HTML(t("card"))
    probabilities = gr.Checkbox(
        False, label=t("probabilities"), info=t("probabilities_info"), container=False, elem_id="probabilities"
    )
    gr.HTML(t("legend"), elem_id="legend")
    gr.HTML(t("settings_heading"))
    sliders = (
        gr.Slider(0, max(2, serve.temperature), serve.temperature, step=0.05, label=t("temperature"),
                  info=t("temperature_info"), buttons=[]),
        gr.Slider(0, max(200, serve.top_k), serve.top_k, step=1, label=t("top_k"), info=t("top_k_info"), buttons=[]),
        gr.Slider(1, most, most, step=1, label=t("max_tokens"), info=t("max_tokens_info"), buttons=[]),
    )  # fmt: skip
    return *sliders, probabilities


def typing(allowed: bool, text: str | None = None) -> dict[str, Any]:
    """Turn the box's button into one that sends or one that stops; with `text`, replace what stands in the box."""
    value: dict[str, Any] = {} if text is None else {"value": text}
    return gr.update(submit_btn=allowed, stop_btn=not allowed, **value)


def undo(messages: Messages) -> tuple[Any, ...]:
    """Take back the last turn; its question returns to the box."""
    text = messages[-2]["content"] if messages else ""
    return messages[:-2], show(messages[:-2]), typing(True, text), ""


def check(limits: ServeConfig, rates: Rates, text: str, client: str) -> None:
    """What the page itself allows; `UsageError`, or `ApiError` 429."""
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
    worker: Worker, before: Messages, text: str, settings: dict[str, Any], ended: Ended | None = None
) -> AsyncIterator[tuple[Messages, str]]:
    """(conversation, status line) again and again while the answer grows; the last line tells the speed."""
    asked = {"role": "user", "content": text}
    request, dropped = fitting_request(worker.engine, [*spoken(before), asked], **settings)
    parts: list[dict[str, str]] = []
    spans = TokenSpans(worker.engine.tokenizer)
    answers = await worker.submit([(request, [request.seed])])
    handle = answers.handles[0]
    try:
        async with answers:  # leaving frees the slot
            if worker.engine.running >= worker.engine.slots:
                yield [*before, *turn(text)], str(t("waiting"))
            async for pieces in answers:
                for _, event in pieces:
                    grow(parts, event, spans)
                yield [*before, *turn(text, parts)], ""
    finally:
        if ended:
            ended([handle], handle.prompt_tokens)
    rate = handle.made / max(time.perf_counter() - (handle.started or 0.0), 1e-9)
    yield [*before, *turn(text, parts)], f"{rate:.0f} {t('speed_forgotten' if dropped else 'speed')}"


def grow(parts: list[dict[str, str]], event: Event, spans: TokenSpans) -> None:
    """Add a piece to an answer."""
    shown = spans.add(event.tokens)
    if event.kind == "done":
        if parts and parts[-1]["html"]:
            parts[-1]["html"] += shown + spans.end()
        return
    if not parts or parts[-1]["type"] != event.kind:
        parts.append({"type": event.kind, "text": "", "html": ""})
    parts[-1]["text"] += event.text
    parts[-1]["html"] += shown
