"""Weights out and in: `python -m jaxchat.interop export|import --help`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jaxchat.arguments import Parser
from jaxchat.errors import InterruptedRun, UsageError, command_line, explained, terminated


def make_parser(program: str = "python -m jaxchat.interop") -> argparse.ArgumentParser:
    parser = Parser(prog=program, description=__doc__)
    commands = parser.add_subparsers(required=True)
    export = commands.add_parser("export", help="a run's model for other people")
    export.set_defaults(run=export_model)
    export.add_argument("run_dir", nargs="?", default=argparse.SUPPRESS, metavar="RUN", help="a run directory")
    export.add_argument("--run-dir", metavar="RUN", help="the same")
    export.add_argument("--stage", choices=("base", "sft", "rl"), help="default: the furthest trained one")
    formats = ("hf", "orbax", "onnx", "html")
    export.add_argument("--format", default="hf", choices=formats, help="default: hf, for transformers")
    export.add_argument("--out", metavar="DIR", help="a new folder, or FILE.html; default: exported/RUN[-STAGE]-FORMAT")
    export.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: as stored")
    export.add_argument(
        "--architecture",
        default="auto",
        choices=("auto", "nanochat", "jaxchat"),
        help="with hf: the stock NanoChat, or our own with its code; auto: stock where it can hold the model",
    )
    export.add_argument("--push", metavar="OWNER/NAME", help="send it to the Hugging Face hub, too: a private model")
    export.add_argument("--dry-run", action="store_true", help="with --push: list what would be sent, send nothing")
    export.add_argument("--public", action="store_true", help="with --push: everybody may see and load it")
    export.add_argument("--update", action="store_true", help="with --push: a new version of what has that name")
    export.add_argument(
        "--license", metavar="ID", help="with --push: for its card, as the hub names it (mit, cc-by-4.0)"
    )
    other = commands.add_parser("import", help="a model from elsewhere as a run directory")
    other.set_defaults(run=import_model)
    other.add_argument("--format", required=True, choices=("hf", "nanochat"))
    other.add_argument("--from", required=True, dest="source", metavar="DIR")
    other.add_argument("--out", required=True, metavar="RUN_DIR", help="a folder that does not exist yet")
    other.add_argument("--stage", choices=("base", "sft", "rl"), help="what the weights are; default: as files say")
    other.add_argument("--tokenizer", metavar="FILE", help="with nanochat: tokenizer.pkl or tokenizer.json")
    other.add_argument("--allow-pickle", action="store_true", help="with nanochat: read its files, which are pickles")
    return parser


def export_model(args: argparse.Namespace) -> None:
    from jaxchat.interop.html_page import write_html
    from jaxchat.interop.huggingface import holds, write_hf
    from jaxchat.interop.onnx import write_onnx
    from jaxchat.interop.push import check_push, push
    from jaxchat.interop.trained import load_trained, write_orbax
    from jaxchat.log import say
    from jaxchat.run_dir import RunDir

    if not args.run_dir:
        raise UsageError(f"which run? As in: {command_line('export runs/nano')}")
    if args.format != "hf" and args.architecture != "auto":
        raise UsageError("--architecture: only with --format hf")
    if args.push is not None:
        check_push(args.push, args.dry_run)
    elif args.dry_run or args.public or args.update or args.license:
        raise UsageError("--dry-run, --public, --update and --license: only with --push")
    run = RunDir(args.run_dir)
    named = "-".join(filter(None, (run.root.resolve().name, args.stage, args.format)))
    model, out = load_trained(run, args.stage, args.dtype), Path(args.out or f"exported/{named}")
    how = "README.md there says how to load it"
    if args.format == "html":
        out, how = out if out.suffix == ".html" else out / "chat.html", "open the file in a browser"
    if args.push and args.format == "hf" and (out / "config.json").exists() and holds(out, model):
        say(f"{out}: is there already and is sent as it is")
    else:
        writers: dict[str, Any] = {"orbax": write_orbax, "onnx": write_onnx, "html": write_html}
        writers["hf"] = partial(write_hf, architecture=args.architecture)
        facts = writers[args.format](model, out)
        kind = f" as {facts['architecture']}" if "architecture" in facts else ""
        say(f"{out}: {facts['bytes']:,} bytes of {facts['dtype']}{kind}; {how}")
    if args.push:
        push(out, args.push, public=args.public, update=args.update, license=args.license, dry_run=args.dry_run)


def import_model(args: argparse.Namespace) -> None:
    from jaxchat.interop.huggingface import read_hf
    from jaxchat.interop.nanochat import read_nanochat
    from jaxchat.interop.trained import write_run
    from jaxchat.log import say

    source, tokenizer = Path(args.source), Path(args.tokenizer) if args.tokenizer else None
    if args.format == "hf" and (tokenizer or args.allow_pickle):
        raise UsageError("--tokenizer and --allow-pickle: only with --format nanochat")
    if args.format == "hf":
        model = read_hf(source, args.stage)
    else:
        model = read_nanochat(source, args.stage, tokenizer, args.allow_pickle)
    write_run(model, Path(args.out))
    kind = "a chat model" if model.chats else "a base model"
    say(f"{args.out}: {kind} (stage {model.stage}; --stage says otherwise), {model.config.depth} layers")
    say(f"talk to it:  {command_line('chat', args.out)}   (or serve, for the page)")


def run_command(args: argparse.Namespace) -> None:
    """Run `export` or `import`."""
    from jaxchat.sharding import require_devices

    require_devices()
    args.run(args)


def main(arguments: Callable[[], argparse.Namespace]) -> int:
    """Run the command that `arguments` parses in a process of its own; return the exit code of the contract."""
    signal.signal(signal.SIGTERM, terminated)
    try:
        run_command(arguments())
    except (Exception, InterruptedRun, KeyboardInterrupt) as error:
        if not (told := explained(error)):
            raise
        print(f"error: {told[0]}", file=sys.stderr)
        return told[1]
    return 0


if __name__ == "__main__":
    sys.exit(main(make_parser().parse_args))
