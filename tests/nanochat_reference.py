"""nanochat's two models in torch, written here from their description, with its names of the tensors: what an import is
held against. October 2025 (`modern=False`): full attention, rotary base 10,000. Since March 2026 (`modern=True`): short
windows, value embeddings, residual scalars, smear, backout, queries and keys scaled by 1.2, rotary base 100,000.
"""

import torch
from torch.nn import functional as F

SHAPES = {"sequence_len": 512, "vocab_size": 293, "n_layer": 5, "n_head": 6, "n_kv_head": 2, "n_embd": 96}


def norm(x):
    return F.rms_norm(x, (x.shape[-1],), eps=1.1920929e-7)


def with_table(layer, layers):
    return layer % 2 == (layers - 1) % 2


def state_dict(modern, shapes=SHAPES, seed=0):
    """Random tensors under nanochat's names, none of them zero; the present layout pads the vocabulary to 64."""
    c, draw = shapes, torch.Generator().manual_seed(seed)
    D, kv = c["n_embd"], c["n_kv_head"] * (c["n_embd"] // c["n_head"])
    rows = -(-c["vocab_size"] // 64) * 64 if modern else c["vocab_size"]

    def matrix(out, inner, scale=None):
        return torch.randn(out, inner, generator=draw) * (scale or inner**-0.5)

    found = {"transformer.wte.weight": matrix(rows, D, 1.0), "lm_head.weight": matrix(rows, D, 0.3)}
    for i in range(c["n_layer"]):
        h = f"transformer.h.{i}."
        found |= {h + "attn.c_q.weight": matrix(D, D), h + "attn.c_k.weight": matrix(kv, D),
                  h + "attn.c_v.weight": matrix(kv, D), h + "attn.c_proj.weight": matrix(D, D),
                  h + "mlp.c_fc.weight": matrix(4 * D, D), h + "mlp.c_proj.weight": matrix(D, 4 * D)}  # fmt: skip
        if modern and with_table(i, c["n_layer"]):
            found[h + "attn.ve_gate.weight"] = matrix(c["n_kv_head"], 12)
            found[f"value_embeds.{i}.weight"] = matrix(rows, kv, 0.5)
    if modern:
        found["resid_lambdas"] = 0.8 + 0.4 * torch.rand(c["n_layer"], generator=draw)
        found["x0_lambdas"] = 0.1 + 0.3 * torch.rand(c["n_layer"], generator=draw)
        found["smear_gate.weight"] = matrix(1, 24)
        found |= {"smear_lambda": torch.tensor([0.7]), "backout_lambda": torch.tensor([0.3])}
    return found


def logits(tensors, ids, modern, shapes=SHAPES):
    """(B, T, V) float32 of ids (B, T)."""
    c, w = shapes, {name: t.float() for name, t in tensors.items()}
    T, N, L = ids.shape[1], c["n_embd"] // c["n_head"], c["n_layer"]
    angle = torch.arange(T)[:, None] * (100_000.0 if modern else 10_000.0) ** (-torch.arange(0, N, 2) / N)
    cos, sin = angle.cos(), angle.sin()
    ago = torch.arange(T)[:, None] - torch.arange(T)[None]

    def turned(x):  # (B, heads, T, N), by minus theta
        a, b = x.chunk(2, dim=-1)
        return norm(torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)) * (1.2 if modern else 1.0)

    x = norm(w["transformer.wte.weight"][ids])
    if modern:
        gate = w["smear_lambda"] * torch.sigmoid(x[:, 1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
    first = middle = x
    for i in range(L):
        h = f"transformer.h.{i}."
        if modern:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * first
        z = norm(x)
        q, k, v = ((z @ w[f"{h}attn.c_{n}.weight"].T).view(*ids.shape, -1, N).transpose(1, 2) for n in "qkv")
        if modern and with_table(i, L):
            gate = 3 * torch.sigmoid(z[..., :12] @ w[h + "attn.ve_gate.weight"].T)  # (B, T, kv heads)
            table = w[f"value_embeds.{i}.weight"][ids].view(*ids.shape, -1, N).transpose(1, 2)
            v = v + gate.transpose(1, 2)[..., None] * table
        short = modern and "SSSL"[i % 4] == "S" and i < L - 1
        seen = (ago >= 0) & (ago <= (128 if short else T))
        shared = c["n_head"] // c["n_kv_head"]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        scores = (turned(q) @ turned(k).transpose(2, 3) * N**-0.5).masked_fill(~seen, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*ids.shape, -1)
        x = x + y @ w[h + "attn.c_proj.weight"].T
        x = x + F.relu(norm(x) @ w[h + "mlp.c_fc.weight"].T).square() @ w[h + "mlp.c_proj.weight"].T
        middle = x if i == L // 2 else middle
    x = norm(x - w["backout_lambda"] * middle) if modern else norm(x)
    return 15 * torch.tanh(x @ w["lm_head.weight"][: c["vocab_size"]].T / 15)
