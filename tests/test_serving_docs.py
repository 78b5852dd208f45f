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

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/chat.md"
HERE = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def service():
    with live(api_keys=()) as running:
        yield running


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def service_examples():
    """The Python examples that talk to a service; the others load a run (tests/test_docs.py)."""
    return [example for example in blocks(PAGE, "python") if HERE in example]


def shell(command, service, **options):
    assert HERE in command
    there = command.replace(HERE, f"127.0.0.1:{service.port}")
    done = subprocess.run(["bash", "-ec", there], capture_output=True, text=True, timeout=280, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(service):
    commands = [command for command in blocks(PAGE, "sh") if command.startswith("curl")]
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
    (command,) = [command for command in blocks(PAGE, "sh") if command.startswith("lm_eval")]
    assert "--tasks arc_easy" in command and "max_length=256" in command
    command = command.replace("--tasks arc_easy", f"--tasks choice,say --include_path {tmp_path}").rstrip()
    command = f"{program}{command.removeprefix('lm_eval').replace('max_length=256', 'max_length=128')}"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    shell(f"{command} --output_path {tmp_path}/out", service, env=env)
    (found,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(found.read_text())["results"]
    assert results["choice"]["acc,none"] == 0.5  # the model finds the same option likelier every time
    assert 0 <= results["say"]["exact_match,none"] <= 1
