"""SmolLM3 (Bakouch et al. 2025): Llama, of whose layers every fourth has no positions."""

from ..config import ModelConfig, model_of
from ..errors import FormatError, shown
from ..fields import Fields, dimension, flag
from ..numbers import is_whole
from . import hugging_face
from .hugging_face import FFN, NAMES, attention_biases, usual_options
from .mixtures import beside
from .windows import switched_windows

__all__ = ["DEFAULTS", "FFN", "MODEL_TYPES", "NAMES", "model_config"]
MODEL_TYPES = ("smollm3",)
DEFAULTS = {
    **hugging_face.LLAMA,
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a SmolLM3Config (a dict). Raises FormatError."""
    options = usual_options(config)
    layers = options["num_hidden_layers"]
    turned = _turned(config, layers)
    windows = switched_windows(
        {**config, "max_window_layers": 0}, layers, lambda layer, first: not turned[layer]
    )
    return model_of(
        **options,
        **attention_biases(config),
        ffn_bias=flag(config, "mlp_bias"),
        by_layer=beside(windows, [{} if turns else {"rotary": None} for turns in turned]),
    )


def _turned(config: Fields, layers: int) -> list[bool]:
    """Whether each layer has rotary positions: ``no_rope_layers`` has a 1 for those that do."""
    given = config["no_rope_layers"]
    if given is None:
        every = dimension(config, "no_rope_layer_interval")
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not all(map(is_whole, given)):
        raise FormatError(
            f"config: no_rope_layers is {shown(given)}, not a list of {layers} numbers 0 or 1"
        )
    return [turns != 0 for turns in given[:layers]]
