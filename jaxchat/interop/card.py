"""The README.md of an export: what the model is, what it scored, how it is loaded."""

from __future__ import annotations

from typing import Any

from jaxchat import __version__
from jaxchat.interop.trained import Trained
from jaxchat.sizes import count_parameters

KINDS = {"base": "a base model that continues text", "sft": "a chat model", "rl": "a chat model after RL"}


def model_card(model: Trained, how: str, library: str) -> str:
    """Markdown with the front matter of a model card; `how` is the section that says how to load it.

    A model that came with a card keeps it.
    """
    if model.card is not None:
        return model.card
    config, total = model.config, count_parameters(model.config).total
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- jaxchat\n---",
        f"# {model.name}",
        f"{total:,} parameters, {KINDS[model.stage]}, {_origin(model)}: {config.depth} layers of width "
        f"{config.width}, {config.n_heads} heads of {config.head_width}, context {config.seq_len:,} tokens, vocabulary "
        f"{config.vocab_size:,}. Recipe `{config.recipe}`.",
        f"## Load it\n\n{how}",
    ]
    if model.report:
        parts += [_training(model.report), _exams(model.report, model.stage)]
    parts.append(
        "## Limits\n\nA model of this size makes facts up, and repeats what its training text held. Look at the exams "
        "before you rely on it."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(model: Trained) -> str:
    if model.imported is None:
        return f"trained with jaxchat {__version__}"
    there = f"imported into jaxchat {__version__} from {model.imported.get('from')} ({model.imported.get('format')})"
    return f"{there} and trained on" if model.trained_on else there


def _training(report: dict[str, Any]) -> str:
    data, pretrain = report.get("data", {}), report.get("pretrain", {})
    facts = [("text", f"`{data['source']}`")] if data.get("source") and pretrain else []
    facts += [("tokens of pretraining", f"{pretrain['tokens']:,}")] if pretrain.get("tokens") else []
    facts += [("passes over the text", f"{pretrain['epochs']:.2f}")] if pretrain.get("epochs") else []
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"## Training\n\n| | |\n| --- | --- |\n{rows}" if facts else ""


def _exams(report: dict[str, Any], stage: str) -> str:
    scores = {s: e for s, e in report.get("exams", {}).items() if s in ("base", stage) and e}
    rows = [
        f"| {kind} | {name} | {score['metric']:.4f} | {score.get('n', '')} |"
        for kind, exams in scores.items()
        for name, score in exams.items()
    ]
    table = "\n".join(rows)
    return f"## Exams\n\n| stage | exam | score | questions |\n| --- | --- | --- | --- |\n{table}" if rows else ""
