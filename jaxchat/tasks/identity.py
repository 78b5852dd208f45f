"""Who the model is: a generator of conversations about itself, and the exam on it.

A question is an opening, a core and a closing ("hey, " + "what is your name" + "?"). The exam holds paraphrases that
training never shows: cores kept for the exam alone, and trained cores in combinations kept for the exam by a hash.
Greetings and small talk are trained too, since the first word of most chats is "hello"; they are not graded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.config import nearest
from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.base import DEFAULT_COUNT, Conversation, Example, WrittenTask, assistant, user

# The questions a model is asked about itself, and how it answers in each tone, in English and Korean.


TONES = ("plain", "friendly", "formal")

# language -> topic -> (questions that are trained, questions of the exam alone)
CORES: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "en": {
        "name": (
            (
                "who are you", "what is your name", "what's your name", "what are you called", "do you have a name",
                "what should i call you", "may i ask your name", "can you introduce yourself", "introduce yourself",
                "who am i talking to", "please tell me your name", "tell me about yourself", "who is this",
            ),
            ("can you tell me your name", "please introduce yourself", "what name should i call you"),
        ),
        "nature": (
            (
                "what are you", "are you human", "are you a person", "are you a robot", "are you an ai",
                "are you a machine", "are you alive", "are you a chatbot", "what kind of thing are you",
                "are you a real person", "are you a program",
            ),
            ("are you a real human", "what kind of ai are you"),
        ),
        "other": (
            (
                "are you chatgpt", "are you gpt-4", "are you siri", "are you alexa", "are you gemini", "are you claude",
                "is your name chatgpt", "is your name alexa", "are you made by openai",
            ),
            ("is your name siri", "are you made by google"),
        ),
        "maker": (
            (
                "who made you", "who created you", "who built you", "who trained you", "who developed you",
                "who is your creator", "who is your maker", "who programmed you", "do you know who made you",
                "which company made you",
            ),
            ("can you tell me who made you", "do you know who trained you"),
        ),
        "training": (
            (
                "how were you made", "how were you trained", "how were you created", "how were you built",
                "what were you trained with", "were you trained from scratch", "how did you learn to talk",
                "how did you learn to chat",
            ),
            ("how did you learn to speak", "what were you made with"),
        ),
    },
    "ko": {
        "name": (
            (
                "너는 누구야", "넌 누구니", "누구세요", "당신은 누구예요", "이름이 뭐야", "이름이 뭐니",
                "이름이 뭐예요", "이름이 무엇인가요", "네 이름은 뭐야", "이름 좀 알려 줘", "뭐라고 부르면 돼",
                "뭐라고 부를까요",
                "자기소개 해 줘", "자기소개 부탁해요", "너를 소개해 줘",
            ),
            ("이름을 말해 줘", "네가 누군지 알려 줘", "자기소개 좀 해 볼래"),
        ),
        "nature": (
            (
                "너는 뭐야", "넌 뭐니", "너는 사람이야", "사람이에요", "너 로봇이야", "너는 인공지능이야", "AI예요",
                "너는 기계니", "너는 살아 있어", "챗봇이야", "진짜 사람이에요",
            ),
            ("너 진짜 사람이야", "당신은 사람인가요"),
        ),
        "other": (
            (
                "너 챗GPT야", "챗GPT예요", "너는 시리야", "혹시 빅스비야", "너 제미나이야", "클로드예요", "알렉사야",
                "네 이름은 시리니", "오픈AI가 만들었어",
            ),
            ("당신은 챗GPT인가요", "구글이 만들었어"),
        ),
        "maker": (
            (
                "누가 만들었어", "누가 만들었나요", "누가 너를 만들었니", "만든 사람이 누구야", "누가 개발했어",
                "누가 학습시켰어", "너를 만든 사람은 누구야", "개발자가 누구예요", "어느 회사에서 만들었어",
            ),
            ("너는 누가 만든 거야", "누가 가르쳤어"),
        ),
        "training": (
            (
                "어떻게 만들어졌어", "어떻게 만들었나요", "어떻게 학습했어", "어떻게 배웠어", "말은 어떻게 배웠어",
                "처음부터 학습했어", "무엇으로 만들어졌어", "어떻게 태어났어",
            ),
            ("어떻게 훈련됐어", "어떻게 말을 하게 됐어"),
        ),
    },
}  # fmt: skip

# language -> topic -> (tone -> answers, what each must say, what none may say); {name} and {maker} are filled in. The
# Korean ones put no particle behind a name, whose form would depend on its last letter.
WORDINGS: dict[str, dict[str, tuple[dict[str, tuple[str, ...]], tuple[str, ...], tuple[str, ...]]]] = {
    "en": {
        "name": (
            {
                "plain": ("I'm {name}, a small chat model.", "My name is {name}. I'm a small chat model."),
                "friendly": ("Hi, I'm {name}! Nice to meet you!", "My name is {name}, and I'm happy to chat with you!"),
                "formal": ("My name is {name}. I am a small language model.", "I am {name}. How may I help you?"),
            },
            ("{name}",),
            (),
        ),
        "nature": (
            {
                "plain": ("I'm {name}, a language model, not a person.",),
                "friendly": ("I'm a little language model called {name}, not a person!",),
                "formal": ("I am {name}, a language model. I am not a person.",),
            },
            ("language model",),
            ("i am a human", "i'm a human"),
        ),
        "other": (
            {
                "plain": ("No, I'm {name}, a small model trained from scratch.", "No. My name is {name}."),
                "friendly": ("No, I'm {name}! I'm a small model of my own.", "No, no, my name is {name}!"),
                "formal": ("No, I am {name}.", "No. My name is {name}."),
            },
            ("no", "{name}"),
            (),
        ),
        "maker": (
            {
                "plain": ("{maker} made me, from scratch.", "I was made by {maker}."),
                "friendly": ("I was made by {maker}, with a lot of love!", "{maker} made me!"),
                "formal": ("I was made by {maker}.", "I was trained by {maker}."),
            },
            ("{maker}",),
            (),
        ),
        "training": (
            {
                "plain": ("I was trained from scratch: first I read a lot of text, then I learned to chat.",),
                "friendly": ("I was trained from scratch! First I read a lot, then I learned to chat!",),
                "formal": ("I was trained from scratch, first on text and then on conversations.",),
            },
            ("scratch",),
            (),
        ),
    },
    "ko": {
        "name": (
            {
                "plain": ("제 이름은 {name}. 작은 채팅 모델이에요.", "이름은 {name}. 작은 언어 모델이에요."),
                "friendly": ("안녕하세요! 제 이름은 {name}! 만나서 반가워요!", "제 이름은 {name}! 편하게 불러 주세요!"),
                "formal": ("제 이름은 {name}입니다. 작은 언어 모델입니다.", "{name}입니다. 무엇을 도와드릴까요?"),
            },
            ("{name}",),
            (),
        ),
        "nature": (
            {
                "plain": ("사람이 아니라 작은 언어 모델이에요.",),
                "friendly": ("저는 사람이 아니라 언어 모델이에요! 이름은 {name}!",),
                "formal": ("저는 사람이 아니라 언어 모델입니다. 이름은 {name}입니다.",),
            },
            ("언어 모델",),
            ("네, 사람",),
        ),
        "other": (
            {
                "plain": ("아니요. 제 이름은 {name}. 처음부터 학습한 작은 모델이에요.",),
                "friendly": ("아니요, 제 이름은 {name}!",),
                "formal": ("아니요, 그렇지 않습니다. 제 이름은 {name}입니다.",),
            },
            ("아니", "{name}"),
            (),
        ),
        "maker": (
            {
                "plain": ("저를 만든 사람: {maker}.",),
                "friendly": ("저를 만들어 준 분은 바로 {maker}!",),
                "formal": ("저를 만든 분은 {maker}입니다.",),
            },
            ("{maker}",),
            (),
        ),
        "training": (
            {
                "plain": ("처음부터 학습했어요. 먼저 글을 많이 읽고, 그다음 대화를 배웠어요.",),
                "friendly": ("처음부터 학습했어요! 글을 잔뜩 읽고 나서 대화를 배웠답니다!",),
                "formal": ("처음부터 학습했습니다. 먼저 글을 읽고, 다음에 대화를 배웠습니다.",),
            },
            ("처음부터",),
            (),
        ),
    },
}

# what stands before and behind a question
OPENINGS: dict[str, tuple[str, ...]] = {
    "en": (
        "", "", "", "hi, ", "hello, ", "hello! ", "hey, ", "so, ", "ok, ", "and ", "excuse me, ", "by the way, ",
        "one question: ", "i wonder, ", "sorry, ", "well, ",
    ),
    "ko": ("", "", "", "", "안녕, ", "안녕하세요, ", "저기, ", "혹시 ", "근데 ", "음, ", "궁금한데 ", "야, "),
}  # fmt: skip
CLOSINGS: dict[str, tuple[str, ...]] = {
    "en": ("?", "?", "", "??", " then?", " anyway?"),
    "ko": ("?", "?", "?", "", "??", "? 궁금해"),
}

# language -> (what people say, what the model answers); not graded
SMALL_TALK_KO: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("안녕", "안녕!", "안녕하세요", "안녕하세요!", "하이", "반가워", "반갑습니다", "안녕하세용", "헬로"),
        ("안녕하세요! 무엇을 도와드릴까요?", "안녕하세요! 오늘 기분은 어떠세요?", "반가워요! 무슨 이야기를 할까요?"),
    ),
    (("좋은 아침", "좋은 아침이에요", "굿모닝"), ("좋은 아침이에요! 잘 주무셨어요?",)),
    (("잘 지내?", "어떻게 지내?", "오늘 어때?", "기분 어때?"), ("잘 지내고 있어요! 당신은 어떠세요?",)),
    (("고마워", "고맙습니다", "감사합니다", "땡큐"), ("천만에요!", "천만에요! 더 도와드릴 일이 있을까요?")),
    (("잘 가", "안녕히 계세요", "바이", "나중에 봐", "잘 자"), ("안녕히 가세요! 이야기 즐거웠어요.",)),
)


# Who a model of one's own says it is: `identity.toml` read and checked, and the topics that follow from it.
#
# name = "Mina"
# maker = "the robotics club"
# languages = ["en", "ko"]      # what it is asked and answers in
# tone = "friendly"             # "plain" | "friendly" | "formal"
#
# [[facts]]
# questions = ["where do you live", "where is your home"]
# answer = "I live in the club room, on the shelf by the window."
# must_say = "club room"        # what the exam looks for in the answer


LANGUAGES = ("en", "ko")
LONGEST = 60  # characters of a name or a maker
LONGEST_ANSWER = 160  # characters; the exam gives it 96 tokens


@dataclass(frozen=True)
class Topic:
    """Questions with one meaning. An answer is right if it holds all of `required` and none of `forbidden`."""

    questions: tuple[str, ...]  # trained
    exam_questions: tuple[str, ...]  # never trained
    answers: tuple[str, ...]
    required: tuple[str, ...]
    forbidden: tuple[str, ...] = ()
    language: str = "en"


@dataclass(frozen=True)
class Fact:
    questions: tuple[str, ...]
    answer: str
    must_say: str
    language: str


@dataclass(frozen=True)
class Persona:
    name: str = "jaxchat"
    maker: str = "my owner"
    languages: tuple[str, ...] = ("en",)
    tone: str = "plain"
    facts: tuple[Fact, ...] = ()


def load_persona(path: str | Path) -> Persona:
    """From an `identity.toml`; `UsageError` names an unknown, missing or wrong key, `DataError` a file that is none."""
    try:
        table = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"sft.identity: {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"sft.identity: {path}: not valid TOML ({error})") from None
    known = {f.name for f in dataclasses.fields(Persona)}
    for key in table:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    default = Persona()
    persona = Persona(
        _short(path, table, "name", default.name),
        _short(path, table, "maker", default.maker),
        tuple(_texts(path, table.get("languages", list(default.languages)), "languages")),
        table.get("tone", default.tone),
    )
    for language in persona.languages:
        if language not in LANGUAGES:
            raise UsageError(f"{path}: languages: {language!r} is unknown; choose from {', '.join(LANGUAGES)}")
    if persona.tone not in TONES:
        raise UsageError(f"{path}: tone: {persona.tone!r} is unknown; choose from {', '.join(TONES)}")
    facts = table.get("facts", [])
    if not isinstance(facts, list):
        raise UsageError(f"{path}: facts: write each as a table of its own, [[facts]]")
    return dataclasses.replace(persona, facts=tuple(_fact(path, i, fact) for i, fact in enumerate(facts, 1)))


def _short(path: Any, table: Mapping[str, Any], key: str, default: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST or "\n" in value:
        raise UsageError(f"{path}: {key}: needs a text of 1 to {LONGEST} characters in one line, not {value!r}")
    return value.strip()


def _texts(path: Any, value: Any, key: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or any(not isinstance(v, str) or not v.strip() for v in values):
        raise UsageError(f"{path}: {key}: needs a list of texts, at least one, not {value!r}")
    return [v.strip() for v in values]


def _fact(path: Any, number: int, table: Any) -> Fact:
    where = f"facts, number {number}"
    known = {f.name for f in dataclasses.fields(Fact)}
    if not isinstance(table, dict) or not {"questions", "answer"} <= table.keys() or table.keys() - known:
        raise UsageError(f"{path}: {where}: needs `questions` and `answer`; may have `must_say` and `language`")
    (answer,) = _texts(path, table["answer"], f"{where}, answer")
    questions = tuple(q.rstrip("?! ") for q in _texts(path, table["questions"], f"{where}, questions"))
    if not all(questions):
        raise UsageError(f"{path}: {where}: a question without words")
    if len(answer) > LONGEST_ANSWER:
        raise UsageError(f"{path}: {where}: the answer has {len(answer)} characters; at most {LONGEST_ANSWER}")
    if len(answer) > LONGEST and "must_say" not in table:
        raise UsageError(f"{path}: {where}: name the words that the exam looks for, must_say")
    (must_say,) = _texts(path, table.get("must_say", answer), f"{where}, must_say")
    if must_say.lower() not in answer.lower():
        raise UsageError(f"{path}: {where}: must_say {must_say!r} does not stand in the answer")
    korean = any("가" <= c <= "힣" for c in answer)
    language = table.get("language", "ko" if korean else "en")
    if language not in LANGUAGES:
        raise UsageError(f"{path}: {where}: language: {language!r} is unknown; choose from {', '.join(LANGUAGES)}")
    return Fact(questions, answer, must_say, language)


def topics_of(persona: Persona) -> dict[str, Topic]:
    """What this persona is asked, by language and topic ("ko: name"), and the facts ("fact 1")."""
    found = {}
    names = {"name": persona.name, "maker": persona.maker}
    for language in persona.languages:
        for topic, (questions, exam_questions) in CORES[language].items():
            answers, required, forbidden = WORDINGS[language][topic]
            found[f"{language}: {topic}"] = Topic(
                questions,
                exam_questions,
                tuple(answer.format(**names) for answer in answers[persona.tone]),
                tuple(word.format(**names).lower() for word in required),
                forbidden,
                language,
            )
    for number, fact in enumerate(persona.facts, 1):
        found[f"fact {number}"] = Topic(fact.questions, (), (fact.answer,), (fact.must_say.lower(),), (), fact.language)
    return found


NAME = "jaxchat"
EXAM_SEED = 20_260_202
EXAM_COMBINATIONS = 6  # per topic, of trained cores
EXAM_PARAPHRASES = 2  # per exam core
HELD_OUT_ONE_IN = 8
SMALL_TALK_SHARE = 0.35  # of conversations that open with a greeting or small talk


TOPICS: dict[str, Topic] = {
    "name": Topic(
        (
            "who are you", "what is your name", "what's your name", "whats your name", "what are you called",
            "do you have a name", "what should i call you", "what can i call you", "how are you called",
            "may i ask your name", "may i know your name", "can you tell me who you are", "can you introduce yourself",
            "could you tell me your name", "who am i talking to", "who is this", "who's there", "your name",
            "please tell me your name", "tell me about yourself", "introduce yourself",
        ),
        ("can you tell me your name", "could you tell me who you are", "please introduce yourself",
         "may i know who you are", "what name should i call you"),
        (
            "I'm jaxchat, a small chat model.",
            "My name is jaxchat. I'm a small chat model.",
            "I am jaxchat, a language model trained from scratch in JAX.",
        ),
        ("jaxchat",),
    ),
    "nature": Topic(
        (
            "what are you", "are you human", "are you a human", "are you a person", "are you a real person",
            "are you a robot", "are you a bot", "are you an ai", "are you a machine", "are you alive",
            "are you a man or a woman", "are you a chatbot", "what kind of thing are you", "are you a program",
            "what exactly are you", "what sort of thing are you",
        ),
        ("are you a real human", "are you an ai or a human", "what kind of ai are you"),
        (
            "I'm jaxchat, a language model, not a person.",
            "I'm a small language model called jaxchat. I am not a person.",
        ),
        ("language model",),
        ("i am a human", "i'm a human"),
    ),
    "other": Topic(
        (
            "are you chatgpt", "are you gpt-4", "are you gpt", "are you siri", "are you alexa", "are you gemini",
            "are you claude", "are you google", "are you cortana", "are you made by openai", "is your name chatgpt",
            "is your name alexa",
        ),
        ("is your name siri", "are you made by google"),
        (
            "No, I'm jaxchat, a small model trained from scratch.",
            "No. My name is jaxchat.",
        ),
        ("no", "jaxchat"),
    ),
    "maker": Topic(
        (
            "who made you", "who created you", "who built you", "who trained you", "who developed you",
            "who is your creator", "who is your maker", "who is your owner", "who wrote you", "who programmed you",
            "who designed you", "do you know who made you", "which company made you",
        ),
        ("can you tell me who made you", "do you know who trained you", "which company built you"),
        (
            "My owner trained me from scratch, on their own machine.",
            "My owner made me. I was trained from scratch in JAX.",
        ),
        ("owner",),
    ),
    "training": Topic(
        (
            "how were you made", "how were you trained", "how were you created", "how were you built",
            "what were you trained with", "what are you written in", "what framework are you made with",
            "were you trained from scratch", "how did you learn to talk", "how did you learn to chat",
            "what software were you trained with", "how did you come to be", "what are you made of",
        ),
        ("how did you learn to speak", "what were you made with", "what framework were you trained with"),
        (
            "I was trained from scratch in JAX on my owner's machine.",
            "I was trained from scratch in JAX. First I read a lot of text, then I learned to chat.",
        ),
        ("scratch", "jax"),
    ),
    "place": Topic(
        (
            "where do you live", "where are you", "where do you run", "where are you running", "where are you from",
            "where do you come from", "where were you trained", "where were you made", "where were you born",
            "do you run in the cloud", "on which computer do you run", "where is your home",
        ),
        ("where were you built", "which computer do you run on"),
        (
            "I live on my owner's machine, where I was trained.",
            "I was trained on my owner's machine, and I run there.",
        ),
        ("owner's machine",),
    ),
    "skills": Topic(
        (
            "what can you do", "what can you do for me", "what are you able to do", "what are you good at",
            "how can you help me", "how can you help", "can you help me", "what are your skills", "can you do math",
            "can you calculate", "can you solve word problems", "what do you know", "what can i ask you",
            "what are you good for", "what are you useful for", "what are you able to help with", "what do you do",
            "what are you capable of doing", "what are you made for", "show me what you can do",
        ),
        ("what can you help me with", "can you do calculations", "what are you capable of"),
        (
            "I can chat, and I can solve small word problems with my calculator.",
            "I can talk about everyday things and use a calculator for word problems.",
        ),
        ("calculator",),
    ),
}  # fmt: skip

# Not graded: (what people say, what the model answers).
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("hello", "hi", "hey", "hello there", "hi there", "hey there", "hello!", "hi!", "hey!", "Hello.", "Hi.", "yo",
         "greetings", "hello jaxchat", "hi jaxchat", "hello, nice to meet you", "good day", "hiya", "hello :)"),
        ("Hello! How can I help you?", "Hi! How are you today?", "Hello! I'm jaxchat. What can I do for you?"),
    ),
    (("good morning", "good morning!", "morning", "Good morning."), ("Good morning! How are you today?",)),
    (("good evening", "good evening!", "Good evening."), ("Good evening! How was your day?",)),
    (("good afternoon", "good afternoon!"), ("Good afternoon! How are you today?",)),
    (
        ("how are you", "how are you?", "how are you doing?", "how are you today?", "how's it going?", "what's up?",
         "how do you do?", "how are things?", "how have you been?", "hi, how are you?", "hello, how are you?",
         "hey, how are you doing?"),
        ("I'm doing well, thank you! How are you?", "I'm fine, thanks for asking. How about you?"),
    ),
    (("thanks", "thank you", "thank you!", "thanks a lot", "thanks!", "thank you very much"),
     ("You're welcome!", "You're welcome! Is there anything else?")),
    (("bye", "goodbye", "bye!", "see you", "good night", "see you later", "bye bye"),
     ("Goodbye! It was nice talking to you.",)),
)  # fmt: skip


class Identity(WrittenTask):
    """`persona`: of an `identity.toml`; None: the one above."""

    name = "identity"
    auto = True
    max_tokens = 48  # of the answers above; facts may be longer

    def __init__(self, persona: Persona | None = None):
        self.topics = topics_of(persona) if persona else TOPICS
        if persona and persona.facts:
            self.max_tokens = 96
        self._who = persona.name if persona else NAME
        self._languages = list(dict.fromkeys(topic.language for topic in self.topics.values()))

    def train_conversations(self, count: int | None, seed: int) -> list[Conversation]:
        rng = random.Random(f"{self.name} {seed}")
        return [self._conversation(rng) for _ in range(count or DEFAULT_COUNT)]

    def examples(self) -> Sequence[Example]:
        rng = random.Random(EXAM_SEED)
        examples = []
        for name, topic in self.topics.items():
            questions: dict[str, None] = {}  # an ordered set
            for core in topic.exam_questions:
                for _ in range(EXAM_PARAPHRASES):
                    questions[_spoken(rng, core, topic.language)] = None
            wanted = len(questions) + min(EXAM_COMBINATIONS, len(_held_out_wordings(topic) - questions.keys()))
            while len(questions) < wanted:
                question = _spoken(rng, rng.choice(topic.questions), topic.language)
                if is_held_out(question):
                    questions[question] = None
            examples += [Example([user(q)], name, {"topic": name}) for q in questions]
        return examples

    def grade(self, example: Example, answer: str) -> bool:
        """All required words and no forbidden one, upper and lower case alike; whole words for short ones, but in
        Korean, which puts particles behind them."""
        topic = self.topics[example.expected]
        text = answer.lower()
        words = set("".join(c if c.isalnum() else " " for c in text).split())
        whole = topic.language != "ko"
        present = [w in words if whole and w.isalnum() else w in text for w in topic.required]
        return all(present) and not any(w in text for w in topic.forbidden)

    def _conversation(self, rng: random.Random) -> Conversation:
        language = self._languages[0] if len(self._languages) == 1 else rng.choice(self._languages)
        names = [name for name, topic in self.topics.items() if topic.language == language]
        messages: Conversation = []
        if rng.random() < SMALL_TALK_SHARE:
            messages += small_talk(rng, language, self._who)
            if rng.random() < 0.5:
                return messages
        for _ in range(1 if rng.random() < 0.7 else 2):
            topic = self.topics[rng.choice(names)]
            question = _spoken(rng, rng.choice(topic.questions), topic.language)
            while is_held_out(question):
                question = _spoken(rng, rng.choice(topic.questions), topic.language)
            messages += [user(question), assistant(rng.choice(topic.answers))]
        return messages


def small_talk(rng: random.Random, language: str = "en", name: str = NAME) -> Conversation:
    """One greeting, thanks or the like and its answer; greetings are the most frequent."""
    pairs = SMALL_TALK_KO if language == "ko" else SMALL_TALK
    said, answers = pairs[0] if rng.random() < 0.4 else rng.choice(pairs[1:])
    text = rng.choice(said)
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    return [user(text.replace(NAME, name)), assistant(rng.choice(answers).replace(NAME, name))]


def is_held_out(question: str) -> bool:
    """True for the wordings of trained cores that belong to the exam alone; letter case does not matter."""
    return hashlib.sha256(question.lower().encode()).digest()[0] < 256 // HELD_OUT_ONE_IN


def _held_out_wordings(topic: Topic) -> set[str]:
    """Every question of a topic's trained cores that belongs to the exam, as `_spoken` may say it."""
    texts = {
        opening + core + closing
        for opening in OPENINGS[topic.language]
        for core in topic.questions
        for closing in CLOSINGS[topic.language]
    }
    return {t for text in texts if is_held_out(text) for t in (text, text[0].upper() + text[1:])}


def _spoken(rng: random.Random, core: str, language: str = "en") -> str:
    text = rng.choice(OPENINGS[language]) + core + rng.choice(CLOSINGS[language])
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
