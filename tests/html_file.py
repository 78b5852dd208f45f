"""Read an HTML export back in Python, so that jaxchat's engine runs the very numbers that the page runs."""

import base64
import json
import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxchat.model import abstract_params
from jaxchat.sizes import value_layers

SCRIPT = '<script[^>]* id="{}">(.*?)</script>'


def parts(path):
    """(what the page knows of the model, base64 pieces, the worker's code)."""
    text = path.read_text(encoding="utf-8")
    model, worker = (re.search(SCRIPT.format(name), text, re.DOTALL)[1] for name in ("model", "worker"))
    return json.loads(model), re.findall('class="piece">([^<]*)<', text), worker


def params_of(path, config):
    """The file's weights as float32 parameters in the layout of training."""
    model, pieces, _ = parts(path)
    data = b"".join(map(base64.b64decode, pieces))
    flat = {}
    for name, leaf in flatten_dict(abstract_params(config), sep=".").items():
        short = name.removeprefix("blocks.")
        layers = value_layers(config) if short in ("value_embedding", "ve_gate") else range(config.depth)
        keys = [short] if short in model["tensors"] else [f"{short}.{i}" for i in layers]
        arrays = []
        for kind, at, rows, columns in (model["tensors"][key] for key in keys):
            scale = np.float32(1)
            if kind == "int8":
                scale, at = np.frombuffer(data, np.float32, rows, at)[:, None], at + 4 * rows
            values = np.frombuffer(data, kind, rows * columns, at).reshape(rows, columns) * scale
            table = short.endswith("embedding")
            if kind == "int8" and not table:
                values = values.T
            if table:
                values = np.pad(values, [(0, leaf.shape[-2] - rows), (0, 0)])
            arrays.append(values)
        flat[name] = np.stack(arrays).reshape(leaf.shape).astype(np.float32)
    return unflatten_dict(flat, sep=".")
