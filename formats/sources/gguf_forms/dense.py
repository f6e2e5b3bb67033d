"""The forms of models without experts, and of those that may have some or none."""

from ...bounded_json import JsonObject
from ...errors import FormatError, shown
from ..gguf_metadata import one_of
from .form import BLOCK, KINDS, LAYER, GgufForm
from .header import Header


def _llama(header: Header, config: JsonObject) -> JsonObject:
    """GGUF's llama is Mixtral, too, and Mistral."""
    if header.of("expert_count"):
        return {"model_type": "mixtral"}
    return {"model_type": "mistral"} if config["sliding_window"] else {}


def _gemma2(header: Header, config: JsonObject) -> JsonObject:
    return {
        "hidden_activation": config["hidden_act"],
        "query_pre_attn_scalar": _scaled_by(config, largest=46),
        "sliding_window": config["sliding_window"] or 4096,
        "attn_logit_softcapping": header.of("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": header.of("final_logit_softcapping", float, 30.0),
    }


def _gemma3(header: Header, config: JsonObject) -> JsonObject:
    near, window = header.of("rope.freq_base_swa", float, 10000.0), config["sliding_window"]
    if config["rope_parameters"]["rope_type"] not in ("default", "linear"):
        raise header.refusal("rope.scaling.type")
    return {
        "hidden_activation": config["hidden_act"],
        "query_pre_attn_scalar": _scaled_by(config, largest=62),
        "final_logit_softcapping": header.of("final_logit_softcapping", float) or None,
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        },
        **({} if window else {"layer_types": ["full_attention"] * header.layers()}),
    }


def _scaled_by(config: JsonObject, largest: int) -> int | None:
    """What attention's scale is the inverse root of, which GGUF does not state: llama.cpp knows the
    largest model of the family, which has another one, by its number of layers."""
    heads, hidden_size = config["num_attention_heads"], config["hidden_size"]
    if config["num_hidden_layers"] == largest and heads and hidden_size:
        return hidden_size // heads
    return config["head_dim"]


def granite_scales(header: Header, config: JsonObject) -> JsonObject:
    """Granite's factors of embeddings, attention, blocks and logits."""
    return {
        "embedding_multiplier": header.of("embedding_scale", float),
        "attention_multiplier": header.of("attention.scale", float),
        "residual_multiplier": header.of("residual_scale", float),
        "logits_scaling": header.of("logit_scale", float),
    }


def _ernie4_5(header: Header, config: JsonObject) -> JsonObject:
    return {"use_bias": "attn_q.bias" in header.kinds}


def _olmo2(header: Header, config: JsonObject) -> JsonObject:
    """GGUF's olmo2 is OLMo 3, too, whose layers with a window turn heads by the base alone."""
    if not config["sliding_window"]:
        return {}
    far, original = config["rope_parameters"], config["original_max_position_embeddings"]
    near = {"rope_type": "default", "rope_theta": far["rope_theta"]}
    far = {**far, "original_max_position_embeddings": original} if original else far
    return {
        "model_type": "olmo3",
        "rope_parameters": {"full_attention": far, "sliding_attention": near},
    }


def _mistral3(header: Header, config: JsonObject) -> JsonObject:
    """GGUF's mistral3 is Ministral 3, whose queries grow with their position, and Mistral."""
    grows = header.of("attention.temperature_scale", float)
    of_scores = header.of("rope.scaling.yarn_log_multiplier", float)
    original = config["original_max_position_embeddings"] or config["max_position_embeddings"]
    rope = dict(config["rope_parameters"])
    if of_scores:
        rope.update(mscale=of_scores, mscale_all_dim=of_scores)
    if not grows:
        return {"model_type": "mistral", "rope_parameters": rope}
    rope.update(llama_4_scaling_beta=grows, original_max_position_embeddings=original)
    return {"rope_parameters": rope}


def _phi3(header: Header, config: JsonObject) -> JsonObject:
    original = config["original_max_position_embeddings"]
    return {"original_max_position_embeddings": original or config["max_position_embeddings"]}


def _falcon(header: Header, config: JsonObject) -> JsonObject:
    return {
        "new_decoder_architecture": True,  # GGUF's packed heads are in that order
        "num_kv_heads": config["num_key_value_heads"] or 1,
        "num_ln_in_parallel_attn": 2 if "attn_norm_2.weight" in header.kinds else 1,
    }


def _gpt_neox(header: Header, config: JsonObject) -> JsonObject:
    _refuse_other_heads(header, config)
    return {
        "use_parallel_residual": header.of("use_parallel_residual", bool),
        "rotary_pct": config["partial_rotary_factor"],
    }


def _gpt2(header: Header, config: JsonObject) -> JsonObject:
    _refuse_other_heads(header, config)
    return {"n_inner": config["intermediate_size"], "activation_function": config["hidden_act"]}


def _refuse_other_heads(header: Header, config: JsonObject) -> None:
    """Raise FormatError where heads share keys, or are not hidden_size all together."""
    heads, width = config["num_attention_heads"], config["head_dim"]
    if config["num_key_value_heads"] not in (None, heads) or (
        heads and width and heads * width != config["hidden_size"]
    ):
        raise FormatError(
            f"{header.path}: {shown(heads)} heads of {shown(width)} with "
            f"attention.head_count_kv {shown(config['num_key_value_heads'])} are not supported "
            f"for {header.architecture}"
        )


GRANITE_ROTARY = {"rope.scaling.finetuned": one_of(True)}  # False: no rotary positions at all
DENSE = (
    GgufForm(
        architecture="llama", model_type="llama", windows=0, paired=True,
        experts="num_local_experts", fields=_llama,
    ),
    GgufForm(architecture="bamboo", model_type="bamboo", activation="relu", paired=True),
    GgufForm(architecture="qwen2", model_type="qwen2"),
    GgufForm(architecture="qwen3", model_type="qwen3"),
    GgufForm(architecture="gemma", model_type="gemma", activation="gelu_pytorch_tanh"),
    GgufForm(
        architecture="gemma2", model_type="gemma2", activation="gelu_pytorch_tanh", windows=2,
        fields=_gemma2,
    ),
    GgufForm(
        architecture="gemma3", model_type="gemma3_text", activation="gelu_pytorch_tanh", windows=6,
        fields=_gemma3,
    ),
    GgufForm(
        architecture="arcee", model_type="arcee", activation="relu2", ffn="plain", paired=True,
    ),
    GgufForm(
        architecture="granite", model_type="granite", paired=True, fields=granite_scales,
        harmless=GRANITE_ROTARY,
    ),
    GgufForm(architecture="ernie4_5", model_type="ernie4_5", paired=True, fields=_ernie4_5),
    GgufForm(architecture="smollm3", model_type="smollm3", paired=True),
    GgufForm(architecture="mistral3", model_type="ministral3", paired=True, fields=_mistral3),
    GgufForm(architecture="hunyuan-dense", model_type="hunyuan_v1_dense"),
    GgufForm(architecture="olmo2", model_type="olmo2", windows=4, fields=_olmo2),
    GgufForm(
        architecture="falcon", model_type="falcon", activation="gelu", ffn="plain",
        epsilon=("layer_norm_epsilon", LAYER), fields=_falcon,
        names={
            **{f"layers.{{}}.attention_norm.{k}":
               f"{BLOCK}.attn_norm_2.{k}|{BLOCK}.attn_norm.{k}" for k in KINDS},
            **{f"layers.{{}}.ffn_norm.{k}": f"{BLOCK}.attn_norm.{k}" for k in KINDS},
        },
        harmless={"use_parallel_residual": one_of(True)},
    ),
    GgufForm(
        architecture="phi2", model_type="phi", activation="gelu_new", ffn="plain",
        epsilon=("layer_norm_eps", LAYER), partly_rotary=True,
        harmless={"use_parallel_residual": one_of(True)},
    ),
    GgufForm(
        architecture="phi3", model_type="phi3", ffn="packed", windows=0, partly_rotary=True,
        fields=_phi3,
    ),
    GgufForm(
        architecture="nemotron", model_type="nemotron", activation="relu2", ffn="plain",
        epsilon=("norm_eps", LAYER), partly_rotary=True,
    ),
    GgufForm(
        architecture="gptneox", model_type="gpt_neox", activation="gelu", ffn="plain",
        epsilon=("layer_norm_eps", LAYER), partly_rotary=True, fields=_gpt_neox,
    ),
    GgufForm(
        architecture="gpt2", model_type="gpt2", activation="gelu_new", ffn="plain",
        epsilon=("layer_norm_epsilon", LAYER), fields=_gpt2,
    ),
)  # fmt: skip
