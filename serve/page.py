"""The chat page, in Gradio: streamed, in English and Korean, nothing leaves the machine.

A conversation is a list of messages as the engine takes them. A part of an answer may also carry `html`: its text as
token spans, made once when it arrives, so that the browser's copy does not change.
"""

from __future__ import annotations

import codecs
import datetime
import html
import json
import math
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.i18n import I18nData

from jaxchat.chat import EXAMPLES
from jaxchat.engine import Token, trained_stages
from jaxchat.errors import DataError, JaxchatError
from jaxchat.run_dir import RunDir, read_json
from jaxchat.sizes import count_parameters
from jaxchat.tasks import TASKS
from jaxchat.tokenizer import Tokenizer

from .completions import token_name
from .schemas import ApiError
from .service import TEXTS, Call, Service, as_api_error, check_length
from .worker import ContextExceeded, fitting_request

Messages = list[dict[str, Any]]
t = I18nData  # a text by its name, in the language of the browser

CSS, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
LOGIN = "Any name will do; the password is an API key. 이름은 아무것이나, 비밀번호는 API 키입니다."
ALTERNATIVES = 5  # shown for each token
BREAK = "\u2060"  # word joiner: no width, no meaning
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
TITLES = {name: task.title for name, task in TASKS.items() if task.title} | {"chatcore": "ChatCORE"}
# the browser itself refuses anything from elsewhere
HEAD = """<meta http-equiv="Content-Security-Policy"
content="default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:">
<script>const LABELS = %s;
%s</script>"""
# the machine's own fonts: nothing is fetched
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Apple SD Gothic Neo", "Noto Sans KR", "sans-serif"]
MONO = ["ui-monospace", "SF Mono", "Cascadia Mono", "Noto Sans Mono", "monospace"]
THEME = gr.themes.Base(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO).set(
    body_background_fill="*neutral_50", body_text_color_subdued="*neutral_600",
    block_border_width="0px", block_label_text_color="*neutral_600",
    color_accent="*primary_700", color_accent_soft="*neutral_200", slider_color_dark="*primary_400",
    input_background_fill="white", input_background_fill_dark="*neutral_800",
    input_border_color="*neutral_500", input_border_color_dark="*neutral_500",
    input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    button_border_width="1px", button_primary_text_color_dark="*neutral_950",
    button_secondary_background_fill="transparent", button_secondary_background_fill_dark="transparent",
    button_secondary_border_color="*neutral_500", button_secondary_border_color_dark="*neutral_500",
    checkbox_border_color="*neutral_500", checkbox_border_color_dark="*neutral_500",
)  # fmt: skip


def turn(text: str, parts: list[dict[str, str]] | None = None) -> Messages:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": parts or []}]


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
    """Return a conversation as lines of the chatbot. A tool call is a line of its own: `12+30 = 42`."""
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
    """Return text in which a browser finds no tag and no entity, and Gradio no indentation to remove.

    Nothing is escaped: escapes would show in the box where a message is edited.
    """
    return re.sub(r"(?<=[<&])(?=[A-Za-z/!?#])|^(?=[ \t])", BREAK, text, flags=re.M)


def token_spans(
    tokenizer: Tokenizer, tokens: Sequence[Token], first: bool = True, final: bool = True
) -> tuple[str, list[Token]]:
    """Return (HTML, rest): a span for each token, tinted by its probability; special tokens have none.

    Tokens that make a character only together share a span. `rest`: tokens of a character that is not complete yet, if
    more come (not `final`). `data-steps` holds, for every token of a span, [text, probability, [[text, probability] of
    each alternative]] as JSON for `page.js`. Tab reaches the `first` span, the arrow keys the others.
    """
    tokens = [token for token in tokens if token.id not in tokenizer.special.values()]
    decoder, spans, text, group = codecs.getincrementaldecoder("utf-8")("replace"), "", "", list[Token]()

    def step(token: int, logprob: float) -> list[Any]:
        return [token_name(tokenizer, token).translate(VISIBLE), probability(logprob)]

    for i, token in enumerate(tokens):
        group.append(token)
        text += decoder.decode(tokenizer.token_bytes(token.id), final and i == len(tokens) - 1)
        if decoder.getstate()[0]:
            continue
        steps = [[*step(t.id, t.logprob), [step(*pair) for pair in t.top]] for t in group]
        data = html.escape(json.dumps(steps, ensure_ascii=False, separators=(",", ":")))
        likely, tabindex = probability(sum(t.logprob for t in group)), 0 if first and not spans else -1
        attributes = f'class="token" tabindex="{tabindex}" style="--p:{likely}" data-steps="{data}"'
        spans += f"<span {attributes}>{html.escape(text)}</span>"
        text, group = "", []
    return spans, group


def probability(logprob: float) -> float:
    return round(math.exp(min(logprob, 0.0)), 4)


def model_card(run: RunDir, service: Service, words: dict[str, str]) -> str:
    """Return size, training time and exam scores as HTML, as far as the run has them."""

    def read(path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except DataError:  # missing or damaged: people can still chat
            return {}

    model, stages = service.config.model, read(run.stages)
    seconds = sum(stages.get(name, {}).get("seconds") or 0 for name in ("pretrain", "sft", "rl"))
    parameters, context = count_parameters(model).total, model.seq_len
    facts = {"parameters": f"{parameters:,}", "layers": str(model.depth), "context": f"{context:,}"}
    if seconds:
        facts["trained"] = str(datetime.timedelta(seconds=round(seconds)))
    tasks: dict[str, Any] = {}
    for stage in ("base", "sft", "rl"):  # of the furthest stage that took it, but bits per byte of the base model
        report = read(run.eval(stage))
        taken = report.get("tasks", {})
        tasks |= {name: task for name, task in taken.items() if name != "bits_per_byte" or name not in tasks}
        tasks |= {name: {"metric": report[name]} for name in ("core", "chatcore") if report.get(name) is not None}
    for name, task in sorted(tasks.items()):
        if task.get("metric") is not None:
            form = task.get("form", ".1%" if "accuracy" in task else ".3f")
            facts[name] = f"{task['metric']:{form}}"
    rows = "".join(
        f"<dt>{html.escape(words.get(name) or TITLES.get(name) or name.replace('_', ' '))}</dt>"
        f"<dd>{html.escape(value)}</dd>"
        for name, value in facts.items()
    )
    return f'<dl id="card">{rows}</dl>'


async def answer(
    service: Service, client: str, before: Messages, text: str, settings: dict[str, Any]
) -> AsyncIterator[tuple[Messages, str]]:
    """Yield (conversation, status line) while the answer grows; the last line has the speed."""
    check_length(service.limits.message_chars, "message", len(text))
    service.clients.count(client)
    service.worker.check()
    messages = [*before, {"role": "user", "content": text}]
    request, dropped = fitting_request(service.worker.engine, messages, **settings, client=client)
    parts: list[dict[str, str]] = []
    rest: list[Token] = []
    with closing(Call(service, client, "page")) as call:  # frees the slot
        await call.submit([(request, [request.seed])])
        if call.engine.running >= call.engine.slots:
            yield [*before, *turn(text)], str(t("waiting"))
        async for events in call.answers:
            for _, event in events:
                done = event.kind == "done"
                if not done and (not parts or parts[-1]["type"] != event.kind):
                    parts.append({"type": event.kind, "text": "", "html": ""})
                if parts:
                    parts[-1]["text"] += event.text
                    tokens, first = [*rest, *event.tokens], not parts[-1]["html"]
                    spans, rest = token_spans(call.engine.tokenizer, tokens, first, done)
                    parts[-1]["html"] += spans
            yield [*before, *turn(text, parts)], ""
        handle = call.answers.handles[0]
    rate = handle.made / max(time.perf_counter() - (handle.started or 0.0), 1e-9)
    yield [*before, *turn(text, parts)], f"{rate:.0f} {t('speed_forgotten' if dropped else 'speed')}"


def complaint(error: Exception, service: Service, text: str) -> str:
    """Return a line for the person, in their language; HTML."""
    code, most = as_api_error(error).code, service.limits.message_chars
    if isinstance(error, ContextExceeded):
        words = f"{t('too_long')} {error.tokens:,} &gt; {error.capacity:,}"
    elif len(text) > most:
        words = f"{t('too_many_characters')} {len(text):,} &gt; {most:,}"
    else:
        words = str(t(code)) if code in TEXTS["en"] else f"{t('failed')} {html.escape(str(error))}"
    return f'<span role="alert">{words}</span>'


def view(messages: Messages, note: Any = "", free: bool | None = None, text: str | None = None) -> tuple[Any, ...]:
    """Return what a step changes: conversation, chatbot, box, status line.

    `free`: the box's button sends, else it stops; None: as it is. `text` replaces what is in the box.
    """
    changes: dict[str, Any] = {} if free is None else {"submit_btn": free, "stop_btn": not free}
    if text is not None:
        changes["value"] = text
    return messages, show(messages), gr.update(**changes), note


def mounted_page(run: RunDir, service: Service) -> FastAPI:
    """Return an application with the page at its root. Where there are keys, the login asks for one as password."""
    config, limits = service.config, service.limits
    is_base = trained_stages(run)[0] == "base"  # a model without SFT, which continues texts
    greeting, placeholder = (t(name + "_base" * is_base) for name in ("greeting", "placeholder"))
    examples = [] if is_base else config.eval.chat_prompts or EXAMPLES
    longest = min(limits.max_tokens, config.model.seq_len)
    logins: dict[str, str] = {}  # names of clients by the names that people gave

    def login(person: str, password: str) -> bool:
        client = service.clients.find(password.encode("utf-8", "replace"))
        if client:
            logins[person] = client
        return bool(client)

    async def talk(
        text: str, messages: Messages, temperature: float, top_k: float, max_tokens: float, probabilities: bool,
        event: gr.EventData, request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:  # fmt: skip
        before, text = next_turn(messages, text, event)
        if not text.strip():
            yield view(before, gr.skip())
            return
        yield view([*before, *turn(text)], "", False, "" if event._data is None else None)
        client = logins.get(request.username or "") or (request.client.host if request.client else "")
        settings: dict[str, Any] = {
            "temperature": float(temperature), "top_k": int(top_k), "max_tokens": int(max_tokens),
            "min_p": limits.min_p, "logprobs": ALTERNATIVES if probabilities else None,
        }  # fmt: skip
        note = ""
        try:
            async with aclosing(answer(service, client, before, text, settings)) as steps:  # type: ignore[type-var]
                async for messages, note in steps:
                    yield view(messages, note)
            yield view(messages, note, True)
        except (JaxchatError, ApiError) as error:
            yield view(before, complaint(error, service, text), True, text)

    def undo(messages: Messages) -> tuple[Any, ...]:
        return view(messages[:-2], "", True, messages[-2]["content"] if messages else "")

    with gr.Blocks(title=f"jaxchat {config.tier}", analytics_enabled=False, fill_height=True) as page:
        conversation = gr.State([])
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>jaxchat</h1><span>{html.escape(config.tier)}</span>", elem_id="title")
            new = gr.Button(t("new_chat"), elem_id="new", size="sm", scale=0)
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=300, elem_id="talk"):
                chatbot = gr.Chatbot(
                    elem_id="chat", show_label=False, buttons=["copy"], feedback_options=None, height="100%",
                    min_height="14rem", editable="user", placeholder=greeting,  # type: ignore[arg-type]
                    examples=[{"text": text} for text in examples],
                    render_markdown=False,  # nothing that was typed or generated is markup
                )  # fmt: skip
                box = gr.Textbox(
                    label=placeholder, placeholder=placeholder, show_label=False, container=False, max_lines=6,
                    autofocus=True, submit_btn=True, elem_id="box",
                )  # fmt: skip
                status = gr.HTML(elem_id="status")
            with gr.Column(scale=1, min_width=250, elem_id="side"):
                gr.HTML(t("about_heading"))
                gr.HTML(t("card"))
                probabilities = gr.Checkbox(
                    False, label=t("probabilities"), info=t("probabilities_info"), container=False,
                    elem_id="probabilities",
                )  # fmt: skip
                gr.HTML(t("legend"), elem_id="legend")
                gr.HTML(t("settings_heading"))
                sliders = [
                    gr.Slider(low, high, value, step=step, label=t(name), info=t(f"{name}_info"), buttons=[])
                    for name, low, high, value, step in (
                        ("temperature", 0, max(2, limits.temperature), limits.temperature, 0.05),
                        ("top_k", 0, max(200, limits.top_k), limits.top_k, 1),
                        ("max_tokens", 1, longest, longest, 1),
                    )
                ]
        seen = [conversation, chatbot, box, status]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        talking = gr.on(  # one event for all, so that a page has one answer at a time
            [box.submit, chatbot.retry, chatbot.edit, chatbot.example_select], talk,
            [box, conversation, *sliders, probabilities], seen, trigger_mode="once",
            concurrency_limit=None, **quiet,  # people wait in the engine's queue
        )  # fmt: skip
        quiet |= {"queue": False, "cancels": [talking]}
        box.stop(lambda: (gr.update(submit_btn=True, stop_btn=False), ""), None, [box, status], **quiet)
        chatbot.undo(undo, conversation, seen, **quiet)
        new.click(lambda: view([], "", True), None, seen, **quiet)
    page.queue(max_size=limits.queue_length + limits.slots)
    # in the browser's language, or in that of `serve.language`
    texts = {name: TEXTS.get(limits.language, words) for name, words in TEXTS.items()}
    labels = {name: [words[key] for key in ("send", "stop", "log", "copy")] for name, words in texts.items()}

    def markup(words: dict[str, str]) -> dict[str, str]:  # a component's text is one translation, so HTML is one too
        return words | {
            "about_heading": f"<h2>{words['about']}</h2>",
            "settings_heading": f"<h2>{words['settings']}</h2>",
            "card": model_card(run, service, words),
            "legend": f"<span>{words['likely']}</span><i></i><span>{words['unlikely']}</span>",
        }

    return gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        page,
        path="",
        server_name=limits.host,
        server_port=limits.port,
        i18n=gr.I18n(**{name: markup(words) for name, words in texts.items()}),
        theme=THEME,
        css=CSS,
        head=HEAD % (json.dumps(labels), SCRIPT),
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        show_error=False,  # unexpected errors are in the log, not on the page
        enable_monitoring=False,
        max_file_size=1,  # nobody uploads anything here
        auth=login if service.clients.keys else None,
        auth_message=LOGIN,
    )
