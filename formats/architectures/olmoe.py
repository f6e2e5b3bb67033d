"""OLMoE (Muennighoff et al. 2024): 64 small experts, 8 of them for each token."""

from ..config import ModelConfig, flag
from ..errors import FormatError
from . import hugging_face
from .hugging_face import mixture, usual_options

MODEL_TYPES = ("olmoe",)
NAMES = {**hugging_face.NAMES, "layers.{}.router.weight": "model.layers.{}.mlp.gate.weight"}
FFN = hugging_face.EXPERTS


def model_config(config):
    """The ModelConfig of an OlmoeConfig (a dict). Raises FormatError."""
    if config.get("clip_qkv") is not None:
        raise FormatError("config: clip_qkv is not supported")
    options = usual_options(config, ("rms_norm_eps", 1e-5))
    return ModelConfig(
        **{**options, **mixture(config, "intermediate_size", normalised=False)},
        qk_norm=True,
        qk_norm_whole=True,
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
    )
