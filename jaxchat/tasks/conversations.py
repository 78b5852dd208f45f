"""Conversations for SFT: from installed packages, from your own files, and from SmolTalk."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxchat.chat import normalize
from jaxchat.config import DataConfig
from jaxchat.data.hub import HubFiles
from jaxchat.data.sources import (
    chitchat_conversations,
    chitchat_document,
    count_rows,
    document_hash,
    open_corpus,
    read_records,
    source_files,
    suffix_of,
    training_limit,
)
from jaxchat.errors import DataError, UsageError, install_command
from jaxchat.tasks.base import Conversation, Task, sample
from jaxchat.tasks.identity import TEXTS
from jaxchat.tasks.speech import words

MAX_TURNS = 6  # of one chitchat dialogue; a longer one is cut into several
LEAST_USES = 5  # in chitchat, of every word of a turn that is learned


def chitchat_dialogues(split: str, val_fraction: float) -> Iterator[Conversation]:
    """Yield chitchat's dialogues, two people as user and assistant, in parts of at most `MAX_TURNS` turns.

    `split` is "train" or "val", the same as in the pretraining corpus. In training both people's turns are targets,
    but for those with a word used less than `LEAST_USES` times: most are typing errors ("truffeee").
    """
    data = DataConfig(source="chitchat", val_fraction=val_fraction)
    limit = training_limit(open_corpus(data), data)
    for turns in chitchat_conversations():
        if (document_hash(chitchat_document(turns)) < limit) != (split == "val"):
            continue
        for start in range(0, len(turns), MAX_TURNS):
            part = ["\n".join(turn) for turn in turns[start : start + MAX_TURNS]]
            part = part[: len(part) // 2 * 2]  # ends with the assistant
            roles = ("user", "assistant") * (len(part) // 2)
            if part and split == "val":
                yield [{"role": role, "content": text} for role, text in zip(roles, part, strict=True)]
            elif any(targets := [int(all(uses()[word] >= LEAST_USES for word in words(text))) for text in part]):
                yield [
                    {"role": role, "content": text, "weight": target}
                    for role, text, target in zip(roles, part, targets, strict=True)
                ]


@functools.cache
def uses() -> Counter[str]:
    """Return how often chitchat uses each of its words."""
    return Counter(
        word for turns in chitchat_conversations() for turn in turns for text in turn for word in words(text)
    )


def chatterbot_pairs(language: str = "english") -> Iterator[Conversation]:
    """Yield the question-answer pairs of chatterbot-corpus, each once, without bots that speak about themselves.

    `DataError` names a language that the corpus does not have.
    """
    try:
        import chatterbot_corpus
        import yaml
    except ImportError:
        raise DataError(f"source chatterbot: install it with {install_command()}") from None
    folder = Path(str(chatterbot_corpus.__file__)).parent / "data" / language
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in folder.parent.iterdir() if p.is_dir()))
        raise DataError(f"source chatterbot: no language {language!r}; it has {known}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: ten times as fast
    seen = set()
    for file in sorted(folder.glob("*.yml")):
        if file.name.lower() in TEXTS["other_bots"]["files"]:
            continue
        for conversation in yaml.load(file.read_text(encoding="utf-8"), loader)["conversations"]:
            pair = tuple(str(text).strip() for text in conversation[:2])
            if len(pair) < 2 or not all(pair) or pair in seen or is_other_bot(*pair):
                continue
            seen.add(pair)
            yield [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


# How data sets name things; of several names that a record has, the first counts. docs/data.md has the same table.
ROLES = dict.fromkeys(("human", "prompter", "person", "사용자"), "user")
ROLES |= dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "chatbot", "function_call"), "assistant")
ROLES |= dict.fromkeys(("observation", "ipython", "tool_response", "function response"), "tool")
LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat", "items", "data")
RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
SYSTEMS = ("system", "system_prompt")
# fmt: off
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input", "inputs", "input_text", "user", "human",
             "질문")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "completion", "response", "answer", "target", "targets", "solution", "output_text", "assistant",
           "답변")
# fmt: on
MARKED_TEXTS = ("text", "chat")  # whole conversations as one text, cut at these marks
MARKS = re.compile(r"(?im)<\|im_start\|>(\w+)\n|(?:^|### )(Human|User|Assistant|System|FUNCTION RESPONSE): ?")
ENDS = re.compile(r"<\|(?:im_end|endoftext)\|>|</s>")


@dataclass
class Found:
    """What was found in a source of conversations. `first`: the first record left out, with the reason."""

    forms: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    first: str = ""

    def __str__(self) -> str:
        forms = "; ".join(f"{count:,} conversations, {form}" for form, count in self.forms.most_common(3))
        left_out = f"; {self.left_out:,} of {self.left_out + self.forms.total():,} left out, first: {self.first}"
        return forms + (left_out if self.left_out else "")


def file_conversations(
    source: str,
    data: DataConfig | None = None,
    *,
    count: int | None = None,
    max_left_out: float = 0.05,
    found: Found | None = None,
) -> Iterator[Conversation]:
    """Yield the conversations of `files:GLOB` or `hf:...`, in any form that `conversation_of` reads.

    count: the most to yield, at least 1. found: filled while they are read. `DataError` names the first record that
    cannot be used if more than the share `max_left_out` cannot be, or if none can.
    """
    data, found = data or DataConfig(), found or Found()
    paths = [path for path in source_files(source, data) if suffix_of(path) in RECORDS]
    if not paths:
        raise DataError(f"sft.mixture: {source}: conversations are read from {', '.join(RECORDS)} files")
    for where, record in (item for path in paths for item in read_records(path, data.encoding)):
        try:
            form, conversation = conversation_of(record)
        except UsageError as error:
            found.left_out += 1
            found.first = found.first or f"{where}: {error}"
            continue
        found.forms[form] += 1
        yield conversation
        if found.forms.total() == count:
            break
    used = found.forms.total()
    if not used and not found.left_out:
        raise DataError(f"sft.mixture: {source}: no conversations in it")
    if found.left_out > max_left_out * (used + found.left_out) or not used:
        raise DataError(
            f"sft.mixture: {source}: {found.left_out:,} of {used + found.left_out:,} conversations cannot be used "
            f"(sft.max_left_out allows {max_left_out:.0%}), first: {found.first}"
        )


def conversation_of(record: Any) -> tuple[str, Conversation]:
    """Return (name of the form, messages) of a record of any form in the table of `docs/data.md`.

    `UsageError` says why it cannot be used: no known form, a message out of form, or no answer to learn from.
    """
    if not isinstance(record, dict | list):
        raise UsageError(f"neither an object nor a list of messages, but {type(record).__name__}")
    record = record if isinstance(record, dict) else {"list": record}
    empty: tuple[Any, ...] = (None, [], {})
    fields = {str(key).lower(): value for key, value in record.items() if value not in empty and value == value}
    kind = next((name for name in ("list", *LISTS) if isinstance(_decoded(fields.get(name)), list | dict)), "")
    text = next((fields[name] for name in MARKED_TEXTS if isinstance(fields.get(name), str)), "")
    if kind:
        form, messages = _messages(kind, _decoded(fields[kind]))
    elif "chosen" in fields or isinstance(fields.get("label"), bool):
        raise UsageError("a preference, not a conversation")
    elif any(name in fields for name in QUESTIONS):
        form, messages = _answered(fields)
    elif MARKS.search(text):
        pieces = MARKS.split(ENDS.sub("", text))
        turns = zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True)
        form = "a text with marks between the turns"
        messages = [_message({"role": a or b, "content": content.strip()}) for a, b, content in turns]
    else:
        raise UsageError(f"no known form of a conversation (it has {', '.join(list(fields)[:8]) or 'nothing'})")
    system = next((fields[name] for name in SYSTEMS if isinstance(fields.get(name), str)), "").removeprefix("SYSTEM: ")
    first = messages[0] if messages else None
    if system.strip() and not (isinstance(first, dict) and first["role"] == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    answers = (part for turn in normalize(messages) if turn["role"] == "assistant" for part in turn["content"])
    if not any(part["text"].strip() and part.get("weight") != 0 for part in answers):
        raise UsageError("no answer to learn from")
    return form, messages


def _decoded(value: Any) -> Any:
    """Return a list that some data sets keep as a text of JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _messages(kind: str, turns: Any) -> tuple[str, Conversation]:
    """Return (form, messages) of messages, of texts in turn, or of questions with answers; also of a dict of lists."""
    if isinstance(turns, dict):
        columns = {key: value for key, value in turns.items() if isinstance(value, list)}
        turns = [dict(zip(columns, values, strict=False)) for values in zip(*columns.values(), strict=False)]
    first = turns[0] if turns else None
    if isinstance(first, str):
        roles = ("user", "assistant")
        return f"texts in turn ({kind})", [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    if isinstance(first, dict) and not {"role", "from", "speaker"} & first.keys():
        return f"questions and answers ({kind})", [message for turn in turns for message in _answered(turn)[1]]
    names = ("role", "from", "speaker", "content", "value", "text")
    keys = ", ".join(name for name in names if name in first) if isinstance(first, dict) else ""
    return f"{'ShareGPT' if 'from' in keys else 'messages'} ({kind}: {keys})", [_message(turn) for turn in turns]


def _message(turn: Any) -> Any:
    """Return a message with our names for its fields and role; what is none, as it is."""
    if not isinstance(turn, dict):
        return turn
    role = next((turn[key] for key in ("role", "from", "speaker") if turn.get(key) is not None), None)
    role = ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else role
    content = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    more = {key: turn[key] for key in ("tool_calls", "function_call", "weight") if turn.get(key) is not None}
    return {"role": role, "content": content} | more


def _answered(fields: Any) -> tuple[str, Conversation]:
    """Return (form, messages) of a question with its answer: texts, or (as in TRL) lists of messages."""
    fields = fields if isinstance(fields, dict) else {}
    questions = [name for name in QUESTIONS if name in fields]  # of Alpaca, some have only an `input`
    question = next((name for name in questions if fields[name] != ""), "".join(questions[:1]))
    answer = next((name for name in ANSWERS if name in fields and name != question), "")
    if not question or not answer:
        raise UsageError(f"no question with an answer (it has {', '.join(list(fields)[:8])})")

    def turns(name: str, role: str) -> Conversation:
        value = fields[name]
        if name == answer and isinstance(value, list) and value and isinstance(value[0], str):
            value = value[0]  # of several accepted answers
        if isinstance(value, list):
            return _messages(name, value)[1]
        value = str(value) if type(value) in (int, float) and value == value else value
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"`{name}` is {'empty' if isinstance(value, str) else type(value).__name__}")
        return [{"role": role, "content": value}]

    asked = turns(question, "user")
    if isinstance(fields[question], list):  # only the completion is learned
        asked = [m | {"weight": 0} if isinstance(m, dict) else m for m in asked]
    contexts = [name for name in CONTEXTS if name in fields and name not in (question, answer)]
    more = [fields[name] for name in contexts if isinstance(fields[name], str) and fields[name].strip()]
    asked += [{"role": "user", "content": text} for text in more]  # joined with empty lines
    history = _decoded(fields.get("history") or [])
    if not isinstance(history, list):
        raise UsageError("`history` is no list of pairs, nor of messages")
    listed = (_messages("history", one)[1] if isinstance(one, list) else [_message(one)] for one in history)
    names = [name for name in ("system", question, *contexts, "history", answer) if name in fields]
    form = "Alpaca" if (question, answer) == ("instruction", "output") else "questions and answers"
    return f"{form} ({', '.join(names)})", [*itertools.chain(*listed), *asked, *turns(answer, "assistant")]


def is_other_bot(question: str, answer: str) -> bool:
    """Return whether a pair is about who answers, or the answer speaks as a machine (`other_bots` in `texts.toml`)."""
    bots, both = TEXTS["other_bots"], (question, answer)
    if re.search("[가-힣]", question + answer):
        return any(re.search(pattern, text) for pattern in bots["korean"] for text in both)
    either = any(re.search(pattern, text) for pattern in bots["either"] for text in both)
    return either or any(re.search(pattern, answer) for pattern in bots["answer"])


class SmolTalk(Task):
    """SmolTalk's small variant (2502.02737): 460 thousand synthetic conversations; no exam."""

    name, title = "smoltalk", "SmolTalk"

    def fetch(self) -> Sequence[Path]:
        folders = ("HuggingFaceTB/smol-smoltalk/", "smol-smoltalk/", "smoltalk/")
        patterns = [f"{folder}{name}" for folder in folders for name in ("data/train-*.parquet", "train*.parquet")]
        names = tuple(f"data/train-{i:05d}-of-00004.parquet" for i in range(4))
        return self.files.find(patterns, HubFiles("HuggingFaceTB/smol-smoltalk", "main", names))

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        """Yield `count` random conversations (None: all), in the order of the files."""
        paths = self.fetch()
        chosen = set(sample(range(sum(map(count_rows, paths))), count, seed))
        for index, row in enumerate(row for path in paths for _, row in read_records(path, columns=["messages"])):
            if index in chosen:
                conversation = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
                while len(conversation) > 1 and conversation[-1]["role"] != "assistant":
                    conversation.pop()  # nothing to learn from a question alone
                yield conversation
