"""The chat page: `python launch.py --run-dir runs/nano --serve`. Gradio, streamed, nothing leaves the machine."""

from __future__ import annotations

import datetime
import html
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.i18n import I18nData

from jaxchat.config import Config
from jaxchat.engine import Engine
from jaxchat.errors import DataError, JaxchatError, UsageError
from jaxchat.log import say
from jaxchat.model.sizes import count_parameters
from jaxchat.paths import RunDir, read_json
from serve.texts import CSS, EXAMPLES, TEXTS
from serve.worker import Worker, fitting_request

Messages = list[dict[str, Any]]
t = I18nData  # a text by its name, in the language of the browser

BREAK = "\u2060"  # word joiner: no width, no meaning
TRAINING = ("pretrain", "sft", "rl")
# belt and braces: the browser itself refuses anything from elsewhere
HEAD = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:\">"
)
# the machine's own fonts: nothing is fetched
THEME = gr.themes.Soft(primary_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def serve(run: RunDir, config: Config) -> None:
    """Serve the page of a finished run until the process is stopped. `UsageError` if the port is taken."""
    check_port(config.serve.host, config.serve.port)
    engine = Engine.from_pretrained(run.root, slots=config.serve.slots)
    say("compiling for every batch size (once per start) ...")
    engine.warm_up()
    worker = Worker(engine)
    page = build_page(worker, config)
    say(f"chat page: http://{config.serve.host}:{config.serve.port}   (Ctrl-C stops it)")
    try:
        page.launch(**launch_options(run, config), prevent_thread_lock=False)
    finally:
        worker.close()


def launch_options(run: RunDir, config: Config) -> dict[str, Any]:
    """What `Blocks.launch` needs so that nothing but this machine is involved, and no browser keeps the talk."""
    return {
        "server_name": config.serve.host,
        "server_port": config.serve.port,
        "i18n": gr.I18n(
            **{language: words | {"card": model_card(run, config, words)} for language, words in TEXTS.items()}
        ),
        "theme": THEME,
        "css": CSS,
        "head": HEAD,
        "ssr_mode": False,
        "share": False,
        "run_history": False,
        "quiet": True,
        "footer_links": [],
        "show_error": True,
    }


def build_page(worker: Worker, config: Config) -> gr.Blocks:
    """The page as Gradio blocks; `worker` answers."""
    limits = config.serve
    with gr.Blocks(title="jaxchat", analytics_enabled=False, fill_height=True) as page:
        conversation = gr.State([])  # as the engine takes it; the chatbot shows it
        with gr.Row(scale=1):
            with gr.Column(scale=3, min_width=300, elem_id="talk"):
                chatbot, box, status = chat_column()
            with gr.Column(scale=1, min_width=250, elem_id="side"):
                gr.HTML(t("card"))
                sliders = settings_column(config, worker.engine.capacity)

        async def talk(
            text: str, messages: Messages, temperature: float, top_k: float, max_tokens: float, event: gr.EventData
        ) -> AsyncIterator[tuple[Any, ...]]:
            before, text = next_turn(messages, text, event)
            if not text.strip():
                yield before, show(before), gr.skip(), gr.skip()
                return
            settings = {"temperature": float(temperature), "top_k": int(top_k), "max_tokens": int(max_tokens)}
            yield before, show([*before, *turn(text)]), typing(False, "" if event._data is None else None), ""
            try:
                async with aclosing(answer(worker, before, text, settings)) as pieces:  # type: ignore[type-var]
                    async for messages, note in pieces:
                        yield messages, show(messages), gr.skip(), note
            except JaxchatError as error:
                gr.Warning(html.escape(str(error)), duration=15)
                yield before, show(before), typing(True, text), ""
                return
            yield messages, show(messages), typing(True), note

        talking = gr.on(  # one event for all, so that a page has one answer at a time
            [box.submit, chatbot.retry, chatbot.edit, chatbot.example_select], talk, [box, conversation, *sliders],
            [conversation, chatbot, box, status], trigger_mode="once", show_progress="hidden",
            concurrency_limit=limits.slots, api_visibility="private",
        )  # fmt: skip
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        box.stop(lambda: typing(True), None, box, cancels=[talking], **quick)
        chatbot.undo(undo, conversation, [conversation, chatbot, box, status], cancels=[talking], **quick)
        chatbot.clear(lambda: ([], typing(True), ""), None, [conversation, box, status], cancels=[talking], **quick)
    page.queue(max_size=8 * limits.slots, default_concurrency_limit=limits.slots)
    return page


def chat_column() -> tuple[gr.Chatbot, gr.Textbox, gr.HTML]:
    """The conversation, what is typed, and a small line below."""
    chatbot = gr.Chatbot(
        elem_id="chat",
        show_label=False,
        buttons=["copy"],
        feedback_options=None,
        render_markdown=False,  # what was typed and what the model said, letter by letter; nothing in it is markup
        height="calc(100dvh - 8.5rem)",
        min_height="18rem",
        editable="user",
        placeholder=t("greeting"),  # type: ignore[arg-type]
        examples=[{"text": text} for text in EXAMPLES],
    )
    box = gr.Textbox(
        placeholder=t("placeholder"), show_label=False, container=False, max_lines=6, autofocus=True, submit_btn=True,
        elem_id="box",
    )  # fmt: skip
    return chatbot, box, gr.HTML(elem_id="status")


def settings_column(config: Config, capacity: int) -> tuple[gr.Slider, gr.Slider, gr.Slider]:
    """Temperature, top-k and longest answer, from the run's own settings."""
    serve = config.serve
    with gr.Accordion(t("settings"), open=False):
        return (
            gr.Slider(0, 2, serve.temperature, step=0.05, label=t("temperature"), info=t("temperature_info")),
            gr.Slider(0, 200, serve.top_k, step=1, label=t("top_k"), info=t("top_k_info")),
            gr.Slider(
                1, capacity, min(serve.max_tokens, capacity), step=1, label=t("max_tokens"), info=t("max_tokens_info")
            ),
        )


def typing(allowed: bool, text: str | None = None) -> dict[str, Any]:
    """Turn the box's button into one that sends or one that stops; with `text`, replace what stands in the box."""
    value: dict[str, Any] = {} if text is None else {"value": text}
    return gr.update(submit_btn=allowed, stop_btn=not allowed, **value)


def turn(text: str, parts: list[dict[str, str]] | None = None) -> Messages:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": parts or []}]


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


def turns_before(messages: Messages, index: int) -> int:
    """Number of the turn to which line `index` of the shown conversation belongs."""
    return max(sum(line["role"] == "user" for line in show(messages)[: index + 1]) - 1, 0)


def undo(messages: Messages) -> tuple[Any, ...]:
    """Take back the last turn; its question returns to the box."""
    text = messages[-2]["content"] if messages else ""
    return messages[:-2], show(messages[:-2]), typing(True, text), ""


async def answer(
    worker: Worker, before: Messages, text: str, settings: dict[str, Any]
) -> AsyncIterator[tuple[Messages, str]]:
    """(conversation, status line) again and again while the answer grows; the last line tells the speed."""
    asked = {"role": "user", "content": text}
    request, dropped = fitting_request(worker.engine, [*before, asked], **settings)
    parts: list[dict[str, str]] = []
    begin = time.perf_counter()
    async with aclosing(worker.events(request)) as events:  # type: ignore[type-var]  # leaving frees the slot
        async for event in events:
            if event.kind == "done":
                break
            if not parts or parts[-1]["type"] != event.kind:
                parts.append({"type": event.kind, "text": ""})
            parts[-1]["text"] += event.text
            yield [*before, *turn(text, parts)], ""
    made = sum(len(worker.engine.tokenizer.encode(part["text"])) for part in parts)
    rate = made / max(time.perf_counter() - begin, 1e-9)
    yield [*before, *turn(text, parts)], f"{rate:.0f} {t('speed_forgotten' if dropped else 'speed')}"


def show(messages: Messages) -> list[dict[str, Any]]:
    """A conversation as lines of the chatbot. A tool call is a line of its own, titled `12+30 = 42`."""
    lines: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "user":
            lines.append({"role": "user", "content": plain(message["content"])})
            continue
        for part in message["content"]:
            if part["type"] == "text":
                lines.append({"role": "assistant", "content": plain(part["text"])})
            elif part["type"] == "python":
                title = {"title": plain(part["text"]), "status": "done"}
                lines.append({"role": "assistant", "content": "", "metadata": title})
            elif lines[-1].get("metadata"):
                lines[-1]["metadata"]["title"] += f" = {plain(part['text'])}"
        if not message["content"]:
            lines.append({"role": "assistant", "content": "…"})  # nothing has come yet, or it was stopped before
    return lines


def plain(text: str) -> str:
    """Text in which a browser finds no tag and no entity, and Gradio no indentation to remove.

    Every sign stands as it was written: escaped signs would show in the box where a message is edited.
    """
    return re.sub(r"(?<=[<&])(?=[A-Za-z/!?#])|^(?=[ \t])", BREAK, text, flags=re.M)


def model_card(run: RunDir, config: Config, words: dict[str, str]) -> str:
    """Tier, size, training time and exam scores as HTML, as far as they are there."""
    model = config.model
    facts = [
        ("parameters", f"{count_parameters(model).total:,}", ""),
        ("layers", str(model.depth), ""),
        ("context", f"{model.seq_len:,}", ""),
    ]
    seconds = sum(stage.get("seconds") or 0 for name, stage in saved(run.stages).items() if name in TRAINING)
    if seconds:
        facts.append(("trained", str(datetime.timedelta(seconds=round(seconds))), ""))
    scores: dict[str, Any] = {}
    for stage in ("rl", "sft", "base"):  # the furthest trained first; bits per byte are about the base model's text
        tasks = saved(run.eval(stage)).get("tasks", {})
        scores |= {k: v for k, v in tasks.items() if k not in scores or k == "bits_per_byte"}
    for name, task in sorted(scores.items()):
        value = f"{task['metric']:.1%}" if "accuracy" in task else f"{task['metric']:.3f}"
        facts.append((name, value, f"n = {task['n']:,}"))
    rows = "".join(
        f'<dt>{html.escape(words.get(name, name.replace("_", " ")))}</dt><dd title="{hint}">{value}</dd>'
        for name, value, hint in facts
    )
    return f'<div id="card"><h1>jaxchat</h1><p>{html.escape(config.tier)}</p><dl>{rows}</dl></div>'


def saved(path: Path) -> dict[str, Any]:
    """A JSON file of the run; a missing or damaged one keeps nobody from talking."""
    try:
        return read_json(path)
    except DataError:
        return {}


def check_port(host: str, port: int) -> None:
    """`UsageError` before anything is loaded if the address cannot be served on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"{host}:{port}: cannot be served on ({reason}); choose another --port or --host"
            ) from None
