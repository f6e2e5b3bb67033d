"""A model of the kit as a GGUF file, as llama.cpp's own conversion packs and names it."""

import string
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from flashinfer.formats.architectures import ARCHITECTURES, model_config
from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.bundle.layout import layout
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.formats.layers.mixer import MixerConfig
from flashinfer.formats.layers.rotary import Rotary
from flashinfer.formats.sources.gguf_forms import FORMS
from flashinfer.formats.sources.names import number_there
from flashinfer.formats.sources.tokenizers.sentencepiece import CONTROL, NORMAL, UNKNOWN
from flashinfer.formats.tensors import TensorSpec
from flashinfer.oracle.kits.configs import KitModel
from flashinfer.oracle.kits.gguf_file import Metadata, gguf_bytes
from flashinfer.oracle.kits.gguf_mixers import as_converted, metadata_of_mixers
from flashinfer.oracle.kits.golden import TOKENS
from flashinfer.oracle.kits.weights import Draw, Form, Tensors, checkpoint_tensors, drawn
from flashinfer.transformer.positions import frequencies_of

GGUF_NAMES = {form.model_type: name for name, form in FORMS.items()} | {
    "mixtral": "llama",
    "olmo3": "olmo2",
    "deepseek_v2": "deepseek2",
    "glm4_moe_lite": "deepseek2",
}
ROUTER = "ffn_gate_inp"  # routers and the gate of a shared expert are never quantised
EXACT = (ROUTER, "ssm_a", "ssm_d", "ssm_norm", "ssm_conv1d", "shortconv.conv", "altup", "laurel")
NOT_TURNED = 1e30  # the factor by which llama.cpp's conversion lets a pair of a head unturned
PACKED = {"falcon", "phi3", "gptneox", "gpt2"}  # queries, keys and values are one tensor


def gguf_architecture(config: ModelConfig, model_type: str) -> str:
    """GGUF's name of a model's architecture, of which Nemotron-H has two."""
    name = GGUF_NAMES[model_type]
    if name == "nemotron_h_moe" and not config.mixture:
        return "nemotron_h"
    return name


def gguf_of(model: KitModel, format: str) -> bytes:
    """The bytes of ``model`` as a GGUF file whose matrices are in the number format ``format``."""
    config = model_config(model.hugging_face_config())
    draw = partial(drawn, config, model.name)
    tensors = gguf_tensors(model.model_type, config, draw, layout(config))
    tensors |= _rope_tensors(_rotary(config))
    metadata = gguf_metadata(model.model_type, config, "flashinfer kit")
    metadata = {**metadata, **_vocabulary(config.vocab_size)}
    return gguf_bytes(metadata, tensors, format, exact=EXACT)


def gguf_tensors(
    model_type: str, config: ModelConfig, draw: Draw, specs: Iterable[TensorSpec]
) -> Tensors:
    """{GGUF's name: values} of the tensors of ``specs``; see ``checkpoint_tensors``."""
    name = gguf_architecture(config, model_type)
    naming = FORMS[name].naming(_kinds(name, config))
    made = getattr(ARCHITECTURES[model_type], "VALUES", {})
    form = Form(naming.NAMES, naming.FFN, naming.DENSE_FFN, naming.ROWS, naming.ROWS, values=made,
                stacked=naming.STACKED, numbered=naming.NUMBERED,
                number=partial(number_there, naming, config))  # fmt: skip
    tensors = checkpoint_tensors(config, form, draw, specs)
    tensors |= _unused(name, config, draw)
    gate = f"{ROUTER}_shexp.weight"  # a matrix of one row there, a vector in GGUF
    tensors = {n: v.reshape(-1) if n.endswith(gate) else v for n, v in tensors.items()}
    tensors = as_converted(name, tensors, config)
    return {n: _of_several(n, _of_state(n, v, config), config) for n, v in tensors.items()}


def _unused(architecture: str, config: ModelConfig, draw: Draw) -> Tensors:
    """What makes keys and values in layers that have none of their own, which files of Gemma 3n
    have nevertheless."""
    found: Tensors = {}
    if architecture != "gemma3n":
        return found
    for number, layer in enumerate(config.layers):
        attention = layer.attention
        if attention.memory_of is not None:
            width = attention.num_key_value_heads * attention.head_dim
            for part, shape in (
                ("k", (width, config.hidden_size)),
                ("v", (width, config.hidden_size)),
                ("k_norm", (attention.head_dim,)),
            ):
                name = f"blk.{number}.attn_{part}.weight"
                found[name] = draw(f"unused {name}", shape)
    return found


def _of_state(name: str, values: AnyArray, config: ModelConfig) -> AnyArray:
    """Mamba-2's vectors are matrices in GGUF: of one column, and of one row for each group."""
    groups = [k.mixer.groups for k in config.layers if isinstance(k.mixer, Mamba2Config)]
    if groups and name.endswith((".ssm_a", ".ssm_d")):
        return values[:, None]
    if groups and name.endswith(".ssm_norm.weight"):
        return values.reshape(groups[0], -1)
    return values


def _of_several(name: str, values: AnyArray, config: ModelConfig) -> AnyArray:
    """A tensor with a dimension for heads or hidden states, of those that have one."""
    if name in ("altup_proj.weight", "altup_unembd_proj.weight"):
        return values.reshape(-1, config.hidden_size, config.hidden_size)
    if not name.endswith((".attn_k_b.weight", ".attn_v_b.weight")):
        return values
    mixer = config.layers[0].mixer
    assert isinstance(mixer, LatentAttentionConfig)
    return values.reshape(mixer.num_attention_heads, -1, values.shape[1])


def _kinds(architecture: str, config: ModelConfig) -> set[str]:
    """The tensors of layers by which a GGUF file tells the forms of an architecture apart."""
    two_norms = architecture == "falcon" and not config.layers[0].shared_norm
    kinds = {
        "ffn_up_exps.weight": config.mixture and architecture != "gemma4",
        "ffn_gate_up_exps.weight": config.mixture and architecture == "gemma4",
        "attn_qkv.weight": architecture in PACKED,
        "attn_norm_2.weight": two_norms,
        "attn_norm_2.bias": two_norms,
        "attn_k_b.weight": architecture == "deepseek2",
        "attn_v_b.weight": architecture == "deepseek2",
    }
    return {kind for kind, there in kinds.items() if there}


def gguf_metadata(model_type: str, config: ModelConfig, title: str) -> Metadata:
    """The metadata of a model called ``title``, without its vocabulary."""
    name = gguf_architecture(config, model_type)
    # Of layers that differ: one whose attention sees all, and one that has experts.
    kinds = AttentionConfig | LatentAttentionConfig
    attentions = [k.mixer for k in config.layers if isinstance(k.mixer, kinds)]
    windows = [getattr(mixer, "attention_window", None) for mixer in attentions]
    attention = attentions[windows.index(None) if None in windows else 0]
    ffn = next((k.ffn for k in config.layers if k.ffn.router), config.layers[0].ffn)
    dense = [k.ffn.d_ffn for k in config.layers if k.ffn.router is None]
    norm = "layer_norm_rms_epsilon" if config.norm.kind == "rms" else "layer_norm_epsilon"
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": dense[0] if dense else ffn.d_ffn,
        **_of_attention(attention),
        f"attention.{norm}": config.norm.epsilon,
        "vocab_size": config.vocab_size,
    }
    if any(windows):
        own["attention.sliding_window"] = max(window or 0 for window in windows)
    rotary = _rotary(config)
    if rotary is not None:
        own["rope.freq_base"] = float(rotary.base)
        own["rope.dimension_count"] = rotary.dim
        own |= _rope_scaling(rotary)
    if ffn.router is not None:
        own["expert_count"] = ffn.experts
        own["expert_used_count"] = ffn.router.experts_per_token
        own["expert_feed_forward_length"] = ffn.d_ffn
    if ffn.shared_d_ffn:
        own["expert_shared_feed_forward_length"] = ffn.shared_d_ffn
    own |= metadata_of_mixers(config)
    own |= OF_ARCHITECTURES.get(name, _nothing)(config)
    return {
        "general.architecture": name,
        "general.name": title,
        **{f"{name}.{key}": value for key, value in own.items()},
    }


def _of_attention(mixer: MixerConfig) -> Metadata:
    """The metadata of heads."""
    if isinstance(mixer, LatentAttentionConfig):
        return {
            "attention.head_count": mixer.num_attention_heads,
            "attention.head_count_kv": 1,
            "attention.key_length": mixer.cached_dim,
            "attention.value_length": mixer.kv_lora_rank,
            "attention.key_length_mla": mixer.qk_head_dim,
            "attention.value_length_mla": mixer.v_head_dim,
            "attention.kv_lora_rank": mixer.kv_lora_rank,
            "attention.q_lora_rank": mixer.q_lora_rank or 0,
        }
    assert isinstance(mixer, AttentionConfig)
    return {
        "attention.head_count": mixer.num_attention_heads,
        "attention.head_count_kv": mixer.num_key_value_heads,
        "attention.key_length": mixer.head_dim,
        "attention.value_length": mixer.head_dim,
    }


def _rotary(config: ModelConfig) -> Rotary | None:
    """The rotary positions of the layers that have any; of those that see all where there are such,
    because layers with a window may have their own."""
    mixers = [layer.mixer for layer in config.layers if layer.mixer.rotary]
    mixers.sort(key=lambda mixer: getattr(mixer, "attention_window", None) is not None)
    return mixers[0].rotary if mixers else None


def _nothing(config: ModelConfig) -> Metadata:
    return {}


def _of_gpt_neox(config: ModelConfig) -> Metadata:
    return {"use_parallel_residual": config.layers[0].parallel}


def _of_granite(config: ModelConfig) -> Metadata:
    scales = [a.attention_scale for k in config.layers if isinstance(a := k.mixer, AttentionConfig)]
    return {
        "embedding_scale": float(config.embedding_scale),
        "attention.scale": float(scales[0] or 0),
        "residual_scale": float(config.layers[0].residual_scale),
        "logit_scale": 1 / config.logit_scale,
    }


def _of_granite_hybrid(config: ModelConfig) -> Metadata:
    rotary = _rotary(config) is not None
    return {**_of_granite(config), **_of_mamba2(config), "rope.scaling.finetuned": rotary}


def _of_mamba2(config: ModelConfig) -> Metadata:
    mamba = next(k.mixer for k in config.layers if isinstance(k.mixer, Mamba2Config))
    key_heads = [
        a.num_key_value_heads if isinstance(a := k.mixer, AttentionConfig) else 0
        for k in config.layers
    ]
    return {
        "attention.head_count_kv": key_heads,
        "ssm.conv_kernel": mamba.kernel,
        "ssm.inner_size": mamba.width,
        "ssm.state_size": mamba.state_size,
        "ssm.time_step_rank": mamba.heads,
        "ssm.group_count": mamba.groups,
    }


def _of_nemotron_h(config: ModelConfig) -> Metadata:
    """Each block is a layer there; of an FFN's no key heads are stated, of a mixer's no neurons."""
    key_heads: list[int] = []
    neurons: list[int] = []
    for layer in config.layers:
        mixer = layer.mixer
        heads = mixer.num_key_value_heads if isinstance(mixer, AttentionConfig) else 0
        key_heads += [heads, 0] if layer.ffn.neurons else [heads]
        neurons += [0, layer.ffn.d_ffn] if layer.ffn.neurons else [0]
    return {
        **_of_mamba2(config),
        "attention.layer_norm_epsilon": config.norm.epsilon,  # which llama.cpp asks for, too
        "block_count": len(neurons),
        "attention.head_count_kv": key_heads,
        "feed_forward_length": neurons,
        "rope.scaling.finetuned": False,
        "rope.dimension_count": 4,
    }


def _of_nemotron_h_moe(config: ModelConfig) -> Metadata:
    ffn = next(layer.ffn for layer in config.layers if layer.ffn.router)
    assert ffn.router is not None
    return {
        **_of_nemotron_h(config),
        "expert_shared_count": 1,
        "expert_weights_norm": ffn.router.normalised,
        "expert_weights_scale": ffn.router.scale,
        "expert_group_count": ffn.router.groups,
        "expert_group_used_count": ffn.router.groups_kept,
    }


def _of_smallthinker(config: ModelConfig) -> Metadata:
    router = config.layers[0].ffn.router
    return {"expert_gating_func": 1 if router and router.scoring == "softmax" else 2}


def _of_gemma2(config: ModelConfig) -> Metadata:
    return {
        "attn_logit_softcapping": config.layers[0].attention.score_cap or 0.0,
        "final_logit_softcapping": config.logit_cap or 0.0,
    }


def _of_gemma3(config: ModelConfig) -> Metadata:
    near = config.layers[0].attention.rotary
    return {"rope.freq_base_swa": float(near.base)} if near else {}


def _of_gemma4(config: ModelConfig) -> Metadata:
    layers = config.layers
    near = next((k.attention for k in layers if k.attention.attention_window), layers[0].attention)
    assert near.rotary is not None
    found: Metadata = {
        "attention.head_count_kv": [layer.attention.num_key_value_heads for layer in layers],
        "attention.sliding_window_pattern": [
            layer.attention.attention_window is not None for layer in layers
        ],
        "attention.key_length_swa": near.head_dim,
        "attention.value_length_swa": near.head_dim,
        "attention.shared_kv_layers": sum(k.attention.memory_of is not None for k in layers),
        "rope.dimension_count_swa": near.head_dim,
        "rope.freq_base_swa": float(near.rotary.base),
        "embedding_length_per_layer_input": layers[0].per_layer.size if layers[0].per_layer else 0,
        "feed_forward_length": [k.ffn.shared_d_ffn or k.ffn.d_ffn for k in layers],
    }
    return {**found, "final_logit_softcapping": config.logit_cap or 0.0}


def _of_gemma3n(config: ModelConfig) -> Metadata:
    layers, altup, own = config.layers, config.layers[0].altup, config.layers[0].per_layer
    near = next(k.attention.rotary for k in layers if k.attention.attention_window)
    assert near is not None and altup is not None and own is not None
    return {
        "attention.sliding_window_pattern": [
            layer.attention.attention_window is not None for layer in layers
        ],
        "attention.shared_kv_layers": sum(k.attention.memory_of is not None for k in layers),
        "rope.freq_base_swa": float(near.base),
        "embedding_length_per_layer_input": own.size,
        "feed_forward_length": [layer.ffn.d_ffn for layer in layers],
        "altup.active_idx": altup.active,
        "altup.num_inputs": altup.states,
        "activation_sparsity_scale": [
            -np.inf if layer.ffn.gate_cut is None else layer.ffn.gate_cut for layer in layers
        ],
        "final_logit_softcapping": config.logit_cap or 0.0,
    }


def _of_deepseek2(config: ModelConfig) -> Metadata:
    mixer, router = config.layers[0].mixer, config.layers[-1].ffn.router
    assert isinstance(mixer, LatentAttentionConfig)
    found = dict(_of_sigmoid_mixture(config))
    if router is not None and router.scoring == "softmax":
        found["expert_gating_func"] = 1
    if mixer.yarn_weight:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * mixer.yarn_weight
    return found


def _of_sigmoid_mixture(config: ModelConfig) -> Metadata:
    """Of DeepSeek V3's experts, after layers without."""
    ffn = config.layers[-1].ffn
    if ffn.router is None:
        return {}
    return {
        "leading_dense_block_count": sum(layer.ffn.router is None for layer in config.layers),
        "expert_gating_func": 2,
        "expert_shared_count": ffn.shared_d_ffn // ffn.d_ffn,
        "expert_weights_norm": ffn.router.normalised,
        "expert_weights_scale": ffn.router.scale,
        "expert_group_count": ffn.router.groups,
        "expert_group_used_count": ffn.router.groups_kept,
    }


def _of_ernie4_5_moe(config: ModelConfig) -> Metadata:
    ffn = config.layers[-1].ffn
    return {
        "leading_dense_block_count": sum(layer.ffn.router is None for layer in config.layers),
        "interleave_moe_layer_step": 1,
        "expert_shared_count": ffn.shared_d_ffn // ffn.d_ffn,
    }


def _of_mistral3(config: ModelConfig) -> Metadata:
    attention = config.layers[0].attention
    if attention.temperature is None or attention.rotary is None:
        return {}
    return {
        "attention.temperature_scale": attention.temperature.beta,
        "rope.scaling.yarn_log_multiplier": attention.rotary.parameters.get("mscale_all_dim", 0.0),
    }


# What llama.cpp's conversion writes for these architectures beside what it writes for all.
OF_ARCHITECTURES: dict[str, Callable[[ModelConfig], Metadata]] = {
    "gptneox": _of_gpt_neox,
    "granitehybrid": _of_granite_hybrid,
    "nemotron_h": _of_nemotron_h,
    "nemotron_h_moe": _of_nemotron_h_moe,
    "smallthinker": _of_smallthinker,
    "lfm2moe": _of_sigmoid_mixture,
    "granite": _of_granite,
    "granitemoe": _of_granite,
    "ernie4_5-moe": _of_ernie4_5_moe,
    "mistral3": _of_mistral3,
    "gemma2": _of_gemma2,
    "gemma3": _of_gemma3,
    "gemma3n": _of_gemma3n,
    "gemma4": _of_gemma4,
    "deepseek2": _of_deepseek2,
    "dots1": _of_sigmoid_mixture,
    "glm4moe": _of_sigmoid_mixture,
}


def _rope_scaling(rotary: Rotary) -> dict[str, float | int | str]:
    """The metadata of rotary positions for long texts; those with factors of each dimension have
    tensors, too."""
    found: dict[str, float | int | str] = {}
    if rotary.kind in ("linear", "yarn"):
        found["rope.scaling.type"] = rotary.kind
        found["rope.scaling.factor"] = float(rotary.parameters["factor"])
    if rotary.kind in ("yarn", "longrope"):
        original = rotary.parameters["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
    if rotary.kind == "longrope":
        found["rope.scaling.attn_factor"] = frequencies_of(rotary, TOKENS)[1]
    return found


def _rope_tensors(rotary: Rotary | None) -> Tensors:
    """{name: the factor of each dimension} of the forms that have such."""
    if rotary is not None and rotary.kind == "llama3":
        plain, _ = frequencies_of(replace(rotary, kind="default"), TOKENS)
        slowed, _ = frequencies_of(rotary, TOKENS)
        return {"rope_freqs.weight": (plain / slowed).astype(np.float32)}
    if rotary is not None and rotary.kind == "proportional":
        factors = np.full(rotary.dim // 2, NOT_TURNED, dtype=np.float32)
        factors[: rotary.parameters["turned"]] = 1
        return {"rope_freqs.weight": factors}
    if rotary is not None and rotary.kind == "longrope":
        return {
            f"rope_factors_{part}.weight": np.array(rotary.parameters[f"{part}_factor"], np.float32)
            for part in ("long", "short")
        }
    return {}


def _vocabulary(size: int) -> Metadata:
    """A vocabulary of letters, so that engines that want one load the file."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *string.ascii_letters, *string.digits]
    pieces = (pieces + list(string.punctuation))[:size]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (size - 3)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(i) for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
