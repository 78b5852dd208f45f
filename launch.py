"""jaxchat: from raw text to a chat page."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxchat import __version__, errors
from jaxchat.arguments import Parser
from jaxchat.config import CONFIG_DIR, Config, load_config, replaced, tier_files
from jaxchat.errors import (
    DataError,
    InterruptedRun,
    UsageError,
    command_line,
    explained,
    terminated,
)

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
    "watch": "a page that follows a run while it trains, and after",
    "doctor": "what this machine can do, and what to install for more",
    "compare": "two runs side by side",
    "ladder": "a series of depths: fit, prediction, compute multiplier",
    "export": "the model for others: Hugging Face, Orbax, ONNX, one HTML file",
    "import": "a run from the weights of nanochat or Hugging Face",
    "tiers": "list the tiers with hardware, time and cost",
}
ALIASES = {f"--{name}" for name in ("chat", "serve", "plan", "rehearse", "doctor", "compare", "ladder", "tiers")}
USES_DEVICES = ("chat", "serve", "rehearse", "compare", "ladder")  # of this process alone
INTEROP = ("export", "import")  # jaxchat.interop reads their arguments
CACHE_BYTES = 2 << 30  # of compiled programs; JAX deletes the least recently used ones
CACHE_PROGRAMS = 4_000  # that a start leaves there: JAX reads the time of every one when it adds one
EPILOG = """\
{program} --tier nano        then: {program} chat runs/nano
--set KEY=VALUE sets any key of docs/configuration.md; COMMAND --help says more"""


CONFIGURED = "train chat serve plan rehearse doctor ladder"
OPTIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (  # commands, flag, what argparse knows of it
    (CONFIGURED, "--tier", {"help": "configs/NAME.toml (default: nano)"}),
    (CONFIGURED, "--config", {"metavar": "FILE", "help": "repeat a run from its saved config.toml"}),
    (CONFIGURED, "--run-dir", {"metavar": "DIR", "help": "default runs/<tier>; alone, the run's own config is taken"}),
    (CONFIGURED, "--data", {"metavar": "SOURCE", "help": "text: files:GLOB, hf:REPO, chitchat ...; repeatable"}),
    ("train plan rehearse", "--init", {"metavar": "RUN", "help": "weights to start from: a run, RUN:STAGE, an export"}),
    (CONFIGURED, "--cache-dir", {"metavar": "DIR", "help": "downloads and programs (default ~/.cache/jaxchat)"}),
    (CONFIGURED, "--set", {"action": "append", "default": [], "metavar": "K=V", "help": "any config key; repeatable"}),
    (CONFIGURED, "--seed", {"type": int, "help": "one seed; same seed, same machine, same result"}),
    ("train rehearse", "--stages", {"metavar": "A,B", "help": "only these stages"}),
    ("train rehearse", "--from", {"dest": "start", "metavar": "STAGE", "help": "this stage and those after it"}),
    ("chat serve", "run", {"nargs": "?", "metavar": "RUN", "help": "run directory (default runs/<tier>)"}),
    ("watch", "run", {"nargs": "?", "metavar": "RUN", "default": "runs/nano", "help": "default runs/nano"}),
    ("train", "--watch", {"action": "store_true", "help": "open a page that follows the run (command watch)"}),
    ("train watch", "--beside", {"metavar": "RUN", "help": "another run, drawn as a grey line behind this one"}),
    ("ladder", "--depths", {"metavar": "A,B,C", "help": "layers (default: three below the tier's, 2,3,4 of ladder)"}),
    ("ladder", "--seeds", {"type": int, "metavar": "N", "help": "runs of each depth (default 3)"}),
    ("ladder", "--next", {"dest": "further", "action": "store_true", "help": "train the depth that was predicted"}),
    ("ladder", "--against", {"action": "append", "default": [], "metavar": "FILE", "help": "another's ladder.json"}),
    ("ladder", "--plan", {"action": "store_true", "help": "hours and dollars on --target; nothing is trained"}),
    ("plan rehearse doctor compare ladder", "--json", {"action": "store_true", "help": "print one JSON object"}),
    ("serve watch", "--host", {"help": "address to serve on (default 127.0.0.1)"}),
    ("serve", "--port", {"type": int, "help": "port to serve on (default 8000)"}),
    ("train watch", "--port", {"type": int, "default": 8001, "help": "port of that page (default 8001)"}),
    ("plan ladder", "--target", {"default": "auto", "help": "auto, cpu:N, h100:N, v5e:RxC ...: docs/planning.md"}),
    ("plan", "--budget", {"metavar": "100usd", "help": "the deepest model that the money buys on --target"}),
    ("plan", "--hours", {"type": float, "metavar": "H", "help": "the deepest model that trains in the time"}),
    ("rehearse", "--keep", {"action": "store_true", "help": "keep what it has written"}),
    ("compare", "runs", {"nargs": 2, "metavar": "RUN", "help": "two run directories"}),
)
PROCESSES = (
    ("--coordinator", str, "JAX_COORDINATOR_ADDRESS", "HOST:PORT of process 0"),
    ("--processes", int, "JAX_NUM_PROCESSES", "how many there are"),
    ("--process-id", int, "JAX_PROCESS_ID", "which one this is, from 0"),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands but those of `INTEROP`."""
    parser = Parser(
        prog=errors.program,
        usage=command_line("[COMMAND] [options]"),
        description=__doc__,
        epilog=EPILOG.format(program=errors.program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jaxchat {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", prog=errors.program)
    parsers = {
        name: commands.add_parser(name, help=text, description=text, usage=command_line(f"{name} [options]"))
        for name, text in COMMANDS.items()
    }
    for names, flag, settings in OPTIONS:
        for name in names.split():
            parsers[name].add_argument(flag, **settings)
    several = parsers["train"].add_argument_group(
        "several processes", "found without flags under Slurm, Open MPI, Kubernetes and on TPU pods"
    )
    for flag, kind, variable, text in PROCESSES:
        several.add_argument(flag, type=kind, default=os.environ.get(variable), help=f"{text} (or {variable})")
    several.add_argument("--connect-timeout", type=int, default=300, metavar="S", help="seconds to wait for all (300)")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command and its options; `--chat`, `--plan` and other flags of older versions become commands."""
    words = list(argv)
    if not words or words[0] not in {*COMMANDS, "-h", "--help", "--version"}:
        flags = ["--ladder"] if "--ladder" in words else [word for word in words if word in ALIASES]
        if any(word.partition("=")[0] in ("--budget", "--hours") for word in words):
            flags.insert(0, "--plan")
        words = [flags[0].removeprefix("--") if flags else "train", *(word for word in words if word not in flags)]
    if words[0] in INTEROP:  # everything after the command is for jaxchat.interop
        return argparse.Namespace(command=words[0], words=words[1:])
    return make_parser().parse_args(words)


def api_keys() -> list[str]:
    return os.environ.get("JAXCHAT_API_KEYS", "").replace(",", " ").split()


def given_config(args: argparse.Namespace, default: str = "nano") -> tuple[Config, Path]:
    """Return what the tier's file and the arguments say, nothing derived yet, and the run directory."""
    chosen, talks = getattr(args, "run", None) or args.run_dir, args.command in ("chat", "serve")
    own = Path(chosen or Path("runs") / (args.tier or default)) / "config.toml"
    source: str | Path = args.config or args.tier or default
    # who talks to a finished run takes its own configuration, whatever the tier's file says by now
    if not args.config and own.exists() and (talks or (args.run_dir and not args.tier)):
        source = own
    if args.config and Path(args.config).is_dir():
        source = Path(args.config) / "config.toml"
    if args.config and not str(source).endswith(".toml") and str(source) not in [path.stem for path in tier_files()]:
        raise UsageError(f"--config {args.config}: give a TOML file, as the config.toml of a run")
    options = {
        "tier": args.tier if args.config else None,
        "data.source": args.data,
        "data.cache_dir": args.cache_dir,
        "train.init": getattr(args, "init", None),
        "seed": args.seed,
    }
    if args.command == "serve":  # the keys from the environment, since everybody can see arguments
        options |= {"serve.host": args.host, "serve.port": args.port, "serve.api_keys": api_keys() or None}
    named = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None]
    overrides = [*args.set, *named]
    names = Counter(item.partition("=")[0].strip() for item in overrides)
    if twice := sorted(name for name, count in names.items() if count > 1):
        from jaxchat.log import say

        say(f"{', '.join(twice)}: given more than once; the last value counts", style="yellow")
    config = load_config(source, overrides)
    if config.train.init and not talks:
        config = initialized(config, args, overrides, names, own, source == own)
    return config, Path(chosen or Path("runs") / config.tier)


def initialized(
    config: Config, args: argparse.Namespace, overrides: Sequence[str], names: Collection[str], own: Path, resumed: bool
) -> Config:
    """Return a configuration with the model of its `train.init`, and with its settings where no tier is named.

    Where all chosen stages come after pretraining, the weights are taken as they are: `train.steps` is 0.
    Args: names: the keys of the overrides; own: the run's config.toml, if there is one; resumed: it was read.
    """
    from jaxchat.interop.initial import find, init_config, with_init_model

    init, saved = config.train.init.rstrip("/"), load_config(own) if args.run_dir and own.exists() else None
    if args.command == "train" and not args.run_dir:
        raise UsageError("train.init: a run from given weights needs a directory of its own; add --run-dir runs/NAME")
    if saved and saved.train.init == init:  # the folder need not be there any more
        known = saved.model
    elif args.run_dir and find(init)[0].resolve() == own.parent.resolve():
        raise UsageError("train.init: is the run directory itself; give a new --run-dir, or raise train.steps instead")
    else:
        known = init_config(init).model
        if not resumed and not args.tier and not args.config:
            config = load_config(replaced(init_config(init), "serve", model_name=""), overrides)
    config = with_init_model(replaced(config, "train", init=init), known, names)
    if "train.steps" not in names and not resumed:
        steps = config.train.steps or -1
        if getattr(args, "stages", None) or getattr(args, "start", None):
            from train.stages import NAMES, named_stages

            asked = named_stages(args.stages, args.start)
            steps = 0 if asked.isdisjoint(NAMES[: NAMES.index("pretrain") + 1]) else steps
        config = replaced(config, "train", steps=steps)
    return config


def run(args: argparse.Namespace) -> int:
    """Run one command; returns the exit code."""
    prepare_environment()
    if not tier_files():
        raise DataError(f"{CONFIG_DIR}: no tiers; this jaxchat was installed without its data: install a whole one")
    if args.command == "tiers":
        for path in tier_files():  # each with the head comment of its file
            lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
            head = [line.lstrip("# ").rstrip().replace("python launch.py", errors.program) for line in lines]
            print(f"{path.stem}\n" + "\n".join(f"    {line}" for line in head if line) + "\n")
        return 0
    if args.command in INTEROP:
        from jaxchat.interop.__main__ import make_parser as make_interop_parser
        from jaxchat.interop.__main__ import run_command

        run_command(make_interop_parser(errors.program).parse_args([args.command, *args.words]))
        return 0
    if args.command in ("serve", "watch"):  # they ask no other machine
        os.environ["no_proxy"] = "*"  # and Gradio's import fails at proxies that httpx cannot use
    if args.command == "watch":
        from serve.watch import watch

        watch(Path(args.run), args.host or "127.0.0.1", args.port, api_keys(), args.beside and Path(args.beside))
        return 0
    plans = args.command == "plan" or (args.command == "ladder" and args.plan)
    if plans:
        prepare_plan(args.target)
    # training joins other processes first, doctor says what is missing, and a plan for another target counts its own
    if (plans and args.target == "auto") or (not plans and args.command in USES_DEVICES):
        from jaxchat.sharding import require_devices

        require_devices()
    if args.command == "compare":
        from train.compare import compare

        compare(args.runs[0], args.runs[1], as_json=args.json)
        return 0
    if args.command == "plan" and (args.budget is not None or args.hours is not None):
        from train.plan import plan_budget

        config, _ = given_config(args, "d20")
        if config.train.init:
            raise UsageError("--budget and --hours choose a depth, and the weights of train.init have one")
        plan_budget(config, args.target, args.budget, args.hours, as_json=args.json)
        return 0

    if args.command == "ladder":
        from train import ladder

        config, root = given_config(args, "ladder")
        if not args.run_dir and config.tier != "ladder":  # not that of the tier's own run
            root = root.with_name(f"ladder-{config.tier}")
        depths, following, seeds = shape = ladder.shape(root, config, args.depths, args.seeds)
        if args.plan:
            ladder.plan_ladder(config, [*depths, following], seeds, args.target, as_json=args.json)
        else:
            keep_programs(config.data.cache_dir)
            ladder.climb(config, root, shape, args.further, args.against, as_json=args.json)
        return 0

    from jaxchat.run_dir import RunDir
    from jaxchat.scaling import derivations, resolve

    given, root = given_config(args)
    config, directory = given, RunDir(root)
    if args.command in ("chat", "serve"):  # a run that can talk has its sizes, and the service's image no `train`
        if not directory.config.exists():
            raise DataError(f"{root}: not a run directory (no config.toml); train one first")
    else:
        from train.prepare import sized

        if args.command == "train":
            from train.stages import with_settings_of

            given = with_settings_of(directory, given)
        config = sized(given)
    config = resolve(config)
    if args.command in ("rehearse", "chat", "serve"):
        keep_programs(config.data.cache_dir)
    if args.command == "plan":
        from train.plan import plan

        plan(config, args.target, as_json=args.json)
    elif args.command == "doctor":
        from train.doctor import doctor

        doctor(config, root, as_json=args.json)
    elif args.command == "rehearse":
        from train.rehearse import rehearse
        from train.stages import select

        stages, reasons = select(args.stages, args.start), derivations(given, config)
        return 0 if rehearse(config, directory, stages, reasons, args.keep, as_json=args.json) else 1
    elif args.command == "chat":
        from serve.cli import chat

        chat(directory, config)
    elif args.command == "serve":
        from serve.app import serve

        serve(directory, config)
    else:
        if args.watch and not config.train.sample_every:
            config = replaced(config, "train", sample_every=config.train.eval_every)
        train(args, config, directory, derivations(given, config))
    return 0


@contextlib.contextmanager
def page_beside(args: argparse.Namespace, root: Path) -> Iterator[None]:
    """Show the page of a run in a process of its own: while it trains, here or elsewhere, and then until Ctrl-C."""
    from jaxchat.log import say
    from jaxchat.run_dir import RunInUse

    beside = ["--beside", args.beside] if args.beside else []
    page = subprocess.Popen([sys.executable, __file__, "watch", str(root), "--port", str(args.port), *beside])
    try:
        try:
            yield
        except RunInUse as error:
            say(f"{error.owner} trains this run already: the page shows it")
        except Exception:
            with contextlib.suppress(subprocess.TimeoutExpired):
                page.wait(4)  # who has it open asks every three seconds, and sees why
            raise
        if page.poll() is None:
            say("the page stays open until Ctrl-C", keep=False)
        with contextlib.suppress(KeyboardInterrupt, InterruptedRun):
            page.wait()
    finally:
        page.terminate()
        page.wait()


def train(args: argparse.Namespace, config: Config, directory: RunDir, reasons: dict[str, str]) -> None:
    """Run the stages; of several processes the first one alone prints."""
    import logging

    import jax

    from jaxchat import distributed
    from jaxchat.log import console, say
    from jaxchat.sharding import require_devices
    from train.plan import before_training
    from train.report import summarize
    from train.stages import run_stages, select, unfinished

    for name in ("asyncio", "concurrent.futures"):  # Orbax's threads, when a signal ends its event loop
        logging.getLogger(name).setLevel(logging.CRITICAL)
    stages = select(args.stages, args.start)
    chosen = args.set or any(value is not None for value in (args.tier, args.config, args.data, args.init, args.seed))
    if args.run_dir and not chosen and not directory.config.exists():
        raise DataError(f"{directory.root}: there is no such run; give --tier to begin one")
    pod = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    flags = (args.coordinator, args.processes, args.process_id, args.connect_timeout)
    if distributed.start(*flags, whole_host=whole_host(os.environ), indexed_pod=pod, complain=_complain):
        signal.signal(signal.SIGTERM, terminated)  # JAX's runtime replaces the handler
        console.quiet = distributed.index() > 0
        say(f"{jax.process_count()} processes, {jax.device_count()} devices")
    require_devices()
    keep_programs(config.data.cache_dir)
    say(f"jaxchat {config.tier} in {directory.root}")
    with page_beside(args, directory.root) if args.watch and not console.quiet else contextlib.nullcontext():
        if not console.quiet:
            before_training(config, directory, {stage.name for stage in stages} & set(unfinished(config, directory)))
        run_stages(config, directory, stages, reasons)
        if not console.quiet:
            summarize(directory, unfinished(config, directory))
        distributed.stop()  # the other processes do not wait for the page


# The process: environment, several processes, signals, exit codes


def prefer_huge_pages() -> None:
    """Start this process again with glibc's malloc asking for huge pages (Linux; elsewhere nothing happens).

    XLA takes and returns hundreds of MB in every CPU step; with 4 KiB pages a quarter of the time goes into page
    faults. Measured on the nano tier, interleaved: 1.22 times the tokens per second. glibc reads the setting at
    program start only, hence the exec: same process, same arguments. A setting of the user's own is left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        with contextlib.suppress(OSError):  # some sandboxes start no program; slower is better than not at all
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_environment() -> None:
    """Set what JAX's CUDA plugins and matplotlib read when they are imported.

    The LLVM in JAX's CUDA plugins 0.10.2 and 0.11.0 makes each float32 addition to memory, as in the embedding's
    gradient, a compare-and-swap loop on GPUs before Hopper, because the instruction flushes subnormal sums to zero
    (jax-ml/jax#38806; 0.11.1 mends it). An option of the user's own is left alone.
    """
    import logging
    from importlib.metadata import PackageNotFoundError, version

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns at length where the home is read-only
    option, flags = "--xla_backend_extra_options=", os.environ.get("XLA_FLAGS", "")
    for package in ("jax-cuda13-pjrt", "jax-cuda12-pjrt"):
        with contextlib.suppress(PackageNotFoundError):
            if version(package) in ("0.10.2", "0.11.0") and option not in flags:
                os.environ["XLA_FLAGS"] = f"{flags} {option}-nvptx-allow-ftz-atomics".strip()


def prepare_plan(target: str) -> None:
    """Before JAX is imported: a plan for another machine neither takes this one's accelerator nor looks for a TPU."""
    if target != "auto":
        quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
        here = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v6e-1"}
        alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # it only compiles: no chip to lock
        os.environ.update({"JAX_PLATFORMS": "cpu", **alone, **quiet, **here})


def keep_programs(cache_dir: str) -> None:
    """Keep compiled programs below `cache_dir`, unless JAX was told of a cache; a warning where that cannot be."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import warnings

    import jax

    from jaxchat.log import say

    try:
        folder = open_cache(cache_dir)
    except OSError as error:
        reason = error.strerror or str(error)
        say(f"compiled programs cannot be kept in {cache_dir} ({reason}); every start compiles anew", style="yellow")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)  # reading a small program takes 2 ms
    # a disk that becomes full costs the next start some seconds, and is no news for every single program
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def open_cache(cache_dir: str) -> Path:
    """Return the cache's folder, made for this user and kind of CPU; `OSError` where it cannot be used.

    What lies there is executed, so it must be the user's alone. What a killed process left unfinished (it has no time
    of use) is deleted, and all but the newest `CACHE_PROGRAMS`.
    """
    import hashlib
    import platform

    from jaxchat.run_dir import locked

    cpu = f"{platform.machine()} {platform.processor()}"  # a program that is compiled for another one may not run here
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        cpu += "".join(sorted({line for line in lines if line.partition("\t")[0].strip() in kinds}))
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = Path(cache_dir).expanduser() / "xla" / f"{user}-{hashlib.sha256(cpu.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and (folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022):
        raise OSError(f"{folder} can be written by others")
    with locked(folder / ".lockfile"):  # JAX's own lock
        programs = {path.name.removesuffix("-cache") for path in folder.glob("*-cache")}
        used = {path.name.removesuffix("-atime"): path.stat().st_mtime_ns for path in folder.glob("*-atime")}
        kept = set(sorted(programs & used.keys(), key=lambda name: used[name])[-CACHE_PROGRAMS:])
        for path in (*folder.glob("*-cache"), *folder.glob("*-atime")):
            if path.name.rpartition("-")[0] not in kept:
                path.unlink(missing_ok=True)
    return folder


def whole_host(env: Mapping[str, str]) -> bool:
    """Return whether a cluster started one process on this host, for all its devices."""
    nodes = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES"))
    alone = nodes == env.get("SLURM_NTASKS") if nodes else env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return alone and "JAX_LOCAL_DEVICE_IDS" not in env


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the contract."""
    signal.signal(signal.SIGTERM, terminated)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's is left alone
        signal.signal(signal.SIGHUP, terminated)
    sys.unraisablehook = _repeat_signal
    try:
        code = run(parse(sys.argv[1:] if argv is None else argv))
        _leave()
        return code
    except BrokenPipeError:
        return 0
    except (Exception, InterruptedRun, KeyboardInterrupt) as error:
        distributed = sys.modules.get("jaxchat.distributed")
        told = explained((distributed and distributed.lost(error)) or error)
        if not told:
            _leave("a fault, shown there", 1)
            raise
        message, code = told
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


def _repeat_signal(lost: Any) -> None:
    """Send a signal again whose exception was raised in a callback of the garbage collector, where Python drops it."""
    if not issubclass(lost.exc_type, KeyboardInterrupt | InterruptedRun):
        sys.__unraisablehook__(lost)
        return
    number = signal.SIGINT if issubclass(lost.exc_type, KeyboardInterrupt) else signal.SIGTERM
    again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()


def start() -> int:
    """Run one command in a process of its own."""
    if not {"-h", "--help", "--version"} & set(sys.argv):
        prefer_huge_pages()
    return main()


def installed() -> int:
    """Run the command `jaxchat` of pyproject.toml: `python launch.py` under its own name, from any directory."""
    sys.path.insert(0, str(Path(__file__).parent))  # as Python itself does for launch.py: train and serve are there
    errors.program = "jaxchat"
    return start()


if __name__ == "__main__":
    sys.exit(start())
