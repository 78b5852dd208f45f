"""Every launch.py command of the documents, run in little, in one working directory.

    python -m pytest tests/drills/test_commands.py -m slow -n0

Shapes, steps and text are replaced by tiny ones, everything else of a command is run as it stands. What needs another
machine is left out by name below, and its own test is named there.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from test_docs import ENGLISH, ROOT, commands, lines_of
from test_rehearse import SELDOM
from whole_run import TINY, write_corpus

pytestmark = pytest.mark.slow
ELSEWHERE = {
    "--coordinator": "two machines: tests/test_distributed.py",
    "hf:": "the hub: tests/test_hub.py, tests/test_prepare.py",
    "backwards": "an exam that the page has you write: tests/test_evaluate.py",
    "d20-base": "weights from elsewhere: tests/test_interop.py",
    "d20-hf": "weights from elsewhere: tests/test_interop.py",
    "python -m bench": "timed, or with other programs: tests/test_bench.py",
    "launch.py import": "weights from elsewhere: tests/test_interop.py",
    "lm_eval": "another library: tests/test_lm_eval.py",
    "python -m pytest": "tests themselves",
    "python -m venv": "an environment",
    "model.vocab_size=8192": "shapes of its own, for minutes: docs/korean.md has the results",
}
# a tier's own settings that would take long here, or that are asked of a network
LITTLE = [*TINY, "eval.exams=[\"auto\"]", "mesh.data=-1", "mesh.fsdp=1", "tokenizer.path=", "eval.sample_prompts=1",
          "eval.sample_temperatures=[0.0]", "train.remat=none", "model.tie_embeddings=false", "train.token_ratio=-1.0",
          "eval.chat_prompts=[]", "rl.environment=word_problems", "data.size_model=false",
          "train.sample_every=0", "data.val_source="]  # fmt: skip


def every_command():
    lines = list(dict.fromkeys(line for page in ENGLISH for line in [*commands(page), *modules(page)]))
    # what others go on from comes first: the run of nano, then every other training
    return sorted(lines, key=lambda line: (line != "python launch.py --tier nano", "launch.py --tier" not in line))


def modules(page):
    """Commands like `python -m jaxchat.interop`."""
    for line in lines_of(page):
        if match := re.match(r"\s+(python -m jaxchat[^#]*)", line):
            yield match[1].strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("texts", "my", "글"):
        (folder / name).mkdir()
        write_corpus(folder / name)
    text = (folder / "texts" / "tale.txt").read_text(encoding="utf-8")
    (folder / "book.txt").write_text(text, encoding="utf-8")
    (folder / "reviews.txt").write_text(text, encoding="utf-8")
    (folder / "소설.txt").write_bytes(("옛날에 한 사람이 살았습니다.\n\n" * 3_000 + text).encode("cp949"))
    (folder / "my" / "talk.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text.split("\n\n")))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (folder / "talks.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    shutil.copy(ROOT / "configs" / "identity" / "example.toml", folder / "my.toml")
    return folder


def words(command, place):
    """The command's words, with tiny settings before its own, so that its own win."""
    given = shlex.split(command)[1:]
    if "launch.py" not in given or given[1] in ("tiers", "compare", "doctor", "plan", "export"):
        return [w if w != "launch.py" else str(ROOT / "launch.py") for w in given]
    own = given[given.index("launch.py") + 1 :]
    name = [own.pop(0)] if own[0] in ("chat", "serve", "rehearse") else []
    known = name in (["chat"], ["serve"]) or ("--run-dir" in own and "--tier" not in own)  # its own configuration
    little = [*LITTLE, *(["model.vocab_size=300"] if "lotto" in own else [])]  # its text has few words
    little += SELDOM if name == ["rehearse"] else []
    sets = [] if known else [word for setting in little for word in ("--set", setting)]
    data = [] if known or "--data" in own or "lotto" in own else ["--data", f"files:{place}/texts/*.txt"]
    return [str(ROOT / "launch.py"), *name, *sets, *data, *own]


@pytest.mark.parametrize("command", every_command())
def test_it_does_what_the_page_says(command, place):
    for part, why in ELSEWHERE.items():
        if part in command:
            pytest.skip(why)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *words(command, place)]
    alone = place / "글" if "files:*.txt" in command else place  # beside a text of another encoding it is refused
    process = subprocess.Popen(
        line, cwd=alone, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if "launch.py serve" in command:
        port = command.split("--port ")[1].split()[0] if "--port" in command else "8000"
        headers = {"Authorization": "Bearer one"} if "api_keys" in command else {}
        end, answered = time.monotonic() + 120, False
        while time.monotonic() < end and process.poll() is None:
            try:
                ask = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers=headers)
                answered = urllib.request.urlopen(ask, timeout=5).status == 200
                break
            except OSError:
                time.sleep(0.3)
        assert answered
        process.send_signal(signal.SIGTERM)
    said = process.communicate("hello\n" if "launch.py chat" in command else "", timeout=600)
    assert process.returncode == 0, "\n".join(said)[-4000:]
    assert "Traceback" not in said[1]
