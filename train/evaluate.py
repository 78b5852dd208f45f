"""Examine trained models: scores in `eval/<stage>.json`, and samples from before and after each stage."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxchat import distributed
from jaxchat import model as gpt
from jaxchat.chat import render_prompt
from jaxchat.checkpoint import params_sha256, trained_params
from jaxchat.config import Config, MeshConfig
from jaxchat.data.packing import Rows
from jaxchat.engine import Engine, Handle, Request, Turn
from jaxchat.engine.scoring import Scorer, Span, rows_at_once
from jaxchat.errors import DataError, UsageError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir, atomic_write, read_json, saved_steps, write_json
from jaxchat.sharding import batch_devices, make_mesh, replicated
from jaxchat.tasks import TASKS, core, get_task, parse_mixture_entry, speech
from jaxchat.tasks.base import (
    OWN,
    RIGHT,
    ChoiceExample,
    ChoiceTask,
    Conversation,
    Example,
    MissingData,
    Task,
    TaskFiles,
    WrittenTask,
    identity_digest,
    listing,
    user,
)
from jaxchat.tasks.from_file import digest_of, split_source
from jaxchat.tasks.speech import FreeAnswers, NextTurn, Words, conversations_of
from jaxchat.tokenizer import Tokenizer
from jaxchat.train_state import TrainState, decided, make_eval_step

from . import plausible
from .contamination import LONG_PASSAGE, memorized, training_documents
from .loop import Z95, Evaluator, bits_per_byte
from .report import STAGES, code, exam_tables, score_cell, standing, text_table, words

FORMAT = 1  # of `eval/<stage>.json` and `samples.json`
AUTO = "auto"  # in `eval.exams`: every task with `auto` whose data is at hand
ORDER_SEED = 42  # of the shuffle that a cap cuts; nanochat's, so that its first N questions are ours
MARK = 12  # hexadecimal digits that identify a question of an exam
COPY_TEXTS = 20  # written to measure memorization
CORE_TEXTS = 8  # rows of a batch that an item of CORE takes, with its options and the examples before it
SEED = 1234  # of samples
SAMPLE_SLOTS = 8  # as many as a chat has (`serve.slots`): its programs are compiled when the run ends
UNKNOWN = "words in no training text"  # of the exam `free_answers`
ALTERNATIVES = 5  # to each token of a sample taken during training
PROMPT_TOKENS = 8  # of a held-out text, for samples of a base model
CHAT_PROMPTS = (
    "hello",
    "who are you?",
    "how are you?",
    "Tom has 12 apples and buys 30 more. How many?",
    "what do you like to do on weekends?",
)
INPUTS = ("max_per_task", "rows", "samples", "temperature")  # settings of `eval` that a score depends on

Scores = dict[str, Any]
Decisions = list[dict[str, Any]]  # one for every question


# Shares of right answers, and how sure they are


def accuracy(right: Sequence[bool], chance: float = 0.0) -> Scores:
    """Return the share of right answers with its 95 % interval, and the share that guessing gets."""
    n, count = len(right), sum(right)
    share = count / n if n else 0.0
    interval = wilson(count, n)
    return {"metric": share, "accuracy": share, "n": n, "right": count, "interval": interval, "chance": chance}


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's score interval, 1927); (0, 1) where nothing was asked."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def passes(right: Any) -> dict[str, Scores]:
    """Return `pass@1` to `pass@S` of right (P, S) bool, P questions with S answers each.

    pass@k is the chance that one of k answers is right, estimated without bias from all S (2107.03374). Intervals are
    over the questions by the normal approximation, (0, 1) for a single one.
    """
    table = np.array(right, bool)
    (n, S), counts = table.shape, table.sum(axis=1).tolist()
    scores = {}
    for k in range(1, S + 1):
        each = np.array([1 - math.comb(S - count, k) / math.comb(S, k) for count in counts], np.float64)
        share = float(each.mean())
        half = Z95 * float(each.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
        interval = max(0.0, share - half), min(1.0, share + half)
        scores[f"pass@{k}"] = {"metric": share, "accuracy": share, "n": n, "interval": interval}
    return scores


def by_tags(examples: Sequence[Example | ChoiceExample], right: Sequence[bool], chance: float) -> Scores:
    """Return the same scores for every tag's value: `{"groups": {"kind: gain": ...}}`."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for example, ok in zip(examples, right, strict=True):
        for tag, value in example.tags.items():
            groups[f"{tag}: {value}"].append(ok)
    return {"groups": {name: accuracy(oks, chance) for name, oks in sorted(groups.items())}}


def core_summary(tasks: dict[str, Scores]) -> Scores:
    """Return the mean of the centred accuracies of CORE's tasks, by label; the interval adds up those of the tasks."""
    n = len(tasks)
    metric = sum(task["centred"] for task in tasks.values()) / n
    halves = [(t["interval"][1] - t["interval"][0]) / 2 / (1 - t["chance"]) for t in tasks.values()]
    half = math.sqrt(sum(h**2 for h in halves)) / n
    totals = {key: round(sum(task[key] for task in tasks.values()), 3) for key in ("n", "seconds")}
    return {"metric": metric, **totals, "interval": (metric - half, metric + half), "chance": 0.0, "groups": tasks}


def chat_core(tasks: dict[str, Scores]) -> float | None:
    """Return ChatCORE: the mean of its five exams, centred so that guessing is 0; None unless all five are there."""
    names = [name for name, task in TASKS.items() if task.chat_core]
    if not all(name in tasks for name in names):
        return None
    return sum((tasks[n]["metric"] - tasks[n]["chance"]) / (1 - tasks[n]["chance"]) for n in names) / len(names)


# Samples


def _answer(tokenizer: Tokenizer, result: Turn) -> dict[str, Any]:
    """Return the text of an answer, and its tokens where their probabilities are known."""
    answer: dict[str, Any] = {"text": shown(result)}
    if result.logprobs:
        pieces = tokenizer.pieces([token.id for token in result.logprobs])
        answer["tokens"] = [
            {
                "id": token.id,
                "text": text,
                "p": None if forced else round(math.exp(token.logprob), 4),
                "top": [] if forced else [[tokenizer.decode([i]), round(math.exp(p), 4)] for i, p in token.top],
            }
            for token, forced, text in zip(result.logprobs, result.forced, pieces, strict=True)
        ]
    return answer


def shown(result: Turn) -> str:
    """Return the text of an answer with its tool calls in brackets."""
    frames = {"text": "{}", "python": "[{} =", "python_output": " {}] "}
    text = "".join(frames[part["type"]].format(part["text"]) for part in result.parts)
    text = text.rstrip("\ufffd") + " ..." if result.finish_reason == "length" else text  # cut inside a character
    return text if text.strip() else ""


def samples_markdown(turns: Sequence[dict[str, Any]]) -> str:
    """Return `samples` for people to read."""
    lines: list[str] = []
    for turn in turns:
        lines += [f"> {code(turn['prompt'])}", ""]
        lines += [f"- **{a['temperature']:g}**: {code(a['text']) or '(nothing)'}" for a in turn["answers"]]
        lines.append("")
    return "\n".join(lines)


def sampler(config: Config, run: RunDir, tokenizer: Tokenizer, stage: str) -> Callable[[TrainState, int], None]:
    """Return what writes the samples of a step: `samples/step_N.json` with probabilities, and `.md` for people."""

    def sample(state: TrainState, step: int) -> None:
        params = jax.tree.map(distributed.gathered, state.params)

        def write() -> None:
            begin, model = time.perf_counter(), Model(config, run, stage, params, tokenizer)
            engine = Engine(config.model, params, tokenizer, slots=SAMPLE_SLOTS)
            turns = model.samples(engine, ALTERNATIVES)
            seconds, path = time.perf_counter() - begin, run.stage(stage) / "samples" / f"step_{step:06d}"
            record = {"format": FORMAT, "step": step, "seconds": seconds, "turns": turns}
            atomic_write(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False))
            atomic_write(path.with_suffix(".md"), f"# Step {step}\n\n{samples_markdown(turns)}")

        distributed.on_first(write)

    return sample


def write_samples(model: Model, before: Any) -> None:
    """Write `samples.json` and `samples.md`: the same prompts to the model before the stage and after it."""
    config, folder = model.config, model.run.stage(model.stage)
    record: dict[str, Any] = {"format": FORMAT}
    text = f"# Samples: {model.stage}\n\nTemperature in bold; tool calls in brackets.\n"
    vars(model).pop("engine", None)  # that of the exams may fill an accelerator's memory
    engine = Engine(config.model, before, model.tokenizer, slots=SAMPLE_SLOTS)
    for title, params in (("Before", before), ("After", model.params)):
        engine.load(params)
        record[title.lower()] = turns = model.samples(engine)
        text += f"\n## {title}\n\n{samples_markdown(turns)}"
    write_json(folder / "samples.json", record)
    atomic_write(folder / "samples.md", text)


# Exams


class Model:
    """A model under examination. Every exam returns its scores and its decision on every question.

    It uses the devices of this process, with whole parameters on each; other processes wait.
    """

    def __init__(self, config: Config, run: RunDir, stage: str, params: Any, tokenizer: Tokenizer):
        self.config, self.run, self.stage, self.params, self.tokenizer = config, run, stage, params, tokenizer
        self.mesh = make_mesh(MeshConfig(), jax.local_devices())
        self.batch_rows = rows_at_once(config.model, config.eval.batch_rows, self.mesh)

    @functools.cached_property
    def engine(self) -> Engine:
        each = max(1, self.batch_rows // self.mesh.size)
        slots = self.mesh.size << (each.bit_length() - 1)
        return Engine(self.config.model, self.params, self.tokenizer, slots=slots, mesh=self.mesh)

    @functools.cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.config.model, self.params, self.mesh, self.batch_rows)

    @property
    def prompts(self) -> list[str]:
        """Of the samples: questions to a chat model, openings of held-out texts for a base model."""
        if self.stage == "base":
            return self.openings(self.config.eval.sample_prompts)
        return list(self.config.eval.chat_prompts or CHAT_PROMPTS)

    def openings(self, count: int) -> list[str]:
        """Return the first words of that many held-out texts, in any language; none without such texts."""
        if not (self.run.data / "rows" / "val" / "meta.json").exists():
            return []
        rows = Rows(self.run.data / "rows" / "val", verify=False)
        first = [rows[i][0][1 : 1 + PROMPT_TOKENS].tolist() for i in range(min(count, len(rows)))]
        # a cut may fall inside a character
        return [text.lstrip("\ufffd").rstrip("\ufffd ") for text in map(self.tokenizer.decode, first)]

    def samples(self, engine: Engine, alternatives: int | None = None) -> list[dict[str, Any]]:
        """Answer every prompt (a base model continues it) at each temperature; the same text every time.

        Returns `{"prompt", "answers": [{"temperature", "text"}]}` each. Prompts longer than the context are left out.
        With `alternatives` a prompt also has its "ids", and an answer "tokens" with so many alternatives: each has id,
        text, probability "p" (null where the calculator wrote it) and "top", pairs of text and probability.
        """
        settings, turns, requests = self.config.eval, list[dict[str, Any]](), list[Request]()
        tokens = min(settings.sample_tokens, self.config.model.seq_len // 2)
        for i, prompt in enumerate(self.prompts):
            request = engine.text_request(prompt) if self.stage == "base" else engine.chat_request([user(prompt)])
            if len(request.tokens) <= engine.capacity:
                turns.append({"prompt": prompt} | ({} if alternatives is None else {"ids": request.tokens}))
                request = dataclasses.replace(request, max_tokens=tokens, seed=SEED + i, logprobs=alternatives)
                requests += [dataclasses.replace(request, temperature=t) for t in settings.sample_temperatures]
        results = iter(engine.generate(requests))
        for turn in turns:
            turn["answers"] = [
                {"temperature": t, **_answer(self.tokenizer, next(results))} for t in settings.sample_temperatures
            ]
        return turns

    def exam(self, task: Task, indices: Sequence[int]) -> tuple[Scores, Decisions]:
        """Ask the questions of those numbers."""
        everything = task.examples()
        examples = [everything[i] for i in indices]
        if isinstance(task, FreeAnswers):
            return self.free_answers(task, examples)
        if isinstance(task, NextTurn):
            scores, decisions = self._next_turn(task, examples)
        elif isinstance(task, WrittenTask):
            scores, decisions = self._written(task, examples)
        elif isinstance(task, ChoiceTask):
            scores, decisions = self._choice(task, examples)
        else:
            raise TypeError(f"{task.name} has questions of an unknown kind")
        right = [decision["right"] for decision in decisions]
        decisions = [{"index": i} | decision for i, decision in zip(indices, decisions, strict=True)]
        return accuracy(right, task.chance) | scores | by_tags(examples, right, task.chance), decisions

    def _written(self, task: WrittenTask, examples: Sequence[Example]) -> tuple[Scores, Decisions]:
        """Grade answers at temperature 0, and `eval.samples` more at `eval.temperature`.

        A question longer than the context counts as wrong (`too_long`). `endless` counts truncated answers.
        """
        requests = [self.engine.chat_request(e.prompt, max_tokens=task.max_tokens) for e in examples]
        too_long = Turn(self.tokenizer)
        too_long.finish_reason = "too_long"
        fits = [len(request.tokens) <= self.engine.capacity for request in requests]

        def answers(count: int, temperature: float) -> tuple[list[Turn], list[bool]]:
            """Return `count` answers to every question, one question after the other, and whether they are right."""
            handles: list[Handle] = []
            for request in itertools.compress(requests, fits):
                seeds = range(ORDER_SEED + len(handles), ORDER_SEED + len(handles) + count)  # the same every time
                handles += self.engine.submit_group(dataclasses.replace(request, temperature=temperature), seeds)
            with progress(f"{self.stage} {task.name}", len(handles)) as bar:
                given = iter(self.engine.finish(handles, lambda _: bar.advance()))
            results: list[Turn] = [next(given) if fit else too_long for fit in fits for _ in range(count)]
            right = task.grade_all([e for e in examples for _ in range(count)], [result.text for result in results])
            return results, [ok >= RIGHT and result is not too_long for ok, result in zip(right, results, strict=True)]

        results, right = answers(1, 0.0)
        decisions = Decisions()
        for e, result, ok in zip(examples, results, right, strict=True):
            decision = {"prompt": e.prompt, "expected": e.expected, "answer": result.parts}
            decisions.append(decision | {"finish_reason": result.finish_reason, "right": ok})
        endless = sum(result.finish_reason == "length" for result in results)
        scores: Scores = {"too_long": fits.count(False), "endless": endless}
        readings = [task.readings(example, result.text) for example, result in zip(examples, results, strict=True)]
        if readings and readings[0]:
            scores["readings"] = {name: accuracy([r[name] for r in readings], task.chance) for name in readings[0]}
        if k := self.config.eval.samples:
            drawn, oks = answers(k, self.config.eval.temperature)
            draws = [{"answer": r.parts, "right": ok} for r, ok in zip(drawn, oks, strict=True)]
            for i, decision in enumerate(decisions):
                decision["draws"] = draws[i * k : i * k + k]
            scores["pass_at_k"] = passes(np.reshape(oks, (-1, k)))
        if facts := task.facts():
            scores["facts"] = facts
        return scores, decisions

    def _choice(self, task: ChoiceTask, examples: Sequence[ChoiceExample]) -> tuple[Scores, Decisions]:
        """Choose the letter of largest logit where the answer begins. `cropped` prompts lost their beginning."""
        prompts = [render_prompt(self.tokenizer, e.prompt) for e in examples]
        ids = {letter: self.tokenizer.encode(letter) for e in examples for letter in e.letters}
        if split := [letter for letter, tokens in ids.items() if len(tokens) != 1]:
            raise DataError(f"the tokenizer splits the letter {split[0]!r} into several tokens; it must be one")
        letters = [[ids[letter][0] for letter in e.letters] for e in examples]
        with progress(f"{self.stage} {task.name}", len(prompts)) as bar:
            logits, cropped = self.scorer.letters(prompts, letters, bar.advance)
        decisions: Decisions = []
        for e, row in zip(examples, logits, strict=True):
            chosen, expected = e.letters[row.index(max(row))], e.letters[e.right]
            mark = digest([e])[:MARK]
            decisions.append({"question": mark, "chosen": chosen, "expected": expected, "right": chosen == expected})
        return {"cropped": cropped}, decisions

    def free_answers(
        self, task: FreeAnswers, examples: Sequence[Example], **sampling: float
    ) -> tuple[Scores, Decisions]:
        """Return the shares of words that no training text has, of repeated 3-grams, and of distinct 2-grams.

        `sampling`: other settings than the exam's. A word cut by the end of an answer does not count.
        """
        if not self.config.eval.overlap_documents:
            raise MissingData("eval.overlap_documents=0: no training text to look the words of answers up in")
        settings: dict[str, Any] = {"temperature": task.temperature, "top_k": task.top_k, "max_tokens": task.max_tokens}
        settings |= {"min_p": self.config.serve.min_p}
        requests = [
            self.engine.chat_request(example.prompt, **settings | sampling, seed=SEED + i)
            for i, example in enumerate(examples)
        ]
        fits = [len(request.tokens) <= self.engine.capacity for request in requests]
        requests = list(itertools.compress(requests, fits))
        examples = list(itertools.compress(examples, fits))
        if not requests:
            raise MissingData(f"no question fits into the context of {self.engine.capacity} tokens")
        known = training_words(self.config, self.run.root)
        decisions, answers = Decisions(), list[list[str]]()
        for example, turn in zip(examples, self.engine.generate(requests), strict=True):
            text = speech.text_of({"content": turn.parts})
            answers.append(speech.words(text.rpartition(" ")[0] if turn.finish_reason == "length" else text))
            new = [word for word in answers[-1] if word not in known]
            decisions.append({"prompt": example.prompt, "answer": turn.parts, "unknown": new})
        unknown = sum(len(decision["unknown"]) for decision in decisions), sum(map(len, answers))
        counts = (
            (UNKNOWN, unknown),
            ("repeated 3-grams", speech.repeated(answers)),
            ("distinct 2-grams", speech.distinct(answers)),
        )
        figures = {name: {"metric": n / max(1, of), "n": of, "form": ".1%"} for name, (n, of) in counts}
        figures[UNKNOWN]["interval"] = wilson(*unknown)
        return figures[UNKNOWN] | {"n": len(examples), "figures": figures}, decisions

    def _next_turn(self, task: NextTurn, examples: Sequence[Example]) -> tuple[Scores, Decisions]:
        """Choose the turn whose log-likelihood per byte gains most by the conversation before it."""
        alone = render_prompt(self.tokenizer, [user("")])
        texts = list(dict.fromkeys(text for example in examples for text in example.expected[0]))
        asked = [(alone, texts), *((render_prompt(self.tokenizer, e.prompt), e.expected[0]) for e in examples)]
        groups = []
        for prompt, options in asked:
            tails = [self.tokenizer.encode(text) for text in options]
            groups.append([Span([*prompt, *tail], len(prompt), len(prompt) + len(tail)) for tail in tails])
        with progress(f"{self.stage} {task.name}", sum(map(len, groups))) as bar:
            without, *within = self.scorer.spans(groups, bar.advance)
        before = {text: score.loss for text, score in zip(texts, without, strict=True)}
        decisions: Decisions = []
        for e, spans in zip(examples, within, strict=True):
            options, right = e.expected
            gains = {t: (before[t] - s.loss) / len(t.encode()) for t, s in zip(options, spans, strict=True)}
            chosen = max(options, key=gains.__getitem__)
            decisions.append({"question": digest([e])[:MARK], "chosen": chosen, "right": chosen == right})
        return {"cropped": sum(spans[0].cropped > 0 for spans in within)}, decisions

    def core_task(
        self, task: core.CoreTask, items: Sequence[core.Item], count: int | None = None
    ) -> tuple[Scores, Decisions]:
        """Ask the first `count` items of one of CORE's tasks (None: all). `cropped` items do not fit the context."""
        asked, decisions, cropped = items[:count], Decisions(), 0
        with progress(f"{self.stage} core: {task.label}", len(asked)) as bar:
            for start in range(0, len(asked), core.BLOCK):
                block = range(start, min(start + core.BLOCK, len(asked)))
                groups = core.groups(task, items, self.tokenizer, block)
                for i, spans in zip(block, self.scorer.spans(groups), strict=True):
                    option, ok = core.decide(task, items[i], spans)
                    decisions.append({"index": i, "question": digest([items[i]])[:MARK], "chosen": option, "right": ok})
                    cropped += any(span.cropped for span in spans)
                bar.advance(len(block))
        scores = accuracy([decision["right"] for decision in decisions], task.baseline)
        shots, centred = min(task.shots, len(items) - 1), core.centred(task, scores["accuracy"])
        return scores | {"centred": centred, "shots": shots, "cropped": cropped}, decisions

    def bits_per_byte(self) -> tuple[Scores, Decisions]:
        """Score held-out text, and held-out conversations where there are any. `n` counts rows."""
        config, devices = self.config, batch_devices(self.mesh)
        at_once = -(-self.batch_rows // devices) * devices
        step = make_eval_step(decided(config, self.mesh), self.mesh)
        params = jax.device_put(self.params, replicated(self.mesh))
        scores: Scores = {}
        for kind, folder in (("text", "rows/val"), ("conversations", "sft/val")):
            directory = self.run.data / folder
            if not (directory / "meta.json").exists():
                continue
            rows = Rows(directory, self.tokenizer.digest)
            if limit := min(config.eval.rows, len(rows)):
                lengths = self.tokenizer.byte_lengths()
                with progress(f"{self.stage} bits_per_byte, {kind}", None):
                    found = bits_per_byte(step, params, rows, lengths, at_once, limit, self.mesh)
                scores[kind] = {"n": limit} | found
        if not scores:
            raise DataError(f"{self.run.data}: no held-out rows; run stage prepare again")
        first = next(iter(scores.values()))
        return {"metric": first["bits_per_byte"], "unit": "bits per byte"} | first | scores, []

    def memorization(self) -> Scores:
        """Return what the model's own texts share with the training text."""
        openings = self.openings(COPY_TEXTS)
        requests = [
            self.engine.text_request(text, temperature=0.8, seed=SEED + i, stop=()) for i, text in enumerate(openings)
        ]
        texts = [result.text for result in self.engine.generate(requests)]
        return memorized(texts, training_documents(self.config)) | {"most": self.config.eval.overlap_documents}


def sft_conversations(run: RunDir, tokenizer: Tokenizer, split: str, most: int = -1) -> list[Conversation]:
    """Return the conversations in the first `most` rows of SFT (-1: all); none in a run that has none."""
    folder = run.data / "sft" / split
    if not (folder / "meta.json").exists():
        return []
    rows = Rows(folder, tokenizer.digest, verify=False)
    return conversations_of(tokenizer, (rows[i][0].tolist() for i in range(len(rows))[: most if most >= 0 else None]))


@functools.lru_cache(maxsize=1)
def training_words(config: Config, root: Path) -> Words:
    """Return the words of the pretraining text and of the conversations, of `eval.overlap_documents` each at most."""
    run = RunDir(root)
    talks = sft_conversations(run, Tokenizer.load(run.tokenizer), "train", config.eval.overlap_documents)
    said = (speech.text_of(message) for messages in talks for message in messages)
    return Words(itertools.chain(training_documents(config), said))


def capped(count: int, limit: int) -> list[int]:
    """Return the indices of the questions to ask: all in order, or the first `limit` of a fixed shuffle."""
    if limit < 0 or limit >= count:
        return list(range(count))
    return [int(i) for i in np.random.default_rng(ORDER_SEED).permutation(count)[:limit]]


def digest(questions: Iterable[Any]) -> str:
    """Return the SHA-256 of what is asked and what is right."""
    sha256 = hashlib.sha256()
    for q in questions:
        if isinstance(q, Example):
            q = [q.prompt, q.expected]
        elif isinstance(q, ChoiceExample):
            q = [q.prompt, q.letters, q.right]
        sha256.update(json.dumps(q, sort_keys=True, default=str).encode() + b"\n")
    return sha256.hexdigest()


# The stage


def run(config: Config, run: RunDir, one_batch: bool = False) -> dict[str, Any]:
    """Examine every stage that has a checkpoint; facts: main scores by stage and task, digest. See `examine`."""
    tokenizer, before = Tokenizer.load(run.tokenizer), gpt.init_params(config.model, config.seed)
    records: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        if saved_steps(run.stage(stage)):
            model = Model(config, run, stage, trained_params(run, stage), tokenizer)
            records[stage] = examine(model, one_batch)
            write_samples(model, before)
            before = model.params
    if not records:
        raise DataError(f"{run.root}: nothing to examine; train it first")
    exams = {stage: record["tasks"] for stage, record in records.items()}
    card = {"exams": exams, "standing": {stage: standing(record) for stage, record in records.items()}}
    table = exam_tables(card)[0]
    say(f"\n{text_table([table.head, *table.rows])}\n")
    timeless = json.loads(json.dumps(records), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})
    content = json.dumps(timeless, sort_keys=True).encode()
    scores = {stage: {name: task["metric"] for name, task in tasks.items()} for stage, tasks in exams.items()}
    lines = [f"{s}: {line}" for s, of in scores.items() for line in plausible.of_score(of.get("bits_per_byte"))]
    return scores | {"digest": hashlib.sha256(content).hexdigest(), "warnings": plausible.warn("eval", lines)}


def check(config: Config) -> None:
    """Refuse, before any work, exams that do not exist, cannot be taken with these settings, or have damaged data.

    What is missing is named once and will not be asked.
    """
    counts, learned = dict[str, int](), {parse_mixture_entry(entry)[0] for entry in config.sft.mixture}
    for source in config.eval.exams:
        if source.startswith(OWN) and split_source(source)[0] in learned:
            say(f"  {source}: SFT trains on this file too, so its score shows what was memorized", style="yellow")
    for task, optional in exam_tasks(config):
        if task.name in counts:
            raise UsageError(f"eval.exams: two exams are called {task.name}; rename the file of one")
        task.check()
        try:
            parts = [task.load(part) for part in core.CORE_TASKS] if isinstance(task, core.Core) else [task.examples()]
            counts[task.name] = sum(map(len, parts))
        except MissingData as error:
            if not optional:
                say(f"  eval.exams: {task.name}, or a part of it, will not be taken: {error}", style="yellow")
    if counts:
        say("  exams: " + ", ".join(f"{name} ({count:,} questions)" for name, count in counts.items() if count))


def external_inputs(config: Config) -> str:
    """Describe the external inputs: the files of `tasks.data_dir`, the identity file, the exams' own files."""
    return listing(config.tasks.data_dir) + identity_digest(config) + digest_of(config.eval.exams)


def exam_tasks(config: Config) -> Iterator[tuple[Task, bool]]:
    """Yield the tasks of `eval.exams`; True for one that is left out silently where its data is not at hand."""
    names: dict[str, bool] = {}
    for entry in config.eval.exams:
        for name in [name for name, task in TASKS.items() if task.auto] if entry == AUTO else [entry]:
            names.setdefault(name, entry == AUTO)
    for name, optional in names.items():
        yield get_task(name, TaskFiles.of(config, download=not optional)), optional


def examine(model: Model, one_batch: bool = False) -> dict[str, Any]:
    """Fill `eval/<stage>.json`, starting from what an earlier evaluation of the same model left there; returns it.

    An exam that is done for the same parameters, questions and settings is kept, so a killed evaluation resumes. An
    exam whose data is missing or damaged is recorded as not run, with the reason.

    `one_batch` asks of every exam only as many questions as run at once, twice; the seconds of the second time, in
    which nothing compiles, are `again_seconds`, and `questions` is how many the whole exam has.
    """
    config, stage, path = model.config, model.stage, model.run.eval(model.stage)
    settings = {key: getattr(config.eval, key) for key in INPUTS}
    inputs = settings | {"params_sha256": params_sha256(model.params), "tokenizer": model.tokenizer.digest}
    record = read_json(path) if path.exists() else {}
    if record.get("inputs") != inputs or record.get("format", 1) != FORMAT:
        record = {"tasks": {}, "core_tasks": {}}
    record |= {"format": FORMAT, "core": None, "core_partial": None, "chatcore": None, "not_run": {}, "inputs": inputs}
    done: dict[str, list[str]] = {"tasks": [], "core_tasks": []}
    limit, rows = config.eval.max_per_task, config.eval.batch_rows

    def take(
        name: str, title: str, asked: str, count: int, ask: Callable[[], tuple[Scores, Decisions]], where: str = "tasks"
    ) -> None:
        """Take an exam, unless the record has its scores for the same questions, whose digest is `asked`."""
        scores = record[where].get(name)
        if scores is None or scores.get("questions_sha256", "") != asked:
            begin = time.perf_counter()
            scores, decisions = ask()
            scores["seconds"] = round(time.perf_counter() - begin, 3)
            scores["questions_sha256"] = asked
            if decisions:
                lines = "".join(json.dumps(decision, ensure_ascii=False) + "\n" for decision in decisions)
                kind = "core_" if where == "core_tasks" else ""
                atomic_write(path.with_name(f"{stage}_{kind}{name}.jsonl"), lines)
            if one_batch:
                begin = time.perf_counter()
                ask()
                scores |= {"again_seconds": round(time.perf_counter() - begin, 3), "questions": count or scores["n"]}
        keep(name, scores | {"title": title}, where)

    def keep(name: str, scores: Scores, where: str = "tasks") -> None:
        record[where][name] = scores
        done[where].append(name)
        write_json(path, record)
        say(f"  {stage:<5} {name:<14} {words(score_cell(scores))}, {scores['n']} cases")

    def not_run(name: str, why: str) -> None:
        record["not_run"][name] = why
        say(f"  {stage:<5} {name:<14} not run: {why}", style="yellow")

    def chat_exam(task: Task) -> None:
        if isinstance(task, NextTurn):
            task.conversations = sft_conversations(model.run, model.tokenizer, "val")
        examples = task.examples()
        indices = capped(len(examples), limit)
        if not examples and isinstance(task, NextTurn):
            raise MissingData(f"{task.name}: the held-out conversations of SFT have no {speech.OPTIONS} turns to ask")
        if not indices:
            raise DataError(f"{task.name} has no questions, it is only a source of conversations")
        asked = indices[: max(1, rows)] if one_batch else indices
        sampling = [config.serve.min_p, config.eval.overlap_documents] if isinstance(task, FreeAnswers) else []
        questions = digest([*(examples[i] for i in asked), *task.setting(), *sampling])
        ask = functools.partial(model.exam, task, asked)
        take(task.name, task.title or task.name, questions, len(indices), ask)

    def core_exams(task: core.Core) -> None:
        missing: dict[str, DataError] = {}
        baselines, first = task.baselines(), max(2, rows // CORE_TEXTS) if one_batch else None
        for part in core.CORE_TASKS:
            part = dataclasses.replace(part, baseline=baselines.get(part.label, part.baseline))
            try:
                items = task.load(part)[: limit if limit >= 0 else None]
                if not items:
                    raise DataError("eval.max_per_task asks for no questions")
            except DataError as error:
                missing[part.label] = error
                continue
            ask = functools.partial(model.core_task, part, items, first)
            take(part.label, part.label, digest(items), len(items), ask, "core_tasks")
        if not done["core_tasks"]:
            raise next(iter(missing.values()))
        summary = core_summary({label: record["core_tasks"][label] for label in done["core_tasks"]})
        if missing:  # the mean of some of its tasks is not called CORE
            reasons, count = {label: str(error) for label, error in missing.items()}, len(done["core_tasks"])
            record["core_partial"] = {"metric": summary["metric"], "tasks": count, "missing": reasons}
            not_run("core", f"no data of {', '.join(reasons)}: {next(iter(reasons.values()))}")
            title = f"core_partial (mean of {count} of CORE's {len(core.CORE_TASKS)} tasks)"
            keep("core_partial", summary | {"title": title})
        else:
            record["core"] = summary["metric"]
            keep("core", summary | {"title": task.title})

    try:
        take("bits_per_byte", "bits per byte", "", 0, model.bits_per_byte)
    except DataError as error:
        if config.train.steps:
            raise
        not_run("bits_per_byte", str(error))  # weights taken as they are may have no held-out text here
    for task, optional in exam_tasks(config):
        try:
            if isinstance(task, core.Core) and stage == "base":
                core_exams(task)
            elif not isinstance(task, core.Core) and stage != "base":
                chat_exam(task)
        except DataError as error:
            if not (optional and isinstance(error, MissingData)):
                not_run(task.name, str(error))
    for where, names in done.items():  # without exams that are no longer asked for
        record[where] = {name: record[where][name] for name in names}
    record["chatcore"] = chat_core(record["tasks"])
    if stage != "base" or not config.eval.copied:
        record.pop("copied", None)
    elif record.get("copied", {}).get("most") != config.eval.overlap_documents:
        record["copied"] = found = model.memorization()
        say(
            f"  {stage:<5} {'copied':<14} the longest memorized passage has {found['longest']:,} characters; "
            f"{found['share']:.1%} of {found['texts']} texts is in passages of {LONG_PASSAGE} bytes and more"
        )
    write_json(path, record)
    return record


def spot_checks(config: Config, run: RunDir, tokenizer: Tokenizer, stage: str, cases: int) -> list[Evaluator]:
    """Return an evaluator that asks `cases` questions of every exam while a model trains.

    Its figures make a curve; they are no scores to report.

    It yields `exam/NAME` for the exams of `eval.exams` whose data is at hand, and `chatcore` where its five are among
    them. An exam without data is reported once. None for 0 cases.
    """
    without_data: set[str] = set()

    def evaluate(state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        params = jax.tree.map(distributed.gathered, state.params)

        def work() -> dict[str, float]:
            model, scores = Model(config, run, stage, params, tokenizer), dict[str, Scores]()
            for task, optional in exam_tasks(config):
                try:
                    if task.name not in without_data and (indices := capped(len(task.examples()), cases)):
                        scores[task.name] = model.exam(task, indices)[0]
                except DataError as error:
                    without_data.add(task.name)
                    if not (optional and isinstance(error, MissingData)):
                        say(f"  {task.name} is not asked during training: {error}", style="yellow")
            mean = chat_core(scores)
            found = {f"exam/{name}": score["metric"] for name, score in scores.items()}
            return found | ({} if mean is None else {"chatcore": mean})

        yield from distributed.on_first(work).items()

    return [evaluate] if cases else []
