"""A Hugging Face config of a GGUF file's metadata: the fields that all architectures share."""

from typing import Any

from ...bounded_json import JsonObject
from .form import GgufForm
from .header import Header
from .rope import partial_rotary_factor, rope_parameters


def config_of(form: GgufForm, header: Header, activation: str | None) -> JsonObject:
    """A Hugging Face config that leaves no field out, because GGUF has defaults of its own.

    activation  the FFN's, under Hugging Face's name; None: as ``GgufCheckpoint`` has it
    A field that the file does not state is None, which ``model_config`` refuses where it needs the
    field.
    """
    if activation is None:  # a model of PowerInfer, which have predictors, has a ReLU
        activation = "relu" if "fc1.weight" in header.kinds else form.activation
    heads, hidden_size = _of(form, header, "attention.head_count"), header.of("embedding_length")
    embeddings = header.tensors.get("token_embd.weight")
    head_dim = header.of("attention.key_length")
    if head_dim is None and heads and hidden_size:
        head_dim = hidden_size // heads
    neurons = _of(form, header, "feed_forward_length")
    epsilon, epsilon_key = form.epsilon
    config = {
        "model_type": form.model_type,
        "vocab_size": embeddings.shape[0] if embeddings else None,
        "hidden_size": hidden_size,
        "intermediate_size": neurons,
        "ffn_hidden_size": neurons,
        "num_hidden_layers": header.of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _of(form, header, "attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": header.of("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "hidden_act": activation,
        "activation": activation,
        epsilon: header.of(epsilon_key, float),
        "attention_bias": "attn_output.bias" in header.kinds,
        "mlp_bias": "ffn_up.bias" in header.kinds,
        "qk_layernorm": "attn_q_norm.weight" in header.kinds,
        "rope_parameters": rope_parameters(header),
        "original_max_position_embeddings": header.of("rope.scaling.original_context_length"),
        "partial_rotary_factor": partial_rotary_factor(form, header, head_dim),
        **_windows(form, header),
        "bos_token_id": header.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": _ends_of_text(header),
    }
    config.update(_mixture(form, header, config))
    config.update(form.fields(header, config))
    return config


def _of(form: GgufForm, header: Header, key: str) -> Any:
    """The value of a key: the largest where the form lets layers differ, else that of all."""
    values = header.of_layers(key) if key in form.by_layer else [header.of_all_layers(key)]
    return max(values) if values else None


def _windows(form: GgufForm, header: Header) -> JsonObject:
    """Attention's window, and which layers have it where that is not as usual."""
    key = "attention.sliding_window_pattern"
    if form.windows is None:
        return {"sliding_window": None}
    window = header.of("attention.sliding_window") or None
    if window is None or not form.windows:
        return {"sliding_window": window}
    if header.is_list(key):
        slides = header.of_layers(key, bool) or []
    else:
        every = header.of(key, int, form.windows)
        if every == form.windows:
            return {"sliding_window": window}
        if every < 0:
            raise header.refusal(key)
        slides = [not every or layer % every < every - 1 for layer in range(header.layers())]
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"sliding_window": window, "layer_types": kinds}


def _mixture(form: GgufForm, header: Header, config: JsonObject) -> JsonObject:
    """The fields of a mixture of experts; none where it is none."""
    experts = header.of("expert_count")
    if not experts:
        return {}
    neurons = header.of("expert_feed_forward_length") or config["intermediate_size"]
    return {
        form.experts: experts,
        "num_experts_per_tok": header.of("expert_used_count"),
        "moe_intermediate_size": neurons,
        "intermediate_size": neurons,
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": header.of("expert_shared_feed_forward_length"),
    }


def _ends_of_text(header: Header) -> list[int]:
    """The ids of the tokens that end a text, a turn or a message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [header.get(f"tokenizer.ggml.{key}", int) for key in keys]
    return sorted({token for token in found if token is not None})
