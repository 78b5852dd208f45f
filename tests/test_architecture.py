"""The laws of the architecture, held by walking the imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jaxchat.pack import core_files, pack

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted(
    [*ROOT.glob("jaxchat/**/*.py"), *ROOT.glob("train/**/*.py"), *ROOT.glob("serve/**/*.py"), ROOT / "launch.py"]
)
# data flows from left to right, imports point to the left
ORDER = (
    "config", "sizes", "scaling", "sharding", "distributed", "tokenizer", "chat", "data", "low_precision", "attention",
    "model", "kv_cache", "loss", "muon", "optimizer", "train_state", "checkpoint", "lens", "engine", "tasks", "interop",
)  # fmt: skip
LEAVES = {"arguments", "errors", "run_dir", "log", "tools", "pack"}  # anyone may import them
WITHOUT_JAX = ("jaxchat/config.py", "jaxchat/sizes.py", "jaxchat/scaling.py", "jaxchat/run_dir.py", "jaxchat/log.py",
               "jaxchat/errors.py", "jaxchat/tokenizer.py", "jaxchat/chat.py", "jaxchat/tools/")  # fmt: skip
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}
ENTRY_NAMES = {"argv", "orig_argv", "environ", "environb", "getenv", "getenvb", "putenv", "unsetenv", "parse_args"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PRODUCT}


def imports(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            inner = [f"{module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if is_module(name)]
            yield from modules
            if len(modules) < len(inner):
                yield module


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


def layer(module):
    return module.split(".")[1] if module.startswith("jaxchat.") else None


def test_imports_point_to_the_left():
    assert len(PRODUCT) > 30
    for path in PRODUCT:
        parts = path.relative_to(ROOT).with_suffix("").parts
        top, own = parts[0], parts[1] if parts[0] == "jaxchat" else None
        assert own in (None, *ORDER, *LEAVES, "__init__"), f"{name_of(path)} has no place in the order"
        for module in imports(path):
            root, other = module.split(".")[0], layer(module)
            line = f"{name_of(path)} imports {module}"
            if top == "jaxchat":
                assert root not in ("train", "serve", "launch"), line
                if other in ORDER and own in ORDER:
                    assert ORDER.index(other) <= ORDER.index(own), line
                if own in LEAVES and root == "jaxchat":
                    assert other in ({"errors", "run_dir", "log", own} if own != "tools" else {"tools"}) | {None}, line
            if top in ("train", "serve"):
                assert root not in ("launch", "serve" if top == "train" else "train"), line


def test_train_and_serve_import_their_own_modules_relatively():
    """So that a wheel can install them under other names."""
    for path in PRODUCT:
        top = path.relative_to(ROOT).parts[0]
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ImportFrom) and top in ("train", "serve"):
                assert node.level or (node.module or "").split(".")[0] != top, f"{name_of(path)}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and top == "jaxchat" and path.parent.name != "exported":
                assert not node.level, f"{name_of(path)}:{node.lineno}"


def test_no_cycles():
    graph = {}
    for path in PRODUCT:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = set(imports(path))
    done, active = set(), []

    def visit(module):
        assert module not in active, f"cycle: {' -> '.join([*active[active.index(module) :], module])}"
        if module in done or module not in graph:
            return
        active.append(module)
        for other in sorted(graph[module]):
            visit(other)
        active.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_what_is_without_jax_imports_none():
    """Not through other modules either: a fresh interpreter that has loaded all of it has no JAX."""
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in PRODUCT
        if name_of(p).startswith(WITHOUT_JAX)
    ]
    code = f"import sys, {', '.join(modules)}; print(sorted({JAX!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def reads_of_the_entry(tree):
    """(line, what): arguments and environment, under whatever name, and imports that no import statement shows."""
    inside = {
        id(n)
        for block in tree.body
        if isinstance(block, ast.If) and "__main__" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Attribute) and node.attr in ENTRY_NAMES:
            yield node.lineno, node.attr
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "sys"):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in ENTRY_NAMES)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield node.lineno, "import by name"


def test_arguments_and_environment_are_read_at_the_entry_only():
    for path in PRODUCT:
        assert path.name == "launch.py" or not list(reads_of_the_entry(TREES[path])), name_of(path)


@pytest.mark.parametrize("code", [
    "import os as o\no.environ", "from os import getenv as g", "import os\nos.putenv('A', 'b')",
    "from sys import argv", "import sys\nsys.orig_argv", "import argparse\nargparse.ArgumentParser().parse_args()",
    "import importlib\nimportlib.import_module('train.loop')",
])  # fmt: skip
def test_every_way_around_that_law_is_seen(code):
    assert list(reads_of_the_entry(ast.parse(code)))
    within = "if __name__ == '__main__':\n" + "\n".join(f"    {line}" for line in code.splitlines())
    assert not list(reads_of_the_entry(ast.parse(within)))


def test_public_functions_are_typed_and_modules_documented():
    for path in PRODUCT:
        tree = TREES[path]
        assert not tree.body or ast.get_docstring(tree), f"{name_of(path)}: no module docstring"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                missing = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None]
                assert not missing and node.returns is not None, f"{name_of(path)}: {node.name} is not typed"


# no public name: the key-value store and the detection of clusters in jaxchat/distributed.py
PRIVATE = {"jax._src", "jax._src.clusters"}


def test_no_private_functions_of_libraries():
    """`jax._src` and the like change without notice."""
    for path in PRODUCT:
        for module in imports(path):
            parts = module.split(".")
            if parts[0] in ("jaxchat", "train", "serve"):
                continue
            hidden = any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
            assert not hidden or module in PRIVATE, f"{name_of(path)} imports {module}"


def test_the_core_is_printed_with_a_table_of_contents():
    lines = pack(core_files()).splitlines()
    table = [line.split() for line in lines[2 : lines.index("", 2)]]
    names = [name for _, _, name in table]
    assert {"launch.py", "jaxchat/model.py", "train/loop.py", "configs/nano.toml"} <= set(names)
    assert not [name for name in names if "interop" in name or "sandbox" in name or name.startswith("serve")]
    for first, count, name in table:
        text = (ROOT / name).read_text(encoding="utf-8").rstrip("\n").splitlines()
        assert lines[int(first) - 2] == f"==== {name} ====" and len(text) == int(count)
        assert lines[int(first) - 1 : int(first) - 1 + len(text)] == text
