"""Models of text and images, of which the text part is a model that is known.

Their config has the text model's in ``text_config``, and its tensors lie beside those of a vision
tower and of what projects its output, which are left out.
"""

from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError, shown
from ..fields import Fields

# Where checkpoints have the tensors of a text model, and where it has them by itself; the first
# that fits counts.
PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("language_model.", "model."),
)
HEAD = "lm_head.weight"
TOWER = ("vision_tower.", "multi_modal_projector.")
# Fields that may stand in the outer config only.
OUTER = ("bos_token_id", "eos_token_id", "quantization_config")


@dataclass(frozen=True)
class Wrapper:
    """A model of text and images.

    text       the architecture of its text where ``text_config`` does not say it
    left_out   the prefixes of its other tensors, which may have "model." before them
    known_as   what ``text_config`` calls that architecture, where it has a name of its own for it
    defaults   of fields of the text, where they are not those of the architecture
    fixed      fields that have this value, whatever ``text_config`` says of them
    flat       older configs have the text's fields beside those of the vision tower
    """

    text: str
    left_out: tuple[str, ...] = TOWER
    known_as: tuple[str, ...] = ()
    defaults: Fields = field(default_factory=dict)
    fixed: Fields = field(default_factory=dict)
    flat: bool = False

    def text_name(self, name: str) -> str | None:
        """What the text model calls a tensor; None: it is none of the text model's."""
        if name.removeprefix("model.").startswith(self.left_out):
            return None
        for theirs, ours in PREFIXES:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name


VISUAL = ("visual.",)
GEMMA4 = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
IDEFICS = ("vision_model.", "connector.")
QWEN2_VL: Fields = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80,
}  # fmt: skip
QWEN3_VL_MOE: Fields = {
    "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
    "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4,
    "max_position_embeddings": 128000, "rope_theta": 5e5,
}  # fmt: skip
WRAPPERS = {
    "gemma3": Wrapper("gemma3_text"),
    "gemma3n": Wrapper("gemma3n_text", GEMMA4),
    "gemma4": Wrapper("gemma4_text", GEMMA4),
    "mistral3": Wrapper("mistral"),
    "llava": Wrapper("llama"),
    "llava_next": Wrapper("llama", (*TOWER, "image_newline")),
    "llava_onevision": Wrapper("qwen2", (*TOWER, "image_newline")),
    "vipllava": Wrapper("llama"),
    "internvl": Wrapper("qwen2"),
    "lighton_ocr": Wrapper("qwen3", ("vision_encoder.", "vision_projection.")),
    "smolvlm": Wrapper("llama", IDEFICS, defaults={"rms_norm_eps": 1e-5}),
    "idefics3": Wrapper("llama", IDEFICS, defaults={"rms_norm_eps": 1e-5}),
    "lfm2_vl": Wrapper("lfm2"),
    "qwen2_vl": Wrapper("qwen2", VISUAL, ("qwen2_vl_text",), QWEN2_VL, flat=True),
    "qwen2_5_vl": Wrapper("qwen2", VISUAL, ("qwen2_5_vl_text",), QWEN2_VL, flat=True),
    "qwen3_vl": Wrapper(
        "qwen3",
        VISUAL,
        ("qwen3_vl_text",),
        {"max_position_embeddings": 128000, "rope_theta": 5e5},
    ),
    "qwen3_vl_moe": Wrapper(
        "qwen3_moe",
        VISUAL,
        ("qwen3_vl_moe_text",),
        QWEN3_VL_MOE,
        fixed={"norm_topk_prob": True, "use_sliding_window": False},
    ),
    "qwen3_5": Wrapper("qwen3_5_text", VISUAL),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text", VISUAL),
}


def wrapper_of(config: Fields) -> Wrapper | None:
    """The Wrapper that a config is of, or None."""
    model_type: Any = config.get("model_type")
    return WRAPPERS.get(model_type) if isinstance(model_type, str) else None


def text_config(config: Fields) -> Fields:
    """The config of the text part of a model of text and images; any other is returned as it is.
    Raises FormatError where it has none."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config
    text = config.get("text_config")
    if text is None and wrapper.flat:
        text = {k: v for k, v in config.items() if k not in ("model_type", "vision_config")}
    if not isinstance(text, dict):
        raise FormatError(f"config: text_config is {shown(text)}, not an object")
    outer = {key: config[key] for key in OUTER if config.get(key) is not None}
    # A checkpoint says by its tensors whether the output head is tied; here it is left to the
    # outer config, whose class ties where it says nothing.
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    text = {"model_type": wrapper.text, **wrapper.defaults, **outer, **text, **wrapper.fixed}
    if text["model_type"] in wrapper.known_as:
        text["model_type"] = wrapper.text
    return {**text, **_of_one_dimension(text), "tie_word_embeddings": tied}


def _of_one_dimension(text: Fields) -> dict[str, Any]:
    """Rotary positions that are of three dimensions for images are the same in all of them for a
    text, and so the usual ones."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key)
        if isinstance(rope, dict) and "mrope" in (rope.get("type"), rope.get("rope_type")):
            kinds = dict.fromkeys(("type", "rope_type"), "default")
            found[key] = {**rope, **kinds}
    return found
