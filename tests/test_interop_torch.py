"""Parity with transformers and with nanochat's files; skipped where torch or transformers is not installed."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs pip install -e '.[hf-check]'")
pytest.importorskip("transformers", reason="needs pip install -e '.[hf-check]'")

import nanochat_reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import KINDS, TEXTS, config, logits_of, random_model, random_run, tokenizer
from test_interop import CONVERSATION
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import jaxchat
from jaxchat.chat import render, render_prompt
from jaxchat.checkpoint import params_sha256
from jaxchat.engine import Engine, Request
from jaxchat.errors import DataError
from jaxchat.interop.__main__ import main, make_parser
from jaxchat.interop.exported.modeling_jaxchat import JaxchatConfig, JaxchatForCausalLM
from jaxchat.interop.huggingface import read_hf, write_hf
from jaxchat.interop.nanochat import read_nanochat, read_tiktoken
from jaxchat.interop.trained import load_trained, write_run
from jaxchat.run_dir import RunDir
from jaxchat.tokenizer import SPECIAL_TOKENS

torch.set_num_threads(2)


def import_nanochat(source, out):
    model = read_nanochat(source, allow_pickle=True)
    write_run(model, out)
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(our model, the same loaded by transformers, its folder)."""
    folder = tmp_path_factory.mktemp("export") / f"{request.param}-hf"
    model = random_model(request.param)
    write_hf(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model, theirs.eval(), folder


def ids_of(rows, length, seed=1):
    return np.random.default_rng(seed).integers(0, 293, (rows, length))


def test_the_stock_class_is_taken_where_it_can_be(pair):
    stock = type(pair[1]).__module__.startswith("transformers.models.nanochat")
    assert stock == (pair[0].config == config("classic") or pair[0].config == config("tied"))
    assert pair[1].dtype == torch.float32


def test_logits_agree(pair):
    model, theirs, _ = pair
    ids = ids_of(3, 100)
    with torch.no_grad():
        found = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    assert np.abs(found - logits_of(model.config, model.params, ids)).max() < 1e-4


def test_cached_equals_uncached_on_the_other_side(pair):
    _, theirs, _ = pair
    ids = torch.tensor(ids_of(2, 60))
    with torch.no_grad():
        whole = theirs(ids, use_cache=False).logits
        for first in (1, 23):
            cache, found = DynamicCache(config=theirs.config), []
            for start, end in [(0, first), (first, first + 7), *((t, t + 1) for t in range(first + 7, 60))]:
                found.append(theirs(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
            assert (torch.cat(found, 1) - whole).abs().max() < 1e-4


def test_padding_on_the_left_changes_nothing(pair):
    _, theirs, _ = pair
    ids, pads = torch.tensor(ids_of(2, 30)), torch.full((2, 6), 5)
    mask = torch.cat([torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 30, dtype=torch.long)], 1)
    with torch.no_grad():
        alone = theirs(ids).logits
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = theirs(torch.cat([pads, ids], 1), attention_mask=mask, position_ids=positions).logits[:, 6:]
    assert (alone - padded).abs().max() < 1e-4


def test_the_chat_template_renders_and_masks_as_we_do(pair):
    """The mask is the one that trainers ask for (`assistant_only_loss` of TRL)."""
    model, _, folder = pair
    names = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    @settings(max_examples=100, deadline=None)
    @given(CONVERSATION, st.booleans())
    def same(messages, learned):
        messages = [m if learned else m | {"weight": 0} for m in messages]
        found = names.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (found["input_ids"], found["assistant_masks"]) == render(model.tokenizer, messages)

    same()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am"}]
    found = names.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert found == render_prompt(model.tokenizer, messages, continue_final=True)


@pytest.mark.slow
def test_a_tokenizer_loads_without_torch(tmp_path):
    """Neither our code nor the lack of it keeps it from loading."""
    write_hf(random_model("modern"), tmp_path / "hf")
    script = """import sys; sys.modules["torch"] = None
from transformers import AutoTokenizer
for trust in (True, False): print(len(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust)))"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "USE_TORCH": "0"}
    command = [sys.executable, "-c", script, str(tmp_path / "hf")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == 2 * [str(tokenizer().vocab_size)], done.stderr


def test_greedy_answers_are_identical(pair):
    model, theirs, folder = pair
    engine = Engine(model.config, model.params, model.tokenizer, slots=4)
    ours, names = model.tokenizer, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    end = theirs.generation_config.eos_token_id
    texts = ["hi", "a <|user_end|> <\ue000|bos|> 한국어", "1 2 3 4 5 6 7 8 9 0 the quick brown fox"]
    for text in texts:
        messages = [{"role": "user", "content": text}]
        inputs = names.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = inputs["input_ids"][0].tolist()
        assert prompt == render_prompt(ours, messages)
        found = theirs.generate(**inputs, max_new_tokens=64, do_sample=False)[0].tolist()[len(prompt) :]
        [result] = engine.generate([Request(prompt, max_tokens=64, stop=(end,), tools=False)])
        stop = [] if result.stop_id is None else [result.stop_id]
        assert found == result.tokens + stop and (len(found) == 64 or stop)


def test_beams_samples_and_batches_of_prompts_work(pair):
    _, theirs, folder = pair
    names = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
    prompts = [[{"role": "user", "content": text}] for text in ("hi", "the quick brown fox jumps")]
    inputs = names.apply_chat_template(
        prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    both = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
    for i, messages in enumerate(prompts):
        one = names.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        alone = theirs.generate(**one, max_new_tokens=12, do_sample=False)[0][one["input_ids"].shape[1] :]
        assert torch.equal(both[i][inputs["input_ids"].shape[1] :][: len(alone)], alone)
    assert len(theirs.generate(**inputs, max_new_tokens=5, num_beams=3)) == 2
    assert len(theirs.generate(**inputs, max_new_tokens=5, do_sample=True, num_return_sequences=2)) == 4


def test_beam_search_with_a_cache_is_the_one_without(pair):
    _, theirs, _ = pair
    ids = torch.tensor(ids_of(1, 9))
    options = {"max_new_tokens": 10, "num_beams": 4, "do_sample": False, "eos_token_id": None}
    with_cache, without = (theirs.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(with_cache, without), "beams that change places take their smear along"


def test_a_static_cache_answers_like_one_that_grows(pair):
    _, theirs, _ = pair
    ids, mask = torch.tensor(ids_of(2, 21)), torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for more in ({}, {"num_beams": 2}):
        static = theirs.generate(ids, cache_implementation="static", **options, **more)
        assert torch.equal(static, theirs.generate(ids, **options, **more))


def test_hidden_states_are_those_of_the_stock_class(tmp_path):
    write_hf(random_model("classic"), tmp_path / "stock")
    write_hf(random_model("classic"), tmp_path / "own", "jaxchat")
    stock, own = (AutoModelForCausalLM.from_pretrained(tmp_path / n, trust_remote_code=True) for n in ("stock", "own"))
    ids = torch.tensor(ids_of(2, 20))
    with torch.no_grad():
        wanted, found = (model(ids, output_hidden_states=True).hidden_states for model in (stock, own))
    assert len(wanted) == len(found) == 6 and own(ids).hidden_states is None
    assert max((a - b).abs().max() for a, b in zip(wanted, found, strict=True)) < 1e-4


@pytest.mark.parametrize("page", ["docs/weights.md", "docs/ko/weights.md"])
def test_the_lines_of_the_page_run(pair, page, capsys):
    text = (Path(__file__).resolve().parent.parent / page).read_text(encoding="utf-8")
    lines = re.findall(r"```python\n(.*?)```", text, re.S)[1]
    exec(lines.replace('"export/hf"', repr(str(pair[2]))), {})
    assert capsys.readouterr().out.startswith("<|bos|><|user_start|>Hello!<|user_end|><|assistant_start|>")


def test_it_can_be_trained_there_and_wants_ids(tmp_path):
    write_hf(random_model("modern"), tmp_path / "hf")
    theirs = JaxchatForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.tensor(ids_of(2, 20))
    found = theirs(ids, labels=ids)
    wanted = torch.nn.functional.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(found.loss, wanted)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in theirs.parameters())
    with pytest.raises(ValueError, match="give input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 2, 96))
    halves = sum(theirs(ids[i : i + 1], labels=ids[i : i + 1], num_items_in_batch=38).loss for i in (0, 1)) / 2
    assert torch.allclose(halves, found.loss) and not theirs.accepts_loss_kwargs, "a trainer averages micro-batches"
    with torch.no_grad():
        logits = theirs(ids, logits_to_keep=torch.tensor([3, 5])).logits
        assert torch.allclose(logits, theirs(ids).logits[:, [3, 5]], atol=1e-5)
    with pytest.raises(ValueError, match="cannot be resized"):
        theirs.resize_token_embeddings(999)
    with pytest.raises(ValueError, match="attention_mask is for 20 tokens"):
        theirs(ids, attention_mask=torch.ones_like(ids), past_key_values=theirs(ids, use_cache=True).past_key_values)
    small = JaxchatForCausalLM(JaxchatConfig(vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
                                             num_key_value_heads=1, head_dim=24, intermediate_size=96))  # fmt: skip
    assert small(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 50)


@pytest.mark.parametrize("kind, stage", [("classic", "base"), ("modern", "sft")])
def test_the_lines_of_the_export_s_own_card_run_and_ask_nothing(tmp_path, kind, stage):
    write_hf(random_model(kind, stage), tmp_path / "hf")
    lines = re.search(r"```python\n(.*?)```", (tmp_path / "hf" / "README.md").read_text(encoding="utf-8"), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", lines], cwd=tmp_path / "hf", stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "custom code" not in done.stdout + done.stderr, done.stderr
    assert done.stdout.startswith("<|bos|>")


@pytest.mark.parametrize("shape", [
    {"depth": 1}, {"depth": 2}, {"n_heads": 4, "head_width": 32}, {"n_kv_heads": 6}, {"window_short": 500},
    {"width": 48, "n_heads": 1, "n_kv_heads": 1, "head_width": 10}, {"vocab_size": 320},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["classic", "modern"])
def test_odd_shapes_agree(tmp_path, kind, shape):
    model = random_model(kind, **shape)
    write_hf(model, tmp_path / "hf")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True), ids_of(1, 40)
    with torch.no_grad():
        found = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - logits_of(model.config, model.params, ids)).max() < 1e-4
    back = read_hf(tmp_path / "hf").config  # a model without short windows need not know how long they would be
    assert dataclasses.replace(back, window_short=model.config.window_short) == model.config


def test_weights_in_bfloat16_load_as_they_are(tmp_path):
    write_hf(load_trained(random_run(tmp_path / "run", "modern"), dtype="bfloat16"), tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    rounded = load_trained(RunDir(tmp_path / "run"), dtype="bfloat16")
    ids = ids_of(1, 20)
    with torch.no_grad():
        found = whole(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - logits_of(rounded.config, rounded.params, ids)).max() < 1e-4


def test_what_they_save_can_be_imported(pair, tmp_path):
    model, theirs, folder = pair
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="500KB")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    arguments = ["import", "--format", "hf", "--from", str(tmp_path / "saved"), "--out", str(tmp_path / "run")]
    assert main(lambda: make_parser().parse_args(arguments)) == 0
    found = load_trained(RunDir(tmp_path / "run")).params
    assert np.array_equal(found["blocks"]["q"], model.params["blocks"]["q"])


# --- nanochat's own files --------------------------------------------------------------------------------------------


def write_nanochat(folder, kind, step=650, dtype="float32", change=lambda tensors: None, prefix="", **meta):
    """What nanochat's checkpoint manager leaves, of random weights; returns its tensors."""
    tensors = nanochat_reference.state_dict(kind == "modern")
    if dtype == "bfloat16":
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.bfloat16)
    change(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: t for name, t in tensors.items()}, folder / f"model_{step:06d}.pt")
    given = nanochat_reference.SHAPES | ({"window_pattern": "SSSL"} if kind == "modern" else {})
    facts = {"step": step, "model_config": given | meta}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(facts))
    return tensors


@pytest.fixture(scope="module")
def encoding():
    """A tiktoken.Encoding with the ranks of our test tokenizer, as nanochat makes one."""
    tiktoken = pytest.importorskip("tiktoken", reason="needs pip install -e '.[hf-check]'")
    ours = tokenizer()
    count = ours.vocab_size - len(SPECIAL_TOKENS)
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    ranks = {ours.token_bytes(i): i for i in range(count)}
    special = {name: count + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding("rustbpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture
def base_dir(tmp_path, encoding):
    """nanochat's base directory, with its tokenizer."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return tmp_path


@pytest.mark.parametrize("kind", ["classic", "modern"])
@pytest.mark.parametrize("folder, stage", [("base_checkpoints", "base"), ("chatsft_checkpoints", "sft"), ("d5", "sft")])
def test_both_layouts_come_in(base_dir, kind, folder, stage):
    source = base_dir / folder / "d5" if "_" in folder else base_dir / folder
    write_nanochat(source, kind, step=3)
    tensors = write_nanochat(source, kind, step=650, prefix="_orig_mod." if kind == "classic" else "")
    model = import_nanochat(source, base_dir / "run")
    assert (model.stage, model.step, model.config.recipe) == (stage, 650, kind)
    assert params_sha256(load_trained(RunDir(base_dir / "run")).params) == params_sha256(model.params)
    if folder != "d5":
        return
    ids = torch.tensor(ids_of(2, 300))  # past the short windows of 128
    wanted = nanochat_reference.logits(tensors, ids, kind == "modern").numpy()
    assert np.abs(wanted - logits_of(model.config, model.params, ids.numpy())).max() < 1e-4
    engine = Engine.from_pretrained(str(base_dir / "run"))
    [found] = engine.generate([Request(ids[0, :9].tolist(), max_tokens=64, tools=False)])
    text = ids[:1, :9]
    for _ in range(64):
        text = torch.cat([text, nanochat_reference.logits(tensors, text, kind == "modern")[:, -1:].argmax(-1)], 1)
    assert len(found.tokens) == 64 and found.tokens == text[0, 9:].tolist()
    assert engine.chat([{"role": "user", "content": "hi"}], max_tokens=5) is not None


def test_dtypes_are_kept(base_dir):
    write_nanochat(base_dir / "d5", "modern", dtype="bfloat16")
    model = read_nanochat(base_dir / "d5", allow_pickle=True)
    assert model.params["embedding"].dtype == "bfloat16" and model.params["blocks"]["q"].dtype == "float32"
    assert params_sha256(model.params)


def test_the_converted_tokenizer_is_the_same(base_dir, encoding):
    found = read_tiktoken(base_dir / "tokenizer" / "tokenizer.pkl")
    random = np.random.default_rng(0)
    pool = "aA1  \n\r\t'sdmtlverRE.,!한국어漢字کلمه😀\u200d\u0301\u00a0\u3000\u2028\x85\x1cé<|bos|>thequick"
    texts = ["".join(random.choice(list(pool), 40)) for _ in range(3000)]
    texts += ["".join(map(chr, range(i, i + 500))) for i in (*range(0, 0xD800, 500), *range(0xE000, 0x30000, 500))]
    texts = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in [*texts, *TEXTS]]
    for text in texts:
        assert found.encode(text) == encoding.encode_ordinary(text), repr(text)
    assert all(found.special[name] == encoding.encode_single_token(name) for name in SPECIAL_TOKENS)


def test_pickles_need_the_flag_and_run_nothing(base_dir, capsys):
    write_nanochat(base_dir / "d5", "classic")
    with pytest.raises(DataError, match="--allow-pickle"):
        read_nanochat(base_dir / "d5")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(base_dir / "owned"),)

    (base_dir / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match=r"asks for posix.mkdir"):
        read_nanochat(base_dir / "d5", allow_pickle=True)
    torch.save({"lm_head.weight": Evil()}, base_dir / "d5" / "model_000650.pt")
    tokenizer().save(base_dir / "ours")
    found = ["import", "--format", "nanochat", "--from", str(base_dir / "d5"), "--out", str(base_dir / "run"),
             "--allow-pickle", "--tokenizer", str(base_dir / "ours" / "tokenizer.json")]  # fmt: skip
    assert main(lambda: make_parser().parse_args(found)) == 3
    assert "cannot be read as tensors" in capsys.readouterr().err
    assert not (base_dir / "owned").exists() and not (base_dir / "run").exists()


def drop(start):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(start)]


def gates(tensors):
    for name in tensors:
        if name.endswith("ve_gate.weight"):
            tensors[name] = torch.zeros(2, 32)


BROKEN = {
    "before smear": ("modern", drop("smear"), "lacks smear_gate.weight, smear_lambda"),
    "wider gates": ("modern", gates, r"ve_gate.weight has the shape \(2, 32\)"),
    "a layer gone": ("classic", drop("transformer.h.4."), "lacks transformer.h.4.attn.c_k.weight"),
    "a strange tensor": ("classic", lambda t: t.update(more=torch.zeros(2)), "does not have: more"),
    "a wrong shape": ("classic", lambda t: t.update({"lm_head.weight": torch.zeros(293, 95)}), r"\(293, 95\)"),
    "a view": ("classic", lambda t: t.update({"lm_head.weight": torch.zeros(96, 293).T}), "not contiguous"),
    "not finite": ("classic", lambda t: t["lm_head.weight"].fill_(torch.nan), "finite"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_other_checkpoints_are_refused_by_name(base_dir, fault):
    kind, change, message = BROKEN[fault]
    write_nanochat(base_dir / "d5", kind, change=change)
    with pytest.raises(DataError, match=message):
        import_nanochat(base_dir / "d5", base_dir / "run")
    assert not (base_dir / "run").exists()


def rewritten(file, compression=zipfile.ZIP_STORED, keep=1.0):
    """The same archive, compressed, or with its storages cut."""
    with zipfile.ZipFile(file) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, data in parts.items():
            new.writestr(name, data[: int(keep * len(data))] if "/data/" in name else data)


@pytest.mark.parametrize("change, message", [
    (lambda f: rewritten(f, zipfile.ZIP_DEFLATED), "compressed"),
    (lambda f: rewritten(f, keep=0.5), "cannot be read as a tensor"),
    (lambda f: f.write_bytes(f.read_bytes()[:-999]), "cannot be read as tensors"),
    (lambda f: torch.save(5, f), "cannot be read as tensors"),
])  # fmt: skip
def test_archives_that_are_not_what_torch_writes(base_dir, change, message):
    write_nanochat(base_dir / "d5", "classic")
    change(base_dir / "d5" / "model_000650.pt")
    with pytest.raises(DataError, match=message):
        read_nanochat(base_dir / "d5", allow_pickle=True)


def test_files_that_lack_something_are_named(base_dir):
    with pytest.raises(DataError, match=r"no model_NNNNNN.pt there"):
        read_nanochat(base_dir, allow_pickle=True)
    write_nanochat(base_dir / "deep" / "d5", "classic", n_layer="5")
    with pytest.raises(DataError, match="its meta file has no model_config"):
        read_nanochat(base_dir / "deep" / "d5", allow_pickle=True)
    (base_dir / "deep" / "d5" / "meta_000650.json").unlink()
    with pytest.raises(DataError, match="meta_000650.json: no such file"):
        read_nanochat(base_dir / "deep" / "d5", allow_pickle=True)
    (base_dir / "tokenizer" / "tokenizer.pkl").unlink()
    write_nanochat(base_dir / "deep" / "d5", "classic")
    with pytest.raises(DataError, match="--tokenizer"):
        read_nanochat(base_dir / "deep" / "d5", allow_pickle=True)


def test_an_imported_run_can_be_exported_again(base_dir):
    write_nanochat(base_dir / "d5", "classic")
    import_nanochat(base_dir / "d5", base_dir / "run")
    model = load_trained(RunDir(base_dir / "run"))
    write_hf(model, base_dir / "hf")
    assert f"imported into jaxchat {jaxchat.__version__} from d5 (nanochat)" in (
        base_dir / "hf" / "README.md"
    ).read_text(encoding="utf-8")
    theirs = AutoModelForCausalLM.from_pretrained(base_dir / "hf")
    ids = ids_of(1, 40)
    with torch.no_grad():
        found = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(found - logits_of(model.config, model.params, ids)).max() < 1e-4
