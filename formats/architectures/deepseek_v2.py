"""DeepSeek V2 (DeepSeek-AI 2024): latent attention, and experts by softmax behind first layers."""

from ..config import ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag, number
from . import hugging_face, latent_attention, mixtures
from .latent_attention import NAMES, ROWS, TURNED_HEADS, latent_options, refuse_others
from .mixtures import FUSED_ROWS, first_dense, mixture

MODEL_TYPES = ("deepseek_v2",)
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DENSE_FFN = hugging_face.FFN
FURTHER_LAYERS = "num_nextn_predict_layers"
DEFAULTS = {
    **latent_attention.DEFAULTS,
    "vocab_size": 102400,
    "mlp_bias": False,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "n_group": None,
    "topk_group": None,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
}
ALIASES = {"num_experts": "n_routed_experts"}
__all__ = [
    "ALIASES", "DEFAULTS", "DENSE_FFN", "FFN", "FURTHER_LAYERS", "FUSED_FFN", "FUSED_ROWS",
    "MODEL_TYPES", "NAMES", "ROWS", "TURNED_HEADS", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a DeepseekV2Config (a dict). Raises FormatError."""
    refuse_others(config, mlp_bias=False, moe_layer_freq=1, scoring_func="softmax")
    if flag(config, "norm_topk_prob"):
        # transformers takes no notice of it, DeepSeek's own code does.
        raise FormatError("config: norm_topk_prob true is not supported for deepseek_v2")
    options = latent_options(config, interleaved=True)
    method, groups = config["topk_method"], {}
    if method == "group_limited_greedy":
        groups = {
            "groups": dimension(config, "n_group"), "groups_kept": dimension(config, "topk_group"),
        }  # fmt: skip
    elif method != "greedy":
        raise FormatError(
            f"config: topk_method {shown(method)} is not supported; supported: greedy, "
            "group_limited_greedy"
        )
    shared = dimension(config, "n_shared_experts") * options["d_ffn"]
    router = mixture(
        config, False, group_by="max", scale=number(config, "routed_scaling_factor"), **groups
    )
    return model_of(
        **options,
        **router,
        shared_d_ffn=shared,
        by_layer=first_dense(config, options["num_hidden_layers"]),
    )
