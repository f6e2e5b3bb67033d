"""The architectures there are: one module each, found by the config's ``model_type``.

A module gives
    MODEL_TYPES           the names it goes by
    DEFAULTS              {field of its config class that changes the result: what it is where a
                          config leaves it out}; no other fields are looked at
    model_config(config)  the ModelConfig of these fields (a dict)
    NAMES                 {our tensor: the checkpoint's}, {} is the layer
    FFN                   {"gate", "up", "down": the checkpoint's tensor}, {expert} is the expert;
                          without it, all of a layer's experts are in one tensor
and where they are needed
    ALIASES               {another name of a field, which goes before it: the field}
    DENSE_FFN             FFN of the layers without experts, of a mixture that has such
    ROWS                  {our projection: which rows of a packed tensor it is, or in which order
                          rows are taken, of a LayerConfig}
    NORM_LESS_ONE         norms are stored with one taken away
    FUSED_FFN, FUSED_ROWS  FFN and ROWS where all of a layer's experts are in one tensor
    OPTIONAL              {field that no config states: the tensor that a checkpoint has where the
                          field is true}
    VALUES                {our tensor: a function that makes it of the checkpoint's, float32 each}
    TURNED_HEADS          {our projection: how many matrices lie below each other in it, of a
                          LayerConfig, of which each has rows and columns exchanged there}
    CONVOLUTIONS          our matrices (channels, kernel) that are (channels, 1, kernel) there
    UNUSED                tensors of checkpoints that have no part in what is computed
    FURTHER_LAYERS        the field that says how many layers come after the last one that are no
                          part of the model proper; they are left out
    FURTHER_NAMES         how the names of tensors begin that predict further tokens; they are left
                          out, too
    STACKED               our tensors, {} is the layer, of which those of all layers are one there,
                          a layer's rows below those of the one before
    NUMBERED              {our matrix of hidden states: its number among those that lie below each
                          other in one tensor there}
    BORROWED              tensors, {} is the layer, that checkpoints may have of layers without use
                          for them, because they read an earlier layer's keys and values
    BLOCKS                mixers and FFNs are numbered there, each as a layer of its own
    ONE_ROW               our vectors that checkpoints have as matrices of one row
    TURNED                the parts, as ROWS names them, whose matrices have rows and columns
                          exchanged; in MXFP4 they never have
    TURNED_BY_SHAPE       those whose matrices have them exchanged in some checkpoints, as their
                          shapes tell; square ones have not
"""

from typing import Any

from ..bitnet import of_config as bitnet_of
from ..config import ModelConfig
from ..errors import FormatError, shown
from ..fields import Fields
from ..fp8 import is_supported
from . import (
    arcee,
    bamboo,
    bert,
    bitnet,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    falcon,
    flex_olmo,
    gemma,
    gemma2,
    gemma3,
    gemma3n,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    hunyuan_v1_dense,
    hunyuan_v1_moe,
    lfm2,
    lfm2_moe,
    llama,
    ministral3,
    mistral,
    mixtral,
    nanochat,
    nemotron,
    nemotron_h,
    olmo2,
    olmo3,
    olmoe,
    opt,
    persimmon,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    roberta,
    smallthinker,
    smollm3,
    sparsellama,
    xlm_roberta,
)
from .wrappers import WRAPPERS

MODULES = (
    opt, llama, arcee, sparsellama, mistral, bamboo, qwen2, qwen3, falcon, persimmon, phi, phi3,
    nemotron, gemma, gemma2, gemma3, gemma3n, gemma4, olmoe, qwen3_moe, qwen2_moe, mixtral,
    granitemoe, gpt_oss, dots1, glm4_moe, smallthinker, lfm2, lfm2_moe, qwen3_next, qwen3_5,
    qwen3_5_moe, gpt_neox, gpt2, bert, roberta, xlm_roberta, smollm3, ministral3, olmo2, olmo3,
    flex_olmo, hunyuan_v1_dense, hunyuan_v1_moe, granite, ernie4_5, ernie4_5_moe, nanochat, bitnet,
    phimoe, deepseek_v2, deepseek_v3, glm4_moe_lite, granitemoehybrid, nemotron_h,
)  # fmt: skip
ARCHITECTURES = {name: module for module in MODULES for name in module.MODEL_TYPES}


def architecture(config: Fields) -> Any:
    """The module for a Hugging Face config (a dict). Raises FormatError where there is none."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise FormatError(
            f"config: model_type {shown(model_type)} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}, and the texts of {', '.join(WRAPPERS)}"
        )
    return ARCHITECTURES[model_type]


def model_config(config: Fields) -> ModelConfig:
    """The ModelConfig of any supported Hugging Face config (a dict). Raises FormatError."""
    module = architecture(config)
    rounded = bitnet_of(config) is not None
    if rounded and hasattr(module, "TURNED"):
        raise FormatError(
            f"config: quantization_config of bitnet is not supported of {config['model_type']}: "
            "its matrices are not those of linear layers"
        )
    for field, is_usual in UNUSUAL.items():
        if field in config and field not in module.DEFAULTS and not is_usual(config[field]):
            raise FormatError(f"config: {field} {shown(config[field])} is not supported")
    fields = {key: config.get(key, default) for key, default in module.DEFAULTS.items()}
    for alias, field in getattr(module, "ALIASES", {}).items():
        fields[field] = config.get(alias, fields[field])
    found: ModelConfig = module.model_config(fields)
    return found.with_rounded_inputs() if rounded else found


# Fields that change the result of every architecture that does not read them: whether they are as
# usual.
UNUSUAL = {
    "is_causal": lambda value: value is True,
    "per_layer_config": lambda value: value is None,
    "quantization_config": is_supported,
}
