"""CORE, the score of base models: 22 tasks of in-context learning, after DCLM (2406.11794) as nanochat runs them.

An item becomes texts whose spans are scored. Multiple choice: the option with the lowest mean loss after the common
prefix. Schema: the context with the lowest mean loss over the common suffix. Language modelling: every token of the
continuation must be the most likely one. Texts are tokenized whole, `<|bos|>` in front.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.data.hub import Archive
from jaxchat.engine.scoring import Span, SpanScore, common_prefix
from jaxchat.errors import DataError
from jaxchat.tasks.base import MissingData, Task, parse_rows
from jaxchat.tokenizer import Tokenizer

BUNDLE = Archive("https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip", (".jsonl", ".yaml", ".csv"))
ORDER_SEED, SHOTS_SEED = 1337, 1234
CHOICE, SCHEMA, LANGUAGE = "multiple choice", "schema", "language modelling"
FIELDS = {
    CHOICE: ("query", "choices", "gold"),
    SCHEMA: ("context_options", "continuation", "gold"),
    LANGUAGE: ("context", "continuation"),
}
ANSWER = "\nAnswer: "
BLOCK = 512  # items whose texts are tokenized, and scored, together
Item = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """`baseline`: accuracy of guessing; `file`: name of the data file where it is not the label."""

    label: str
    kind: str
    shots: int
    baseline: float
    delimiter: str = " "
    file: str = ""

    @property
    def data(self) -> str:
        return (self.file or self.label) + ".jsonl"


CORE_TASKS = (
    CoreTask("hellaswag_zeroshot", CHOICE, 0, 0.25, file="hellaswag"),
    CoreTask("jeopardy", LANGUAGE, 10, 0.0, ANSWER, "jeopardy_all"),
    CoreTask("bigbench_qa_wikidata", LANGUAGE, 10, 0.0),
    CoreTask("arc_easy", CHOICE, 10, 0.25, ANSWER),
    CoreTask("arc_challenge", CHOICE, 10, 0.25, ANSWER),
    CoreTask("copa", CHOICE, 0, 0.5),
    CoreTask("commonsense_qa", CHOICE, 10, 0.2),
    CoreTask("piqa", CHOICE, 10, 0.5, ANSWER),
    CoreTask("openbook_qa", CHOICE, 0, 0.25),
    CoreTask("lambada_openai", LANGUAGE, 0, 0.0),
    CoreTask("hellaswag", CHOICE, 10, 0.25),
    CoreTask("winograd", SCHEMA, 0, 0.5, file="winograd_wsc"),
    CoreTask("winogrande", SCHEMA, 0, 0.5),
    CoreTask("bigbench_dyck_languages", LANGUAGE, 10, 0.0),
    CoreTask("agi_eval_lsat_ar", CHOICE, 3, 0.2),
    CoreTask("bigbench_cs_algorithms", LANGUAGE, 10, 0.0),
    CoreTask("bigbench_operators", LANGUAGE, 10, 0.0),
    CoreTask("bigbench_repeat_copy_logic", LANGUAGE, 10, 0.0),
    CoreTask("squad", LANGUAGE, 10, 0.0),
    CoreTask("coqa", LANGUAGE, 0, 0.0),
    CoreTask("boolq", CHOICE, 10, 0.62, ANSWER),
    CoreTask("bigbench_language_identification", CHOICE, 10, 0.091),
)


class Core(Task):
    """All of them; an exam of base models. `chance` is 0, since accuracies are centred by their baselines."""

    name, title, auto = "core", "CORE", True

    def baselines(self) -> dict[str, float]:
        """Return the accuracies of guessing by label from the bundle's own table; {} without the table."""
        try:
            path = self.files.find(("core/eval_meta_data.csv", "**/eval_meta_data.csv"), BUNDLE)[0]
        except MissingData:
            return {}
        try:
            with open(path, encoding="utf-8", newline="") as file:
                return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise DataError(f"{path}: no table of the tasks' random baselines ({error})") from None

    def load(self, task: CoreTask) -> list[Item]:
        """Return one task's items, shuffled as the protocol wants; `MissingData` if its file is not at hand."""
        path = self.files.find((f"core/{task.data}", f"**/eval_data/**/{task.data}", task.data), BUNDLE)[0]

        def parse(row: Item) -> Item:
            first, second, *gold = (row[name] for name in FIELDS[task.kind])
            if gold and not 0 <= gold[0] < len(second if task.kind == CHOICE else first):
                raise ValueError(f"gold {gold[0]} is none of the options")
            return row

        items = parse_rows(path, parse)
        if len(items) <= task.shots:
            raise DataError(f"{path}: {len(items)} items are too few for {task.shots} examples before each")
        random.Random(ORDER_SEED).shuffle(items)
        return items


def prompts(task: CoreTask, items: Sequence[Item], index: int) -> list[str]:
    """Return the texts of one item with its few-shot examples.

    One for each option, or one without and one with the continuation. The examples depend on the item's place in
    `items`, so a cap must come first.
    """
    item, d = items[index], task.delimiter
    count = min(task.shots, len(items) - 1)
    places = random.Random(SHOTS_SEED + index).sample(range(len(items) - 1), count)  # among the others
    shots = [items[place + (place >= index)] for place in places]
    if task.kind == CHOICE:
        before = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{before}{item['query']}{d}{choice}" for choice in item["choices"]]
    if task.kind == SCHEMA:
        before = "".join(f"{s['context_options'][s['gold']]}{d}{s['continuation']}\n\n" for s in shots)
        return [f"{before}{context}{d}{item['continuation']}" for context in item["context_options"]]
    before = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shots)
    text = f"{before}{item['context'].strip()}{d}"
    return [text.strip(), text + item["continuation"]]


def spans(task: CoreTask, tokens: Sequence[list[int]]) -> list[Span]:
    """Return the spans to score of an item whose `prompts` are `tokens`, `<|bos|>` included."""
    if task.kind == CHOICE:
        start = common_prefix(tokens)
        return [Span(t, start, len(t)) for t in tokens]
    if task.kind == SCHEMA:
        length = common_prefix([t[::-1] for t in tokens])
        return [Span(t, max(1, len(t) - length), len(t)) for t in tokens]
    without, whole = tokens
    # a tokenizer may merge across the border; then what differs is the continuation
    return [Span(whole, common_prefix([without, whole]), len(whole))]


def decide(task: CoreTask, item: Item, scores: Sequence[SpanScore]) -> tuple[int, bool]:
    """Return (chosen option, whether it is right); for language modelling the choice is 1 if every token matched.

    An option without a token of its own has no mean loss and wins only where it comes first, as in nanochat.
    """
    if task.kind == LANGUAGE:
        return int(scores[0].best), scores[0].best
    means = [score.mean for score in scores]
    chosen = means.index(min(means))
    return chosen, chosen == item["gold"]


def groups(task: CoreTask, items: Sequence[Item], tokenizer: Tokenizer, places: Sequence[int]) -> list[list[Span]]:
    """Return the spans of the items at these places, whose texts are tokenized together."""
    texts = [prompts(task, items, i) for i in places]
    tokens = iter(tokenizer.encode_batch([text for group in texts for text in group]))
    return [spans(task, [[tokenizer.bos, *next(tokens)] for _ in group]) for group in texts]


def centred(task: CoreTask, accuracy: float) -> float:
    return (accuracy - task.baseline) / (1 - task.baseline)
