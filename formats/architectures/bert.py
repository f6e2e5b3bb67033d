"""BERT (Devlin et al. 2019): an encoder, whose tokens see each other in both directions."""

from typing import Any

from ..config import ModelConfig, Options, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, number
from .hugging_face import activation, dimensions

MODEL_TYPES = ("bert",)
KINDS = ("weight", "bias")
# Older checkpoints call a norm's weight gamma, and its bias beta.
NORM = {"weight": "gamma", "bias": "beta"}


def names_of(prefix: str) -> dict[str, str]:
    """NAMES of an encoder whose tensors begin with ``prefix``, without those of its head."""
    layer, embeddings = f"{prefix}.encoder.layer.{{}}", f"{prefix}.embeddings"
    norms = {
        "embed_norm": f"{embeddings}.LayerNorm",
        "layers.{}.attention_norm": f"{layer}.attention.output.LayerNorm",
        "layers.{}.ffn_norm": f"{layer}.output.LayerNorm",
    }
    projections = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
    }
    return {
        "embed_tokens.weight": f"{embeddings}.word_embeddings.weight",
        "embed_positions.weight": f"{embeddings}.position_embeddings.weight",
        "embed_types.weight": f"{embeddings}.token_type_embeddings.weight",
        **{f"{ours}.{k}": norm_names(theirs, k) for ours, theirs in norms.items() for k in KINDS},
        **{
            f"layers.{{}}.{p}_proj.{k}": f"{layer}.{name}.{k}"
            for p, name in projections.items()
            for k in KINDS
        },
        "layers.{}.ffn.up_bias": f"{layer}.intermediate.dense.bias",
        "layers.{}.ffn.down_bias": f"{layer}.output.dense.bias",
        **{f"pooler.{k}": f"{prefix}.pooler.dense.{k}" for k in KINDS},
    }


def norm_names(name: str, kind: str) -> str:
    """The names that the weight or the bias of a norm may have."""
    return f"{name}.{kind}|{name}.{NORM[kind]}"


def ffn_of(prefix: str) -> dict[str, str]:
    """FFN of an encoder whose tensors begin with ``prefix``."""
    layer = f"{prefix}.encoder.layer.{{}}"
    return {"up": f"{layer}.intermediate.dense.weight", "down": f"{layer}.output.dense.weight"}


HEAD = "cls.predictions"
NAMES = {
    **names_of("bert"),
    **{f"head_dense.{k}": f"{HEAD}.transform.dense.{k}" for k in KINDS},
    **{f"head_norm.{k}": norm_names(f"{HEAD}.transform.LayerNorm", k) for k in KINDS},
    "lm_head.weight": f"{HEAD}.decoder.weight",
    "lm_head.bias": f"{HEAD}.decoder.bias|{HEAD}.bias",
}
FFN = ffn_of("bert")
# The head that tells whether a sentence follows another one.
UNUSED = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")
# What only some checkpoints have: the field, and the tensor that tells.
OPTIONAL = {
    "has_pooler": "bert.pooler.dense.weight",
    "has_masked_head": f"{HEAD}.transform.dense.weight",
}
DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "is_decoder": False,
    "add_cross_attention": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
    "has_pooler": False,
    "has_masked_head": False,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a BertConfig (a dict). Raises FormatError."""
    return encoder(config, head_activation=activation(config)["activation"])


def encoder(config: Fields, head_activation: str, **options: Any) -> ModelConfig:
    """The ModelConfig of an encoder like BERT. Raises FormatError.

    head_activation  of the head of masked tokens, where there is one; options: those of its own
    """
    for field in ("is_decoder", "add_cross_attention"):
        if flag(config, field):
            raise FormatError(f"config: {field} true is not supported")
    if config["position_embedding_type"] != "absolute":
        kind = shown(config["position_embedding_type"])
        raise FormatError(f"config: position_embedding_type {kind} is not supported")
    own: Options = {
        **dimensions(config),
        **activation(config),
        "learned_positions": True,
        "token_types": dimension(config, "type_vocab_size"),
        "norm_epsilon": number(config, "layer_norm_eps", zero=True),
        "pooler": flag(config, "has_pooler"),
        "has_head": flag(config, "has_masked_head"),
        **options,
    }
    if own["has_head"]:
        own |= {"head_activation": head_activation, "head_bias": True}
    return model_of(
        **own,
        both_ways=True,
        embedding_norm=True,
        norm="layer",
        norm_before=False,
        final_norm=False,
        gated=False,
        qkv_bias=True,
        o_bias=True,
        ffn_bias=True,
    )
