"""What the architectures' modules share: how Hugging Face names things, and packs them."""

import math
from collections.abc import Callable

import numpy as np

from ..arrays import AnyArray
from ..config import MOST_LAYERS, Options
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, number, token_ids
from ..layers.layer import LayerConfig
from .rope import ROPE, longest, rope_parameters, rotary

# Which rows of a packed tensor a layer's projection is.
Rows = Callable[[LayerConfig], AnyArray]
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
# The fields of Llama's config class and of the many that follow it, and what is taken where a
# config leaves them out.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **ROPE,
}


def without(defaults: Fields, *fields: str) -> Fields:
    """The defaults of a config class that has no use for these fields."""
    return {key: value for key, value in defaults.items() if key not in fields}


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def dimensions(config: Fields, d_ffn: str = "intermediate_size") -> Options:
    """The options of ``model_of`` that nearly every config has under the same name."""
    hidden_size = dimension(config, "hidden_size")
    heads = dimension(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden_size % heads:
        raise FormatError(
            f"config: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    vocab_size = dimension(config, "vocab_size")
    # A pruned vocabulary leaves special ids beyond its end; they can never occur.
    begins = [id for id in token_ids(config, "bos_token_id") if id < vocab_size]
    ends = [id for id in token_ids(config, "eos_token_id") if id < vocab_size]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "embedding_size": hidden_size,
        "d_ffn": dimension(config, d_ffn),
        "num_hidden_layers": dimension(config, "num_hidden_layers", most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": dimension(config, "num_key_value_heads", heads),
        "head_dim": dimension(config, "head_dim", hidden_size // heads),
        "max_position_embeddings": dimension(config, "max_position_embeddings"),
        "tied": flag(config, "tie_word_embeddings"),
        "bos_token_id": begins[0] if begins else None,
        "eos_token_ids": tuple(ends),
    }


def usual_options(
    config: Fields,
    epsilon: str = "rms_norm_eps",
    d_ffn: str = "intermediate_size",
    partly: bool = False,
) -> Options:
    """``dimensions``, ``activation``, ``rotary`` and the norms' epsilon, in one.

    epsilon, d_ffn  the keys of these; partly: whether a part of each head may be rotary
    """
    common = dimensions(config, d_ffn)
    turned = rotary(config, rope_parameters(config), common["head_dim"], partly)
    return {
        **common,
        **activation(config),
        "rotary": turned,
        "max_position_embeddings": longest(turned, common["max_position_embeddings"]),
        "norm_epsilon": number(config, epsilon, zero=True),
    }


def attention_biases(config: Fields) -> Options:
    """``model_of``'s options where ``attention_bias`` stands for all four projections."""
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def activation(config: Fields, key: str = "hidden_act") -> Options:
    """FFNConfig's ``activation`` and ``threshold``. Raises FormatError where it is unknown."""
    name = config[key]
    if name == "fatrelu" and "hidden_act_param" in config:
        return {"activation": "relu", "threshold": number(config, "hidden_act_param", zero=True)}
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise FormatError(
            f"config: {key} {shown(name)} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return {"activation": ACTIVATIONS[name]}


def interleaved(part: str) -> Rows:
    """Rows of a packed query_key_value: for each key/value head its queries, its key, its value."""

    def rows(layer: LayerConfig) -> AnyArray:
        sizes = layer.attention
        group = sizes.num_attention_heads // sizes.num_key_value_heads
        shape = (sizes.num_key_value_heads, group + 2, sizes.head_dim)
        ids = np.arange(math.prod(shape)).reshape(shape)
        chosen = {"q": ids[:, :group], "k": ids[:, group], "v": ids[:, group + 1]}
        return chosen[part].reshape(-1)

    return rows


def behind(part: str) -> Rows:
    """Rows of a packed qkv_proj: all queries, then all keys, then all values."""

    def rows(layer: LayerConfig) -> AnyArray:
        queries, keys = (layer.attention.projections()[p][0] for p in "qk")
        begin = {"q": 0, "k": queries, "v": queries + keys}[part]
        return begin + np.arange(queries if part == "q" else keys)

    return rows


def by_head(part: str, order: Callable[[int], AnyArray]) -> Rows:
    """Rows of a projection of queries or keys, of which each head has the values that are turned in
    another order: ``order`` of so many values says which of them comes first, second and so on."""

    def rows(layer: LayerConfig) -> AnyArray:
        sizes = layer.attention
        turned = sizes.rotary.dim if sizes.rotary else 0
        of_head = np.concatenate([order(turned), np.arange(turned, sizes.head_dim)])
        heads = sizes.projections()[part][0] // sizes.head_dim
        return (np.arange(heads)[:, None] * sizes.head_dim + of_head).reshape(-1)

    return rows


# Where rotary positions turn neighbours (2 i, 2 i + 1): they turn (i, i + dim / 2) here.
PAIRED_ROWS = {
    f"{p}_proj": by_head(p, lambda dim: np.arange(dim).reshape(-1, 2).T.reshape(-1)) for p in "qk"
}
