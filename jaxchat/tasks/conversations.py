"""SmolTalk's small variant, 460 thousand synthetic conversations (SmolLM2, 2502.02737): what the real tiers learn to
chat from. Not an exam."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxchat.chat import normalize, render
from jaxchat.data.files import find_files, kind_of, read_records
from jaxchat.data.shards import token_dtype
from jaxchat.data.sources import chitchat_conversations, chitchat_document, document_hash, split_limit
from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.base import Conversation, Task, drawn
from jaxchat.tasks.files import HubFiles, TaskFiles, count_rows, read_parquet
from jaxchat.tokenizer import Tokenizer

# Conversations for SFT from installed data sets, as messages (see `text/chat.py`).


MAX_TURNS = 6  # of one chitchat dialogue; a longer one is cut into several
# What other programs say about themselves in chatterbot-corpus contradicts who our model is (`tasks/identity.py`).
OTHER_BOT_FILES = {"ai.yml", "botprofile.yml", "ia.yml", "perfilbot.yml"}
OTHER_BOT_NAMES = re.compile(r"\b(A\.?L\.?I\.?C\.?E|(?i:aiml|chatterbot|botmaster|teknolust))\b")
WHO_ARE_YOU = re.compile(
    r"\b(who|what) (are|r) (you|u)\b( really| anyway)?\W*$"
    r"|\byour (real )?(name|maker|creator|age|father|mother|purpose|function)\b"
    r"|\b(made|created|built|programmed|trained|wrote|designed) you\b|\bmy name\b"
    r"|\bare you (an? |the |really )?(human|person|man|woman|real|alive|(chat)?bot|robot|ai|computer|machine|program)",
    re.I,
)
I_AM_A_MACHINE = re.compile(
    r"\b(i|i'm|me|my|mine|we|our|us)\b.*\b((chat)?bots?|robots?|software|programs?|programmed|computers?|machines?"
    r"|processor|circuits?|android|cyborg|artificial intelligence|power supply|memory banks?|database|man in a mask)\b"
    r"|\b((chat)?bots?|robots?|software|computers?|machines?)\b.*\b(i|i'm|me|my|we|our)\b",
    re.I | re.S,
)
HANGUL = re.compile("[가-힣]")
KOREAN_BOT = re.compile(
    r"로봇|챗봇|소프트웨어|프로그램|컴퓨터|기계|인공 ?지능|A\.?I\.?\b|메모리|RAM|2진수|누가.*(만들|개발|학습)|만든 사람"
    r"|(너|넌|당신|네|니)(은|는|의)? ?(누구|이름)|이름이|누구(야|니|세요|예요)|사람(이야|이니|이에요|인가요)"
)

Message = dict[str, Any]


def chitchat_dialogues(split: str, val_fraction: float) -> Iterator[list[Message]]:
    """Chitchat's conversations, two people as user and assistant, at most `MAX_TURNS` turns each.

    `split` is "train" or "val", by the same hash as the pretraining corpus: what is held out there is held out here.
    """
    limit = split_limit("chitchat", val_fraction)
    for turns in chitchat_conversations():
        if (document_hash(chitchat_document(turns)) < limit) != (split == "val"):
            continue
        for start in range(0, len(turns), MAX_TURNS):
            piece = turns[start : start + MAX_TURNS]
            piece = piece[: len(piece) // 2 * 2]  # ends with the assistant
            if piece:
                roles = ("user", "assistant")
                yield [{"role": roles[i % 2], "content": "\n".join(turn)} for i, turn in enumerate(piece)]


def chatterbot_pairs(language: str = "english") -> Iterator[list[Message]]:
    """Question-answer pairs of chatterbot-corpus, each once, without those in which another bot speaks of itself.

    The corpus repeats some pairs dozens of times. `DataError` names a language that it does not have.
    """
    try:
        import chatterbot_corpus
        import yaml
    except ImportError:
        raise DataError("source chatterbot: install it with pip install -r requirements.txt") from None
    folder = Path(str(chatterbot_corpus.__file__)).parent / "data" / language
    if not folder.is_dir():
        known = ", ".join(sorted(p.name for p in folder.parent.iterdir() if p.is_dir()))
        raise DataError(f"source chatterbot: no language {language!r}; it has {known}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is there: ten times as fast
    seen = set()
    for file in sorted(folder.glob("*.yml")):
        if file.name.lower() in OTHER_BOT_FILES:
            continue
        for conversation in yaml.load(file.read_text(encoding="utf-8"), loader)["conversations"]:
            pair = tuple(str(text).strip() for text in conversation[:2])
            if len(pair) < 2 or not all(pair) or pair in seen or is_other_bot(*pair):
                continue
            seen.add(pair)
            yield [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


def file_conversations(source: str, encoding: str = "auto") -> Iterator[list[Message]]:
    """Conversations of one's own, `files:GLOB` of jsonl: {"messages": [{"role", "content"}, ...]} a line.

    `DataError` names the file and line of what is not in the form of `text/chat.py`.
    """
    for path in find_files(source):
        if kind_of(path) != ".jsonl":
            raise DataError(f"sft.mixture: {path}: conversations are read from jsonl files, a line each")
        for where, record in read_records(path, encoding):
            messages = record.get("messages") if isinstance(record, dict) else None
            try:
                normalize(messages)  # type: ignore[arg-type]
            except UsageError as error:
                raise DataError(f"{where}: {error}") from None
            yield [{"role": m["role"], "content": m["content"]} for m in messages]  # type: ignore[union-attr]


def spoken(conversation: list[Message]) -> str:
    """A conversation as pretraining reads it from a file: a message a line, without roles."""
    contents = (m["content"] for m in conversation)
    return "\n".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)


@dataclass(frozen=True)
class RenderJob:
    """Conversations to render in another process; `tokenizer` is the path of the run's, `digest` its digest.

    A conversation comes as (entry of the mixture, held out, messages).
    """

    tokenizer: str
    digest: str
    conversations: list[tuple[str, bool, list[Message]]]


@dataclass(frozen=True)
class Rendered:
    """Conversations as token ids (N,) and their mask (N,) uint8, one behind the other.

    `labels` has (entry of the mixture, held out) of each conversation, `ends` (C,) where it ends.
    """

    labels: list[tuple[str, bool]]
    ends: np.ndarray
    ids: np.ndarray
    mask: np.ndarray

    def __iter__(self) -> Iterator[tuple[tuple[str, bool], np.ndarray, np.ndarray]]:
        """(label, ids, mask) of each conversation; the arrays are views."""
        start = 0
        for label, end in zip(self.labels, self.ends.tolist(), strict=True):
            yield label, self.ids[start:end], self.mask[start:end]
            start = end


def render_job(job: RenderJob) -> Rendered:
    """Render the conversations of a job, in a process that may not have the tokenizer yet."""
    return render_all(_loaded(job.tokenizer, job.digest), job.conversations)


def render_all(tokenizer: Tokenizer, conversations: list[tuple[str, bool, list[Message]]]) -> Rendered:
    """Render (entry, held out, messages); `DataError` names the entry of a conversation that is out of form."""
    lengths, all_ids, all_masks = list[int](), list[int](), list[int]()
    for entry, _, messages in conversations:
        try:
            ids, mask = render(tokenizer, messages)
        except UsageError as error:
            raise DataError(f"sft.mixture: {entry}: a conversation is out of form: {error}") from None
        lengths.append(len(ids))
        all_ids += ids
        all_masks += mask
    labels = [(entry, held_out) for entry, held_out, _ in conversations]
    ids_array = np.array(all_ids, token_dtype(tokenizer.vocab_size))
    return Rendered(labels, np.cumsum(lengths), ids_array, np.array(all_masks, np.uint8))


@functools.lru_cache(1)
def _loaded(path: str, digest: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.digest != digest:
        raise DataError(f"{path}: has changed while the conversations were rendered; run the same command again")
    return tokenizer


def is_other_bot(question: str, answer: str) -> bool:
    """Whether a pair is about who answers, or has the one who answers speak as a machine."""
    if HANGUL.search(question + answer):
        return bool(KOREAN_BOT.search(question) or KOREAN_BOT.search(answer))
    named = any(OTHER_BOT_NAMES.search(text) for text in (question, answer))
    return bool(named or WHO_ARE_YOU.search(question) or WHO_ARE_YOU.search(answer) or I_AM_A_MACHINE.search(answer))


FOLDERS = ("HuggingFaceTB/smol-smoltalk/", "smol-smoltalk/", "smoltalk/")
PATTERNS = tuple(f"{folder}{name}" for folder in FOLDERS for name in ("data/train-*.parquet", "train*.parquet"))
HUB = HubFiles(  # the names as the hub's viewer shows them; the newest commit, whose id the download records
    "HuggingFaceTB/smol-smoltalk", "main", tuple(f"data/train-{i:05d}-of-00004.parquet" for i in range(4))
)


class SmolTalk(Task):
    name = "smoltalk"
    title = "SmolTalk"

    def __init__(self, files: TaskFiles):
        self._files = files

    def fetch(self) -> Sequence[Path]:
        return self._files.find(PATTERNS, HUB)

    def train_conversations(self, count: int | None, seed: int) -> Iterator[Conversation]:
        """`count` of them drawn at random (None: all), in the order of the files."""
        paths = self._files.find(PATTERNS, HUB)
        chosen = set(drawn(count, sum(map(count_rows, paths)), seed))
        rows = itertools.chain.from_iterable(read_parquet(path, ["messages"]) for path in paths)
        for index, (_, row) in enumerate(rows):
            if index in chosen:
                yield _checked(row["messages"], index)


def _checked(messages: object, index: int) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"smoltalk: row {index} has no messages")
    try:
        conversation = [{"role": m["role"], "content": m["content"]} for m in messages]
    except (TypeError, KeyError) as error:
        raise DataError(f"smoltalk: row {index}: a message needs role and content") from error
    while len(conversation) > 1 and conversation[-1]["role"] != "assistant":
        conversation.pop()  # nothing to learn from a question alone
    return conversation
