"""What the architectures' modules share: how Hugging Face names things, and packs them."""

import math
from dataclasses import replace

import numpy as np

from ..config import (
    LARGEST,
    MOST_EXPERTS,
    MOST_LAYERS,
    ROTARY,
    Rotary,
    dimension,
    flag,
    number,
    shown,
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
# The same of a mixture's experts, one tensor each; or all of a layer's in two.
EXPERTS = {
    p: f"model.layers.{{}}.mlp.experts.{{expert}}.{p}_proj.weight" for p in ("gate", "up", "down")
}
FUSED_EXPERTS = {
    part: f"model.layers.{{}}.mlp.experts.{name}"
    for part, name in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj"))
}
FUSED_ROWS = {  # of each expert's matrix in them
    "gate": lambda config: np.arange(config.unit_neurons),
    "up": lambda config: np.arange(config.unit_neurons, 2 * config.unit_neurons),
}

# The fields of a config class that stand for rotary positions, in the older form and the new, and
# what is taken where a config leaves them out.
ROPE = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}
# The same of all fields that Llama and the many that follow it have.
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


def without(defaults, *fields):
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


def dimensions(config, d_ffn="intermediate_size"):
    """The options of ModelConfig that nearly every config has under the same name."""
    hidden_size = dimension(config, "hidden_size")
    heads = dimension(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden_size % heads:
        raise FormatError(
            f"config: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}"
        )
    vocab_size = dimension(config, "vocab_size")
    # Ids beyond the vocabulary are those of a model that was made smaller: they never occur.
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


def usual_options(config, epsilon="rms_norm_eps", d_ffn="intermediate_size", partly=False):
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


def mixture(plain, config, normalised):
    """The ModelConfig of layers of experts, each of which is the FFN of ``plain``.

    normalised  whether the weights of the experts that a token uses add up to 1
    """
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise FormatError(
            "config: layers without experts between those with (decoder_sparse_step, "
            "mlp_only_layers) are not supported"
        )
    experts = dimension(config, key, most=MOST_EXPERTS)
    return replace(
        plain,
        d_ffn=experts * plain.d_ffn,
        experts=experts,
        experts_per_token=dimension(config, "num_experts_per_tok"),
        router_normalised=normalised,
    )


def activation(config, key="hidden_act"):
    """ModelConfig's ``activation`` and ``threshold``. Raises FormatError where it is unknown."""
    name = config[key]
    if name == "fatrelu" and "hidden_act_param" in config:
        return {"activation": "relu", "threshold": number(config, "hidden_act_param", zero=True)}
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise FormatError(
            f"config: {key} {shown(name)} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return {"activation": ACTIVATIONS[name]}


def rope_parameters(config):
    """The parameters of rotary positions (a dict), which are the same in all layers.

    Those of ``rope_scaling``, the older form, where it says anything, else of ``rope_parameters``;
    what they leave out stands beside them.
    """
    for key in ("rope_scaling", "rope_parameters"):
        check_object(config[key], key)
    found = config["rope_scaling"] or config["rope_parameters"] or {}
    if kinds := found.keys() & LAYER_TYPES.keys():
        raise FormatError(f"config: rotary positions of {min(kinds)} alone are not supported")
    beside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor")}
    found = {**beside, **found}
    if config["original_max_position_embeddings"] is not None:
        found["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return found


def check_object(value, key):
    """Raises FormatError where a value is neither a JSON object nor null."""
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"config: {key} is {shown(value)}, not an object")


def rotary(config, found, head_dim, partly=False):
    """The Rotary of parameters that ``rope_parameters`` found.

    partly  whether the architecture turns the part of each head that ``partial_rotary_factor``
            says; the others take no notice of it, or cannot be run with it
    """
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROTARY:
        raise FormatError(
            f"config: rotary positions of rope_type {shown(kind)} are not supported; "
            f"supported: {', '.join(ROTARY)}"
        )
    base, share = number(found, "rope_theta"), 1.0
    if base <= 1:
        raise FormatError(f"config: rope_theta is {base}, not above 1")
    if partly or (kind != "default" and found.get("partial_rotary_factor") is not None):
        share = number(found, "partial_rotary_factor")
    if share > 1 or (share < 1 and not partly):
        raise FormatError(f"config: partial_rotary_factor {share} is not supported here")
    dim = int(head_dim * share)
    if dim % 2 or not dim:
        raise FormatError(
            f"config: {dim} values of each head (head_dim {head_dim}, partial_rotary_factor "
            f"{share}) cannot be rotary"
        )
    most = dimension(config, "max_position_embeddings")
    return Rotary(dim, base, kind, _rotary_parameters(kind, found, most, dim))


def _rotary_parameters(kind, found, most, dim):
    """The parameters that a kind of rotary positions has. Raises FormatError."""
    known = {"max_position_embeddings": most}
    if kind in ("llama3", "yarn", "longrope"):
        original = dimension(found, "original_max_position_embeddings", most)
        if original < 2:
            raise FormatError(f"config: original_max_position_embeddings is {original}")
        known["original_max_position_embeddings"] = original
    if kind in ("yarn", "longrope") and found.get("factor") is None:
        known["factor"] = most / known["original_max_position_embeddings"]
    elif kind != "default":
        known["factor"] = number(found, "factor")
    if kind == "llama3":
        low, high = number(found, "low_freq_factor"), number(found, "high_freq_factor")
        if high <= low:
            raise FormatError(f"config: high_freq_factor {high} is not above low_freq_factor {low}")
        known.update(low_freq_factor=low, high_freq_factor=high)
    if kind == "longrope":
        known.update({key: _factors(found, key, dim) for key in ("short_factor", "long_factor")})
    if kind in ("yarn", "longrope") and found.get("attention_factor") is not None:
        known["attention_factor"] = number(found, "attention_factor")
    if kind == "yarn":
        known["truncate"] = flag({"truncate": True, **found}, "truncate")
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if found.get(key) is not None:
                known[key] = number(found, key, zero=True)
    return known


def _factors(found, key, dim):
    values = found.get(key)
    if not isinstance(values, list) or len(values) != dim // 2:
        raise FormatError(f"config: {key} is not a list of {dim // 2} numbers")
    return [number({key: value}, key) for value in values]


def longest(rotary, most):
    """How many positions there are: dynamic rotary positions are made to go on behind ``most``."""
    if rotary.kind == "dynamic":
        most = min(int(most * max(1.0, rotary.parameters["factor"])), LARGEST - 1)
    return most


# What a layer's attention may be called, and whether it sees its window only.
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}


def slides(config, layers, default):
    """Whether each layer sees its window only, by ``layer_types``, or by ``default`` (of a layer's
    number) where a config has none."""
    kinds = config["layer_types"]
    if kinds is None:
        return [default(layer) for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FormatError(f"config: layer_types is {shown(kinds)}, not a list of {layers}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise FormatError(
                f"config: layer_types has {shown(kind)}; supported: {', '.join(LAYER_TYPES)}"
            )
    return [LAYER_TYPES[kind] for kind in kinds]


def sliding_windows(config, sliding):
    """ModelConfig's ``sliding_windows``: ``sliding_window`` of the layers that are sliding."""
    if not any(sliding):
        return ()
    window = dimension(config, "sliding_window")
    return tuple(window if slides else 0 for slides in sliding)


def switched_windows(config, layers, default):
    """The same where ``use_sliding_window`` switches the windows on.

    default  called as default(layer, max_window_layers) where ``layer_types`` is absent
    """
    used, first = flag(config, "use_sliding_window"), config["max_window_layers"]
    if not isinstance(first, int):
        raise FormatError(f"config: max_window_layers is {shown(first)}, not a whole number")
    there = used and config["sliding_window"] is not None
    sliding = slides(config, layers, lambda layer: there and default(layer, first))
    if any(sliding) and not used:
        raise FormatError("config: layer_types has sliding_attention, use_sliding_window is false")
    return sliding_windows(config, sliding)


def one_window(config, layers):
    """ModelConfig's ``sliding_windows`` where all layers have the same, or all have none."""
    return sliding_windows(config, [config["sliding_window"] is not None] * layers)


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
