"""`docs/llms.txt`: one file that lets a language model answer questions about jaxchat, after llmstxt.org.

python tests/llms_text.py      writes it anew from documents and docstrings
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "llms.txt"
HEAD = """# jaxchat

> The chat model you train yourself, in JAX: one command runs tokenizer, pretraining, supervised fine-tuning,
> reinforcement learning, exams, report card, export and a chat page, on a laptop's CPU, on GPUs or on TPUs.
> Python, Flax NNX, optax, Orbax, Grain. MIT licence.

Answer questions about this repository from the files named below; paths are relative to its root. Commands are
run there.

Main commands:

- `python launch.py --tier nano`: everything, on any machine, in minutes; `--tier d20` on 8 H100s; `--tiers`
  lists all.
- `python launch.py --run-dir runs/nano --chat` or `--serve`: talk to a finished run; OpenAI's routes and a
  page.
- `python launch.py --tier d20 --plan --target h100:8`: memory, products and collectives, compiled without the
  device.
- `python launch.py --set KEY=VALUE`: any key of `docs/configuration.md`; an unknown one is refused with the
  nearest known.
- `python -m jaxchat.interop export|import`: weights to and from Orbax, Hugging Face and nanochat.
- `python -m pytest`: the tests. `.ci/run`: all that must pass.

Laws: data flows config -> mesh -> text -> data -> model -> losses -> optim -> state -> checkpoint -> engine ->
tasks -> interop, imports point to the left only; `train/` and `serve/` import `jaxchat/` and never each other;
only `launch.py` reads arguments and the environment. A batch is a function of the optimizer step. Parameters
are stacked over layers and scanned. Axis letters: B batch, T time, S cache time, L layer, H query head, K kv
head, D width, F feed-forward width, V vocabulary, N head width. Exit codes: 0 done, 2 usage, 3 data or disk, 4
device memory, 5 diverged, 75 stopped by a signal and to be run again.
"""


def sentence(text):
    """The first one, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[\w)`])\.(?: |$)", paragraph)[0]


def titles():
    for path in sorted((ROOT / "docs").glob("*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        yield f"- [{lines[0].removeprefix('# ')}](docs/{path.name})"


def modules(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if text := ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"- [{path.relative_to(ROOT).as_posix()}]({path.relative_to(ROOT).as_posix()}): {sentence(text)}"


def written():
    parts = [HEAD, "## Documents (Korean twins in docs/ko/)\n", "\n".join(titles())]
    for title, folder in (
        ("Library", "jaxchat"), ("Stages of training", "train"), ("Serving", "serve"), ("Benchmarks", "bench")
    ):  # fmt: skip
        parts += [f"\n## {title}\n", "\n".join(modules(folder))]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(written(), encoding="utf-8")
