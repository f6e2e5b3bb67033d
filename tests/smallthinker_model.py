"""SmallThinker in plain PyTorch, as its authors define it: its code is not in transformers."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn


def normed(x, weight, epsilon):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def turned(x, base):
    """Heads (heads, T, head_dim), whose values i and i + head_dim / 2 are turned together."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None] * speed
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Layer(nn.Module):
    def __init__(self, c, turns, window):
        super().__init__()
        self.c, self.turns, self.window = c, turns, window
        d, heads, width = c.hidden_size, c.num_attention_heads, c.head_dim
        keys = c.num_key_value_heads * width
        self.input_layernorm, self.post_attention_layernorm = nn.Module(), nn.Module()
        for norm in (self.input_layernorm, self.post_attention_layernorm):
            norm.weight = nn.Parameter(torch.ones(d))
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(d, heads * width, bias=False),
            "k_proj": nn.Linear(d, keys, bias=False),
            "v_proj": nn.Linear(d, keys, bias=False),
            "o_proj": nn.Linear(heads * width, d, bias=False),
        })  # fmt: skip
        moe = self.block_sparse_moe = nn.Module()
        moe.primary_router = nn.Linear(d, c.moe_num_primary_experts, bias=False)
        moe.experts = nn.ModuleList(
            nn.ModuleDict({
                "up": nn.Linear(d, c.moe_ffn_hidden_size, bias=False),
                "gate": nn.Linear(d, c.moe_ffn_hidden_size, bias=False),
                "down": nn.Linear(c.moe_ffn_hidden_size, d, bias=False),
            })
            for _ in range(c.moe_num_primary_experts)
        )  # fmt: skip

    def attention(self, x):
        width = self.c.head_dim
        q, k, v = (
            self.self_attn[f"{p}_proj"](x).view(len(x), -1, width).transpose(0, 1) for p in "qkv"
        )
        if self.turns:
            q, k = turned(q, self.c.rope_theta), turned(k, self.c.rope_theta)
        k, v = (part.repeat_interleave(len(q) // len(k), 0) for part in (k, v))
        behind = torch.arange(len(x))[:, None] - torch.arange(len(x))
        seen = (behind >= 0) & (behind < (self.window or len(x)))
        scores = (q @ k.transpose(1, 2) * width**-0.5).masked_fill(~seen, -torch.inf)
        heads = scores.softmax(-1) @ v
        return self.self_attn["o_proj"](heads.transpose(0, 1).reshape(len(x), -1))

    def forward(self, h):
        c, moe = self.c, self.block_sparse_moe
        scores, chosen = moe.primary_router(h).topk(c.moe_num_active_primary_experts)
        if c.moe_primary_router_apply_softmax:
            weights = scores.softmax(-1)
        else:
            weights = scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)
        h = h + self.attention(normed(h, self.input_layernorm.weight, c.rms_norm_eps))
        x, y = normed(h, self.post_attention_layernorm.weight, c.rms_norm_eps), []
        for token, ids, shares in zip(x, chosen, weights, strict=True):
            experts = (moe.experts[int(i)] for i in ids)
            each = (e["down"](e["up"](token) * e["gate"](token).relu()) for e in experts)
            y.append(sum(share * one for share, one in zip(shares, each, strict=True)))
        return h + torch.stack(y)


class SmallThinker(nn.Module):
    """With the usual values of the fields that ``options`` leaves out."""

    def __init__(self, options):
        super().__init__()
        usual = {
            "moe_primary_router_apply_softmax": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "tie_word_embeddings": True, "sliding_window_size": 4096,
        }  # fmt: skip
        self.options = {**options, "model_type": "smallthinker"}
        c = self.c = self.config = SimpleNamespace(**{**usual, **options})
        layers = c.num_hidden_layers
        turns = options.get("rope_layout") or [1] * layers
        slides = options.get("sliding_window_layout") or [0] * layers
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(
            Layer(c, turn, c.sliding_window_size if slide else None)
            for turn, slide in zip(turns, slides, strict=True)
        )
        self.model.norm = nn.Module()
        self.model.norm.weight = nn.Parameter(torch.ones(c.hidden_size))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.2)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids):
        h = self.model.embed_tokens(ids[0])
        for layer in self.model.layers:
            h = layer(h)
        logits = self.lm_head(normed(h, self.model.norm.weight, self.c.rms_norm_eps))
        return SimpleNamespace(logits=logits[None])

    def save_pretrained(self, folder):
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        if self.c.tie_word_embeddings:
            del tensors["lm_head.weight"]
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder) / "model.safetensors")
        config = json.dumps(self.options, indent=2)
        (Path(folder) / "config.json").write_text(config + "\n")
