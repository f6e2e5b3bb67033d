"""Hunyuan-A13B (Tencent 2025): Hunyuan with experts, and one more that every token uses."""

from ..config import ModelConfig, Options, model_of
from ..errors import FormatError, shown
from ..fields import Fields
from . import hunyuan_v1_dense, mixtures
from .hunyuan_v1_dense import hunyuan_options
from .mixtures import FUSED_ROWS, MLP, mixture

MODEL_TYPES = ("hunyuan_v1_moe",)
NAMES = {
    **hunyuan_v1_dense.NAMES,
    "layers.{}.router.weight": f"{MLP}.gate.wg.weight",
    **{
        f"layers.{{}}.shared.{p}.weight": f"{MLP}.shared_mlp.{p}_proj.weight"
        for p in ("gate", "up", "down")
    },
}
FFN, FUSED_FFN = mixtures.EXPERTS, mixtures.FUSED_EXPERTS
DEFAULTS = {**hunyuan_v1_dense.DEFAULTS, "num_experts": 1, "moe_topk": 1}
ALIASES = {"num_local_experts": "num_experts", "num_experts_per_tok": "moe_topk"}
__all__ = [
    "ALIASES", "DEFAULTS", "FFN", "FUSED_FFN", "FUSED_ROWS", "MODEL_TYPES", "NAMES", "model_config",
]  # fmt: skip


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a HunYuanMoEV1Config (a dict). Raises FormatError."""
    options = hunyuan_options(config)
    layers, chosen = options["num_hidden_layers"], config["moe_topk"]
    chosen = chosen if isinstance(chosen, list) else [chosen] * layers
    if len(chosen) < layers:
        raise FormatError(f"config: moe_topk is {shown(chosen)}, not a list of {layers}")
    return model_of(
        **options,
        shared_d_ffn=options["d_ffn"],
        by_layer=[_router(config, of_layer) for of_layer in chosen[:layers]],
    )


def _router(config: Fields, experts_per_token: object) -> Options:
    return mixture({**config, "num_experts_per_tok": experts_per_token}, normalised=True)
