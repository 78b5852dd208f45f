"""The chat page: `python launch.py --run-dir runs/nano --serve`. Gradio, streamed, nothing leaves the machine."""

from __future__ import annotations

import asyncio
import html
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from jaxchat.config import Config
from jaxchat.engine import Engine
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.log import say
from jaxchat.model.sizes import count_parameters
from jaxchat.paths import RunDir
from serve.worker import Worker

TEXTS = {
    "en": {
        "title": "jaxchat",
        "placeholder": "Say something",
        "settings": "Settings",
        "temperature": "Temperature (0: the likeliest word each time)",
        "top_k": "Top-k (0: all tokens)",
        "max_tokens": "Longest answer, tokens",
        "examples": "Try",
        "model": "This model",
    },
    "ko": {
        "title": "jaxchat",
        "placeholder": "메시지를 입력하세요",
        "settings": "설정",
        "temperature": "온도 (0이면 항상 가장 그럴듯한 단어)",
        "top_k": "Top-k (0이면 전체 토큰)",
        "max_tokens": "답변 최대 길이(토큰)",
        "examples": "예시",
        "model": "이 모델",
    },
}
EXAMPLES = ["hello", "who are you?", "Tom has 12 apples and buys 30 more. How many?", "what do you like to do?"]
CSS = """
.gradio-container { width: 100% !important; max-width: 860px !important; margin: 0 auto !important; }
.examples { gap: .5em !important; }
.example { border: 1px solid var(--border-color-primary) !important; border-radius: 10px !important; }
textarea { border: 1px solid var(--border-color-primary) !important; border-radius: 10px !important; }
.speed { opacity: .55; font-size: .8em; }
.tool { background: var(--background-fill-secondary); border-radius: 6px; padding: 0 .4em; font-family: monospace; }
footer { display: none !important; }
"""
# the machine's own fonts: nothing is fetched
THEME = gr.themes.Soft(primary_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def serve(run: RunDir, config: Config) -> None:
    """Serve the page of a finished run until the process is stopped. `UsageError` if the port is taken."""
    check_port(config.serve.host, config.serve.port)
    engine = Engine.from_pretrained(run.root, slots=config.serve.slots)
    say("compiling for every batch size (once per start) ...")
    engine.warm_up()
    worker = Worker(engine)
    page = build_page(worker, run, config)
    say(f"chat page: http://{config.serve.host}:{config.serve.port}   (Ctrl-C stops it)")
    try:
        page.launch(**launch_options(config), prevent_thread_lock=False)
    finally:
        worker.close()


def launch_options(config: Config) -> dict[str, Any]:
    """What `Blocks.launch` needs so that nothing but this machine is involved."""
    return {
        "server_name": config.serve.host,
        "server_port": config.serve.port,
        "i18n": gr.I18n(**TEXTS),
        "theme": THEME,
        "css": CSS,
        "ssr_mode": False,
        "share": False,
        "quiet": True,
        "footer_links": [],
        "show_error": True,
    }


def build_page(worker: Worker, run: RunDir, config: Config) -> gr.Blocks:
    """The page as Gradio blocks; `worker` answers."""
    t, limits = gr.I18n(**TEXTS), config.serve

    async def answer(
        message: str, history: list[dict[str, Any]], temperature: float, top_k: float, max_tokens: float
    ) -> AsyncIterator[str]:
        settings = {"temperature": float(temperature), "top_k": int(top_k), "max_tokens": int(max_tokens)}
        messages = [*plain_history(history), {"role": "user", "content": message}]
        async for text in stream(worker, messages, settings):
            yield text

    with gr.Blocks(title="jaxchat", analytics_enabled=False, fill_height=True) as page:
        temperature = gr.Slider(0, 2, limits.temperature, step=0.05, label=t("temperature"), render=False)
        top_k = gr.Slider(0, 200, limits.top_k, step=1, label=t("top_k"), render=False)
        most = gr.Slider(1, worker.engine.capacity, min(limits.max_tokens, worker.engine.capacity), step=1,
                         label=t("max_tokens"), render=False)  # fmt: skip
        gr.ChatInterface(
            answer,
            title=t("title"),
            chatbot=gr.Chatbot(show_label=False, buttons=["copy"], feedback_options=None, scale=1, min_height=320),
            textbox=gr.Textbox(
                placeholder=t("placeholder"),
                show_label=False,
                container=False,
                scale=7,
                max_lines=6,
                submit_btn=True,
                stop_btn=True,
            ),
            additional_inputs=[temperature, top_k, most],
            additional_inputs_accordion=gr.Accordion(t("settings"), open=False, render=False),
            examples=[[text] for text in EXAMPLES],
            examples_label=t("examples"),
            cache_examples=False,
            editable=True,
            flagging_mode="never",
            analytics_enabled=False,
            concurrency_limit=limits.slots,
            api_visibility="private",
        )
        with gr.Accordion(t("model"), open=False):
            gr.Markdown(model_card(run, config))
    page.queue(max_size=8 * limits.slots, default_concurrency_limit=limits.slots)
    return page


async def stream(worker: Worker, messages: list[dict[str, Any]], settings: dict[str, Any]) -> AsyncIterator[str]:
    """The growing answer as safe Markdown: text as text, tool calls marked, the speed at the end.

    A conversation too long for the context loses its oldest turns, with a note.
    """
    engine, note = worker.engine, ""
    request = engine.chat_request(messages, **settings)
    while len(request.tokens) > engine.capacity - min(32, engine.capacity // 2) and len(messages) > 2:
        messages = messages[2:]
        note = "<span class='speed'>(the context is full: the oldest messages are forgotten)</span>\n\n"
        request = engine.chat_request(messages, **settings)
    parts: list[tuple[str, str]] = []
    begin, count = time.perf_counter(), 0
    events = worker.events(request)
    try:
        async for event in events:
            if event.kind == "done":
                break
            count += 1
            if parts and parts[-1][0] == event.kind:
                parts[-1] = (event.kind, parts[-1][1] + event.text)
            else:
                parts.append((event.kind, event.text))
            yield note + show(parts)
    except JaxchatError as error:
        raise gr.Error(str(error), duration=10, print_exception=False) from error
    finally:
        await asyncio.shield(events.aclose())  # type: ignore[attr-defined]  # frees the slot, also on stop
    made = sum(len(engine.tokenizer.encode(text)) for _, text in parts)
    rate = made / max(time.perf_counter() - begin, 1e-9)
    yield f"{note}{show(parts)}\n\n<span class='speed'>{rate:.0f} tokens/s</span>"


def show(parts: list[tuple[str, str]]) -> str:
    """Parts of an answer as Markdown in which nothing of the model's text is markup."""
    pieces = []
    for i, (kind, text) in enumerate(parts):
        safe = escape(text)
        if kind == "text":
            pieces.append(safe)
        elif kind == "python":
            result = escape(parts[i + 1][1]) if i + 1 < len(parts) else "..."
            pieces.append(f"<span class='tool'>{safe} = {result}</span> ")
    return "".join(pieces)


def escape(text: str) -> str:
    """Text for Markdown in which nothing is markup: its signs as character references, line breaks kept."""
    return re.sub(r"[\\`*_{}\[\]()#+\-.!|~$<>&:]", lambda m: f"&#{ord(m[0])};", text).replace("\n", "<br>")


def plain_history(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the person and the model said, as the engine takes it: roles in turn, the page's own markup removed."""
    messages: list[dict[str, Any]] = []
    for entry in history:
        content = entry["content"]
        if isinstance(content, list):
            content = "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
        content = str(content)
        if entry["role"] == "assistant":
            content = unshow(content)
        if messages and messages[-1]["role"] == entry["role"]:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": entry["role"], "content": content})
    if messages and messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": ""})  # an answer that was stopped before its first word
    return messages


def unshow(markdown: str) -> str:
    """The text behind `show`: notes, speed and tool calls are the page's, the rest the model's."""
    markdown = re.sub(r"<span class=.(speed|tool).>.*?</span>\s*", "", markdown, flags=re.S)
    return html.unescape(markdown.replace("<br>", "\n")).strip()


def model_card(run: RunDir, config: Config) -> str:
    """Tier, size and scores of the run, as far as they are there."""
    count = count_parameters(config.model).total
    lines = [
        f"**{config.tier}**: {count:,} parameters, {config.model.depth} layers, context {config.model.seq_len}",
        "",
    ]
    for stage in ("sft", "base"):
        if run.eval(stage).exists():
            tasks = json.loads(run.eval(stage).read_text(encoding="utf-8"))["tasks"]
            for name, task in tasks.items():
                score = f"{task['metric']:.1%}" if "accuracy" in task else f"{task['metric']:.3f}"
                lines.append(f"- {stage.upper()} {name.replace('_', ' ')}: {score} ({task['n']:,} cases)")
    return "\n".join(lines)


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
