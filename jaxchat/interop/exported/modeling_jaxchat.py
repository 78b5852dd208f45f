"""jaxchat's GPT for Hugging Face's transformers, in torch. It needs `configuration_jaxchat.py` and the weights.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Axes: B batch, T new tokens, S tokens in all (cached ones first; of a static cache all places), H query heads, K kv
heads, N head width, D width.

It is transformers' NanoChat (QK-norm after rotary embeddings that turn by minus theta, relu squared, norms without
weights, capped logits) and, as the config says: short windows, value embeddings (arXiv 2410.17897), learned residual
scalars, smear (part of the previous token's embedding is added), bigrams (so is an embedding of the pair of tokens),
keys of which a half is the previous token's, backout (the middle layer's output is subtracted).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_jaxchat import JaxchatConfig

VE_GATE_CHANNELS = 12  # of a layer's normed input that gate its value embedding
SMEAR_CHANNELS = 24  # of an embedding that gate its smear
UINT32 = 2**32 - 1
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # since 5.24


def norm(x: Tensor, eps: float) -> Tensor:
    """Return RMSNorm over the last axis without weights, computed in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, heads, T, N) by minus theta, halves split; cos and sin (B, 1, T, N/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: JaxchatConfig, layer: int):
        super().__init__()
        self.config, self.layer, D, K = config, layer, config.hidden_size, config.num_key_value_heads
        HN, KN = config.num_attention_heads * config.head_dim, K * config.head_dim
        self.q_proj, self.o_proj = nn.Linear(D, HN, bias=False), nn.Linear(HN, D, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(D, KN, bias=False) for _ in range(2))
        if layer in (config.value_embedding_layers or ()):
            self.ve_gate = nn.Linear(VE_GATE_CHANNELS, K, bias=False)

    def forward(
        self, h: Tensor, value: Tensor | None, cos_sin: Any, mask: Tensor, real: Tensor, cache: Cache | None, at: Tensor
    ) -> Tensor:
        """Return the attention's output (B, T, D).

        h: (B, T, D) normed; value: (B, T, K*N) the tokens' value embeddings; mask: (B, 1, T, S), true where seen; real:
        (B, S), false on padding; at: (T,) the tokens' places in the cache.
        """
        c, (B, T, _) = self.config, h.shape
        q, k, v = (p(h).view(B, T, -1, c.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if value is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(h[..., :VE_GATE_CHANNELS]))
            v = v + gate[..., None] * value.view(v.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = (norm(rotate(x, *cos_sin), c.rms_norm_eps) * c.qk_scale for x in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer, {"cache_position": at})
        if c.key_offset:  # the slowly rotating half of a key is that of the token before
            slow = torch.arange(c.head_dim, device=k.device) % (c.head_dim // 2) >= c.head_dim // 4
            k = torch.where(slow, F.pad(k, (0, 0, 1, -1)) * F.pad(real, (1, -1))[:, None, :, None].to(k.dtype), k)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self, config: JaxchatConfig, layer: int):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.self_attn, self.eps = Attention(config, layer), config.rms_norm_eps
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, F, bias=False), "fc2": nn.Linear(F, D, bias=False)})

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.self_attn(norm(x, self.eps), *rest)
        return x + self.mlp["fc2"](self.mlp["fc1"](norm(x, self.eps)).relu().square())


class Trunk(nn.Module):
    def __init__(self, config: JaxchatConfig):
        super().__init__()
        c, L = config, config.num_hidden_layers
        self.config, self.windows = config, config.layer_windows or [config.max_position_embeddings] * L
        self.rope_theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 100_000.0)
        self.value_layers = config.value_embedding_layers or []
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([Block(c, i) for i in range(L)])
        if self.value_layers:
            width = c.num_key_value_heads * c.head_dim
            tables = {str(i): nn.Embedding(c.vocab_size, width) for i in self.value_layers}
            self.value_embeddings = nn.ModuleDict(tables)
        if c.residual_scalars:
            self.residual_scale, self.x0_scale = nn.Parameter(torch.ones(L)), nn.Parameter(torch.zeros(L))
        if c.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_scale = nn.Parameter(torch.zeros(1))
        if c.bigram_rows:
            self.bigram_embeddings = nn.Embedding(c.bigram_rows, c.hidden_size)
        if c.backout:
            self.backout_scale = nn.Parameter(torch.zeros(1))

    def forward(
        self, ids: Tensor, real: Tensor, positions: Tensor, cache: Cache | None, at: Tensor, states: list[Tensor] | None
    ) -> Tensor:
        """Return last normed activations (B, T, D) of ids (B, T).

        real (B, S): false on padding; positions (B, T); at (T,): places in the cache; what each layer reads and the
        result are added to `states`.
        """
        c = self.config
        x = self.embed(ids, self.previous(ids, real, cache, at) if c.smear or c.bigram_rows else None)
        masks = {w: self.mask(real, at, w) for w in set(self.windows)}
        cos_sin = self.rotary(positions, x.dtype)
        x0 = x
        for i, layer in enumerate(self.layers):
            if states is not None:
                states.append(x)
            if c.residual_scalars:
                x = (self.residual_scale[i].float() * x.float() + self.x0_scale[i].float() * x0.float()).to(x.dtype)
            value = self.value_embeddings[str(i)](ids) if i in self.value_layers else None
            x = layer(x, value, cos_sin, masks[self.windows[i]], real, cache, at)
            if i == c.num_hidden_layers // 2:
                middle = x
        if c.backout:
            x = (x.float() - self.backout_scale.float() * middle.float()).to(x.dtype)
        x = norm(x, c.rms_norm_eps)
        if states is not None:
            states.append(x)
        return x

    def previous(self, ids: Tensor, real: Tensor, cache: Cache | None, at: Tensor) -> Tensor:
        """Return the token before each one (B, T), -1 where there is none.

        Ids are kept as one more layer of the cache, so that whatever cuts, repeats or reorders a cache does the same to
        them.
        """
        kept = ids[:, None, :, None]
        if cache is not None:
            L = self.config.num_hidden_layers
            while len(cache.layers) <= L:
                cache.layers.append(StaticLayer(real.shape[1]) if cache.is_compileable else DynamicLayer())
            kept, _ = cache.update(kept, kept[..., :0], L, {"cache_position": at})
        before, there = (F.pad(x, (1, 0)).index_select(1, at) for x in (kept[:, 0, :, 0], real))
        return before.masked_fill(~there, -1)

    def embed(self, ids: Tensor, previous: Any) -> Tensor:
        """Return embeddings (B, T, D) with what the token before each adds to them."""
        c = self.config
        e = norm(self.embed_tokens(ids), c.rms_norm_eps)
        x = e.float()
        if c.smear:
            before = norm(self.embed_tokens(previous.clamp(min=0)), c.rms_norm_eps) * (previous >= 0)[..., None]
            gate = self.smear_scale.float() * torch.sigmoid(self.smear_gate(e[..., :SMEAR_CHANNELS])).float()
            x = x + gate * before.float()
        if c.bigram_rows:
            mixed = (previous * 0xC2B2AE35 + ids * 0x9E3779B1) & UINT32
            mixed = ((mixed ^ (mixed // 2**15)) * 0x85EBCA6B) & UINT32
            x = x + self.bigram_embeddings((mixed ^ (mixed // 2**13)) % c.bigram_rows).float()
        return x.to(e.dtype)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin (B, 1, T, N/2); made here, since loading wipes tables that are not in the checkpoint."""
        half = torch.arange(0, self.config.head_dim, 2, device=positions.device, dtype=torch.float32)
        angle = positions[:, None, :, None].float() * self.rope_theta ** (-half / self.config.head_dim)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    @staticmethod
    def mask(real: Tensor, at: Tensor, window: int) -> Tensor:
        """Return (B, 1, T, S): a token sees itself and `window` tokens before it; padding sees itself, not nothing."""
        i, j = at[:, None], torch.arange(real.shape[1], device=real.device)[None, :]
        return (real[:, None, None, :] & (j <= i) & (i - j <= window)) | (i == j)


class JaxchatForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = JaxchatConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Trunk"]  # noqa: RUF012 - the first embedding and the middle layer's output are used again at the end
    accepts_loss_kwargs = False  # the loss is a plain mean over the batch, which a trainer then averages itself
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: JaxchatConfig):
        super().__init__(config)
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Embedding:
        raise ValueError("value embeddings have a row for every token, so the vocabulary cannot be resized")

    def create_masks_for_generate(self, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """Keep the mask (B, tokens) that `generate` would expand for a static cache: `forward` makes its own."""
        return attention_mask

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V) float32, capped; with `labels` (B, T) the mean loss of every next token but -100.

        `logits_to_keep`: of the last so many positions (0: all), or of those positions. `cache`: another name of
        `past_key_values`, since transformers 5.24. Hidden states: what every layer reads, and the last normed
        activations. Attention weights are not returned.
        """
        if input_ids is None:
            raise ValueError("give input_ids: value embeddings are looked up by token, so inputs_embeds cannot do")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None and labels is None:
            cache = DynamicCache(config=self.config)
        (B, T), past = input_ids.shape, cache.get_seq_length() if cache is not None else 0
        at, static = past + torch.arange(T, device=input_ids.device), cache is not None and cache.is_compileable
        S = cache.layers[0].max_cache_len if static else past + T
        if attention_mask is None:
            attention_mask = torch.ones(B, S, device=input_ids.device)
        if not static and attention_mask.shape[1] != S:
            raise ValueError(f"attention_mask is for {attention_mask.shape[1]} tokens, and cached and new ones are {S}")
        real = F.pad(attention_mask.bool(), (0, S - attention_mask.shape[1]))
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0).index_select(1, at)
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] | None = [] if want_states else None
        x = self.model(input_ids, real, position_ids, cache, at, states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        z = self.lm_head(x[:, kept]).float()
        cap = self.config.final_logit_softcapping
        z = cap * torch.tanh(z / cap)
        loss = None if labels is None else F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        outputs: dict[str, Any] = {"loss": loss, "logits": z, CACHE_FIELD: cache if use_cache else None}
        return CausalLMOutputWithPast(**outputs, hidden_states=None if states is None else tuple(states))
