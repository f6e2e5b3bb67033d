"""GLM-4.7-Flash (Zhipu AI 2026): DeepSeek V3, in which a list says which layers have experts."""

from ..config import ByLayer, ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, flag, of_layers
from . import hugging_face, mixtures
from .deepseek_v3 import SIGMOID
from .latent_attention import NAMES, ROWS, TURNED_HEADS, latent_options, refuse_others
from .mixtures import FUSED_ROWS, dense_layers, sigmoid_mixture

MODEL_TYPES = ("glm4_moe_lite",)
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
FURTHER_LAYERS = "num_nextn_predict_layers"
DEFAULTS = {
    **SIGMOID,
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_routed_experts": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": None,
    "mlp_layer_types": None,
}
ALIASES = {"num_local_experts": "n_routed_experts", "head_dim": "qk_rope_head_dim"}
# Of mlp_layer_types: whether a layer is without experts.
LAYER_TYPES = {"dense": True, "sparse": False}
__all__ = [
    "ALIASES", "DEFAULTS", "DENSE_FFN", "FFN", "FURTHER_LAYERS", "FUSED_FFN", "FUSED_ROWS",
    "MODEL_TYPES", "NAMES", "ROWS", "TURNED_HEADS", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a Glm4MoeLiteConfig (a dict). Raises FormatError."""
    refuse_others(config, moe_layer_freq=1, topk_method="noaux_tc", scoring_func="sigmoid")
    options = latent_options(config, flag(config, "rope_interleave"), partly=True)
    return model_of(
        **options,
        **sigmoid_mixture(config),
        by_layer=_dense(config, options["num_hidden_layers"]),
    )


def _dense(config: Fields, layers: int) -> ByLayer:
    """By layer: an FFN without experts where ``mlp_layer_types`` says so, or else in the first."""
    given, first = config["mlp_layer_types"], config["first_k_dense_replace"]
    kinds = ["dense"] + ["sparse"] * (layers - 1) if given is None else given
    without = of_layers("mlp_layer_types", kinds, LAYER_TYPES, layers)
    if first is not None and without != [layer < first for layer in range(layers)]:
        raise FormatError(
            f"config: first_k_dense_replace {shown(first)} says otherwise than mlp_layer_types"
        )
    return dense_layers(config, without)
