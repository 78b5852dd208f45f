"""Run in a process of its own with 4 simulated devices: an engine over all of them against one device, as JSON."""

import json
import random

import jax
import numpy as np
from small_model import CAPACITY, CONFIG, QUESTION, tokenizer

from jaxchat import model as gpt
from jaxchat.config import MeshConfig
from jaxchat.engine import Engine, Request
from jaxchat.engine import device as programs
from jaxchat.engine.constraint import Constraint
from jaxchat.engine.device import decode_chunk
from jaxchat.sharding import make_mesh

programs.PROMPT_CHUNK = programs.MIN_CACHE_BUCKET = 32


def requests(count: int, constraint: Constraint) -> list[Request]:
    rng, made = random.Random(1), []
    for i in range(count):
        length = rng.choice([1, 5, 20, 33, 70, CAPACITY])
        drawn = {"temperature": rng.choice([0.0, 1.2]), "seed": i, "repetition_penalty": rng.choice([1.0, 1.4])}
        drawn |= {"frequency_penalty": rng.choice([0.0, 0.6]), "constraint": rng.choice([None, None, constraint])}
        made.append(Request([rng.randrange(270) for _ in range(length)], max_tokens=rng.randint(1, 12), **drawn))
    return made


def everything(engine: Engine) -> list[list[int]]:
    """Tokens of many requests: short and long ones, groups, a conversation that goes on, a calculator call."""
    asked = requests(14, engine.constraint(json={"type": "object"}))
    handles = [engine.submit(request) for request in asked[:5]]
    engine.step()
    handles += engine.submit_group(Request(asked[5].tokens, max_tokens=6, temperature=1.0), [1, 2, 3])
    handles += [engine.submit(request) for request in asked[6:]]
    handles.append(engine.submit(engine.chat_request(QUESTION, max_tokens=25)))
    gone = engine.submit(asked[0])
    engine.step()
    engine.cancel(gone)
    engine.finish(handles)
    tokens = [handle.tokens for handle in handles]
    longer = [*handles[-1].request.tokens, *tokens[-1], *range(20, 45)]
    for _ in range(2):
        last = engine.submit(Request(longer, max_tokens=8))
        engine.finish([last])
        tokens.append([last.reused, *last.tokens])
        longer = [*longer, *last.tokens, 7]
    return tokens


if __name__ == "__main__":
    assert jax.device_count() == 4
    leaves, tree = jax.tree.flatten(gpt.init_params(CONFIG, seed=0))
    draw = np.random.default_rng(0)
    leaves = [np.asarray(a) + 0.2 * draw.standard_normal(a.shape).astype(np.float32) for a in leaves]
    params = jax.tree.unflatten(tree, leaves)
    alone = Engine(CONFIG, params, tokenizer(), slots=8)
    spread = Engine(CONFIG, params, tokenizer(), slots=8, mesh=make_mesh(MeshConfig()))
    p = spread.programs
    static = {"rows": 2, "bucket": 32, "steps": 8, "capacity": CAPACITY}
    chunk, arguments, _ = p._ready(decode_chunk, (p.state, np.full(4, 8, np.int32)), static)
    print(
        json.dumps(
            {
                "alone": everything(alone),
                "spread": everything(spread),
                "split": len({s.device for s in p.state.cache.k[0].addressable_shards}) == 4,
                "text": chunk.lower(*arguments).compile().as_text(),
            }
        )
    )
