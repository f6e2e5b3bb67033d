"""What the architectures' modules share: how Hugging Face names things, and packs them."""

import math

import numpy as np

from ..config import (
    MOST_EXPERTS,
    MOST_LAYERS,
    ROTARY,
    Rotary,
    dimension,
    flag,
    number,
    token_ids,
)
from ..errors import FormatError

# Our name -> the checkpoint's, of Llama and the many that follow it; {} is the layer.
NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    **{
        f"layers.{{}}.{p}_proj.{kind}": f"model.layers.{{}}.self_attn.{p}_proj.{kind}"
        for p in "qkvo"
        for kind in ("weight", "bias")
    },
    **{
        f"layers.{{}}.{p}_norm.weight": f"model.layers.{{}}.self_attn.{p}_norm.weight" for p in "qk"
    },
    **{
        f"layers.{{}}.ffn.{p}_bias": f"model.layers.{{}}.mlp.{p}_proj.bias"
        for p in ("gate", "up", "down")
    },
}
FFN = {p: f"model.layers.{{}}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
# The same of a mixture's experts, one tensor each.
EXPERTS = {
    p: f"model.layers.{{}}.mlp.experts.{{expert}}.{p}_proj.weight" for p in ("gate", "up", "down")
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "fatrelu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def dimensions(config, d_ffn="intermediate_size", tied=False):
    """The options of ModelConfig that nearly every config has under the same name."""
    hidden_size = dimension(config, "hidden_size")
    heads = dimension(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden_size % heads:
        raise FormatError(
            f"config: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    most = dimension(config, "max_position_embeddings")
    kind, scaling = rotary_kind(config)
    if kind == "dynamic":  # made to go on behind it
        most = int(most * number(scaling, "factor"))
    bos = token_ids(config, "bos_token_id")
    return {
        "vocab_size": dimension(config, "vocab_size"),
        "hidden_size": hidden_size,
        "embedding_size": hidden_size,
        "d_ffn": dimension(config, d_ffn),
        "num_hidden_layers": dimension(config, "num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": dimension(config, "num_key_value_heads", heads),
        "head_dim": dimension(config, "head_dim", hidden_size // heads),
        "max_position_embeddings": most,
        "tied": flag(config, "tie_word_embeddings", tied),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": token_ids(config, "eos_token_id"),
    }


def usual_options(config, epsilon, share=1.0):
    """``dimensions``, ``activation``, ``rotary`` and the norms' epsilon, in one.

    epsilon  the key it has, and its default; share: of each head that is rotary
    """
    common = dimensions(config)
    return {
        **common,
        **activation(config),
        "rotary": rotary(config, common["head_dim"], share),
        "norm_epsilon": number(config, *epsilon),
    }


def mixture(config, neurons="moe_intermediate_size", normalised=True):
    """ModelConfig's options of a layer's experts; neurons: the key of how many each has."""
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = dimension(config, key, most=MOST_EXPERTS)
    if dimension(config, "decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise FormatError("config: layers without experts between those with are not supported")
    return {
        "d_ffn": experts * dimension(config, neurons),
        "experts": experts,
        "experts_per_token": dimension(config, "num_experts_per_tok"),
        "router_normalised": flag(config, "norm_topk_prob", normalised),
    }


def activation(config, key="hidden_act"):
    """ModelConfig's ``activation`` and ``threshold``. Raises FormatError where it is unknown."""
    name = config.get(key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise FormatError(
            f"config: {key} {str(name)[:40]!r} is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    threshold = number(config, "hidden_act_param", 0.01) if name == "fatrelu" else 0.0
    return {"activation": ACTIVATIONS[name], "threshold": threshold}


def rotary_kind(config):
    """One of ROTARY and its parameters, in the old form (rope_scaling) or new (rope_parameters)."""
    scaling = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise FormatError(f"config: {key} is {str(found)[:40]!r}, not an object")
        scaling.update(found)
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in ROTARY:
        raise FormatError(
            f"config: rotary positions {str(kind)[:40]!r} are not supported; "
            f"supported: {', '.join(ROTARY)}"
        )
    return kind, scaling


def rotary(config, head_dim, share=1.0):
    """The Rotary of a config, by which the first ``share`` of each head is turned."""
    kind, scaling = rotary_kind(config)
    base = number(scaling, "rope_theta", number(config, "rope_theta", 10000.0))
    share = number(scaling, "partial_rotary_factor", number(config, "partial_rotary_factor", share))
    most = dimension(config, "max_position_embeddings")
    original = dimension(config, "original_max_position_embeddings", most)
    scaling["original_max_position_embeddings"] = dimension(
        scaling, "original_max_position_embeddings", original
    )
    scaling["max_position_embeddings"] = most
    if base <= 1 or scaling["original_max_position_embeddings"] < 2:
        raise FormatError(f"config: rotary positions of base {base} are not angles")
    dim = int(min(share, 1.0) * head_dim)
    return Rotary(dim, base, kind, _checked(kind, scaling, dim))


def _checked(kind, scaling, dim):
    """The parameters that a kind of rotary positions needs. Raises FormatError."""
    if kind == "llama3":
        low, high = number(scaling, "low_freq_factor"), number(scaling, "high_freq_factor")
        if high <= low:
            raise FormatError(f"config: high_freq_factor {high} is not above low_freq_factor {low}")
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        values = scaling.get(key)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise FormatError(f"config: {key} is not a list of {dim // 2} numbers")
        for value in values:
            number({key: value}, key)
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if scaling.get(key) is not None:
            number(scaling, key)
    if kind in ("yarn", "longrope") and scaling.get("factor") is None:
        known = scaling["max_position_embeddings"] / scaling["original_max_position_embeddings"]
        scaling["factor"] = known
    if kind != "default":
        number(scaling, "factor")
    return scaling


def sliding_windows(config, layers):
    """ModelConfig's ``sliding_windows`` by ``layer_types``, or one ``sliding_window`` for all."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return ()
    window = dimension(config, "sliding_window")
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    first = config.get("max_window_layers") if "use_sliding_window" in config else 0
    first = first if isinstance(first, int) else 0
    return tuple(window if layer >= first else 0 for layer in range(layers))


def interleaved(part):
    """Rows of a packed query_key_value: for each key/value head its queries, its key, its value."""

    def rows(config):
        group = config.num_attention_heads // config.num_key_value_heads
        shape = (config.num_key_value_heads, group + 2, config.head_dim)
        ids = np.arange(math.prod(shape)).reshape(shape)
        chosen = {"q": ids[:, :group], "k": ids[:, group], "v": ids[:, group + 1]}
        return chosen[part].reshape(-1)

    return rows


def behind(part):
    """Rows of a packed qkv_proj: all queries, then all keys, then all values."""

    def rows(config):
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        begin = {"q": 0, "k": queries, "v": queries + keys}[part]
        return begin + np.arange(queries if part == "q" else keys)

    return rows
