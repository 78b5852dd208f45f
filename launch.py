"""jaxchat: from raw text to a chat page. `python launch.py --tier nano`; see --help and docs/."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

# Before any import that reads them: no telemetry from the page, no log lines of libraries between ours.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():  # both at once: an error
    os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"

try:
    from jaxchat.config import Config, load_config, tier_files
    from jaxchat.errors import DataError, InterruptedRun, JaxchatError, OutOfMemoryError, UsageError
    from jaxchat.log import console, say
    from jaxchat.run_dir import RunDir
except ModuleNotFoundError as missing:
    print(f"error: {missing.name} is not installed here; run pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


def prefer_huge_pages() -> None:
    """Start this process again with glibc's malloc asking for huge pages (Linux; elsewhere nothing happens).

    XLA takes and returns hundreds of MB in every CPU step; with 4 KiB pages a quarter of the time goes into page
    faults. Measured on the nano tier, interleaved: 1.22 times the tokens per second. glibc reads the setting at
    program start only, hence the exec: same process, same arguments. A setting of the user's own is left alone.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def native_atomics(flags: str, plugin: str) -> str:
    """Return XLA_FLAGS with the option that keeps float32 additions to memory single instructions, where it is needed.

    The LLVM in JAX's CUDA plugins 0.10.2 and 0.11.0 makes each a compare-and-swap loop on GPUs before Hopper, because
    the instruction flushes subnormal sums to zero (jax-ml/jax#38806; 0.11.1 mends it). The embedding's gradient is
    such additions. An option of the user's own is kept.
    """
    option, switch = "--xla_backend_extra_options=", "-nvptx-allow-ftz-atomics"
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", plugin)
    version = tuple(map(int, found.groups())) if found else (0, 0, 0)
    if not (0, 10, 2) <= version < (0, 11, 1) or switch.lstrip("-") in flags:
        return flags
    if option in flags:
        return flags.replace(option, f"{option}{switch},", 1)
    return f"{flags} {option}{switch}".strip()


for package in ("jax-cuda13-pjrt", "jax-cuda12-pjrt"):
    with contextlib.suppress(PackageNotFoundError):
        if flags := native_atomics(os.environ.get("XLA_FLAGS", ""), version(package)):
            os.environ["XLA_FLAGS"] = flags


class Parser(argparse.ArgumentParser):
    """One line and exit code 2 for bad arguments."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see python launch.py --help")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", help="configs/NAME.toml (default: nano)")
    parser.add_argument("--tiers", action="store_true", help="list the tiers with hardware, time and cost")
    parser.add_argument("--config", metavar="FILE", help="repeat a run from its saved config.toml")
    parser.add_argument("--run-dir", metavar="DIR", help="default runs/<tier>; alone, the run's own config is taken")
    parser.add_argument("--data", metavar="SOURCE", help="pretraining text: files:GLOB, hf:REPO, chitchat ...")
    parser.add_argument("--cache-dir", metavar="DIR", help="downloads and compiled programs (default ~/.cache/jaxchat)")
    parser.add_argument("--stages", metavar="A,B", help="only these stages")
    parser.add_argument("--from", dest="start", metavar="STAGE", help="this stage and those after it")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="any config key; may be repeated")
    parser.add_argument("--seed", type=int, help="one seed; same seed, same machine, same result")
    parser.add_argument("--plan", action="store_true", help="dry run: memory, time and cost; nothing is trained")
    parser.add_argument(
        "--target",
        default="auto",
        help="of --plan: auto, cpu:N, h100:N, rtx4090:N and other GPUs, v5e:RxC, v6e:RxC, v5p:AxBxC; docs/planning.md",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="every stage on this machine with few steps: what the whole run will take, and what would go wrong; "
        "exit code 1 if anything would",
    )
    parser.add_argument("--keep", action="store_true", help="with --rehearse: keep what it has written")
    parser.add_argument("--budget", metavar="100usd", help="plan the deepest model that the money buys on --target")
    parser.add_argument("--hours", type=float, metavar="H", help="plan the deepest model that trains in the time")
    parser.add_argument("--doctor", action="store_true", help="what this machine can do, and what to install for more")
    parser.add_argument("--compare", nargs=2, metavar="RUN", help="two run directories side by side, in pairs")
    parser.add_argument(
        "--json", action="store_true", help="with --plan, --doctor, --compare and --rehearse: one JSON object"
    )
    hosts = parser.add_argument_group(
        "several processes", "found by itself under Slurm, Open MPI, Kubernetes, on TPU pods"
    )
    for name, kind, text in (
        ("--coordinator", str, "HOST:PORT of process 0"),
        ("--processes", int, "how many there are"),
        ("--process-id", int, "which one this is, from 0"),
    ):
        variable = "JAX_" + {"--coordinator": "COORDINATOR_ADDRESS", "--processes": "NUM_PROCESSES"}.get(
            name, "PROCESS_ID"
        )
        hosts.add_argument(name, type=kind, default=os.environ.get(variable), help=f"{text} (or {variable})")
    hosts.add_argument("--connect-timeout", type=int, default=300, metavar="S", help="seconds to wait for all (300)")
    parser.add_argument("--chat", action="store_true", help="talk to the finished run in the terminal")
    parser.add_argument("--serve", action="store_true", help="serve the finished run: chat page and HTTP API")
    parser.add_argument("--host", help="address to serve on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to serve on (default 8000)")
    return parser


def prepare_plan(target: str) -> None:
    """Before JAX is imported: a plan for another machine neither takes this one's accelerator nor looks for a TPU."""
    if target != "auto":
        quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
        here = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v6e-1"}
        alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # it only compiles: no chip to lock
        os.environ.update({"JAX_PLATFORMS": "cpu", **alone, **quiet, **here})


def resolve_arguments(args: argparse.Namespace) -> tuple[Config, RunDir, dict[str, str]]:
    """(resolved configuration, run directory, why each derived key has its value)."""
    from jaxchat.scaling import derivations, resolve
    from train.prepare import sized

    given = given_config(args)
    config = resolve(sized(given))
    return config, RunDir(args.run_dir or Path("runs") / config.tier), derivations(given, config)


def given_config(args: argparse.Namespace, default: str = "nano") -> Config:
    """What the tier's file and the arguments say, nothing derived yet."""
    source: str | Path = args.config or args.tier or default
    own = RunDir(args.run_dir or Path("runs") / (args.tier or default)).config
    talking = args.chat or args.serve  # to what is finished, whatever became of its text since
    if not args.config and own.exists() and (talking or (args.run_dir and not args.tier)):
        source = own
    overrides = list(args.set)
    for key, value in (("data.source", args.data), ("data.cache_dir", args.cache_dir), ("serve.host", args.host)):
        if value is not None:
            overrides.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    for key, value in (("seed", args.seed), ("serve.port", args.port)):
        if value is not None:
            overrides.append(f"{key}={value}")
    if args.serve and (keys := os.environ.get("JAXCHAT_API_KEYS", "").replace(",", " ").split()):
        overrides.append(f"serve.api_keys={json.dumps(keys, ensure_ascii=False)}")  # arguments are for all to see
    given = load_config(source, overrides)
    if args.tier and args.config:
        given = dataclasses.replace(given, tier=args.tier)
    return given


def join_processes(args: argparse.Namespace) -> None:
    """Start JAX's runtime of several processes where flags or a cluster ask for it; all but process 0 fall silent."""
    import jax

    from jaxchat import distributed as hosts

    joined = hosts.start(
        args.coordinator,
        args.processes,
        args.process_id,
        args.connect_timeout,
        whole_host=whole_host(os.environ),
        indexed_pod="KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ,
        complain=_complain,
    )
    if joined:
        signal.signal(signal.SIGTERM, _terminated)  # JAX's runtime takes it for its own
        console.quiet = hosts.index() > 0
        say(f"{jax.process_count()} processes, {jax.device_count()} devices")


def whole_host(env: Mapping[str, str]) -> bool:
    """Whether a cluster started one process on this host, for all its devices (`JAX_LOCAL_DEVICE_IDS` says which)."""
    nodes = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES"))
    alone = nodes == env.get("SLURM_NTASKS") if nodes else env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return alone and "JAX_LOCAL_DEVICE_IDS" not in env


def keep_programs(config: Config) -> None:
    """Turn JAX's persistent compilation cache on, unless the user has said in JAX's own words where it shall be."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        from jaxchat.xla_cache import use_cache

        use_cache(config.data.cache_dir)


def list_tiers() -> None:
    """Print each tier with the head comment of its file."""
    for path in tier_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        head = [line.lstrip("# ").rstrip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
        print(f"{path.stem}\n" + "\n".join(f"    {line}" for line in head if line) + "\n")


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; the exit code."""
    if args.tiers:
        list_tiers()
        return 0
    if args.plan or args.budget or args.hours:
        prepare_plan(args.target)
    if args.budget or args.hours:
        from train.plan import plan_budget

        plan_budget(given_config(args, "d20"), args.target, args.budget, args.hours, as_json=args.json)
        return 0
    if args.compare:
        from train.compare import compare

        compare(args.compare[0], args.compare[1], as_json=args.json)
        return 0
    if args.keep and not args.rehearse:
        raise UsageError("--keep: it is for --rehearse; a run keeps its directory anyway")
    config, directory, reasons = resolve_arguments(args)
    if args.plan:
        from train.plan import plan

        plan(config, args.target, as_json=args.json)
    elif args.rehearse:
        from train.rehearse import rehearse
        from train.stages import select

        if any(value is not None for value in (args.coordinator, args.processes, args.process_id)):
            raise UsageError("--rehearse: it takes one process, and the devices of one host")
        stages = select(args.stages, args.start)
        keep_programs(config)
        return 0 if rehearse(config, directory, stages, reasons, args.keep, as_json=args.json) else 1
    elif args.doctor:
        from train.doctor import doctor

        doctor(config, directory.root, as_json=args.json)
    elif args.chat:
        from serve.cli import chat

        keep_programs(config)
        chat(directory, config)
    elif args.serve:
        from serve.app import serve

        keep_programs(config)
        serve(directory, config)
    else:
        from train.preflight import before_training
        from train.report import summarize
        from train.stages import run_stages, select, unfinished

        stages = select(args.stages, args.start)
        told = (args.tier, args.config, args.data, args.seed, *args.set)
        if args.run_dir and not directory.config.exists() and all(word is None for word in told):
            raise DataError(f"{directory.root}: there is no such run; give --tier to begin one")
        join_processes(args)
        keep_programs(config)
        say(f"jaxchat {config.tier} in {directory.root}")
        if not console.quiet:
            before_training(config, directory, stages)
        run_stages(config, directory, stages, reasons)
        if not console.quiet:
            summarize(directory, unfinished(config, directory))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code of the contract."""
    signal.signal(signal.SIGTERM, _terminated)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's is left alone
        signal.signal(signal.SIGHUP, _terminated)
    sys.unraisablehook = _lost_on_the_way
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where there is no home to write it says so at length
    try:
        code = run(make_parser().parse_args(argv)) or 0
        _leave()
    except (JaxchatError, InterruptedRun) as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", InterruptedRun.exit_code)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}; what was complete is kept", 3)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            advice = "out of device memory: lower eval.batch_rows (exams) or serve.slots (--serve)"
            return _fail(advice, OutOfMemoryError.exit_code)  # training says by itself what fits: train/loop.py
        hosts = sys.modules.get("jaxchat.distributed")
        if hosts and (lost := hosts.lost(error)):
            return _fail(str(lost), lost.exit_code)
        _leave("a fault, shown there", 1)
        raise
    return code


def _fail(message: str, code: int) -> int:
    _complain(message, code)
    _leave(message, code)
    return code


def _complain(message: str, code: int) -> None:
    console.quiet = False  # also where only process 0 speaks
    console.print(f"error: {message}" if code != InterruptedRun.exit_code else message, markup=False, soft_wrap=True)


def _leave(message: str = "", code: int = 0) -> None:
    """End JAX's runtime of several processes, if it was started; after a failure the others are told."""
    if hosts := sys.modules.get("jaxchat.distributed"):
        hosts.fail(message, code) if code else hosts.stop()


def _terminated(number: int, frame: Any) -> None:
    raise InterruptedRun(f"stopped by {signal.Signals(number).name}; the same command goes on from here")


def _lost_on_the_way(found: Any) -> None:
    """What is raised inside a callback of the garbage collector (JAX has one) or a destructor goes no further; a signal
    that came just then comes once more."""
    if issubclass(found.exc_type, KeyboardInterrupt | InterruptedRun):
        number = signal.SIGINT if issubclass(found.exc_type, KeyboardInterrupt) else signal.SIGTERM
        again = threading.Timer(0.01, _send, (number,))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(found)


def _send(number: int) -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # wakes it, too
    else:
        _thread.interrupt_main(signal.Signals(number))


if __name__ == "__main__":
    prefer_huge_pages()
    sys.exit(main())
