"""The ladder: statistics on made-up points, refusals, and a tiny real one that is killed and goes on (slow)."""

import argparse
import copy
import json
import math
import time

import numpy as np
import pytest
from whole_run import finish, records, start

import launch
from bench import nanochat_ladder
from jaxchat.config import load_config, to_toml
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import write_json
from jaxchat.scaling import resolve
from jaxchat.sizes import count_parameters, flops_per_token
from train import ladder

TRUTH = (0.55, 6.0, 0.07)  # a, b, c
SMALL = ["model.seq_len=64", "model.vocab_size=400", "train.batch_tokens=512", "train.device_batch_rows=8",
         "train.token_ratio=0.02", "optim.warmup_steps=2", "data.val_fraction=0.2",
         "train.checkpoint_every=4"]  # fmt: skip


def made_up(depths, efficiency=1.0, seeds=3, deviation=0.003, seed=0, truth=TRUTH, documents=100):
    """A ladder whose runs learn as from `efficiency` times their FLOPs, with noise of seeds and documents."""
    rng, (a, b, c), text = np.random.default_rng(seed), truth, np.random.default_rng(7)
    sizes, hardness = text.integers(200, 2000, documents), np.exp(text.normal(0, 0.2, documents))
    points = []
    for depth in depths:
        n = 12 * depth * (64 * depth) ** 2 + 4096 * 64 * depth
        flops = 6 * n * n * 0.6
        for number in range(seeds):
            value = (a + b * (flops * efficiency) ** -c) * (1 + rng.normal(0, deviation))
            bits = sizes * hardness * np.exp(rng.normal(0, 0.02, documents))
            bits *= value * sizes.sum() / bits.sum()
            one = {"depth": depth, "seed": number, "flops": flops, "tokens": 0.6 * n, "seconds": flops / 1e11,
                   "step_seconds": flops / 1e13, "parameters": n, "scaling_parameters": n, "table_parameters": n // 10,
                   "bytes_looked_up": 4}  # fmt: skip
            points.append(one | dict.fromkeys(ladder.MEASURES, value) | {"bits": dict.fromkeys(ladder.MEASURES, bits)})
    return {
        "format": 1, "name": "made up", "token_ratio": 0.6, "about": "made up", "points": points,
        "corpus": {"documents": documents, "held_out": "a", "training_text": "b", "tokenizer": "c", "context": 64},
        "sizes": dict.fromkeys(ladder.MEASURES, sizes), "config": {"data.source": "x"}, "failed": {},
        "predictions": [], "against": [],
    }  # fmt: skip


def times(ours, theirs, depth, key="flops", measure="start"):
    return ladder.multipliers(ours, theirs)[measure][str(depth)][key]


@pytest.fixture(autouse=True)
def fewer_samples(monkeypatch):
    monkeypatch.setattr(ladder, "RESAMPLES", 300)


# Statistics


def test_fit_finds_the_curve_and_three_points_do_not_decide_the_offset_alone():
    x = np.log(np.geomspace(1e12, 1e15, 8))
    a, b, c = ladder.fit(x, (TRUTH[0] + TRUTH[1] * np.exp(-TRUTH[2] * x))[None])
    assert np.allclose([a[0, 0], b[0, 0], c[0, 0]], TRUTH, rtol=0.05)
    straight = np.array([[1.0, 0.9, 0.81]])  # a pure power law would have no offset; one point higher, none at all
    bent = straight * [[1.0, 1.004, 1.0]]
    curves = [ladder.on_curve(ladder.fit(x[:3], y), x[3:4])[0, 0] for y in (straight, bent)]
    assert abs(curves[0] / curves[1] - 1) < 0.01


def test_known_multiplier_is_recovered_at_every_depth():
    ours, theirs = (made_up(d, e, deviation=1e-6) for d, e in (((2, 3, 4), 1.3), ((2, 3, 4, 5), 1.0)))
    for depth in (2, 3, 4):
        assert times(ours, theirs, depth)["value"] == pytest.approx(1.3, rel=0.01)
        assert times(ours, theirs, depth, "seconds")["value"] == pytest.approx(1.3, rel=0.01)  # FLOPs / 1e11 here
        tokens = times(ours, theirs, depth, "tokens")["value"]
        assert 1.3**0.5 == pytest.approx(tokens, rel=0.02)  # FLOPs grow with the square of the tokens


def test_same_ladder_has_multiplier_one_at_each_of_its_points():
    card = made_up((2, 3, 4, 5))
    found = ladder.multipliers(card, card)
    for depth in "345":
        assert found["every"][depth]["flops"]["value"] == pytest.approx(1, rel=1e-3)
    assert found["ratios"]["parameters"] == dict.fromkeys("2345", 1)


def test_intervals_cover_the_truth():
    """Of multiplier and prediction: 95 of 100; with 40 trials 33 is unlikely to be less by chance alone (1 in 400)."""
    trials, covered, foreseen = 40, 0, 0
    for i in range(trials):
        ours, theirs = (
            made_up((2, 3, 4), 1.3, seed=2 * i, documents=40),
            made_up((2, 3, 4, 5), 1.0, seed=2 * i + 1, documents=40),
        )
        low, high = times(ours, theirs, 3)["interval"]
        covered += (low or 0) <= 1.3 <= (high or math.inf)
        y, noise = ladder.sample(ours, "start")
        later = made_up((5,), 1.3, seed=1000 + i, documents=40)["points"]
        x = ladder.log_median(ladder.by_depth(ours), "flops")
        values = ladder.on_curve(ladder.fit(x, y), np.log([later[0]["flops"]]))[:, 0]
        low, high = ladder.interval(values[1:] * np.exp(noise))
        foreseen += low <= np.mean([p["start"] for p in later]) <= high
        assert high - low < 0.2
    assert covered >= 33 and foreseen >= 33


def test_more_seeds_and_less_noise_make_intervals_narrower():
    def width(**options):
        ours, theirs = made_up((2, 3, 4), 1.3, **options), made_up((2, 3, 4, 5), **options | {"seed": 1})
        low, high = times(ours, theirs, 3)["interval"]
        return high - low

    assert width(seeds=8) < width(seeds=2)
    assert width(deviation=0.0003) < width(deviation=0.003) / 2


def test_nothing_is_extrapolated():
    ours, theirs = made_up((2, 3, 4), 1.5), made_up((2, 3, 4))  # their ladder does not go one depth further
    assert times(ours, theirs, 4) == {"value": None, "interval": None}  # better than anything they have
    assert times(theirs, ours, 2)["value"] is None  # worse than anything we have
    assert times(ours, theirs, 3)["value"] is not None
    near = times(made_up((2, 3, 4), 1.02), theirs, 2)  # within the noise of their first point
    assert near["value"] is None or near["interval"][0] is None
    card = ours | {
        "against": [ladder.multipliers(ours, theirs)],
        "fit": {m: ladder.fitted(ours, m) for m in ladder.MEASURES},
    }
    rows = next(t.rows for t in ladder.tables(card) if t.title.startswith("Against"))
    assert [row[2] for row in rows if row[1] == "4"] == ["outside"] * 2


@pytest.mark.parametrize("key", ["held_out", "training_text", "tokenizer", "context", "scoring"])
def test_ladders_of_other_text_or_scoring_are_refused_by_name(key):
    ours, theirs = made_up((2, 3, 4)), made_up((2, 3, 4, 5))
    ours["corpus"]["scoring"] = theirs["corpus"]["scoring"] = "s"
    ladder.multipliers(ours, theirs)
    theirs["corpus"] = theirs["corpus"] | {key: "another"}
    with pytest.raises(DataError, match=key):
        ladder.multipliers(ours, theirs)


def test_one_seed_has_an_interval_of_documents_alone():
    y, noise = ladder.sample(made_up((2, 3, 4), seeds=1), "start")
    assert not noise.any() and y[1:].std() > 0


# Depths, settings, files


def test_depths_come_from_the_tier_and_rise(tmp_path):
    assert ladder.shape(tmp_path, load_config("ladder"), None, None) == ([2, 3, 4], 5, 3)
    assert ladder.shape(tmp_path, load_config("d20"), None, None) == ([8, 12, 16], 20, 3)
    assert ladder.shape(tmp_path, load_config("nano"), "3,6", 1) == ([3, 6], 9, 1)
    for words in ("", "a", "3,2", "2,2", "0,1"):
        with pytest.raises(UsageError, match="--depths"):
            ladder.shape(tmp_path, load_config("ladder"), words, None)
    with pytest.raises(UsageError, match="--seeds"):
        ladder.shape(tmp_path, load_config("ladder"), "2,3", 0)


def test_settings_that_a_ladder_derives_or_that_differ_are_refused(tmp_path):
    with pytest.raises(UsageError, match="model.width, model.n_heads, train.steps"):
        ladder.opened(load_config("nano"), tmp_path, 5)
    given = ladder.opened(load_config("ladder"), tmp_path, 5)
    (tmp_path / "config.toml").write_text(to_toml(given))
    assert ladder.opened(load_config("ladder", ["train.eval_rows=8", "seed=7"]), tmp_path, 6) == given.__class__(
        **vars(given) | {"seed": 7, "train": load_config("ladder", ["train.eval_rows=8"]).train}
    )
    with pytest.raises(UsageError, match=r"optim.lr_scale \(-1.0 -> 0.5\)"):
        ladder.opened(load_config("ladder", ["optim.lr_scale=0.5"]), tmp_path, 5)


def test_every_depth_has_the_same_ratio_of_tokens_and_hub_text_for_the_deepest(tmp_path):
    given = ladder.opened(load_config("d20"), tmp_path, 20)
    rungs = [ladder.rung(given, depth, 1) for depth in (8, 12, 16, 20)]
    assert len({r.data.text_bytes for r in rungs}) == 1
    ratios = [r.train.steps * r.train.batch_tokens / count_parameters(r.model).scaling for r in rungs]
    assert np.allclose(ratios, rungs[0].train.token_ratio, rtol=0.01)


def test_what_is_no_ladder_is_refused(tmp_path):
    for content in ("[]", "{}", '{"format": 2}', "no"):
        (tmp_path / "ladder.json").write_text(content)
        with pytest.raises(DataError):
            ladder.read_ladder(tmp_path)


def test_prediction_is_kept_once_its_depth_was_begun(tmp_path):
    given, card = load_config("ladder"), made_up((2, 3, 4))
    ladder.predict(card, given, 5, tmp_path, required=True)
    first = copy.deepcopy(card["predictions"])
    assert first[0]["depth"] == 5 and first[0]["from"] == [2, 3, 4]
    card["points"] = made_up((2, 3, 4), 2.0)["points"]
    ladder.predict(card, given, 5, tmp_path, required=True)
    assert card["predictions"][0]["start"] != first[0]["start"] and len(card["predictions"]) == 1
    begun, second = tmp_path / "d5_s42", copy.deepcopy(card["predictions"])
    begun.mkdir()
    card["points"] = made_up((2, 3, 4), 3.0)["points"]
    ladder.predict(card, given, 5, tmp_path, required=True)
    assert card["predictions"] == second
    card["predictions"] = []
    with pytest.raises(UsageError, match="begun"):
        ladder.predict(card, given, 5, tmp_path, required=True)


def test_files_are_made_from_the_numbers_alone(tmp_path):
    card = made_up((2, 3, 4), 1.3)
    for p in card["points"]:
        p["bits"] = {m: bits.tolist() for m, bits in p["bits"].items()}
    card["sizes"] = {m: sizes.tolist() for m, sizes in card["sizes"].items()}
    ladder.predict(card, load_config("ladder"), 5, tmp_path, required=True)
    card["config"]["data.source"] = "files:<script>alert(1)</script>"
    ladder.write(tmp_path, card)
    page = (tmp_path / "ladder.html").read_text()
    assert "<script" not in page and "data:image/svg+xml;base64," in page
    again = ladder.read_ladder(tmp_path)
    assert again["fit"]["start"]["depths"] == [2, 3, 4] and "error" not in again["predictions"][0]["start"]
    again["points"] += [{**p, "depth": 5} for p in again["points"] if p["depth"] == 4]
    ladder.write(tmp_path, again)
    one = again["predictions"][0]["start"]
    assert one["error"] == pytest.approx(one["value"] / again["fit"]["start"]["values"][3] - 1)


def test_plan_of_a_gpu_node_has_hours_and_dollars(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ladder, "best_plan", lambda config, target: estimate(config, target))
    from train.plan import estimate

    plan = ladder.plan_ladder(load_config("d20"), [8, 12, 16, 20], 3, "h100:8", as_json=True)
    assert json.loads(capsys.readouterr().out) == plan
    runs = [plan[f"depth {depth}"] for depth in (8, 12, 16, 20)]
    assert plan["usd_estimate"] == pytest.approx(sum(run["usd_estimate"] for run in runs[:3]))
    assert 0 < plan["hours_estimate"] < 100


def test_best_rate_of_the_peer_is_taken_at_each_depth(tmp_path):
    sizes = made_up((2,))["sizes"]
    held = ladder.HeldOut([[0]], {m: np.array(s) for m, s in sizes.items()}, {"documents": 100})
    for factor, efficiency in ((1, (0.5, 2.0, 0.8)), (4, (1.0, 1.0, 1.0)), (16, None)):
        for depth in (2, 3, 4):
            card = made_up((depth,), efficiency[depth - 2] if efficiency else 1.0, seeds=2)
            for p in card["points"]:
                p |= {"lr_factor": factor, "decay_factor": 1 / factor, "batch_tokens": 512, "run": "x"}
                p["bits"] = {m: bits.tolist() for m, bits in p["bits"].items()}
                p = p if efficiency else {k: v for k, v in p.items() if k != "bits"} | {"start": math.inf, "every": 1.0}
                folder = tmp_path / f"d{depth}_s{p['seed']}_x{factor}"
                write_json(folder / "result.json", {"corpus": held.corpus, "point": p})
    write_json(tmp_path / "d5_s0_x1" / "result.json", {"corpus": {"documents": 99}, "point": p})  # of other text
    given = load_config("ladder")
    card = nanochat_ladder.best(argparse.Namespace(out=tmp_path, name="peer"), given, held)
    assert {p["depth"]: p["lr_factor"] for p in card["points"]} == {2: 4, 3: 1, 4: 4}
    assert [len(group) for group in ladder.by_depth(card).values()] == [2, 2, 2]
    assert len(card["sweep"]) == 9 and [s["start"] for s in card["sweep"]].count("diverged") == 3
    assert ladder.read_ladder(tmp_path)["name"] == "peer"


def test_command_line_has_the_alias():
    for words in (["ladder", "--plan", "--tier", "d20"], ["--ladder", "--plan", "--tier", "d20"]):
        args = launch.parse(words)
        assert args.command == "ladder" and args.plan and args.tier == "d20" and args.target == "auto"


# A real one, tiny


def command(corpus, root, *more, depths="1,2,3"):
    sets = [part for setting in SMALL for part in ("--set", setting)]
    return ["ladder", "--data", f"files:{corpus}/*.txt", "--run-dir", str(root), *sets, "--depths", depths,
            "--seeds", "2", *more]  # fmt: skip


@pytest.mark.slow
def test_tiny_ladder_goes_on_after_a_kill_predicts_and_compares(corpus, tmp_path):
    root, runs = tmp_path / "ladder", [f"d{depth}_s{seed}" for depth in (1, 2, 3) for seed in (42, 43)]
    process = start(command(corpus, root))
    end = time.monotonic() + 200
    while not list((root / "d2_s42" / "base").glob("[0-9]*")) and time.monotonic() < end:  # a checkpoint
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not (root / "d3_s42").exists()
    began = {name: records(root / name)["pretrain"]["start"] for name in ("d1_s42", "d1_s43", "d2_s42")}
    code, out, err = finish(start(command(corpus, root)), 900)
    assert code == 0, err
    card = ladder.read_ladder(root)
    assert [p["run"] for p in card["points"]] == runs
    assert {name: records(root / name)["pretrain"]["start"] for name in began} == began  # gone on with, not repeated
    assert f"{card['points'][0]['flops']:.3g}" in out
    rows = [root / name / "data" / "rows" / "train" / "rows.bin" for name in ("data", *runs)]
    assert len({path.stat().st_ino for path in rows}) == 1  # one copy of the text
    for p in card["points"]:
        assert p["every"] == pytest.approx(sum(p["bits"]["every"]) / sum(card["sizes"]["every"]), rel=1e-4)
        assert p["every"] <= p["start"] + 1 and p["bits"]["start"][0] <= p["bits"]["every"][0] + 1e-3
        config = resolve(load_config(root / p["run"] / "config.toml"))
        assert p["flops"] == flops_per_token(config.model) * config.train.steps * config.train.batch_tokens
    made = copy.deepcopy(card["predictions"])
    assert made[0]["depth"] == 4 and "error" not in made[0]["start"]

    code, _, err = finish(start(command(corpus, root, "--next", "--against", str(root / "ladder.json"))), 900)
    assert code == 0, err
    after = ladder.read_ladder(root)
    for measure in ladder.MEASURES:
        one = after["predictions"][0][measure]
        assert {key: one[key] for key in made[0][measure]} == made[0][measure]
        assert one["error"] == pytest.approx(one["value"] / one["measured"] - 1)
    assert {p["depth"] for p in after["points"]} == {1, 2, 3, 4} and after["points"][:6] == card["points"]
    assert after["against"][0]["start"]["4"]["flops"]["value"] is None  # theirs ends at 3
    code, _, err = finish(start(command(corpus, root, "--set", "optim.matrix_lr=0.01")))
    assert code == 2 and "optim.matrix_lr" in err
    assert ladder.read_ladder(root) == after


@pytest.mark.slow
def test_run_that_diverges_leaves_the_others_alone(corpus, tmp_path):
    root = tmp_path / "ladder"
    sets = ["--set", "optim.matrix_lr=1e30", "--set", "optim.embedding_lr=1e30"]
    code, _, err = finish(start(command(corpus, root, *sets, depths="1,2")), 900)
    assert code == 5, err
    card = ladder.read_ladder(root)
    assert set(card["failed"]) | {p["run"] for p in card["points"]} == {"d1_s42", "d1_s43", "d2_s42", "d2_s43"}
    assert card["failed"]
