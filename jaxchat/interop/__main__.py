"""Weights out and in: `python -m jaxchat.interop export|import --help`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxchat.errors import InterruptedRun, JaxchatError, OutOfMemoryError, UsageError
from jaxchat.log import say
from jaxchat.run_dir import RunDir


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python -m jaxchat.interop --help")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m jaxchat.interop", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    out = commands.add_parser("export", help="a run's model for other people")
    out.add_argument("--run-dir", required=True, metavar="R")
    out.add_argument("--stage", choices=("base", "sft", "rl"), help="default: the furthest trained one")
    out.add_argument("--format", required=True, choices=("orbax", "hf"))
    out.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    out.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: as stored")
    out.add_argument(
        "--architecture",
        default="auto",
        choices=("auto", "nanochat", "jaxchat"),
        help="of hf: the stock NanoChat, or our own with its code; auto: stock where it can hold the model",
    )
    into = commands.add_parser("import", help="a model from elsewhere as a run directory")
    into.add_argument("--format", required=True, choices=("hf", "nanochat"))
    into.add_argument("--from", required=True, dest="source", metavar="DIR")
    into.add_argument("--out", required=True, metavar="RUN_DIR", help="a folder that does not exist yet")
    into.add_argument("--stage", choices=("base", "sft", "rl"), help="what the weights are; default: as its files say")
    into.add_argument("--tokenizer", metavar="FILE", help="of nanochat: tokenizer.pkl or tokenizer.json")
    into.add_argument("--allow-pickle", action="store_true", help="of nanochat: its files are pickles, I trust them")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.command == "export":
        from jaxchat.interop.huggingface import export_hf
        from jaxchat.interop.orbax_export import export_orbax

        directory, out = RunDir(args.run_dir), Path(args.out)
        if args.format == "hf":
            facts = export_hf(directory, out, args.stage, args.dtype, args.architecture)
        elif args.architecture != "auto":
            raise UsageError("--architecture: is of --format hf")
        else:
            facts = export_orbax(directory, out, args.stage, args.dtype)
        kind = f" as {facts['architecture']}" if "architecture" in facts else ""
        say(f"{out}: {facts['bytes']:,} bytes of {facts['dtype']}{kind}; README.md there says how to load it")
        return
    if args.format == "hf":
        from jaxchat.interop.huggingface import import_hf

        if args.tokenizer or args.allow_pickle:
            raise UsageError("--tokenizer and --allow-pickle: are of --format nanochat")
        model = import_hf(args.source, args.out, args.stage)
    else:
        from jaxchat.interop.nanochat import import_nanochat

        model = import_nanochat(args.source, args.out, args.stage, args.tokenizer, args.allow_pickle)
    kind = "a chat model" if model.chats else "a base model"
    say(f"{args.out}: {kind} (stage {model.stage}; --stage says otherwise), {model.config.depth} layers")
    say(f"talk to it:  python launch.py --run-dir {args.out} --chat   (or --serve for the page)")


def main(arguments: Callable[[], argparse.Namespace]) -> int:
    """Run the command that `arguments` gets; returns the exit code of the contract."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        run(arguments())
    except (JaxchatError, InterruptedRun) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return InterruptedRun.exit_code
    except OSError as error:
        print(f"error: {error.filename or 'file system'}: {error.strerror or error}; nothing is left", file=sys.stderr)
        return 3
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("error: out of device memory; set JAX_PLATFORMS=cpu, an export needs no accelerator", file=sys.stderr)
        return OutOfMemoryError.exit_code
    return 0


def _terminated(number: int, frame: Any) -> NoReturn:
    raise InterruptedRun("stopped by SIGTERM, nothing is left")


if __name__ == "__main__":
    sys.exit(main(make_parser().parse_args))
