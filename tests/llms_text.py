"""Write `docs/llms.txt` (llmstxt.org): an index of documents and modules for a language model.

python tests/llms_text.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# jaxchat

> The chat model you train yourself, in JAX: one command runs tokenizer, pretraining, supervised fine-tuning,
> reinforcement learning, exams, report card, export and a chat page, on a laptop's CPU, on GPUs or on TPUs.
> Python, Flax NNX, optax, Orbax, Grain. MIT licence.

Answer questions about this repository from the files named below; paths are relative to its root. Commands are run
there. `python -m jaxchat.pack` prints the core as one text.

- `python launch.py --tier nano`: everything, on any machine, in minutes; `python launch.py tiers` lists all tiers.
- `python launch.py chat runs/nano`, `serve runs/nano`: talk to a finished run; OpenAI's routes and a page.
- `python launch.py plan --tier d20 --target h100:8`: memory, products, collectives, compiled without the device.
- `python launch.py rehearse`, `doctor`, `compare A B`, `export RUN`, `import`: see `python launch.py --help`.
- `--set KEY=VALUE`: any key of `docs/configuration.md`.
- `python -m pytest`: the tests. `.ci/run`: all that must pass.

`train/` and `serve/` import `jaxchat/` and never each other; imports inside `jaxchat/` go one way. Only `launch.py`
reads arguments and the environment. A batch is a function of the optimizer step. Parameters are stacked over layers
and scanned. Axis letters: B batch, T time, S cache time, L layer, H query head, K kv head, D width, F feed-forward
width, V vocabulary, N head width. Exit codes: 0 done, 2 usage, 3 data or disk, 4 device memory, 5 diverged, 75 stopped
by a signal.
"""


def documents():
    for path in sorted((ROOT / "docs").glob("*.md")):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        yield f"- [{title}](docs/{path.name})"


def modules(folder):
    """One line a module: its path and the first sentence of its docstring."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if text := ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            paragraph = " ".join(text.split("\n\n")[0].split())
            name = path.relative_to(ROOT).as_posix()
            yield f"- [{name}]({name}): {re.split(r'(?<=[a-z0-9)`])[.](?: |$)', paragraph)[0]}"


if __name__ == "__main__":
    parts = [HEAD, "## Documents (Korean twins in docs/ko/)\n", *documents()]
    for title, folder in {
        "Library": "jaxchat",
        "Stages of training": "train",
        "Serving": "serve",
        "Benchmarks": "bench",
    }.items():
        parts += [f"\n## {title}\n", *modules(folder)]
    (ROOT / "docs" / "llms.txt").write_text("\n".join(parts) + "\n", encoding="utf-8")
