"""The parts of `bench.gpu`: python -m bench.gpu_parts PART SETTINGS prints a JSON object for every finding.

Neither Grain nor Gradio is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import curve, decode, machine, trace
from bench.train_step import measure, random_trainer
from jaxchat.attention import attention, choose_backend, disagreement, has_fp8
from jaxchat.config import Config, load_config
from jaxchat.engine import Engine
from jaxchat.errors import first_line
from jaxchat.low_precision import E4M3, fp8_dot
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.sizes import flops_per_token, mlp_width, peak_flops, scan_groups, windows
from jaxchat.train_state import compute_dtype
from train.compiled import compile_step, rows_and_accumulation

Findings = Iterator[dict[str, Any]]
TOY = ("model.depth=4", "model.width=32", "model.n_heads=2", "model.n_kv_heads=2", "model.head_width=16",
       "model.vocab_size=300", "model.seq_len=256", 'model.window_pattern="SL"', "train.batch_tokens=1024",
       "train.device_batch_rows=2", "train.steps=100")  # fmt: skip
STEP_TOKENS = 2**19  # accumulated, so that the optimizer weighs what it weighs in a real run
VARIANTS = {"scanned": ("train.remat=names",), "unrolled": ("train.remat=names",), "none": ("train.remat=none",)}
BACKWARD = 2.5  # products of attention's backward pass over those of its forward pass


@dataclasses.dataclass(frozen=True)
class Settings:
    """What bench.gpu was asked for; `work`: a folder that all parts of one call share."""

    toy: bool
    work: str
    nanochat: str | None
    python: str
    text: str
    steps: int

    def config(self, tier: str, *overrides: str) -> Config:
        sizes = TOY if self.toy else (f"train.batch_tokens={STEP_TOKENS}",)
        return resolve(load_config(tier, [*sizes, *overrides]))

    def variant(self, tier: str, name: str) -> Config:
        """The step of a tier, with everything that the variants differ in written out."""
        unroll = 1 if name == "scanned" else scan_groups(self.config(tier).model)[0]
        return self.config(tier, f"train.scan_unroll={unroll}", *VARIANTS[name])


def device(settings: Settings) -> Findings:
    """What is here, whether the fast attention is right, and the two ceilings of everything else."""
    config = settings.config("d20")
    first = jax.devices()[0]
    yield machine.about() | {"peak_tflops": _tera(peak_flops(first.device_kind)), "fp8": has_fp8(first)}
    if first.platform == "cpu" and not settings.toy:
        return  # the command refuses to measure a CPU at full size
    dtype = compute_dtype(config, make_mesh(config.mesh))
    backend, why = choose_backend(config.model, dtype, first)
    yield {"attention": backend, "why": why, "disagreement": disagreement(backend, config.model, dtype)}
    rate = machine.product_rate(dtype, 512 if settings.toy else 8192)
    yield {"dtype": dtype.name, "product_tflops": _tera(rate), "bandwidth": round(machine.bandwidth())}


def attention_alone(settings: Settings) -> Findings:
    """Every window of d12 and d20 in every backend, forward and with its gradients."""
    for tier in ("d12", "d20"):
        config = settings.config(tier)
        model, mesh = config.model, make_mesh(config.mesh)
        dtype, chip = compute_dtype(config, mesh), mesh.devices.flat[0]
        B, T, H, K, N = config.train.device_batch_rows, model.seq_len, model.n_heads, model.n_kv_heads, model.head_width
        shapes = [(B, T, H, N), (B, T, K, N), (B, T, K, N), (B, T, H, N)]
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, g = (jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True))
        for window in sorted(set(windows(model))):
            pairs = sum(min(t, window) + 1 for t in range(T))  # that a query sees: what must be computed
            flops = 4 * B * H * N * pairs
            for backend in dict.fromkeys((choose_backend(model, dtype, chip)[0], "xla")):
                forward = functools.partial(attention, window=window, backend=backend)
                about = {"tier": tier, "rows": B, "window": window, "backend": backend, "dtype": dtype.name}
                yield about | _attempt(lambda f=forward, q=q, k=k, v=v, g=g, n=flops: _time_attention(f, n, q, k, v, g))


def _time_attention(forward: Callable[..., Any], flops: float, *inputs: jax.Array) -> dict[str, Any]:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        y, pull = jax.vjp(forward, q, k, v)
        return y, pull(g)

    once = machine.median_seconds(jax.jit(forward), *inputs[:3])
    whole = machine.median_seconds(jax.jit(both), *inputs)
    return {
        "forward_ms": round(1e3 * once, 4),
        "forward_backward_ms": round(1e3 * whole, 4),
        "forward_tflops": _tera(flops / once),
        "forward_backward_tflops": _tera((1 + BACKWARD) * flops / whole),
    }


def products(settings: Settings) -> Findings:
    """The product shapes of d20, each with the two of its gradient, in 16 bits and with 8-bit operands."""
    config = settings.config("d20")
    model, mesh = config.model, make_mesh(config.mesh)
    M, D, F, V = config.train.device_batch_rows * model.seq_len, model.width, mlp_width(model), model.vocab_size
    dtype, peak = compute_dtype(config, mesh), peak_flops(mesh.devices.flat[0].device_kind)
    shapes = {"q, k, v, o": (D, D), "q, k, v as one": (D, 3 * D), "fc": (D, F), "proj": (F, D), "logits": (D, V)}
    for name, (inner, outer) in shapes.items():
        x, w, g = (
            jax.random.normal(key, shape, dtype)
            for key, shape in zip(
                jax.random.split(jax.random.key(0), 3), [(M, inner), (inner, outer), (M, outer)], strict=True
            )
        )
        whole: dict[str, tuple[Any, Any, Any]] = {
            "forward": (lambda a, b: a @ b, x, w),
            "gradient of x": (lambda a, b: a @ b.T, g, w),
            "gradient of w": (lambda a, b: a.T @ b, x, g),
            "forward fp8, operands given": (_fp8_product, x.astype(E4M3), w.astype(E4M3)),
            "forward fp8, scaling included": (fp8_dot, x, w),
        }
        for which, (multiply, a, b) in whole.items():
            about = {"product": name, "which": which, "shape": [M, inner, outer], "dtype": dtype.name}
            flops = 2 * M * inner * outer
            yield about | _attempt(lambda f=multiply, a=a, b=b, n=flops: _time_product(f, n, peak, a, b))


def _fp8_product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.bfloat16)


def _time_product(multiply: Callable[..., Any], flops: float, peak: float | None, *inputs: jax.Array) -> dict[str, Any]:
    seconds = machine.median_seconds(jax.jit(multiply), *inputs)
    share = round(flops / seconds / peak, 4) if peak else None
    return {"ms": round(1e3 * seconds, 4), "tflops": _tera(flops / seconds), "share_of_16_bit_peak": share}


def step(settings: Settings, tier: str, variant: str) -> Findings:
    """The real training step. Rows that do not fit are halved until they do."""
    config = settings.variant(tier, variant)
    steps = 1 if settings.toy else 10 if tier == "d12" else 6
    yield from _fitting(config, lambda config: measure(config, steps))


def profile(settings: Settings) -> Findings:
    """One step of d20, split by kind of kernel."""
    yield from _fitting(settings.variant("d20", "unrolled"), _profiled)


def _profiled(config: Config) -> dict[str, Any]:
    trainer, _ = random_trainer(config)
    wall = min(trainer.step() for _ in range(2))
    kernels = trace.record(trainer.step)
    found = trace.split(kernels, trace.Classifier(trainer.compiled.as_text()))
    flops = config.train.batch_tokens * flops_per_token(config.model)
    return {"tier": config.tier, "step_seconds": round(wall, 4), "flops": flops} | found


def decoding(settings: Settings) -> Findings:
    """Answers of d20's shape at 1, 32 and 128 rows: tokens a second, share of the memory's limit, launch gaps."""
    sizes = ["--batch-sizes", "1,4", "--prompt", "16", "--tokens", "24", "--rounds", "1"] if settings.toy else [
        "--batch-sizes", "1,32,128"]  # fmt: skip
    overrides = [part for override in TOY for part in ("--set", override)] if settings.toy else []
    args = decode.make_parser().parse_args(["--tier", "d20", "--profile", *sizes, *overrides])
    yield from decode.measure(*decode.load(args), args, "auto")


def curve_ours(settings: Settings) -> Findings:
    """The first steps of d12 on real text."""
    config = settings.variant("d12", "unrolled")
    yield _rows(settings, config)
    yield from curve.ours(config, Path(settings.work))


def curve_nanochat(settings: Settings) -> Findings:
    """nanochat's first steps on the same tokens. This process leaves the GPU to it."""
    jax.config.update("jax_platforms", "cpu")
    config = settings.variant("d12", "unrolled")
    if not (Path(settings.work) / curve.ROWS).exists():
        yield _rows(settings, config)
    assert settings.nanochat
    yield from curve.nanochat(config, Path(settings.work), Path(settings.nanochat), settings.python, dict(os.environ))


def _rows(settings: Settings, config: Config) -> dict[str, Any]:
    begin = time.perf_counter()
    text = curve.write_rows(config, settings.steps, settings.text, Path(settings.work))
    return text | {"seconds": round(time.perf_counter() - begin, 1)}


def compiling(settings: Settings) -> Findings:
    """Seconds that the compiler takes: nothing cached, and read from JAX's cache on the disk."""
    jax.config.update("jax_compilation_cache_dir", f"{settings.work}/compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_enable_compilation_cache", True)

    def twice(run: Callable[[], float]) -> dict[str, float]:
        found = {}
        for name in ("nothing_cached", "from_disk"):
            jax.clear_caches()
            found[name] = round(run(), 2)
        return found

    for tier, name in (("d12", "unrolled"), ("d20", "unrolled"), ("d20", "scanned")):
        config = settings.variant(tier, name)  # at toy size the two tiers are one program, which the disk then has
        mesh = make_mesh(config.mesh)
        rows, accumulate = rows_and_accumulation(config, mesh)
        found = _attempt(lambda c=config, m=mesh, r=rows, a=accumulate: twice(lambda: compile_step(c, m, r, a).seconds))
        yield {"program": f"step of {tier}, {name}"} | found
    sets = [part for override in TOY for part in ("--set", override)] if settings.toy else []
    sizes = ["--prompt", "16", "--tokens", "24"] if settings.toy else []
    args: argparse.Namespace = decode.make_parser().parse_args(["--tier", "d20", *sizes, *sets])
    config, params, tokenizer = decode.load(args)

    def warm_up() -> float:
        engine = Engine(config.model, params, tokenizer)
        begin = time.perf_counter()
        engine.programs.warm_up()
        return time.perf_counter() - begin

    yield {"program": "engine of d20, 8 slots"} | _attempt(lambda: twice(warm_up))


def _fitting(config: Config, run: Callable[[Config], dict[str, Any]]) -> Findings:
    rows = config.train.device_batch_rows
    while True:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, device_batch_rows=rows))
        found = _attempt(lambda config=config: run(config))
        yield {"rows": rows} | found
        if not found.get("out_of_memory") or rows == 1:
            return
        rows //= 2
        jax.clear_caches()


def _attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or its error: one case that fails must not end the others."""
    try:
        return run()
    except Exception as error:  # also what a kernel's library throws
        return {"error": first_line(error, 300), "out_of_memory": machine.out_of_memory(error)}


def _tera(rate: float | None) -> float | None:
    return round(rate / 1e12, 3) if rate else None


PARTS: dict[str, Callable[[Settings], Findings]] = {
    "device": device,
    "attention": attention_alone,
    "products": products,
    **{
        f"step-{tier}-{variant}": functools.partial(step, tier=tier, variant=variant)
        for tier in ("d12", "d20")
        for variant in VARIANTS
    },
    "profile": profile,
    "decode": decoding,
    "curve": curve_ours,
    "curve-nanochat": curve_nanochat,
    "compile": compiling,
}


def main(part: str, settings: Settings) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # seconds of compiling are among what is measured
    for finding in PARTS[part](settings):
        print(json.dumps(finding), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Settings(**json.loads(sys.argv[2])))
