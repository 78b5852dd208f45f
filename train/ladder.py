"""A ladder of depths: held-out bits per byte against training FLOPs, the next depth predicted, two ladders compared.

Every run is a run directory below the ladder's folder, with the tokenizer and rows of `data/` linked into it. The
numbers are in `ladder.json`; `ladder.html` and `ladder.svg` are made from it alone.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxchat.checkpoint import trained_params
from jaxchat.config import KEYS, Config, ModelConfig, flatten, is_derived, load_config, replaced, to_toml
from jaxchat.data.shards import read_documents
from jaxchat.engine.scoring import Scorer
from jaxchat.errors import DataError, DivergedError, JaxchatError, OutOfMemoryError, UsageError, command_line
from jaxchat.log import print_facts, progress, read_metrics, say
from jaxchat.run_dir import RunDir, atomic_write, link, read_json, require_format, write_json
from jaxchat.scaling import derivations, resolve
from jaxchat.sizes import count_parameters, flops_per_token, looked_up
from jaxchat.tokenizer import Tokenizer

from .compare import windows
from .curves import STYLE
from .plan import before_training, best_plan
from .report import PRIVATE, Table, count, duration, page, speed, text_table
from .stages import run_stages, select
from .targets import parse_target

FORMAT = 1  # of `ladder.json`
DOCUMENTS, DOCUMENT_BYTES = 400, 2_000_000  # held-out ones that are scored, at most
MEASURES = {"start": "windows from a document's start", "every": "every byte"}  # whose bits per byte
SCORING = "float32; documents in windows of seq_len + 1 tokens that overlap by half; start: the first window alone"
AXES = {"flops": "FLOPs", "tokens": "tokens", "seconds": "wall clock"}
RESAMPLES, SEED = 2_000, 20_261_130  # of the bootstrap
# Prior of the offset a in a + b C^-c, as a share of the best loss; and the misfit that counts as one deviation
OFFSET, OFFSET_SD, MISFIT = 0.5, 0.25, 0.005
OWN_KEYS = ("seed", "tier", "model.depth")  # in which the runs of a ladder may differ
DERIVED = ("model.width", "model.n_heads", "model.n_kv_heads", "train.steps")
Ladder = dict[str, Any]  # what `ladder.json` holds
Points = list[dict[str, Any]]
Shape = tuple[list[int], int, int]  # depths, the next one, seeds
Fit = tuple[np.ndarray, np.ndarray, np.ndarray]  # a, b, c of a + b C^-c, each (R, 1)


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents: ids with `<|bos|>` first, and the bytes of each that count, by measure."""

    documents: list[list[int]]
    sizes: dict[str, np.ndarray]
    corpus: dict[str, Any]  # what two ladders must have in common

    @classmethod
    def of(cls, data: RunDir, context: int) -> HeldOut:
        """Return the documents with the smallest hashes that stage prepare held out in `data`."""
        tokenizer, found, sizes = Tokenizer.load(data.tokenizer), dict[int, np.ndarray](), dict[str, np.ndarray]()
        for folder in sorted((data.data / "tokens").glob("*")):
            found |= {number: tokens for tokens, number in read_documents(folder, "val", tokenizer.digest)}
        lengths, numbers = tokenizer.byte_lengths(), sorted(found)[:DOCUMENTS]
        before = np.cumsum([0, *(lengths[found[number]].sum() for number in numbers)])[:-1]
        numbers = [number for number, size in zip(numbers, before, strict=True) if size < DOCUMENT_BYTES]
        for measure, end in (("start", context + 1), ("every", None)):
            sizes[measure] = np.array([lengths[found[number][:end]].sum() for number in numbers], np.int64)
        text = data.records()["prepare"]["facts"]["train"]
        corpus = {"training_text": [text[key] for key in ("documents", "bytes", "chars")], "documents": len(numbers)}
        corpus |= {"held_out": hashlib.sha256(np.array(numbers, "<u8").tobytes()).hexdigest()}
        corpus |= {"tokenizer": tokenizer.digest, "context": context, "scoring": SCORING}
        return cls([found[number].tolist() for number in numbers], sizes, corpus)

    def score(self, config: ModelConfig, params: Any) -> dict[str, list[float]]:
        """Return the bits of every document, by measure: of its first window, and of all its windows."""
        scorer = Scorer(config, params, context=0, dtype=jnp.float32)
        groups = [windows(ids, self.corpus["context"] + 1) for ids in self.documents]
        with progress("score", sum(map(len, groups))) as bar:
            scores = iter(scorer.spans([[span] for group in groups for span in group], bar.advance))
            losses = [[next(scores)[0].loss / math.log(2) for _ in group] for group in groups]
        return {"start": [one[0] for one in losses], "every": [math.fsum(one) for one in losses]}

    def point(self, config: Config, tokens: int, step_seconds: float, bits: dict[str, list[float]]) -> dict[str, Any]:
        """Return the entry of one run in `ladder.json`. FLOPs are counted as nanochat does."""
        number, model = count_parameters(config.model), config.model
        about: dict[str, Any] = {
            "depth": model.depth,
            "seed": config.seed,
            "flops": flops_per_token(model) * tokens,
            "tokens": tokens,
        }
        about |= {"seconds": step_seconds * config.train.steps, "step_seconds": step_seconds}
        about |= {"parameters": number.total, "scaling_parameters": number.scaling}
        about |= {"table_parameters": number.total - number.scaling - number.scalars}
        about |= {"bytes_looked_up": 4 * looked_up(model)}  # by one token, in float32
        about |= {m: math.fsum(bits[m]) / float(self.sizes[m].sum()) for m in MEASURES}
        return about | {"bits": {m: [round(b, 3) for b in bits[m]] for m in MEASURES}}


def shape(root: Path, given: Config, words: str | None, seeds: int | None) -> Shape:
    """Return the depths of `--depths 2,3,4`, the one after them, and the number of seeds; by default the folder's.

    A new ladder has the three depths below the tier's, a fifth of it apart, and three seeds. Raises `UsageError`.
    """
    card = read_ladder(root) if (root / "ladder.json").exists() else {}
    gap, seeds = max(1, given.model.depth // 5), card.get("seeds", 3) if seeds is None else seeds
    depths = card.get("depths") or [d for i in (3, 2, 1) if (d := given.model.depth - gap * i) > 0]
    if words is not None:
        depths = [int(word) if word.strip().isdecimal() else 0 for word in words.split(",")]
    if not depths or depths != sorted(set(depths)) or depths[0] < 1 or seeds < 1:
        raise UsageError(f"--depths {words} --seeds {seeds}: give rising depths, as 2,3,4, and at least one seed")
    return depths, 2 * depths[-1] - depths[-2] if len(depths) > 1 else depths[-1] + 1, seeds


def opened(given: Config, root: Path, deepest: int) -> Config:
    """Return the settings that all runs of the ladder share, with hub text for the deepest.

    `UsageError` names keys that a ladder derives and that are set, and those in which the folder's runs differ.
    """
    values, own = flatten(given), root / "config.toml"
    if wrong := [key for key in DERIVED if not is_derived(values[key])]:
        sets = " ".join(f"--set {key}=-1" for key in wrong)
        raise UsageError(f"{', '.join(wrong)}: a ladder derives it from the depth and train.token_ratio; add {sets}")
    if given.train.init or given.data.size_model:
        raise UsageError("train.init, data.size_model: a ladder begins at random weights, and its depths are given")
    before = flatten(load_config(own)) if own.exists() else {}
    text = resolve(replaced(given, "model", depth=deepest)).data.text_bytes
    if before and is_derived(given.data.text_bytes):  # a longer ladder goes on with the text that is there
        text = before["data.text_bytes"]
    given = replaced(given, "data", text_bytes=text)
    deciding = {k: v for k, v in flatten(given).items() if before and k not in OWN_KEYS and not KEYS[k].free}
    if changed := [f"{k} ({before[k]!r} -> {v!r})" for k, v in deciding.items() if v != before[k]]:
        raise UsageError(f"{root}: was made with other settings: {', '.join(changed)}; choose another --run-dir")
    return given


def rung(given: Config, depth: int, seed: int) -> Config:
    """Return the resolved configuration of one run."""
    return resolve(dataclasses.replace(replaced(given, "model", depth=depth), seed=seed))


def prepared(given: Config, root: Path, depth: int) -> tuple[RunDir, HeldOut]:
    """Return `data/`, a run directory with the tokenizer and rows that all share, and its held-out documents.

    Then the settings are kept in the ladder's `config.toml`, so that a command whose text cannot be read may be mended.
    """
    data, config = RunDir(root / "data"), rung(given, depth, given.seed)
    run_stages(config, data, select("prepare", None), {})
    if not (root / "config.toml").exists():
        atomic_write(root / "config.toml", to_toml(given))
    return data, HeldOut.of(data, config.model.seq_len)


def trained(given: Config, depth: int, seed: int, root: Path, data: RunDir, held: HeldOut) -> dict[str, Any]:
    """Train one run, or find it done, and return its point."""
    config, run = rung(given, depth, seed), RunDir(root / f"d{depth}_s{seed}")
    if not run.stages.exists():
        for folder in ("tokenizer", "data/rows"):
            shutil.rmtree(run.root / folder, ignore_errors=True)
            shutil.copytree(data.root / folder, run.root / folder, copy_function=link)
        write_json(run.stages, {name: data.records()[name] for name in ("tokenizer", "prepare")})
    if run.records().get("pretrain", {}).get("status") != "done":
        say(run.root.name, style="bold")
        before_training(config, run, {"pretrain"})
    run_stages(config, run, select("pretrain", None), derivations(given, config))
    facts, scores = run.records()["pretrain"]["facts"], run.eval("ladder")
    key = {"params_sha256": facts["params_sha256"], "corpus": held.corpus}
    cached = read_json(scores) if scores.exists() else {}
    if {name: cached.get(name) for name in key} != key:
        cached = key | {"bits": held.score(config.model, trained_params(run, "base"))}
        if not np.isfinite(cached["bits"]["every"]).all():
            raise DivergedError(f"{run.root}: its bits per byte are not finite; lower optim.lr_scale in another folder")
        write_json(scores, cached)
    step = speed(read_metrics(run.stage("base") / "metrics.jsonl"))["step_seconds"]
    return held.point(config, facts["tokens"], step, cached["bits"]) | {"run": run.root.name}


def climb(
    given: Config, root: Path, shape: Shape, further: bool, against: Sequence[str], as_json: bool = False
) -> Ladder:
    """Train what is missing of the ladder in `root`, write and print its results, and return `ladder.json`.

    The depth after the last is predicted, and with `further` trained. A run that diverges, or does not fit, leaves the
    others alone; the first such error is raised at the end.
    """
    (depths, following, seeds), others, errors = shape, [read_ladder(path) for path in against], list[JaxchatError]()
    given = opened(given, root, max(following, given.model.depth))
    with RunDir(root).lock():
        data, held = prepared(given, root, depths[0])
        card = blank(f"jaxchat {root.name}", given, held) | {"depths": list(depths), "seeds": seeds}
        if (root / "ladder.json").exists():  # of the same settings; other depths and seeds stay
            card |= {key: read_ladder(root)[key] for key in ("points", "predictions")}
        for depth in [*depths, *([following] if further else [])]:
            if depth == following:
                predict(card, given, depth, root, required=True)
            for seed in range(given.seed, given.seed + seeds):
                write(root, card)
                try:
                    point = trained(given, depth, seed, root, data, held)
                    card["points"] = [*(p for p in card["points"] if p["run"] != point["run"]), point]
                except (DivergedError, OutOfMemoryError) as error:
                    errors.append(error)
                    card["failed"][f"d{depth}_s{seed}"] = str(error)
                    say(f"  d{depth}_s{seed}: {error}; the others go on", style="yellow")
            jax.clear_caches()
        predict(card, given, following, root, required=False)
        card["against"] = [multipliers(card, other) for other in others]
        write(root, card, others)
    parts = [f"{t.title}\n\n{text_table([t.head, *t.rows])}\n{t.note}".rstrip() for t in tables(card)]
    print(json.dumps(card) if as_json else "\n\n".join([card["about"], *parts]))
    say(f"page {root / 'ladder.html'}, numbers {root / 'ladder.json'}")
    if errors:
        raise errors[0]
    return card


def blank(name: str, given: Config, held: HeldOut) -> Ladder:
    """Return a ladder without points."""
    config = rung(given, given.model.depth, given.seed)
    of = "parameter" if config.model.recipe == "classic" else "scaling parameter"
    about = f"{config.train.token_ratio:g} tokens per {of}; text: {given.data.source}"
    about += f", {len(held.documents)} documents of it held out"
    found = {"format": FORMAT, "name": name, "about": about, "token_ratio": config.train.token_ratio}
    found |= {
        "corpus": held.corpus,
        "config": {key: value for key, value in flatten(given).items() if not key.startswith(PRIVATE)},
    }
    found |= {"sizes": {measure: sizes.tolist() for measure, sizes in held.sizes.items()}}
    return found | {"points": [], "failed": {}, "predictions": [], "against": []}


def read_ladder(path: str | Path) -> Ladder:
    """Return a `ladder.json`, of a file or of the folder that has it; `DataError` for anything else."""
    file = Path(path) / "ladder.json" if Path(path).is_dir() else Path(path)
    card = read_json(file)
    require_format(card, FORMAT, file)
    if not isinstance(card, dict) or not {"name", "corpus", "sizes", "points", "predictions"} <= card.keys():
        raise DataError(f"{file}: not the ladder.json that {command_line('ladder')} writes")
    return card


def write(root: Path, card: Ladder, others: Sequence[Ladder] = ()) -> None:
    """Write `ladder.json`, `ladder.svg` and `ladder.html`, with the fits and the predictions' errors of its points."""
    card["fit"] = {measure: fitted(card, measure) for measure in MEASURES}
    for prediction in card["predictions"]:
        for measure, found in card["fit"].items():
            if prediction["depth"] in found["depths"]:
                measured = found["values"][found["depths"].index(prediction["depth"])]
                prediction[measure] |= {"measured": measured, "error": prediction[measure]["value"] / measured - 1}
    write_json(root / "ladder.json", card)
    picture = draw([card, *others])
    atomic_write(root / "ladder.svg", picture)
    uri = "data:image/svg+xml;base64," + base64.b64encode(picture).decode()
    shown = {"headline": card["about"], "exams": tables(card), "pictures": [("ladder.svg", "ladder", uri)]}
    atomic_write(root / "ladder.html", page("html", card["config"], title=f"Ladder: {card['name']}", **shown))


def by_depth(card: Ladder) -> dict[int, Points]:
    """Return the points of each depth, the smallest depth first."""
    depths = sorted({p["depth"] for p in card["points"]})
    return {d: [p for p in card["points"] if p["depth"] == d] for d in depths}


def log_median(groups: dict[int, Points], key: str) -> np.ndarray:
    """Return the logarithm of each depth's median."""
    return np.log([float(np.median([p[key] for p in points])) for points in groups.values()])


def sample(card: Ladder, measure: str, stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return bits per byte of every depth, measured and in R samples (1 + R, D), and seed noise of another depth (R,).

    Documents are drawn with replacement, the same ones for all models and ladders. Seeds: log deviations from the
    mean of a depth, of all depths together, are drawn with replacement and scaled up for the few degrees of freedom, as
    in Student's t (one seed has none). `stream`: another number for a ladder whose seeds are independent of these.
    """
    sizes = np.array(card["sizes"][measure], np.float64)
    weights = np.random.default_rng(SEED).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), RESAMPLES)
    bits = [np.array([p["bits"][measure] for p in points]) for points in by_depth(card).values()]  # (S, n) each
    samples = np.stack([weights @ b.mean(axis=0) for b in bits], axis=1) / (weights @ sizes)[:, None]
    values = [b.sum(axis=1) / sizes.sum() for b in bits]
    pool = [np.log(v / v.mean()) * math.sqrt(len(v) / (len(v) - 1)) for v in values if len(v) > 1]
    freedom, counts = sum(map(len, pool)) - len(pool), [*map(len, values), max(map(len, values))]
    noise = np.zeros((RESAMPLES, len(counts)))
    if freedom:
        rng = np.random.default_rng([SEED, stream])
        drawn = [rng.choice(np.concatenate(pool), (RESAMPLES, n)).mean(axis=1) for n in counts]
        noise = np.stack(drawn, axis=1) * np.sqrt(freedom / rng.chisquare(freedom, (RESAMPLES, 1)))
    return np.vstack([[v.mean() for v in values], samples * np.exp(noise[:, :-1])]), noise[:, -1]


def fit(x: np.ndarray, y: np.ndarray) -> Fit:
    """Return a + b exp(-c x) for every row of y (R, D), x (D,) = log C, as three (R, 1).

    For every offset a on a grid b and c are the straight line through log(y - a). The best a has the least misfit (in
    units of `MISFIT`) plus distance from its prior, so that three points do not decide it alone.
    """
    shares, center = np.linspace(0, 0.95, 96), x - x.mean()
    a = shares * y.min(axis=1, keepdims=True)  # (R, A)
    z = np.log(y[:, None] - a[..., None])  # (R, A, D)
    slope, level = (z @ center) / (center @ center), z.mean(axis=-1)
    curve = a[..., None] + np.exp(level[..., None] + slope[..., None] * center)
    cost = np.square(np.log(curve / y[:, None]) / MISFIT).sum(axis=-1) + ((shares - OFFSET) / OFFSET_SD) ** 2
    best = cost.argmin(axis=1)[:, None]
    a, slope, level = (np.take_along_axis(v, best, axis=1) for v in (a, slope, level))
    return a, np.exp(level - slope * x.mean()), -slope


def on_curve(curve: Fit, x: np.ndarray) -> np.ndarray:
    """Return the fitted values (R, X) at x (X,) = log C."""
    a, b, c = curve
    return a + b * np.exp(-c * x)


def interval(samples: np.ndarray) -> list[float | None]:
    """Return the 95 % interval; None for an end that is not finite."""
    ordered, cut = np.sort(samples), len(samples) // 40
    return [float(end) if math.isfinite(end) else None for end in (ordered[cut], ordered[-1 - cut])]


def fitted(card: Ladder, measure: str) -> dict[str, Any]:
    """Return the bits per byte of each depth with their intervals and, from three depths on, the curve."""
    if not (groups := by_depth(card)):
        return {"depths": [], "values": []}
    (y, _), x = sample(card, measure), log_median(groups, "flops")
    found = {"depths": list(groups), "values": y[0].tolist(), "intervals": [interval(s) for s in y[1:].T]}
    if len(groups) > 2:
        curve = fit(x, y)
        found |= {name: float(v[0, 0]) for name, v in zip("abc", curve, strict=True)}
        found |= {"c_interval": interval(curve[2][1:, 0]), "misfit": (on_curve(curve, x)[0] / y[0] - 1).tolist()}
    return found


def predict(card: Ladder, given: Config, depth: int, root: Path, required: bool) -> None:
    """Add what the fit says of a deeper model; what was written before that was begun is never changed.

    `UsageError` where it is `required` and cannot be: below three depths, or for a depth that was begun without it.
    """
    below = card | {"points": [p for p in card["points"] if p["depth"] < depth]}
    groups, begun = by_depth(below), any(root.glob(f"d{depth}_s*"))
    if begun and depth in [p["depth"] for p in card["predictions"]]:
        return
    if begun or len(groups) < 3:
        why = "was begun without a prediction" if begun else f"needs three depths below it, not {list(groups)}"
        if required:
            raise UsageError(f"--next: depth {depth} {why}; give other --depths")
        return
    config, now = rung(given, depth, given.seed), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    flops = flops_per_token(config.model) * config.train.steps * config.train.batch_tokens
    found: dict[str, Any] = {"depth": depth, "made": now, "from": list(groups), "flops": flops}
    for measure in MEASURES:
        y, noise = sample(below, measure)
        values = on_curve(fit(log_median(groups, "flops"), y), np.log([flops]))[:, 0]
        found[measure] = {"value": float(values[0]), "interval": interval(values[1:] * np.exp(noise))}
    card["predictions"] = [*(p for p in card["predictions"] if p["depth"] != depth), found]


def reach(x: np.ndarray, y: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the log C (R, K) at which ladders y (R, D), at x (D,), reach the targets (R, K); inf or -inf beyond them.

    Between the points the curve is the fit times its misfits, which are interpolated in a straight line, so that it
    goes through the points. Where it rises, the first place counts.
    """
    grid, curve = np.linspace(x[0], x[-1], 400), fit(x, y)
    basis = np.stack([np.interp(grid, x, row) for row in np.eye(len(x))])  # (D, G)
    values = np.exp(np.log(y / on_curve(curve, x)) @ basis) * on_curve(curve, grid)
    values = np.minimum.accumulate(values, axis=1)
    found = np.stack([np.interp(-t, -v, grid) for t, v in zip(targets, values, strict=True)])
    return np.where(targets < values[:, -1:], np.inf, np.where(targets > values[:, :1], -np.inf, found))


def multipliers(card: Ladder, other: Ladder) -> dict[str, Any]:
    """Return, by measure and depth, how many times our FLOPs, tokens and seconds the other ladder needs.

    Both for the same bits per byte, on the other's curve between its points. `value` None: our score is outside what
    the other reached, and nothing is extrapolated; the same for an end of an interval. `ratios`: ours over theirs at
    the same depth. Raises `DataError` where text, tokenizer or scoring differ.
    """
    if differ := [key for key, value in card["corpus"].items() if other["corpus"].get(key) != value]:
        what = "--data, tokenizer, model.seq_len and held-out documents"
        raise DataError(f"--against {other['name']}: {', '.join(differ)} differ; both ladders need the same {what}")
    ours, theirs, found = by_depth(card), by_depth(other), dict[str, Any]()
    if len(theirs) < 3:
        raise DataError(f"--against {other['name']}: has {len(theirs)} depths, and its curve needs three")
    x = log_median(theirs, "flops")
    for measure in MEASURES:
        found[measure] = {str(depth): {} for depth in ours}
        at = reach(x, sample(other, measure, stream=1)[0], sample(card, measure)[0])  # (1 + R, D)
        for key in AXES:
            times = np.exp(np.interp(at, x, log_median(theirs, key)) - log_median(ours, key))
            for depth, column in zip(ours, np.where(np.isfinite(at), times, at).T, strict=True):
                value = float(column[0]) if math.isfinite(column[0]) else None
                found[measure][str(depth)][key] = {"value": value, "interval": value and interval(column[1:])}
    both = [{d: side[d] for d in ours if d in theirs} for side in (ours, theirs)]
    ratios = {
        key: np.exp(np.subtract(*(log_median(side, key) for side in both))) for key in ("step_seconds", "parameters")
    }
    found["ratios"] = {
        key: dict(zip(map(str, both[0]), values.tolist(), strict=True)) for key, values in ratios.items()
    }
    return found | {"name": other["name"]}


def cell(value: float | None, ends: Sequence[float | None] | None, digits: int) -> dict[str, Any] | str:
    """Return a value with its interval for a table."""
    if value is None or ends is None:
        return "outside"
    note = " to ".join("outside" if end is None else f"{end:.{digits}f}" for end in ends)
    return {"text": f"{value:.{digits}f}", "note": note}


def tables(card: Ladder) -> list[Table]:
    """Return points, predictions, multipliers and failures; what is empty is left out."""
    points, predictions, fits = [], [], card["fit"]
    for i, (depth, group) in enumerate(by_depth(card).items()):
        one, seconds = group[0], float(np.median([p["seconds"] for p in group]))
        scores = [cell(f["values"][i], f["intervals"][i], 4) for f in fits.values()]
        sizes = [f"{one['flops']:.3g}", *(count(one[key]) for key in ("tokens", "parameters", "table_parameters"))]
        times = [duration(seconds), f"{one['tokens'] / seconds:,.0f}"]
        points.append([str(depth), str(len(group)), *scores, *sizes, f"{one['bytes_looked_up']:,}", *times])
    for p in card["predictions"]:
        for measure, name in MEASURES.items():
            one = p[measure]
            measured = [f"{one['measured']:.4f}", f"{one['error']:+.2%}"] if "error" in one else ["-", "-"]
            predictions.append([str(p["depth"]), p["made"], name, cell(one["value"], one["interval"], 4), *measured])
    head = ["depth", "seeds", *MEASURES.values(), "FLOPs", "tokens", "parameters", "of them in tables"]
    head += ["bytes looked up a token", "training", "tokens/s"]
    curves = [f"{MEASURES[m]}: {f['a']:.3f} + {f['b']:.4g} C^-{f['c']:.4f}" for m, f in fits.items() if "a" in f]
    found = [Table("Points", head, points, "; ".join(["Bits per byte with 95 % intervals", *curves]))]
    found.append(Table("Predictions", ["depth", "made", "", "predicted", "measured", "error"], predictions, labels=3))
    for other in card["against"]:
        rows = []
        for measure, name in MEASURES.items():
            for depth, times in other[measure].items():
                same = [f"{ratio[depth]:.2f}" if depth in ratio else "-" for ratio in other["ratios"].values()]
                rows.append(
                    [name, depth, *(cell(times[key]["value"], times[key]["interval"], 2) for key in AXES), *same]
                )
        head = ["", "depth", *AXES.values(), "seconds a step", "parameters"]
        note = (
            "How many times ours the other ladder needs for the same bits per byte, on its curve between its points; a "
        )
        note += "score outside them has no number. Last two columns: ours over theirs at the same depth."
        found.append(Table(f"Against {other['name']}", head, rows, note, labels=2))
    found.append(Table("Failed", ["run", "why"], [list(item) for item in card["failed"].items()], labels=2))
    return [table for table in found if table.rows]


def draw(ladders: Sequence[Ladder]) -> bytes:
    """Return an SVG of bits per byte against FLOPs; predictions are open circles, other ladders dashed."""
    data = io.BytesIO()
    with rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": "ladder"}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
            axis.set(title=f"bits per byte, {MEASURES[measure]}", xlabel="training FLOPs", xscale="log", yscale="log")
            axis.yaxis.set_major_formatter("{x:.2f}")
            axis.yaxis.set_minor_formatter("{x:.2f}")
            for i, one in enumerate(ladder for ladder in ladders if ladder["points"]):
                found, x, look = fitted(one, measure), np.exp(log_median(by_depth(one), "flops")), {"color": f"C{i}"}
                bars, ahead = np.abs(np.array(found["intervals"], float).T - found["values"]), one["predictions"]
                axis.errorbar(x, found["values"], bars, fmt="o", markersize=4, capsize=3, label=one["name"], **look)
                for p in ahead:
                    axis.plot(p["flops"], p[measure]["value"], "o", fillstyle="none", markersize=8, **look)
                if "a" in found:
                    grid = np.geomspace(x[0], max([x[-1], *(p["flops"] for p in ahead)]), 100)
                    axis.plot(grid, found["a"] + found["b"] * grid ** -found["c"], "--" if i else "-", **look)
                axis.legend()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


def plan_ladder(given: Config, depths: Sequence[int], seeds: int, target: str, as_json: bool) -> dict[str, Any]:
    """Print and return hours and dollars of every depth, the last one apart (`--next`), for all seeds on a target."""
    keys = ("params", "tokens", "flops_total", "fits", "hours_estimate", "usd_estimate")
    plans = [best_plan(rung(given, depth, given.seed), parse_target(target)) for depth in depths]
    runs = [{key: seeds * plan[key] if key in keys[-2:] else plan[key] for key in keys} for plan in plans]
    found = {"tier": given.tier, "target": plans[0]["target"], "seeds": seeds}
    found |= {key: sum(run[key] for run in runs[:-1]) for key in keys[-2:]}
    found |= {f"depth {depth}": run for depth, run in zip(depths, runs, strict=True)}
    found |= {"assumptions": f"all seeds; sums without the last depth (--next); {plans[0]['assumptions']}"}
    print(json.dumps(found)) if as_json else print_facts(found)
    return found
