"""One run under JAX's profiler: which kernels ran, how long each kind took, and how long the device waited.

XLA launches kernels singly while a profile is taken; without one it may start many at once as a CUDA graph. Busy time
is therefore comparable between the two, the gaps between kernels are not: subtract busy time from unprofiled wall time.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileOptions

from train.hlo import COLLECTIVES, Instruction, Program

KINDS = ("products", "attention", "scatter", "collectives", "copies", "elementwise", "unknown")
CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")  # their kernels are events of their own
# Names of kernels that XLA did not make itself, and of instructions where the program's text is not at hand.
FLASH = re.compile(r"fmha|flash|sdpa|attention", re.I)
PRODUCT = re.compile(r"gemm|cublas|cutlass|nvjet|xmma|matmul|(^|[_.])dot([_.]|$)", re.I)
COPY = re.compile(r"^(memcpy|memset|copy|wrapped_copy|wrapped_slice|dynamic_update_slice)", re.I)


@dataclass(frozen=True)
class Kernel:
    """One execution. `instruction`: the HLO instruction it belongs to, "" where the profiler does not say."""

    name: str
    instruction: str
    begin: float  # ns
    end: float

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / 1e9


def record(run: Callable[[], Any]) -> list[Kernel]:
    """Call `run` under the profiler and return the kernels of the first device, in order of their begin."""
    options = ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        kernels: list[Kernel] = []
        for file in Path(folder).rglob("*.xplane.pb"):
            kernels += read_kernels(ProfileData.from_file(str(file)))
    return sorted(kernels, key=lambda kernel: kernel.begin)


def read_kernels(profile: ProfileData) -> list[Kernel]:
    """Return what ran on the first device: the streams of a GPU, or the instructions that a CPU's threads ran."""
    planes = {plane.name: plane for plane in profile.planes}
    devices = sorted(name for name in planes if name.startswith("/device:GPU"))
    kernels = []
    for line in planes[devices[0] if devices else "/host:CPU"].lines:
        if devices and not line.name.startswith("Stream"):  # derived lines repeat the kernels
            continue
        for event in line.events:
            stats = dict(event.stats)
            if devices or "hlo_op" in stats:
                end = event.start_ns + event.duration_ns
                kernels.append(Kernel(event.name, str(stats.get("hlo_op", "")), event.start_ns, end))
    return kernels


def busy_seconds(kernels: Iterable[Kernel]) -> float:
    """Return the time in which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        total += max(0.0, kernel.end - max(kernel.begin, reached))
        reached = max(reached, kernel.end)
    return total / 1e9


class Classifier:
    """Sorts kernels into `KINDS` by the optimized program's text, and by their names where it does not help."""

    def __init__(self, text: str = ""):
        self._computations = Program(text).computations
        fused = {
            i.called("calls") for c in self._computations.values() for i in c if i.opcode == "fusion"
        }  # fmt: skip
        run = (i for name, c in self._computations.items() if name not in fused for i in c)
        self._instructions = {_plain(i.name): i for i in run}

    def __call__(self, kernel: Kernel) -> str | None:
        """The kind; None for what only contains other kernels."""
        for name in (kernel.instruction, kernel.name):
            if found := self._instructions.get(_plain(name)):
                return self.kind(found)
        if kernel.instruction.split(".")[0] in CONTAINERS:
            return None
        for pattern, kind in ((FLASH, "attention"), (PRODUCT, "products"), (COPY, "copies")):
            if pattern.search(kernel.name):
                return kind
        return "scatter" if "scatter" in kernel.name else "elementwise" if "fusion" in kernel.name else "unknown"

    def kind(self, i: Instruction) -> str | None:
        """The kind of an instruction that is not inside a fusion."""
        if i.opcode in CONTAINERS:
            return None
        inside = [i, *self._computations.get(i.called("calls"), [])]
        opcodes, root = {x.opcode for x in inside}, inside[-1]
        target = " ".join(re.findall(r'(?:custom_call_target=|"kind":)"([^"]*)"', i.attributes))
        # the layer that an operation comes from stands in its name: jax.named_scope in jaxchat/attention.py
        if FLASH.search(target) or "/attention/" in i.attributes.replace("(attention)", "/attention/"):
            return "attention"
        if opcodes & {"dot", "convolution"} or PRODUCT.search(target):
            return "products"
        if "scatter" in opcodes:
            return "scatter"
        if any(i.opcode.startswith(kind) for kind in COLLECTIVES):
            return "collectives"
        if i.opcode == "copy" or root.opcode in ("dynamic-update-slice", "copy"):
            return "copies"
        return "elementwise"


def _plain(name: str) -> str:
    """Kernels are named after instructions, with underscores where those have dots and dashes."""
    return re.sub(r"[.\-]", "_", name.removeprefix("%"))


def split(kernels: list[Kernel], classify: Classifier, top: int = 20) -> dict[str, Any]:
    """Return busy time, gaps, each kind's seconds, kernels and share, and the kernels that took longest."""
    seconds: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    by_name: dict[str, list[Any]] = {}
    leaves = [(kernel, kind) for kernel in kernels if (kind := classify(kernel))]
    for kernel, kind in leaves:
        seconds[kind] += kernel.seconds
        counts[kind] += 1
        entry = by_name.setdefault(kernel.instruction or kernel.name, [0.0, 0, kind, kernel.name])
        entry[0] += kernel.seconds
        entry[1] += 1
    total = sum(seconds.values())
    busy = busy_seconds(kernel for kernel, _ in leaves)
    span = (max(k.end for k, _ in leaves) - min(k.begin for k, _ in leaves)) / 1e9 if leaves else 0.0
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:top]
    return {
        "kernels": len(leaves),
        "span_seconds": round(span, 6),
        "busy_seconds": round(busy, 6),
        "gap_share": round(1 - busy / span, 4) if span else None,
        "kinds": {
            kind: {
                "seconds": round(seconds[kind], 6),
                "kernels": counts[kind],
                "share": round(seconds[kind] / total, 4),
            }
            for kind in KINDS
            if kind in seconds
        },
        "longest": [
            {"instruction": name, "kernel": kernel, "kind": kind, "seconds": round(spent, 6), "calls": calls}
            for name, (spent, calls, kind, kernel) in longest
        ],
    }
