"""What a config leaves out is what the library's config class makes of it."""

import json
from dataclasses import MISSING, fields

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

from random_configs import ENCODERS, MODEL_TYPES, random_config, rotary_fields  # noqa: E402

from flashinfer.formats.architectures import (  # noqa: E402
    ARCHITECTURES,
    gemma4,
    model_config,
    olmo3,
)
from flashinfer.formats.errors import FormatError  # noqa: E402

# Fields of the classes that change no logit: of training, of generation, of the library's own.
WITHOUT_EFFECT = {
    "attention_dropout", "attn_pdrop", "dropout", "embd_pdrop", "hidden_dropout", "layerdrop",
    "resid_pdrop", "init_std", "initializer_range", "use_cache", "pad_token_id", "pretraining_tp",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
}  # fmt: skip
# Fields that some classes have, and their models do not look at.
NOT_LOOKED_AT = {
    "gemma3_text": {"attn_logit_softcapping"},
    "gemma3n_text": {"altup_coef_clip"},  # of training
    "gpt_oss": {"hidden_act"},
    # Which layers a second token is predicted with; they are left out.
    "glm4_moe": {"num_mtp_layers"},
    "deepseek_v3": {"num_mtp_layers"},
    # It is made of qk_rope_head_dim.
    "deepseek_v2": {"head_dim"},
    # Of a classifier; and what its model never asks for.
    "gpt_neox": {"classifier_dropout", "is_decoder"},
    # Of another head than that of a language model.
    **{
        name: {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"}
        for name in ENCODERS
    },
    **{name: {"eod_token_id", "sep_token_id"} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe")},
    "phimoe": {"input_jitter_noise"},  # of training
    # How many tokens are computed together.
    "granitemoehybrid": {"mamba_chunk_size"},
    # What transformers' own model never asks for, of training, or of layers that are left out.
    "nemotron_h": {
        "attention_bias",
        "chunk_size",
        "expand",
        "mamba_proj_bias",
        "mamba_ssm_cache_dtype",
        "moe_shared_expert_overlap",
        "mtp_layers_block_type",
        "n_shared_experts",
        "num_logits_to_keep",
        "num_nextn_predict_layers",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "sliding_window",
        "tie_word_embeddings",
        "time_step_floor",
        "time_step_limit",
        "time_step_max",
        "use_mamba_kernels",
    },
    "gpt2": {
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    },
}
# And those that some look at, where most do not.
LOOKED_AT = {
    "roberta": {"pad_token_id"}, "xlm-roberta": {"pad_token_id"}, "phimoe": {"router_jitter_noise"},
}  # fmt: skip
# Fields that the classes do not name, but take: what older configs say of rotary positions, a
# head's width, and others that the class or its model looks for by name.
UNNAMED = {
    "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "head_dim", "rope_local_base_freq", "sliding_window_pattern", "n_embed", "layer_types",
    "hidden_act_param", "rotary_emb_base", "rotary_pct", "position_embedding_type",
    "has_pooler", "has_masked_head", "full_attention_interval", "hybrid_override_pattern",
    # Which of GGUF's forms it is.
    "linear_value_heads_tiled",
    # What DeepSeek's own code looks at, and what GGUF's epsilon is.
    # Of Gemma 4's layers that see all, and which of its vectors a checkpoint has.
    "global_head_dim", "num_global_key_value_heads", "per_layer_config", "layer_scalar",
    "first_k_dense_replace", "moe_layer_freq", "scoring_func", "topk_method", "latent_norm_eps",
}  # fmt: skip

# Classes with rotary positions of their own for configs that say nothing of them; the base is then
# that of configs that leave it alone out.
OWN_ROPE = {"ministral3"}


def class_of(model_type):
    return transformers.AutoConfig.for_model(model_type).__class__


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_defaults_are_those_of_the_config_class(model_type):
    defaults = ARCHITECTURES[model_type].DEFAULTS
    named = {f.name: f.default for f in fields(class_of(model_type)) if f.default is not MISSING}
    for field in defaults.keys() & named.keys():
        assert (field, defaults[field]) == (field, named[field])
    assert defaults.keys() - named.keys() <= UNNAMED
    ignored = WITHOUT_EFFECT | NOT_LOOKED_AT.get(model_type, set())
    ignored = ignored - LOOKED_AT.get(model_type, set())
    assert named.keys() - defaults.keys() <= ignored, "fields that nobody looked at"
    assert not ignored & defaults.keys()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_base_of_rotary_positions(model_type):
    given = {"rope_parameters": {"rope_type": "default"}} if model_type in OWN_ROPE else {}
    defaults, config = ARCHITECTURES[model_type].DEFAULTS, class_of(model_type)(**given)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        assert "rope_theta" not in defaults
        return
    if model_type == "gemma4_text":
        assert rope == gemma4.ROPE_OF_KINDS
        return
    if "sliding_attention" in rope:
        near = defaults.get("rope_local_base_freq", olmo3.THETA)
        assert rope["sliding_attention"]["rope_theta"] == near
        rope = rope["full_attention"]
    base, share = rotary_fields(defaults)
    assert rope["rope_theta"] == defaults[base]
    assert rope.get("partial_rotary_factor") == defaults[share]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_library_fills_in_the_same(model_type):
    """A config from which a field was taken is the same model as what the library makes of it."""
    transformers.logging.set_verbosity_error()
    compared = 0
    for seed in range(12):
        config = random_config(np.random.default_rng([7, seed]), model_type)
        for field in [None, *config]:
            if field != "model_type":
                left = {key: value for key, value in config.items() if key != field}
                compared += same(left)
    assert compared > 30


def same(config):
    """Whether a config could be compared; they agree where it can."""
    text = json.dumps(config)
    try:
        full = transformers.AutoConfig.for_model(**json.loads(text)).to_dict()
    except Exception:  # the library refuses it, in one of many ways
        return False
    try:
        ours = model_config(json.loads(text))
        theirs = model_config({**full, "model_type": config["model_type"]})
    except FormatError:
        return False
    assert ours == theirs, text
    return True
