"""RoBERTa (Liu et al. 2019): BERT with another head, and positions that begin behind the
padding's."""

from ..config import ModelConfig
from ..errors import FormatError, shown
from ..fields import Fields, dimension
from ..numbers import is_whole
from . import bert
from .bert import KINDS, encoder, ffn_of, names_of

MODEL_TYPES = ("roberta",)
NAMES = {
    **names_of("roberta"),
    **{f"head_dense.{k}": f"lm_head.dense.{k}" for k in KINDS},
    **{f"head_norm.{k}": f"lm_head.layer_norm.{k}" for k in KINDS},
    "lm_head.weight": "lm_head.decoder.weight",
    "lm_head.bias": "lm_head.decoder.bias|lm_head.bias",
}
FFN = ffn_of("roberta")
OPTIONAL = {
    "has_pooler": "roberta.pooler.dense.weight",
    "has_masked_head": "lm_head.dense.weight",
}
DEFAULTS = {
    **bert.DEFAULTS,
    "vocab_size": 50265,
    "pad_token_id": 1,  # positions begin behind its row
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of a RobertaConfig (a dict). Raises FormatError."""
    padding, rows = config["pad_token_id"], dimension(config, "max_position_embeddings")
    if not is_whole(padding, 0, rows - 2):
        raise FormatError(
            f"config: pad_token_id {shown(padding)} leaves none of {rows} max_position_embeddings"
        )
    return encoder(
        config,
        head_activation="gelu",
        position_offset=padding + 1,
        position_padding=padding,
        max_position_embeddings=rows - padding - 1,
    )
