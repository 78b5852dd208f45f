"""jaxchat: from raw text to a chat page."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxchat import __version__
from jaxchat.config import Config, load_config, tier_files
from jaxchat.errors import DataError, InterruptedRun, JaxchatError, OutOfMemoryError, UsageError

if TYPE_CHECKING:  # imported where a command runs: --help answers before numpy, rich and JAX are loaded
    from jaxchat.run_dir import RunDir

# Before any import that reads them: no telemetry from the page, no log lines of libraries between ours.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():  # both at once: an error
    os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"

COMMANDS = {
    "train": "the default: run the stages of a tier, from where they stopped",
    "chat": "talk to a finished run in the terminal",
    "serve": "chat page and OpenAI-compatible API of a finished run",
    "plan": "memory, time and cost on any hardware; nothing is trained",
    "rehearse": "every stage with few steps: what would it take or go wrong",
    "doctor": "what this machine can do, and what to install for more",
    "compare": "two runs side by side",
    "export": "a run's model for other people: Orbax or Hugging Face",
    "import": "a run from the weights of nanochat or Hugging Face",
    "tiers": "list the tiers with hardware, time and cost",
}
ALIASES = {f"--{name}" for name in ("chat", "serve", "plan", "rehearse", "doctor", "compare", "tiers")}
INTEROP = ("export", "import")  # jaxchat.interop reads their arguments
OWN = ("jaxchat", "train", "serve")
EPILOG = """\
python launch.py --tier nano        then: python launch.py chat runs/nano
--set KEY=VALUE sets any key of docs/configuration.md; COMMAND --help says more"""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py",
        usage="python launch.py [COMMAND] [options]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxchat {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog="launch.py")
    parsers = {
        name: commands.add_parser(name, help=text, description=text, usage=f"python launch.py {name} [options]")
        for name, text in COMMANDS.items()
    }
    for name in ("train", "chat", "serve", "plan", "rehearse", "doctor"):
        add = parsers[name].add_argument
        add("--tier", help="configs/NAME.toml (default: nano)")
        add("--config", metavar="FILE", help="repeat a run from its saved config.toml")
        add("--run-dir", metavar="DIR", help="default runs/<tier>; alone, the run's own config is taken")
        add("--data", metavar="SOURCE", help="pretraining text: files:GLOB, hf:REPO, chitchat ...")
        add("--cache-dir", metavar="DIR", help="downloads and compiled programs (default ~/.cache/jaxchat)")
        add("--set", action="append", default=[], metavar="K=V", help="any config key; may be repeated")
        add("--seed", type=int, help="one seed; same seed, same machine, same result")
    for name in ("train", "rehearse"):
        parsers[name].add_argument("--stages", metavar="A,B", help="only these stages")
        parsers[name].add_argument("--from", dest="start", metavar="STAGE", help="this stage and those after it")
    for name in ("chat", "serve"):
        parsers[name].add_argument("run", nargs="?", metavar="RUN", help="run directory (default runs/<tier>)")
    for name in ("plan", "rehearse", "doctor", "compare"):
        parsers[name].add_argument("--json", action="store_true", help="print one JSON object")
    parsers["serve"].add_argument("--host", help="address to serve on (default 127.0.0.1)")
    parsers["serve"].add_argument("--port", type=int, help="port to serve on (default 8000)")
    targets = "auto, cpu:N, h100:N, rtx4090:N and other GPUs, v5e:RxC, v6e:RxC, v5p:AxBxC; see docs/planning.md"
    parsers["plan"].add_argument("--target", default="auto", help=targets)
    parsers["plan"].add_argument("--budget", metavar="100usd", help="the deepest model that the money buys on --target")
    parsers["plan"].add_argument("--hours", type=float, metavar="H", help="the deepest model that trains in the time")
    parsers["rehearse"].add_argument("--keep", action="store_true", help="keep what it has written")
    parsers["compare"].add_argument("runs", nargs=2, metavar="RUN", help="two run directories")
    several = parsers["train"].add_argument_group(
        "several processes", "found without flags under Slurm, Open MPI, Kubernetes and on TPU pods"
    )
    for flag, kind, variable, text in (
        ("--coordinator", str, "JAX_COORDINATOR_ADDRESS", "HOST:PORT of process 0"),
        ("--processes", int, "JAX_NUM_PROCESSES", "how many there are"),
        ("--process-id", int, "JAX_PROCESS_ID", "which one this is, from 0"),
    ):
        several.add_argument(flag, type=kind, default=os.environ.get(variable), help=f"{text} (or {variable})")
    several.add_argument("--connect-timeout", type=int, default=300, metavar="S", help="seconds to wait for all (300)")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command and its options; `--chat`, `--plan` and other flags of older versions become commands."""
    words = list(argv)
    if not words or words[0] not in {*COMMANDS, "-h", "--help", "--version"}:
        flags = [word for word in words if word in ALIASES]
        if any(word.partition("=")[0] in ("--budget", "--hours") for word in words):
            flags.insert(0, "--plan")
        words = [flags[0].removeprefix("--") if flags else "train", *(word for word in words if word not in flags)]
    if words[0] in INTEROP:  # everything after the command is for jaxchat.interop
        return argparse.Namespace(command=words[0], words=words[1:])
    return make_parser().parse_args(words)


def given_config(args: argparse.Namespace, default: str = "nano") -> Config:
    """Return what the tier's file and the arguments say, nothing derived yet."""
    from jaxchat.run_dir import RunDir

    talks = args.command in ("chat", "serve")
    own = RunDir(run_root(args, args.tier or default)).config
    source: str | Path = args.config or args.tier or default
    # who talks to a finished run takes its own configuration, whatever the tier's file says by now
    if not args.config and own.exists() and (talks or (args.run_dir and not args.tier)):
        source = own
    options = {
        "data.source": args.data,
        "data.cache_dir": args.cache_dir,
        "seed": args.seed,
        "serve.host": getattr(args, "host", None),
        "serve.port": getattr(args, "port", None),
    }
    if args.command == "serve":  # from the environment, since everybody can see arguments
        options["serve.api_keys"] = os.environ.get("JAXCHAT_API_KEYS", "").replace(",", " ").split() or None
    named = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None]
    if args.tier and args.config:
        named.append(f"tier={json.dumps(args.tier)}")
    return load_config(source, [*args.set, *named])


def run_root(args: argparse.Namespace, tier: str) -> Path:
    return Path(getattr(args, "run", None) or args.run_dir or Path("runs") / tier)


def resolve_arguments(args: argparse.Namespace) -> tuple[Config, RunDir, dict[str, str]]:
    """Return (resolved configuration, run directory, why each derived key has its value)."""
    from jaxchat.run_dir import RunDir
    from jaxchat.scaling import derivations, resolve

    given = config = given_config(args)
    directory = RunDir(run_root(args, given.tier))
    if args.command not in ("chat", "serve"):  # a run that can talk has its sizes, and the service's image no `train`
        from train.prepare import sized

        config = sized(given)
    config = resolve(config)
    return config, directory, derivations(given, config)


def run(args: argparse.Namespace) -> int:
    """Run one command; returns the exit code."""
    prepare_environment()
    if args.command == "tiers":
        list_tiers()
        return 0
    if args.command in INTEROP:
        from jaxchat.interop import __main__ as interop

        words = args.words
        if args.command == "export" and words and not words[0].startswith("-"):
            words = ["--run-dir", *words]
        return interop.main(lambda: interop.make_parser("python launch.py").parse_args([args.command, *words]))
    if args.command == "compare":
        from train.compare import compare

        compare(args.runs[0], args.runs[1], as_json=args.json)
        return 0
    if args.command == "plan":
        prepare_plan(args.target)
        if args.budget or args.hours:
            from train.plan import plan_budget

            plan_budget(given_config(args, "d20"), args.target, args.budget, args.hours, as_json=args.json)
            return 0
    root = run_root(args, args.tier or "nano")
    if args.command in ("chat", "serve") and not (root / "config.toml").exists():
        raise DataError(f"{root}: not a run directory (no config.toml); train one with launch.py first")
    config, directory, reasons = resolve_arguments(args)
    if args.command == "plan":
        from train.plan import plan

        plan(config, args.target, as_json=args.json)
    elif args.command == "doctor":
        from train.doctor import doctor

        doctor(config, directory.root, as_json=args.json)
    elif args.command == "rehearse":
        from train.rehearse import rehearse
        from train.stages import select

        stages = select(args.stages, args.start)
        keep_programs(config)
        return 0 if rehearse(config, directory, stages, reasons, args.keep, as_json=args.json) else 1
    elif args.command == "chat":
        from serve.cli import chat

        keep_programs(config)
        chat(directory, config)
    elif args.command == "serve":
        from serve.app import serve

        keep_programs(config)
        serve(directory, config)
    else:
        train(args, config, directory, reasons)
    return 0


def train(args: argparse.Namespace, config: Config, directory: RunDir, reasons: dict[str, str]) -> None:
    from jaxchat.log import console, say
    from train.plan import before_training
    from train.report import summarize
    from train.stages import remaining, run_stages, select, unfinished

    stages = select(args.stages, args.start)
    chosen = args.set or any(value is not None for value in (args.tier, args.config, args.data, args.seed))
    if args.run_dir and not chosen and not directory.config.exists():
        raise DataError(f"{directory.root}: there is no such run; give --tier to begin one")
    join_processes(args)
    keep_programs(config)
    say(f"jaxchat {config.tier} in {directory.root}")
    if not console.quiet:
        before_training(config, directory, {stage.name for stage in remaining(config, directory, stages)})
    run_stages(config, directory, stages, reasons)
    if not console.quiet:
        summarize(directory, unfinished(config, directory))


def list_tiers() -> None:
    """Print each tier with the head comment of its file."""
    for path in tier_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        head = [line.lstrip("# ").rstrip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
        print(f"{path.stem}\n" + "\n".join(f"    {line}" for line in head if line) + "\n")


# The process: environment, several processes, signals, exit codes


def prefer_huge_pages() -> None:
    """Start this process again with glibc's malloc asking for huge pages (Linux; elsewhere nothing happens).

    XLA takes and returns hundreds of MB in every CPU step; with 4 KiB pages a quarter of the time goes into page
    faults. Measured on the nano tier, interleaved: 1.22 times the tokens per second. glibc reads the setting at
    program start only, hence the exec: same process, same arguments. A setting of the user's own is left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_environment() -> None:
    """Set what JAX's CUDA plugins and matplotlib read when they are imported."""
    import logging
    from importlib.metadata import PackageNotFoundError, version

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns at length where the home is read-only
    for package in ("jax-cuda13-pjrt", "jax-cuda12-pjrt"):
        with contextlib.suppress(PackageNotFoundError):
            if flags := native_atomics(os.environ.get("XLA_FLAGS", ""), version(package)):
                os.environ["XLA_FLAGS"] = flags


def native_atomics(flags: str, plugin: str) -> str:
    """Return XLA_FLAGS with the option that keeps float32 additions to memory single instructions, where it is needed.

    The LLVM in JAX's CUDA plugins 0.10.2 and 0.11.0 makes each a compare-and-swap loop on GPUs before Hopper, because
    the instruction flushes subnormal sums to zero (jax-ml/jax#38806; 0.11.1 mends it). The embedding's gradient is
    such additions. An option of the user's own is kept.
    """
    option, switch = "--xla_backend_extra_options=", "-nvptx-allow-ftz-atomics"
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", plugin)
    version = tuple(map(int, match.groups())) if match else (0, 0, 0)
    if not (0, 10, 2) <= version < (0, 11, 1) or switch.lstrip("-") in flags:
        return flags
    if option in flags:
        return flags.replace(option, f"{option}{switch},", 1)
    return f"{flags} {option}{switch}".strip()


def prepare_plan(target: str) -> None:
    """Before JAX is imported: a plan for another machine neither takes this one's accelerator nor looks for a TPU."""
    if target != "auto":
        quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
        here = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v6e-1"}
        alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # it only compiles: no chip to lock
        os.environ.update({"JAX_PLATFORMS": "cpu", **alone, **quiet, **here})


def keep_programs(config: Config) -> None:
    """Turn JAX's persistent compilation cache on, unless the environment says where it shall be."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        from jaxchat.xla_cache import use_cache

        use_cache(config.data.cache_dir)


def join_processes(args: argparse.Namespace) -> None:
    """Start JAX's runtime of several processes where flags or a cluster ask for it; only process 0 prints."""
    import jax

    from jaxchat import distributed
    from jaxchat.log import console, say

    joined = distributed.start(
        args.coordinator,
        args.processes,
        args.process_id,
        args.connect_timeout,
        whole_host=whole_host(os.environ),
        indexed_pod="KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ,
        complain=_complain,
    )
    if joined:
        signal.signal(signal.SIGTERM, _terminated)  # JAX's runtime replaces the handler
        console.quiet = distributed.index() > 0
        say(f"{jax.process_count()} processes, {jax.device_count()} devices")


def whole_host(env: Mapping[str, str]) -> bool:
    """Return whether a cluster started one process on this host, for all its devices."""
    nodes = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES"))
    alone = nodes == env.get("SLURM_NTASKS") if nodes else env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return alone and "JAX_LOCAL_DEVICE_IDS" not in env


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the contract."""
    signal.signal(signal.SIGTERM, _terminated)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's is left alone
        signal.signal(signal.SIGHUP, _terminated)
    sys.unraisablehook = _repeat_signal
    try:
        code = run(parse(sys.argv[1:] if argv is None else argv))
        _leave()
        return code
    except (JaxchatError, InterruptedRun) as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", InterruptedRun.exit_code)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}; what was complete is kept", 3)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OWN:
            return _fail(f"{error.name} is not installed here; run pip install -r requirements.txt", 2)
        if "RESOURCE_EXHAUSTED" in str(error):  # training says by itself what fits: train/loop.py
            advice = "out of device memory: lower eval.batch_rows (exams) or serve.slots (serve)"
            return _fail(advice, OutOfMemoryError.exit_code)
        distributed = sys.modules.get("jaxchat.distributed")
        if distributed and (lost := distributed.lost(error)):
            return _fail(str(lost), lost.exit_code)
        _leave("a fault, shown there", 1)
        raise


def _fail(message: str, code: int) -> int:
    _complain(message, code)
    _leave(message, code)
    return code


def _complain(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(message if code == InterruptedRun.exit_code else f"error: {message}", file=sys.stderr, flush=True)


def _leave(message: str = "", code: int = 0) -> None:
    """End JAX's runtime of several processes, if it was started; after a failure the others are told."""
    if distributed := sys.modules.get("jaxchat.distributed"):
        distributed.fail(message, code) if code else distributed.stop()


def _terminated(number: int, frame: Any) -> None:
    raise InterruptedRun(f"stopped by {signal.Signals(number).name}; the same command goes on from here")


def _repeat_signal(lost: Any) -> None:
    """Send a signal again whose exception was raised in a callback of the garbage collector, where Python drops it."""
    if not issubclass(lost.exc_type, KeyboardInterrupt | InterruptedRun):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGINT if issubclass(lost.exc_type, KeyboardInterrupt) else signal.SIGTERM
    again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()


if __name__ == "__main__":
    if not {"-h", "--help", "--version"} & set(sys.argv):
        prefer_huge_pages()
    sys.exit(main())
