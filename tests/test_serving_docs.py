"""Examples of docs/chat.md against a live service: they run as printed, but for the address."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live_service import live, needs_openai

from serve.schemas import ERROR_CODES, ERROR_TYPES, UNSUPPORTED, ChatRequest, CompletionRequest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs/chat.md", ROOT / "docs/ko/chat.md"]
HERE = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def service():
    with live(api_keys=()) as running:
        yield running


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def service_examples():
    """The Python examples that talk to a service; the others load a run (tests/test_docs.py)."""
    return [example for example in blocks(PAGES[0], "python") if HERE in example]


def shell(command, service, **options):
    assert HERE in command
    there = command.replace(HERE, f"127.0.0.1:{service.port}")
    done = subprocess.run(["bash", "-ec", there], capture_output=True, text=True, timeout=280, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_languages_show_the_same_examples():
    for language in ("sh", "python"):
        assert blocks(PAGES[0], language) == blocks(PAGES[1], language)
    assert len(blocks(PAGES[0], "sh")) == 5 and len(service_examples()) == 2


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(service):
    commands = [command for command in blocks(PAGES[0], "sh") if command.startswith("curl")]
    whole, stream, scores, tokens = [shell(command, service) for command in commands]
    assert json.loads(whole)["choices"][0]["message"]["content"]
    *_, usage, done, end = stream.split("\n\n")
    assert (done, end) == ("data: [DONE]", "") and json.loads(usage[6:])["usage"]["completion_tokens"] > 0
    scored = json.loads(scores)["choices"][0]
    assert scored["text"] == "hello there" and all(len(top) >= 3 for top in scored["logprobs"]["top_logprobs"])
    assert json.loads(tokens)["token_strs"][0] == "<|bos|>"


@pytest.mark.parametrize("number", [pytest.param(0, marks=needs_openai), 1], ids=["openai", "websocket"])
def test_python(service, number, capsys):
    example = service_examples()[number]
    exec(compile(example.replace(HERE, f"127.0.0.1:{service.port}"), "chat.md", "exec"), {})
    assert capsys.readouterr().out.strip()


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}"""
KINDS = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: options\ndoc_to_target: answer\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "say": "output_type: generate_until\ndoc_to_target: '{{options[answer]}}'\n"
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
}


def test_lm_eval(service, tmp_path):
    """Log-likelihoods and written answers, on a task from local files, by the command as printed."""
    program = shutil.which("lm_eval", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("needs lm_eval: pip install 'lm-eval[api]'")
    rows = [{"question": "hello 🙂", "options": ["Hi 🙂 안녕!", "How many?"], "answer": i % 2} for i in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, rest in KINDS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, rest=rest))
    (command,) = [command for command in blocks(PAGES[0], "sh") if command.startswith("lm_eval")]
    assert "--tasks arc_easy" in command and "max_length=256" in command
    command = command.replace("--tasks arc_easy", f"--tasks choice,say --include_path {tmp_path}").rstrip()
    command = f"{program}{command.removeprefix('lm_eval').replace('max_length=256', 'max_length=128')}"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    shell(f"{command} --output_path {tmp_path}/out", service, env=env)
    (found,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(found.read_text())["results"]
    assert results["choice"]["acc,none"] == 0.5  # the model finds the same option likelier every time
    assert 0 <= results["say"]["exact_match,none"] <= 1


@pytest.mark.parametrize("page", PAGES, ids=["en", "ko"])
def test_fields_errors_and_what_is_refused(page):
    text = page.read_text(encoding="utf-8")
    fields = next(table for table in re.findall(r"(?:^\|.*\n)+", text, re.M) if "| `stream`" in table)
    named = {name for row in re.findall(r"^\| (`.*?) \|", fields, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named | {"max_completion_tokens"} == set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    errors = next(table for table in re.findall(r"(?:^\|.*\n)+", text, re.M) if "| 429 |" in table)
    assert {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", errors, re.M) for code in row.split(", ")} == (
        set(ERROR_CODES) | {400, 503}
    )
    assert set(ERROR_TYPES) <= set(ERROR_CODES) | {403}
    for name in ("tools", "response_format", "logit_bias", "suffix", "best_of"):
        assert name in UNSUPPORTED and f"`{name}`" in text
