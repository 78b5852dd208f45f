"""Write the table of docs/tiers.md and docs/ko/tiers.md from the configurations and the plan.

    python -m bench.tier_table                 what follows from the configurations
    python -m bench.tier_table --compile       also time, cost, memory and bytes sent; needs the extra plan-cuda

Every other cell stays as it is: what a tier is meant for, and what was measured (`nano`, whole runs).
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxchat.config import Config, load_config
from jaxchat.log import size_text
from jaxchat.scaling import resolve
from jaxchat.sizes import count_parameters, flops_per_token
from train.plan import HUB_TEXT, compile_plan, disk_parts
from train.targets import parse_target

DOCS = Path(__file__).resolve().parent.parent / "docs"
TARGETS = {"d12": ("h100:1", "h100:8"), "d20": ("h100:8",), "d26": ("h100:8",), "d32": ("h100:8",)}
UNITS = {"en": (" min", " h", " rows", " ("), "ko": ("분", "시간", "행", "(")}
# (English, Korean): cell of a resolved configuration; "" keeps the cell
CONFIGURED: dict[tuple[str, str], Callable[[Config], str]] = {
    ("layers", "층"): lambda c: f"{c.model.depth}",
    ("width", "폭"): lambda c: f"{c.model.width:,}",
    ("heads x head width", "헤드 수 x 헤드 폭"): lambda c: f"{c.model.n_heads} x {c.model.head_width}",
    ("context, vocabulary", "문맥, 어휘"): lambda c: f"{c.model.seq_len:,}, {c.model.vocab_size:,}",
    ("parameters", "매개변수"): lambda c: f"{count_parameters(c.model).total:,}",
    ("in matrix products", "행렬곱에 쓰이는 것"): lambda c: f"{count_parameters(c.model).scaling:,}",
    ("pretraining tokens", "사전학습 토큰"): lambda c: f"{c.train.steps * c.train.batch_tokens:,}",
    ("steps x tokens", "스텝 x 토큰"): lambda c: f"{c.train.steps:,} x {c.train.batch_tokens:,}",
    ("pretraining FLOPs", "사전학습 FLOPs"): lambda c: (
        f"{flops_per_token(c.model) * c.train.steps * c.train.batch_tokens:.1e}".replace("e+", "e")
    ),
    ("download, text in it", "내려받는 양, 그 안의 글"): lambda c: (
        f"{size_text(c.data.text_bytes / HUB_TEXT)}, {size_text(c.data.text_bytes)}" if "hf:" in c.data.source else "-"
    ),
    ("disk", "디스크"): lambda c: size_text(sum(part.bytes for part in disk_parts(c))),
}
# of the plans on the tier's targets, and the units of the language
PLANNED: dict[tuple[str, str], Callable[[list[dict[str, Any]], tuple[str, ...]], str]] = {
    ("pretraining time", "사전학습 시간"): lambda plans, units: (
        units[3].join(duration(plan, units) for plan in plans) + ")" * (len(plans) > 1)
    ),
    ("pretraining cost", "사전학습 비용"): lambda plans, _: f"{plans[0]['usd_estimate']:.0f} USD",
    ("MFU", "MFU"): lambda plans, _: f"{100 * plans[0]['mfu_assumed']:.0f} %",
    ("memory a device", "장치당 메모리"): lambda plans, units: (
        f"{plans[0]['peak_bytes_per_device'] / 1e9:.1f} GB, {plans[0]['device_batch_rows']}{units[2]}"
    ),
    ("sent a device and step", "장치가 스텝마다 보내는 양"): lambda plans, _: (
        size_text(plans[0]["sent_bytes_per_device"]) if plans[0]["sent_bytes_per_device"] else "-"
    ),
}


def duration(plan: dict[str, Any], units: tuple[str, ...]) -> str:
    """Return the hours of a plan, below one hour in minutes."""
    hours = plan["hours_estimate"]
    return f"{60 * hours:.0f}{units[0]}" if hours < 1 else f"{hours:.2g}{units[1]}"


def page(language: str, plans: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page in "en" or "ko" with the table filled; `plans` by tier, {} keeps the cells that need one."""
    path = (DOCS if language == "en" else DOCS / "ko") / "tiers.md"
    lines = path.read_text(encoding="utf-8").split("\n")
    column = ("en", "ko").index(language)
    start = next(i for i, line in enumerate(lines) if line.startswith("| | `nano`"))
    tiers = [cell.strip(" `") for cell in lines[start].split("|")[2:-1]]
    configs = {tier: resolve(load_config(tier)) for tier in tiers}
    for i in range(start + 2, lines.index("", start)):
        label, *cells = [cell.strip() for cell in lines[i].split("|")[1:-1]]
        name = label.removeprefix("[").partition("(")[0].partition("[")[0].strip()
        for names, fill in CONFIGURED.items():
            if name == names[column]:
                cells = [fill(configs[tier]) for tier in tiers]
        for names, show in PLANNED.items():
            if name == names[column]:
                cells = [
                    show(plans[t], UNITS[language]) if t in plans else cell
                    for t, cell in zip(tiers, cells, strict=True)
                ]
        lines[i] = f"| {' | '.join([label, *cells])} |"
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    plans: dict[str, list[dict[str, Any]]] = {}
    for tier, targets in TARGETS.items() if "--compile" in arguments else ():
        plans[tier] = [compile_plan(resolve(load_config(tier)), parse_target(target)) for target in targets]
    for language, folder in (("en", DOCS), ("ko", DOCS / "ko")):
        (folder / "tiers.md").write_text(page(language, plans), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
