"""A few questions of every chat exam while a model trains: a curve to watch, not a score to report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxchat import hosts
from jaxchat.config import Config
from jaxchat.errors import DataError
from jaxchat.log import say
from jaxchat.paths import RunDir
from jaxchat.state import TrainState
from jaxchat.tasks.base import ChoiceTask, Task, WrittenTask
from jaxchat.tasks.files import MissingData
from jaxchat.text.tokenizer import Tokenizer
from train.evaluate import chat_core, exam_tasks
from train.exams import Model, capped
from train.loop import Evaluator


class _Passing(Model):
    """A model on its way: its decisions are not kept."""

    def keep(self, name: str, decisions: Iterable[dict[str, Any]]) -> None:
        pass


def spot_checks(config: Config, run: RunDir, tokenizer: Tokenizer, stage: str, cases: int) -> list[Evaluator]:
    """An evaluator for `train.loop`: `exam/NAME` for the exams of `eval.exams` whose data is at hand, `cases` questions
    each, and `chatcore` where its five are among them. None for 0 cases. An exam without data is said once."""
    silent: set[str] = set()

    def asked(model: Model, task: Task, optional: bool) -> float | None:
        try:
            if isinstance(task, WrittenTask | ChoiceTask):
                indices = capped(len(task.examples()), cases)
                if not indices:
                    raise DataError("no questions")
                exam = model.written if isinstance(task, WrittenTask) else model.choice
                return exam(task, indices)["metric"]  # type: ignore[arg-type]
        except DataError as error:
            if not (optional and isinstance(error, MissingData)):
                say(f"  {task.name} is not asked during training: {error}", style="yellow")
            silent.add(task.name)
        return None

    def evaluate(state: TrainState, step: int) -> Iterator[tuple[str, float]]:
        params = jax.tree.map(hosts.gathered, state.params)

        def work() -> dict[str, float]:
            model = _Passing(config, run, stage, params, tokenizer)
            scores: dict[str, dict[str, float]] = {}
            for task, optional in exam_tasks(config):
                if task.name not in silent and (metric := asked(model, task, optional)) is not None:
                    scores[task.name] = {"metric": metric, "chance": task.chance}
            mean = chat_core(scores)
            found = {f"exam/{name}": score["metric"] for name, score in scores.items()}
            return found | ({} if mean is None else {"chatcore": mean})

        yield from hosts.on_first(work).items()

    return [evaluate] if cases else []
