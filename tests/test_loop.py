"""The training loop: micro-batches, divergence, and what a run of it leaves."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from jaxchat.config import MeshConfig, load_config
from jaxchat.data.loader import Batches
from jaxchat.data.packing import Rows, write_rows
from jaxchat.errors import DataError, DivergedError, UsageError
from jaxchat.log import read_metrics
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh, micro_batch
from jaxchat.tokenizer import train_tokenizer
from train.loop import Trainer, bits_per_byte
from train.pretrain import run as pretrain

TINY = ["model.depth=2", "model.width=32", "model.n_heads=2", "model.head_width=16", "model.vocab_size=64",
        "model.seq_len=16", "train.batch_tokens=64", "train.steps=12", "train.eval_every=5",
        "train.checkpoint_every=4", "train.sample_every=6", "train.max_bad_steps=3"]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "train"
    draw = np.random.default_rng(0)
    ids = (draw.integers(0, 60, (40, 1)) + np.arange(17)) % 60  # counts up: easy to learn
    write_rows(folder, [row.astype(np.uint16) for row in ids], 17, 63, 64, lambda: {"tokenizer": "none"})
    return Rows(folder)


def trainer(rows, folder, *overrides, **more):
    config = resolve(load_config("nano", [*TINY, *overrides]))
    return Trainer(config, folder, np.ones(64, np.int32), rows, rows, **more)


@pytest.mark.parametrize(
    ("batch_tokens", "device_rows", "devices", "expected"),
    [(64, 4, 1, (4, 1)), (64, 3, 1, (2, 2)), (64, 1, 1, (1, 4)), (64, 32, 4, (4, 1)), (128, 1, 4, (4, 2))],
)
def test_micro_batches_make_up_the_batch(batch_tokens, device_rows, devices, expected):
    overrides = [f"train.batch_tokens={batch_tokens}", f"train.device_batch_rows={device_rows}"]
    config = resolve(load_config("nano", [*TINY, *overrides]))
    assert micro_batch(config, devices) == expected


def test_a_batch_that_devices_cannot_share_names_the_nearest_that_works():
    with pytest.raises(UsageError, match="3 devices cannot share; take 48"):
        micro_batch(resolve(load_config("nano", TINY)), 3)


def test_metrics_scores_and_samples_have_their_steps(rows, tmp_path):
    sampled = []
    evaluators = [lambda state, step: [("extra", float(step))]]
    facts = trainer(rows, tmp_path, sampler=lambda state, step: sampled.append(step), evaluators=evaluators).run()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(12))
    assert {r["step"]: r["extra"] for r in records if "val_bpb" in r} == {4: 5.0, 9: 10.0, 11: 12.0}
    assert sampled == [0, 6, 12]
    assert [r["tokens"] for r in records] == [64 * (s + 1) for s in range(12)]
    assert all(r["mfu"] is None for r in records) or records[0]["mfu"] > 0
    assert facts["val_bpb"] == records[-1]["val_bpb"] and facts["bad_steps"] == 0
    again = trainer(rows, tmp_path).run()  # finished: restores, trains nothing
    assert again["params_sha256"] == facts["params_sha256"]
    assert read_metrics(tmp_path / "metrics.jsonl") == records


def test_a_limited_training_leaves_early_and_goes_on_to_the_same_bits(rows, tmp_path):
    whole = trainer(rows, tmp_path / "whole").run()
    part = trainer(rows, tmp_path / "parts", limit=7).run()
    assert len(read_metrics(tmp_path / "parts" / "metrics.jsonl")) == 7 and "val_bpb" in part
    assert (
        len(part["timings"]["validate"]) == 2 and len(part["timings"]["save"]) == len(part["timings"]["written"]) == 3
    )
    assert trainer(rows, tmp_path / "parts").run()["params_sha256"] == whole["params_sha256"] != part["params_sha256"]
    assert "timings" not in whole


def test_a_run_that_diverges_ends_with_its_own_error(rows, tmp_path):
    broken = trainer(rows, tmp_path)

    def ruin(state):
        params = state.params | {"embedding": state.params["embedding"] * np.nan}
        return dataclasses.replace(state, params=params)

    with pytest.raises(DivergedError, match="3 steps in a row"):
        dataclasses.replace(broken, start=ruin).run()
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [None] * 3


def poisoned(monkeypatch, numbers):
    """Those batches make the loss NaN."""
    load = Batches.batch

    def bad(self, number, columns=None):
        batch = load(self, number, columns)
        seen.append(number)
        return batch | {"weights": batch["weights"] * np.nan} if number in numbers else batch

    seen = []
    monkeypatch.setattr(Batches, "batch", bad)
    return seen


def test_bad_batches_are_left_out_once(rows, tmp_path, monkeypatch, capsys):
    seen = poisoned(monkeypatch, {5, 6, 7})
    facts = trainer(rows, tmp_path / "bad").run()
    assert facts["left_out"] == [5, 6, 7] and facts["bad_steps"] == 0
    assert "steps 5 to 7" in capsys.readouterr().err
    records = read_metrics(tmp_path / "bad" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(12)) and all(r["loss"] for r in records)
    assert {12, 13, 14} <= set(seen), "later steps take the next ones"
    again = trainer(rows, tmp_path / "bad").run()
    assert again["params_sha256"] == facts["params_sha256"] and again["left_out"] == [5, 6, 7]


def test_what_a_checkpoint_has_skipped_already_is_not_left_out_twice(rows, tmp_path, monkeypatch):
    seen = poisoned(monkeypatch, {6, 7, 8})
    facts = trainer(rows, tmp_path).run()
    assert facts["left_out"] == [8] and facts["bad_steps"] == 2, "the checkpoint of step 8 had gone past the others"
    assert set(range(13)) <= set(seen)


def test_the_second_time_it_gives_up(rows, tmp_path, monkeypatch):
    poisoned(monkeypatch, {5, 6, 7, 8, 9, 10})
    with pytest.raises(DivergedError, match=r"3 steps in a row were not finite \(step 7\)"):
        trainer(rows, tmp_path).run()


def test_bits_per_byte_by_hand(rows):
    """A uniform model over 64 tokens of 2 bytes each: log2(64) / 2 bits a byte."""

    def uniform(params, batch, byte_lengths):
        targets = batch["weights"].sum(axis=(0, 2))
        nats = targets * np.log(64)
        return {"nats": nats, "bytes": 2 * targets, "all_nats": nats.sum(), "targets": targets.sum()}

    found = bits_per_byte(uniform, None, rows, np.full(64, 2), 8, 20, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert found["bits_per_byte"] == pytest.approx(3.0) and found["interval"] == pytest.approx((3.0, 3.0))
    assert found["perplexity"] == pytest.approx(64.0) and found["targets"] == 20 * 16


def test_pretraining_refuses_rows_of_another_tokenizer(rows, tmp_path):
    shutil.copytree(rows.directory, tmp_path / "data" / "rows" / "train")
    train_tokenizer(["another text " * 50, "altogether different " * 50], 270, 10**5, 10**5).save(
        tmp_path / "tokenizer"
    )
    with pytest.raises(DataError, match="another tokenizer"):
        pretrain(resolve(load_config("nano", TINY)), RunDir(tmp_path))
    assert not (tmp_path / "base").exists()
