"""Run in a process of its own with 8 simulated devices: small programs whose collectives and products are known by
hand, compiled, and what `bench.hlo` reads from them, as JSON."""

import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.hlo import analyse

MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
ROW = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(MESH, P(("a", "b"))))  # 64 floats a device


def mapped(function):
    return jax.shard_map(function, mesh=MESH, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)


def scanned(body, length):
    return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, None, length=length)[0]


def reduce_in_scan(x):
    return mapped(scanned(lambda c: jax.lax.psum(c, ("a", "b")) * 0.5, 5))(x)


def gather_in_nested_scans(x):
    inner = scanned(lambda c: jax.lax.all_gather(c, "b").sum(0) * 0.5, 4)
    return mapped(scanned(inner, 3))(x)


def scatter_exchange_shift(x):
    def body(c):
        part = jax.lax.psum_scatter(c, "b", scatter_dimension=1, tiled=True)  # (1, 16)
        swapped = jax.lax.all_to_all(c.reshape(4, 16), "b", 0, 0)
        shifted = jax.lax.ppermute(c, "b", [(i, (i + 1) % 4) for i in range(4)])
        return shifted + swapped.reshape(1, 64) + jnp.tile(part, (1, 4))

    return mapped(scanned(body, 6))(x)


def products_in_scan(w):
    return scanned(lambda c: jnp.tanh(c @ w), 7)(jnp.ones((32, 48)))


def recomputed(w):
    layer = jax.checkpoint(lambda c: jnp.sin(jnp.sin(c @ w) @ w), prevent_cse=True)
    return jax.grad(lambda c: scanned(layer, 7)(c).sum())(jnp.ones((32, 48)))


def by_kind(program):
    kinds = {c.kind for c in program.collectives}
    of = {kind: [c for c in program.collectives if c.kind == kind] for kind in kinds}
    return {k: {"count": sum(c.count for c in cs), "bytes": sum(c.count * c.bytes for c in cs)} for k, cs in of.items()}


def read(function, argument):
    text = jax.jit(function).lower(argument).compile().as_text()
    found, blind = analyse(text, 8), analyse(re.sub(r'"known_trip_count":\{[^}]*\},?', "", text), 8)
    return {
        "collectives": by_kind(found),
        "without_notes": by_kind(blind),
        "groups": sorted({(c.kind, c.group) for c in found.collectives}),
        "sent": sum(c.count * c.sent_bytes for c in found.collectives),
        "flops": [found.product_flops, blind.product_flops],
        "recomputed": found.recomputed_flops,
        "buffers": found.buffers,
        "bytes": found.bytes,
        "unknown_loops": [found.unknown_loops, blind.unknown_loops],
    }


if __name__ == "__main__":
    square = jax.ShapeDtypeStruct((48, 48), jnp.float32)
    programs = {f.__name__: read(f, ROW) for f in (reduce_in_scan, gather_in_nested_scans, scatter_exchange_shift)}
    programs |= {f.__name__: read(f, square) for f in (products_in_scan, recomputed)}
    print(json.dumps(programs))
