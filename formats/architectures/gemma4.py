"""Gemma 4 (2026), its texts: layers that see all have heads of another size; the last layers attend
to keys and values of earlier ones; tokens give each layer something of its own; and the experts of
a mixture stand beside a dense network."""

from collections.abc import Sequence
from typing import Any

from ..config import MOST_EXPERTS, MOST_LAYERS, ModelConfig, Options, model_of
from ..errors import FormatError, shown
from ..fields import ABSENT, Fields, dimension, flag, number, of_layers
from ..layers.ffn import RouterConfig
from ..layers.norm import NormConfig
from ..layers.per_layer_input import PerLayerInputConfig
from ..numbers import is_whole
from . import hugging_face
from .gemma2 import cap
from .hugging_face import FFN, activation, attention_biases, dimensions
from .mixtures import FUSED_ROWS
from .rope import check_object, longest, rotary

__all__ = [
    "BORROWED", "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "OPTIONAL",
    "STACKED", "model_config",
]  # fmt: skip
MODEL_TYPES = ("gemma4_text",)
LAYER = "model.layers.{}"
FUSED_FFN = {
    part: f"{LAYER}.experts.{name}"
    for part, name in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj"))
}
NORMS = {
    "attention_after_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_after_norm": "post_feedforward_layernorm",
    "shared_after_norm": "post_feedforward_layernorm_1",
    "experts_norm": "pre_feedforward_layernorm_2",
    "experts_after_norm": "post_feedforward_layernorm_2",
    "per_layer.after_norm": "post_per_layer_input_norm",
}
CONTEXT = "layers.{}.per_layer.context.weight"
NAMES = {
    **hugging_face.NAMES,
    **{f"layers.{{}}.{ours}.weight": f"{LAYER}.{theirs}.weight" for ours, theirs in NORMS.items()},
    **{f"layers.{{}}.shared.{part}.weight": name for part, name in FFN.items()},
    "layers.{}.router.weight": f"{LAYER}.router.proj.weight",
    "layers.{}.router.expert_scales": f"{LAYER}.router.per_expert_scale",
    "layers.{}.router_norm.weight": f"{LAYER}.router.scale",
    "layers.{}.output_scale": f"{LAYER}.layer_scalar",
    "embed_tokens_per_layer.weight": "model.embed_tokens_per_layer.weight",
    CONTEXT: "model.per_layer_model_projection.weight",
    "layers.{}.per_layer.context_norm.weight": "model.per_layer_projection_norm.weight",
    "layers.{}.per_layer.gate.weight": f"{LAYER}.per_layer_input_gate.weight",
    "layers.{}.per_layer.proj.weight": f"{LAYER}.per_layer_projection.weight",
}
STACKED = (CONTEXT,)
BORROWED = tuple(
    f"{LAYER}.self_attn.{part}.{kind}"
    for part in ("k_proj", "v_proj", "k_norm")
    for kind in ("weight", "bias")
)
OPTIONAL = {"layer_scalar": "model.layers.0.layer_scalar"}
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_OF_KINDS = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
DEFAULTS = {
    **hugging_face.without(
        hugging_face.LLAMA, "hidden_act", "rope_scaling", "rope_theta", "partial_rotary_factor",
        "original_max_position_embeddings",
    ),
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attention_bias": False,
    "sliding_window": 512,
    "layer_types": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "per_layer_config": ABSENT,
    "layer_scalar": True,
}  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Gemma4TextConfig (a dict). Raises FormatError."""
    if config["use_bidirectional_attention"] not in (None, "vision"):  # whose texts are causal
        both = config["use_bidirectional_attention"]
        raise FormatError(f"config: use_bidirectional_attention {shown(both)} is not supported")
    options = {**shared_options(config), "output_scale": flag(config, "layer_scalar")}
    kinds = kinds_of_layers(config, options["num_hidden_layers"])
    per_layer = per_layer_inputs(config, options)
    wide, doubled = options.pop("d_ffn"), flag(config, "use_double_wide_mlp")
    attentions, by_layer = kinds_of_attention(config, options, kinds), list[Options]()
    most = options["max_position_embeddings"]
    options["max_position_embeddings"] = longest(attentions[FULL]["rotary"], most)
    for number_of_layer, (kind, memory) in enumerate(
        zip(kinds, shared_memories(config, kinds), strict=True)
    ):
        own = {**attentions[kind], **memory, "per_layer": per_layer[number_of_layer]}
        borrows = memory["memory_of"] is not None
        neurons = 2 * wide if doubled and borrows else wide
        by_layer.append({**own, **feed_forward(config, options, neurons)})
    rows = dimension(config, "vocab_size_per_layer_input") if per_layer[0] else 0
    if per_layer[0] and rows < options["vocab_size"]:
        raise FormatError(
            f"config: vocab_size_per_layer_input {rows} is less than vocab_size "
            f"{options['vocab_size']}"
        )
    return model_of(**options, per_layer_rows=rows, by_layer=by_layer)


def shared_options(config: Fields) -> Options:
    """What Gemma 3n and Gemma 4 read alike."""
    return {
        **dimensions(config),
        **activation(config, "hidden_activation"),
        **attention_biases(config),
        "norm_epsilon": number(config, "rms_norm_eps", zero=True),
        "embedding_scale": dimension(config, "hidden_size") ** 0.5,
        "attention_scale": 1.0,
        "logit_cap": cap(config, "final_logit_softcapping"),
        "qk_norm": "head",
        "norm_after": True,
    }


def kinds_of_layers(config: Fields, layers: int) -> list[str]:
    """SLIDING or FULL for each layer; the last one always sees all."""
    kinds = config["layer_types"]
    if kinds is None:
        kinds = [FULL if (layer + 1) % 6 == 0 else SLIDING for layer in range(layers)]
    kinds = of_layers("layer_types", kinds, {SLIDING: SLIDING, FULL: FULL}, layers)
    return [*kinds[:-1], FULL]


def kinds_of_attention(
    config: Fields, options: Options, kinds: Sequence[str]
) -> dict[str, Options]:
    """{SLIDING or FULL: the options of attention of these layers}."""
    check_object(config["rope_parameters"], "rope_parameters")
    given, found = config["rope_parameters"], dict[str, Options]()
    given = ROPE_OF_KINDS if given is None else given
    for kind, sizes in sizes_of_heads(config, options, kinds).items():
        if not isinstance(given.get(kind), dict):
            raise FormatError(f"config: rope_parameters has no object {kind}")
        # transformers reads ``truncate`` from ``rope_parameters`` itself.
        parameters = {**given[kind], "truncate": given.get("truncate", True)}
        found[kind] = {**sizes, "rotary": rotary(config, parameters, sizes["head_dim"])}
        if kind == SLIDING:
            found[kind]["attention_window"] = dimension(config, "sliding_window")
        else:
            found[kind]["v_of_k"] = flag(config, "attention_k_eq_v")
    return found


def sizes_of_heads(config: Fields, options: Options, kinds: Sequence[str]) -> dict[str, Options]:
    """{SLIDING or FULL: ``head_dim`` and ``num_key_value_heads`` of these layers}."""
    usual = {key: options[key] for key in ("head_dim", "num_key_value_heads")}
    if config["per_layer_config"] is ABSENT:
        others = {"head_dim": dimension(config, "global_head_dim")}
        heads = config["num_global_key_value_heads"]
        if flag(config, "attention_k_eq_v") and heads is not None:
            others["num_key_value_heads"] = dimension(config, "num_global_key_value_heads")
        return {kind: {**usual, **others} if kind == FULL else usual for kind in set(kinds)}
    own = [{**usual, **layer} for layer in overrides(config, len(kinds))]
    found = {kind: own[kinds.index(kind)] for kind in set(kinds)}
    if any(sizes != found[kind] for kind, sizes in zip(kinds, own, strict=True)):
        raise FormatError("config: per_layer_config lets layers of one of layer_types differ")
    return found


def overrides(config: Fields, layers: int) -> list[Options]:
    """What ``per_layer_config`` says of each layer."""
    given: Any = config["per_layer_config"]
    check_object(given, "per_layer_config")
    found: list[Options] = [{} for _ in range(layers)]
    for layer, fields in (given or {}).items():
        if not layer.isdecimal() or int(layer) >= layers:
            raise FormatError(f"config: per_layer_config is of layer {shown(layer)} of {layers}")
        check_object(fields, f"per_layer_config {layer}")
        for key in fields or {}:
            if key not in ("head_dim", "num_key_value_heads"):
                raise FormatError(f"config: per_layer_config of {shown(key)} is not supported")
            found[int(layer)][key] = dimension(fields, key)
    return found


def shared_memories(config: Fields, kinds: Sequence[str]) -> list[Options]:
    """``memory_of``, ``lends`` and ``v_norm`` of each layer: the last ``num_kv_shared_layers`` read
    the memory of the last one of their kind before them."""
    layers, shared = len(kinds), config["num_kv_shared_layers"]
    if not is_whole(shared, 0, layers - 1):
        raise FormatError(f"config: num_kv_shared_layers is {shown(shared)}, with {layers} layers")
    own = list(kinds[: layers - shared])
    if set(own) != set(kinds):
        raise FormatError(f"config: num_kv_shared_layers {shared} leaves no keys for a layer type")
    sources = {kind: max(n for n, k in enumerate(own) if k == kind) for kind in set(own)}
    lent = {sources[kind] for kind in kinds[len(own) :]}
    return [
        {
            "memory_of": None if layer < len(own) else sources[kind],
            "lends": layer in lent,
            "v_norm": layer < len(own),
        }
        for layer, kind in enumerate(kinds)
    ]


def per_layer_inputs(config: Fields, options: Options) -> list[PerLayerInputConfig | None]:
    """The block of each layer for what tokens give it alone; None: there is none."""
    layers, size = options["num_hidden_layers"], config["hidden_size_per_layer_input"]
    if not is_whole(size, 0, MOST_LAYERS * MOST_LAYERS):
        raise FormatError(f"config: hidden_size_per_layer_input is {shown(size)}, no whole number")
    if not size:
        return [None] * layers
    return [
        PerLayerInputConfig(
            hidden_size=options["hidden_size"],
            size=size,
            begin=layer * size,
            activation=options["activation"],
            norm=NormConfig("rms", options["norm_epsilon"]),
        )
        for layer in range(layers)
    ]


def feed_forward(config: Fields, options: Options, neurons: int) -> Options:
    """The options of a layer's FFN: dense of so many neurons, or experts beside that."""
    if not flag(config, "enable_moe_block"):
        return {"d_ffn": neurons}
    norm = NormConfig("rms", options["norm_epsilon"])
    router = RouterConfig(
        experts=dimension(config, "num_experts", most=MOST_EXPERTS),
        experts_per_token=dimension(config, "top_k_experts"),
        norm=norm,
        expert_scales=True,
    )
    d_ffn = dimension(config, "moe_intermediate_size")
    return {"d_ffn": d_ffn, "router": router, "shared_d_ffn": neurons, "branch_norm": norm}
