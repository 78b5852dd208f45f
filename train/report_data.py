"""The report card's section on the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.copying import LONG
from train.report_blocks import Block, Heading, Line, Mono, Table
from train.report_exams import Card

PASSAGE = 300  # characters of a copied passage that are shown


def data_blocks(card: Card) -> list[Block]:
    """The text, how it was packed, how much of it was used and how much of it the model says by heart."""
    data = card["data"]
    rows: list[Sequence[Line]] = [["source", Mono(str(data["source"]))]]
    for split, title in (("train", "training text"), ("val", "held-out text")):
        if split in data:
            d = data[split]
            again = f" ({d['duplicates']:,} duplicates found)" if d.get("duplicates") else ""
            rows += [
                [title, f"{d['documents']:,} documents{again}, {d['bytes']:,} bytes, {d['tokens']:,} tokens"],
                [
                    f"{title}, packed",
                    f"{d['rows']:,} rows, {d['fill']:.2%} filled, {d['cuts']:,} cuts, {_left_out(d)}",
                ],
            ]
            for part in d.get("sources", []) if len(d.get("sources", [])) > 1 else []:
                rows.append([f"{title}, {part['weight']:.1%} from", Mono(f"{part['source']}: {part['rows']:,} rows")])
    if card["corpus_share"] is not None:
        epochs = card["pretrain"]["epochs"]
        rows.append(["training text used", f"{card['corpus_share']:.1%} ({epochs:.2f} epochs)"])
    if found := card["copied"]:
        searched = f"{found['documents']:,} documents searched"
        share = (
            f"{found['share']:.1%} of {found['texts']} texts that BASE wrote stands there in passages of {LONG} bytes"
        )
        rows.append(["by heart", f"{share} and more; the longest has {found['longest']:,} characters; {searched}"])
        rows += [["that passage", Mono(found["passage"][:PASSAGE])]] if found["passage"] else []
    if t := card["tokenizer"]:
        how = "trained on the training text" if t["trained"] else "taken as it was"
        size = f"{t['vocab_size']:,} tokens, {t['bytes_per_token']:.2f} bytes per token on held-out text, {how}"
        rows.append(["tokenizer", size])
        rows += [[f"the same text in {o['name']}'s tokens", _other(o)] for o in card["other_tokenizers"]]
    return [Heading("Data"), Table(["", ""], rows)]


def _left_out(split: dict[str, Any]) -> str:
    """How many tokens stand in no row."""
    lost = split.get("lost", 0)
    return f"{lost:,} tokens ({lost / max(1, split['tokens']):.1%}) left out" if lost else "nothing left out"


def _other(other: dict[str, Any]) -> str:
    return (
        f"{other['vocab_size']:,} tokens, {other['bytes_per_token']:.2f} bytes per token; "
        f"ours needs {other['ours_per_token']:.2f} tokens for one of its"
    )
