"""Weights out and in without torch: Orbax and Hugging Face exports, imports, what is refused."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2.ext
import jinja2.sandbox
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import KINDS, config, logits_of, random_model, random_params, random_run, tokenizer
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as Backend

from jaxchat.chat import render, render_prompt
from jaxchat.checkpoint import params_sha256, restore_params, trained_params
from jaxchat.config import load_config, tier_files
from jaxchat.engine import Engine
from jaxchat.errors import DataError, UsageError
from jaxchat.interop import huggingface
from jaxchat.interop.__main__ import main, make_parser
from jaxchat.interop.bundle import bundle
from jaxchat.interop.huggingface import (
    architecture_of,
    assemble,
    config_from_hf,
    config_to_hf,
    places,
    read_hf,
    tensor,
    write_hf,
)
from jaxchat.interop.trained import (
    CODE,
    HOW,
    MARK,
    load_trained,
    model_card,
    read_tokenizer,
    tokenizer_files,
    write_orbax,
    write_run,
)
from jaxchat.model import abstract_params
from jaxchat.run_dir import RunDir, read_json
from jaxchat.scaling import resolve
from jaxchat.sizes import count_parameters, windows
from jaxchat.tokenizer import Tokenizer
from train.stages import FORMATS
from train.stages import run_export as stage_run

ROOT = Path(__file__).resolve().parent.parent


def leaves(params):
    return flatten_dict(params, sep=".").items()


def export_hf(run, out):
    return write_hf(load_trained(run), out)


def import_hf(source, out, stage=None):
    model = read_hf(source, stage)
    write_run(model, out)
    return model


def interop(*arguments):
    """Exit code of `python -m jaxchat.interop`."""
    return main(lambda: make_parser().parse_args([str(a) for a in arguments]))


def digests(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def unpadded(path, leaf, vocab=293):
    """A parameter without the rows that fill a table up to whole tiles."""
    if path in ("embedding", "unembedding"):
        return leaf[:vocab]
    return leaf[:, :vocab] if path == "value_embedding" else leaf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["hf", "nanochat"])
def test_every_parameter_has_one_place_and_comes_back(kind, format):
    model = random_model(kind)
    flat, found = flatten_dict(model.params, sep="."), places(model.config, format)
    sizes = {path: leaf.size for path, leaf in leaves(abstract_params(model.config))}
    for place in found.values():
        sizes[place.path] -= np.prod(place.shape, dtype=int)
    assert all(path.endswith("embedding") for path, size in sizes.items() if size), "only padded rows are left out"
    tensors = {name: tensor(flat, place) for name, place in found.items()}
    assert {name: t.shape for name, t in tensors.items()} == {name: p.shape for name, p in found.items()}
    back = flatten_dict(assemble(model.config, format, tensors.keys(), tensors.__getitem__, "here"), sep=".")
    assert back.keys() == flat.keys()
    for path, leaf in flat.items():
        assert leaf.shape == back[path].shape and leaf.dtype == back[path].dtype, path
        assert np.array_equal(unpadded(path, leaf), unpadded(path, back[path])), path
    if format == "hf":
        np.testing.assert_array_equal(tensors["model.layers.3.self_attn.q_proj.weight"], flat["blocks.q"][3].T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_import_export_is_the_same_byte_for_byte(tmp_path, kind, dtype):
    run = random_run(tmp_path / "run", kind, dtype=np.dtype(dtype))
    assert export_hf(run, tmp_path / "first")["dtype"] == dtype
    import_hf(tmp_path / "first", tmp_path / "again")
    export_hf(RunDir(tmp_path / "again"), tmp_path / "second")
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    there, _ = restore_params(tmp_path / "run" / "sft")
    here, _ = restore_params(tmp_path / "again" / "sft")
    for (path, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert a.dtype == b.dtype, path
        assert np.array_equal(unpadded(path, a), unpadded(path, b)), path


def test_shards_hold_the_same_and_dtypes_may_be_mixed(tmp_path, monkeypatch):
    model = random_model("modern")
    model.params["embedding"] = model.params["embedding"].astype(ml_dtypes.bfloat16)
    write_hf(model, tmp_path / "one")
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 200_000)
    write_hf(model, tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    assert len(files) > 3 and set(index["weight_map"].values()) == {f.name for f in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    assert read_json(tmp_path / "many" / "config.json")["dtype"] == "float32"
    one, many = read_hf(tmp_path / "one"), read_hf(tmp_path / "many")
    assert params_sha256(one.params) == params_sha256(many.params)


def test_the_stock_config_says_everything(tmp_path):
    export_hf(random_run(tmp_path / "run", "classic", rotary_base=50_000.0), tmp_path / "hf")
    found, special = read_json(tmp_path / "hf" / "config.json"), tokenizer().special
    end = special["<|assistant_end|>"]
    expected = {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", "intermediate_size": 4 * 96,
        "final_logit_softcapping": 15.0, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
        "bos_token_id": special["<|bos|>"], "eos_token_id": end, "pad_token_id": end, "tie_word_embeddings": False,
        "vocab_size": 293, "hidden_act": "relu2", "num_key_value_heads": 2,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"].shape == (293, 96), "padded rows are cut"
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("tier", [path.stem for path in tier_files()])
@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_every_tier_s_config_comes_back(tier, recipe):
    sizes = ["model.depth=4", "model.seq_len=256", "model.vocab_size=999", "train.steps=9"]
    own_size = sizes if tier == "book" else []  # it takes them from its text
    shape = resolve(load_config(tier, [f"model.recipe={recipe}", *own_size])).model
    found = config_to_hf(shape, architecture_of(shape))
    again = config_from_hf(json.loads(json.dumps(found)), "here")
    assert again == dataclasses.replace(shape, attention="auto")
    assert (found["model_type"] == "nanochat") == (recipe == "classic")


@pytest.mark.parametrize("extra", [
    {"value_embeddings": True}, {"residual_scalars": True}, {"smear": True}, {"backout": True}, {"qk_scale": 1.2},
    {"window_pattern": "SL", "window_short": 8},
])  # fmt: skip
def test_the_stock_exporter_refuses_every_extra(tmp_path, extra):
    model = random_model("classic", **extra)
    with pytest.raises(UsageError, match=r"has no .*--architecture jaxchat"):
        write_hf(model, tmp_path / "hf", architecture="nanochat")
    assert not list(tmp_path.iterdir())
    assert write_hf(model, tmp_path / "hf")["architecture"] == "jaxchat"
    assert read_hf(tmp_path / "hf").config == model.config


# --- tokenizer and chat template -------------------------------------------------------------------------------------

TEXT = st.text(alphabet=st.one_of(st.sampled_from("<|>\ue000_ \nab한é"), st.characters(codec="utf-8")), max_size=40)
SNIPPETS = st.sampled_from(["<|user_end|>", "<|assistant_start|>x", "<\ue000|bos|>", "<", "<\u0338", "e\u0301", ""])
CONTENT = st.lists(st.one_of(TEXT, SNIPPETS), max_size=4).map("".join)
ARGUMENTS = st.sampled_from([
    None, {}, "{}", '{"x": 1}', '{"expression": "1+2*(3)"}', {"code": "2*3"}, {"e": '"straw".count("r")'}, "2+2",
    r'{"e": "\"straw\".count(\"r\")"}', {"a": {"b": "<é"}}, {"code": "import os"}, '{ "a" : "1" }', '{"a": ""}',
    '{"a": "1", "b": "2"}', {"e": "1\\2"},
])  # fmt: skip
FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["calculator", "python", "weather", "<|bos|>"]), "arguments": ARGUMENTS}
)
CALLS = st.lists(FUNCTION | st.fixed_dictionaries({"id": st.just("1"), "function": FUNCTION}), max_size=3)


def parts(*kinds):
    return st.lists(
        st.builds(lambda kind, text: {"type": kind, "text": text}, st.sampled_from(kinds), CONTENT), max_size=3
    )


MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer", "tool", "function"]),
         "content": CONTENT | parts("text", "input_text")}),
    st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={"content": st.none() | CONTENT | parts("text", "python", "python_output"),
                  "tool_calls": CALLS, "function_call": st.none() | FUNCTION}),
    st.fixed_dictionaries(
        {"role": st.just("tool")},
        optional={"content": st.none() | CONTENT | st.integers(-9, 99) | st.dictionaries(CONTENT, CONTENT)}),
)  # fmt: skip
CONVERSATION = st.lists(MESSAGE, min_size=1, max_size=7)


def files_of(ours):
    return tokenizer_files(dataclasses.replace(random_model("classic"), tokenizer=ours))


class Generation(jinja2.ext.Extension):
    """The block that tells trainers what the assistant says: its text stands as it is."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def template(files):
    """As Hugging Face compiles it."""

    def refuse(message):
        raise ValueError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(files["chat_template.jinja"])


@pytest.mark.parametrize("normalize", ["none", "nfc"])
def test_the_template_renders_token_for_token_what_we_do(normalize):
    ours = tokenizer(normalize)
    files = files_of(ours)
    theirs, compiled = Backend.from_str(files["tokenizer.json"]), template(files)

    @settings(max_examples=150, deadline=None)
    @given(CONVERSATION)
    def same(messages):
        for prompt in {False, messages[-1]["role"] != "assistant"}:
            wanted = render_prompt(ours, messages) if prompt else render(ours, messages)[0]
            text = compiled.render(messages=messages, add_generation_prompt=prompt, bos_token="<|bos|>")
            assert theirs.encode(text, add_special_tokens=False).ids == wanted

    same()


@pytest.mark.parametrize("message", [
    {"role": "user", "content": [{"type": "python", "text": "1"}]}, {"role": "king", "content": "x"},
    {"role": "user", "content": [{"type": "image", "url": "x"}]},
    {"role": "assistant", "content": [{"type": "image", "url": "x"}]},
])  # fmt: skip
def test_the_template_refuses_what_we_refuse(message):
    with pytest.raises(ValueError):
        template(files_of(tokenizer())).render(messages=[message], bos_token="<|bos|>")
    with pytest.raises(UsageError):
        render(tokenizer(), [message])


def test_tokenizers_from_elsewhere_are_guarded_too():
    """Special tokens that begin with something else than "<", and flags that would eat what stands beside them."""
    content = json.loads(tokenizer().to_json())
    for token in content["added_tokens"]:
        token |= {"normalized": True, "rstrip": True}
    more = {"special": True, "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 293, "content": "[INST]", **more})
    ours = Tokenizer.parse(json.dumps(content), "here")
    files = files_of(ours)
    theirs, compiled = Backend.from_str(files["tokenizer.json"]), template(files)
    for text in ("a [INST] b", " [INST]<|user_end|>  c", "[\ue000INST] <\ue000|bos|>"):
        messages = [{"role": "user", "content": text}]
        rendered = compiled.render(messages=messages, add_generation_prompt=True, bos_token="<|bos|>")
        assert theirs.encode(rendered, add_special_tokens=False).ids == render_prompt(ours, messages)


@pytest.mark.parametrize("normalize", ["none", "nfc"])
def test_a_tokenizer_goes_out_and_comes_back(tmp_path, normalize):
    ours = tokenizer(normalize)
    for name, text in files_of(ours).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(f"a <{MARK}|user_end|> b").ids == ours.encode("a <|user_end|> b")
    assert theirs.encode("<|user_end|>").ids == [ours.special["<|user_end|>"]], "theirs finds specials in plain text"
    assert read_tokenizer(tmp_path / "tokenizer.json").digest == ours.digest


# --- what an import makes ------------------------------------------------------------------------------------------


def test_an_imported_model_answers_as_the_one_that_went_out(tmp_path):
    run = random_run(tmp_path / "run", "modern")
    export_hf(run, tmp_path / "hf")
    assert interop("import", "--format", "hf", "--from", tmp_path / "hf", "--out", tmp_path / "in") == 0
    question = [{"role": "user", "content": "hello <|bos|>"}]
    answers = [Engine.from_pretrained(str(tmp_path / name)).chat(question, temperature=0) for name in ("run", "in")]
    assert answers[0] == answers[1]
    records = read_json(tmp_path / "in" / "stages.json")
    assert records["sft"]["imported"]["from"] == "hf" and records["pretrain"]["status"] == "done"


def test_a_base_model_stays_one(tmp_path):
    run = random_run(tmp_path / "run", "classic", stage="base")
    export_hf(run, tmp_path / "hf")
    assert import_hf(tmp_path / "hf", tmp_path / "in").stage == "base"
    assert not (tmp_path / "in" / "sft").exists()
    assert import_hf(tmp_path / "hf", tmp_path / "chat", stage="sft").chats


def launch(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "launch.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow  # a minute; CI runs it
def test_an_imported_model_is_examined_and_trains_on(tmp_path, corpus):
    random_run(tmp_path / "in", "modern", stage="base")
    before = params_sha256(trained_params(RunDir(tmp_path / "in"), "base"))
    found = launch(
        "--run-dir", tmp_path / "in", "--data", f"files:{corpus}/*.txt", "--set", 'sft.mixture=["identity:40"]',
        "--set", "sft.batch_tokens=1024", "--set", "train.device_batch_rows=8", "--set", "eval.rows=8",
        "--set", "eval.max_per_task=2", "--set", "eval.overlap_documents=10",
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"pretrain +done .* nothing to do", found.stderr)
    assert params_sha256(trained_params(RunDir(tmp_path / "in"), "base")) == before
    assert params_sha256(trained_params(RunDir(tmp_path / "in"), "sft")) != before
    assert "imported from random numbers" in (tmp_path / "in" / "report.md").read_text(encoding="utf-8")
    assert read_json(tmp_path / "in" / "eval" / "base.json")["tasks"]["bits_per_byte"]["metric"] > 0
    assert {p.name for p in (tmp_path / "in" / "export").iterdir()} == {"orbax", "hf"}
    for change in ("train.steps=1000", "model.attention=xla"):
        again = launch("--run-dir", tmp_path / "in", "--set", change, "--stages", "pretrain")
        refused = change.startswith("train")
        assert again.returncode == (2 if refused else 0), again.stderr
        assert ("imported weights there, which train.steps cannot change" in again.stderr) == refused
    again = launch("--run-dir", tmp_path / "in", "--set", "model.depth=6")
    assert again.returncode == 2 and "model.depth (5 -> 6)" in again.stderr


# --- Orbax ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, devices", [pytest.param("classic", 1, marks=pytest.mark.slow), ("modern", 8)])
def test_the_five_printed_lines_run_without_us(tmp_path, kind, devices):
    run = random_run(tmp_path / "run", kind)
    write_orbax(load_trained(run, dtype="bfloat16"), tmp_path / "out")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert len(code.strip().splitlines()) == 5
    more = (
        "\nimport sys, jax\nassert 'jaxchat' not in sys.modules and 'tokenizers' not in sys.modules"
        f"\nassert jax.device_count() == {devices}, jax.devices()"
        "\nassert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {'bfloat16'}"
        "\nprint(model.check(), model.generate([1, 2, 3], 24))"
        "\nfrom orbax.checkpoint.experimental import v1\nimport numpy as np"
        "\nassert np.array_equal(v1.load(FOLDER / 'params')['blocks']['q'], params['blocks']['q'])"
        "\nparams['blocks']['o'] = params['blocks']['o'] * 1.1\nprint(GPT(params).check())"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-W", "ignore", "-c", code + more]
    done = subprocess.run(command, cwd=tmp_path / "out", capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    _, good, bad = done.stdout.strip().splitlines()
    difference, _, rest = good.partition(" ")
    assert float(difference) < 1e-4 < float(bad), "the golden logits tell a wrong weight"
    params, _ = restore_params(run.stage("sft"))
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    written = [1, 2, 3, *json.loads(rest)]
    logits = logits_of(load_trained(run).config, rounded, np.array([written]))[0]
    assert len(written) == 27 and written[3:] == logits[2:-1].argmax(-1).tolist(), "it wrote what is likeliest"


def test_the_card_says_what_the_model_is_and_scored():
    report = {
        "data": {"source": "files:a.txt"}, "pretrain": {"tokens": 1234567, "epochs": 2.5},
        "exams": {"base": {"core": {"metric": 0.12345, "n": 22}}, "sft": {"gsm8k": {"metric": 0.5, "n": 8}}, "rl": {}},
    }  # fmt: skip
    model = dataclasses.replace(random_model("modern"), report=report)
    text, total = model_card(model, "like this", "jax"), count_parameters(model.config).total
    for part in ("library_name: jax\n", f"{total:,} parameters, a chat model", "like this", "1,234,567", "2.50",
                 "files:a.txt", "| base | core | 0.1235 | 22 |", "| sft | gsm8k | 0.5000 | 8 |"):  # fmt: skip
        assert part in text
    assert model_card(dataclasses.replace(model, card="as it came"), "", "jax") == "as it came"
    assert "## Exams" not in model_card(random_model("classic", stage="base"), "", "jax")


@pytest.mark.parametrize("page", ["docs/weights.md", "docs/ko/weights.md"])
def test_the_page_prints_the_lines_of_the_export(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"```python\n(.*?)```", text, re.S)[0].replace("\n\n", "\n") in HOW


def test_checksums_cover_every_file_and_the_golden_logits_are_ours(tmp_path):
    model = random_model("modern")
    write_orbax(model, tmp_path / "out")
    lines = (tmp_path / "out" / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    named = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    assert named == {name: d for name, d in digests(tmp_path / "out").items() if name != "SHA256SUMS"}
    assert {
        "config.json", "tokenizer.json", "chat_template.jinja", "model.py", "README.md", "golden.npz"
    } <= named.keys()  # fmt: skip
    with np.load(tmp_path / "out" / "golden.npz") as golden:
        ours = logits_of(model.config, model.params, golden["ids"])
        assert golden["ids"].shape == (1, 72) and golden["logits"].shape == (1, 64, 293), "longer than a short window"
        assert np.abs(ours[:, -64:] - golden["logits"]).max() < 1e-4
        other = dataclasses.replace(model.config, window_short=9)
        assert np.abs(logits_of(other, model.params, golden["ids"])[:, -64:] - golden["logits"]).max() > 1e-3
    assert read_json(tmp_path / "out" / "config.json")["format"] == 1


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The names of the `model.py` that an export gets."""
    file = tmp_path_factory.mktemp("generated") / "model.py"
    file.write_text(bundle(CODE), encoding="utf-8")
    return runpy.run_path(str(file))


@pytest.mark.parametrize("kind", KINDS)
def test_the_generated_model_is_ours(generated, kind):
    shape = config(kind)
    params, ids = random_params(shape), np.random.default_rng(2).integers(0, 293, (2, 100))
    facts = {"model": dataclasses.asdict(shape), "windows": windows(shape), "end_tokens": []}
    ours = logits_of(shape, params, ids)
    for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 1.0)):
        theirs = np.asarray(generated["GPT"](params, facts, dtype)(ids))
        assert theirs.dtype == np.float32 and np.abs(theirs - ours).max() < tolerance, dtype


def test_the_generated_file_is_whole_and_has_nothing_of_training(generated):
    functions = {name: f for name, f in generated.items() if getattr(f, "__module__", "") == generated["__name__"]}
    assert {"GPT", "run", "forward", "block", "norm", "embed"} < functions.keys()
    for function in functions.values():
        typing.get_type_hints(getattr(function, "__wrapped__", function), generated)  # every name is defined
    assert not re.findall(r"(from|import) jaxchat|lax\.scan|jax\.checkpoint\(|custom_vjp|Mesh", bundle(CODE))


def test_the_export_stage_leaves_both_formats(finished):
    card = (finished / "export" / "hf" / "README.md").read_text(encoding="utf-8")
    report = read_json(finished / "report.json")
    stage = next(s for s in ("rl", "sft", "base") if s in report["exams"])
    assert f"{report['exams'][stage]['bits_per_byte']['metric']:.4f}" in card
    model = read_hf(finished / "export" / "hf")
    own, vocab = trained_params(RunDir(finished), stage), model.config.vocab_size
    assert model.config == load_trained(RunDir(finished)).config
    for (path, a), (_, b) in zip(leaves(own), leaves(model.params), strict=True):
        assert np.array_equal(unpadded(path, a, vocab), unpadded(path, b, vocab)), path
    assert (finished / "export" / "orbax" / "params").is_dir()


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    write_hf(random_model("classic"), folder)
    return folder


def edit(folder, **changes):
    path = folder / "config.json"
    found = read_json(path) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v != "drop"}), encoding="utf-8")


def with_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


Q = "model.layers.2.self_attn.q_proj.weight"
BROKEN = {
    "another architecture": (lambda f: edit(f, model_type="llama"), "architecture 'llama'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "depth a text": (lambda f: edit(f, num_hidden_layers="5"), "depth: needs a whole number, not '5'"),
    "depth gone": (lambda f: edit(f, num_hidden_layers="drop"), "lacks num_hidden_layers"),
    "more layers": (lambda f: edit(f, num_hidden_layers=6), "lacks model.layers.5"),
    "heads that cannot be": (lambda f: edit(f, num_key_value_heads=4), "does not divide"),
    "other activation": (lambda f: edit(f, hidden_act="silu"), "hidden_act is 'silu'"),
    "biases": (lambda f: edit(f, attention_bias=True), "attention_bias is True"),
    "scaled rotary": (lambda f: edit(f, rope_parameters={"rope_type": "yarn"}), "'yarn'"),
    "scaled rotary, as it was": (lambda f: edit(f, rope_parameters="drop", rope_scaling={"type": "yarn"}), "'yarn'"),
    "uncapped": (lambda f: edit(f, final_logit_softcapping=None), "final_logit_softcapping is None"),
    "missing tensor": (lambda f: with_tensors(f, lambda t: t.pop(Q)), f"lacks {Q}"),
    "extra tensor": (lambda f: with_tensors(f, lambda t: t.update(more=t[Q])), "does not have: more"),
    "wrong shape": (lambda f: with_tensors(f, lambda t: t.update({Q: t[Q][:, :64].copy()})), r"q_proj.* \(96, 64\)"),
    "whole numbers": (lambda f: with_tensors(f, lambda t: t.update({Q: t[Q].astype(np.int32)})), "int32"),
    "not finite": (lambda f: with_tensors(f, lambda t: t.update({Q: t[Q] * np.inf})), "finite"),
    "truncated": (cut, "damaged or no safetensors"),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "no safetensors there"),
    "depth beyond its tensors": (lambda f: edit(f, num_hidden_layers=20_000_000), "at most 10000"),
    "width beyond floats": (lambda f: edit(f, intermediate_size=10**400), "invalid values"),
    "base not a number": (lambda f: edit(f, rope_parameters={"rope_theta": float("nan")}), "rotary_base"),
    "deep json": (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
    "deep tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"a": ' * 100_000), "not valid JSON"),
    "odd normalizer": (lambda f: (f / "tokenizer.json").write_text('{"normalizer": {"normalizers": 5}}'), "not a tok"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "tokenizer no json": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff{"), "tokenizer.json: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_bad_folders_are_named_and_nothing_is_written(exported, tmp_path, capsys, fault):
    shutil.copytree(exported, tmp_path / "bad")
    change, message = BROKEN[fault]
    change(tmp_path / "bad")
    assert interop("import", "--format", "hf", "--from", tmp_path / "bad", "--out", tmp_path / "in" / "run") == 3
    assert re.search(message, capsys.readouterr().err), fault
    assert [p.name for p in tmp_path.iterdir()] == ["bad"] or not list((tmp_path / "in").iterdir())


def test_what_says_two_things_is_refused(tmp_path):
    write_hf(random_model("modern"), tmp_path / "hf")
    edit(tmp_path / "hf", layer_windows=[1] * 5)
    with pytest.raises(DataError, match=r"layer_windows is \[1, 1, 1, 1, 1\]"):
        read_hf(tmp_path / "hf")


@pytest.mark.parametrize("format", ["orbax", "hf"])
def test_a_file_that_cannot_be_written_is_one_line(tmp_path, format):
    random_run(tmp_path / "run", "classic")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from jaxchat.interop.__main__ import main, make_parser\n"
        f"sys.exit(main(lambda: make_parser().parse_args(['export', '--run-dir', {str(tmp_path / 'run')!r}, "
        f"'--format', {format!r}, '--out', {str(tmp_path / 'out')!r}])))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # TensorStore's threads add theirs
    assert done.returncode == 3 and len(said) == 1 and "could not be written" in said[0], done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_export_is_swapped_whole_and_leftovers_go(tmp_path, monkeypatch):
    run = random_run(tmp_path / "run", "classic")
    settings = load_config("nano", [])
    for left in (run.root / ".export.new" / "hf", run.export / ".hf.old"):
        left.mkdir(parents=True)
    assert stage_run(settings, run)["stage"] == "sft"
    assert {p.name for p in run.export.iterdir()} == {"orbax", "hf", "html"}
    before = digests(run.export / "hf")
    monkeypatch.setitem(FORMATS, "hf", lambda model, out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage_run(settings, run)
    assert digests(run.export / "hf") == before, "the old one stays until the new one is whole"
    stage_run(load_config("nano", ['export.formats=["orbax"]']), run)
    assert {p.name for p in run.export.iterdir()} == {"orbax"} and not (run.root / ".export.new").exists()


def test_bad_arguments(exported, tmp_path, capsys):
    assert interop("export", "--format", "tar", "--run-dir", "x", "--out", "y") == 2
    assert interop("import", "--format", "hf", "--from", tmp_path / "none", "--out", tmp_path / "in") == 3
    assert interop("import", "--format", "hf", "--from", exported, "--out", tmp_path / "in", "--allow-pickle") == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    assert interop("import", "--format", "hf", "--from", exported, "--out", tmp_path / "full") == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["precious"]
    random_run(tmp_path / "run", "modern")
    export = ("export", "--format", "hf", "--out", tmp_path / "out", "--run-dir")
    assert interop(*export, tmp_path / "none") == 3
    assert interop(*export, tmp_path / "run", "--architecture", "nanochat") == 2
    assert interop(*export, tmp_path / "run", "--stage", "rl") == 3
    assert interop(*export, tmp_path / "run", "--dtype", "int4") == 2
    assert not (tmp_path / "out").exists()


def test_an_export_needs_only_the_name_of_a_run(tmp_path, monkeypatch):
    random_run(tmp_path / "run", "modern")
    monkeypatch.chdir(tmp_path)
    for stage in ([], ["--stage", "base"]):
        assert interop("export", *stage, "run") == 0
    assert interop("export", "--run-dir", "run") == 2, "nothing is written over"
    assert interop("export") == 2
    assert {p.name for p in Path("exported").iterdir()} == {"run-hf", "run-base-hf"}


def test_a_vocabulary_without_room_for_the_chat_is_refused(tmp_path):
    model = random_model("classic", vocab_size=290)
    write_hf(model, tmp_path / "hf")
    with pytest.raises(DataError, match="293 tokens.* 290 rows"):
        import_hf(tmp_path / "hf", tmp_path / "in")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize("file, code", [
    ("stages.json", 3), ("tokenizer/meta.json", 3), ("config.toml", 2), ("sft/0/meta/metadata", 3)
])  # fmt: skip
def test_every_file_of_a_run_of_another_format_is_refused_by_name(tmp_path, capsys, file, code):
    random_run(tmp_path / "run", "classic")
    (tmp_path / "run" / "sft" / "0" / "SHA256SUMS").unlink()  # or its checkpoint would count as damaged
    path, out = tmp_path / "run" / file, tmp_path / "out"
    text, count = re.subn(r'(format"? ?[:=] ?)1\b', r"\g<1>7", path.read_text(encoding="utf-8"))
    assert count
    path.write_text(text, encoding="utf-8")
    assert interop("export", "--format", "hf", "--run-dir", tmp_path / "run", "--out", out) == code
    assert re.search(r"run.* format 7, and this version reads format 1", capsys.readouterr().err)
    assert not out.exists()


def test_random_models_use_every_parameter():
    """What the parity tests stand on: no part of these models is without effect."""
    for kind in ("tied", "modern"):  # together they have every parameter
        shape = config(kind)
        params = random_params(shape)
        ids = np.random.default_rng(0).integers(0, 293, (1, 24))
        plain = logits_of(shape, params, ids)
        for path, leaf in leaves(params):
            changed = jax.tree.map(np.copy, params)
            inner = changed["blocks"] if path.startswith("blocks.") else changed
            inner[path.split(".")[-1]] = leaf * np.float32(1.3) + np.float32(0.01)
            assert np.abs(logits_of(shape, changed, ids) - plain).max() > 1e-4, (kind, path)
