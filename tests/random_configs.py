"""Random Hugging Face configs of every architecture, small enough to be made into a model.

Fields are left out at random, so that defaults count, stand in their older forms, or beside others
that the architecture takes no notice of. Some configs are no model's; most are.
"""

import json

from flashinfer.formats.architectures import ARCHITECTURES

TOKENS = 24  # of the texts that are compared: longer than most windows
# Their code comes with their checkpoints, not with the library.
OWN_CODE = ("sparsellama", "bamboo", "turbosparsemistral", "smallthinker")
MODEL_TYPES = tuple(sorted(ARCHITECTURES.keys() - set(OWN_CODE)))
MIXTURES = (
    "olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "dots1", "glm4_moe",
    "flex_olmo", "hunyuan_v1_moe", "phimoe", "ernie4_5_moe", "lfm2_moe", "qwen3_next",
    "qwen3_5_moe_text", "granitemoehybrid", "nemotron_h",
)  # fmt: skip
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
ENCODERS = ("bert", "roberta", "xlm-roberta")
ACTIVATIONS = (
    "silu", "swish", "relu", "relu2", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh",
    "gelu_python", "gelu_accurate", "quick_gelu",
)  # fmt: skip
NO_EXPERTS = {  # of the other names of fields: those that name no number of experts
    "layers_block_type", "layer_types", "mamba_n_groups", "mamba_d_conv", "mamba_dt_min",
    "mamba_conv_bias",
}  # fmt: skip
UNKNOWN_ACTIVATIONS = ("mish", "tanh", "gelu_10", "none")
# What no architecture looks at, or not this one.
STRANGERS = {
    "pretraining_tp": 2,
    "torch_dtype": "float16",
    "use_cache": False,
    "attention_dropout": 0.3,
    "some_field": {"of": ["another", 1]},
    "quantization_config": None,
    "router_jitter_noise": 0.2,
    "transformers_version": "4.30.0",
}
KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


class Draw:
    """Random choices; ``config`` is what was chosen so far."""

    def __init__(self, random, model_type):
        self.random, self.model_type = random, model_type
        self.defaults = ARCHITECTURES[model_type].DEFAULTS
        self.config = {"model_type": model_type}

    def often(self, share):
        return self.random.random() < share

    def one_of(self, *values):
        return values[self.random.integers(len(values))]

    def number(self, low, high):
        """Of a logarithmic scale, with a few digits."""
        return float(f"{low * (high / low) ** self.random.random():.3g}")

    def put(self, field, *values, there=0.6):
        """One of ``values``, where the architecture knows the field; else seldom."""
        if self.often(there if field in self.defaults else 0.02):
            self.config[field] = self.one_of(*values)


def random_config(random, model_type):
    """A config (a dict) as config.json might hold it."""
    draw = Draw(random, model_type)
    _dimensions(draw)
    _options(draw)
    if model_type == "ernie4_5_moe":
        _mixture_of_ernie(draw)
    elif model_type in (*MIXTURES, *LATENT):
        _mixture(draw)
    if model_type in LATENT:
        _latent(draw)
    _windows(draw)
    _mixers(draw)
    if model_type == "gemma4_text":
        _of_gemma4(draw)
    elif model_type in ("gemma3_text", "gemma3n_text", "olmo3"):
        _rotary_of_two_kinds(draw)
    elif model_type not in ("opt", "gpt2", "nemotron_h", *ENCODERS):
        _rotary(draw)
    if '"dynamic"' in json.dumps(draw.config) and draw.often(0.6):
        draw.config["max_position_embeddings"] = draw.one_of(12, 16)
    if model_type == "gemma3n_text":
        _of_gemma3n(draw)
    if model_type == "gpt2":
        _of_gpt2(draw)
    if model_type == "nemotron_h":
        _of_nemotron_h(draw)
    if model_type == "granitemoehybrid":
        _of_granite_hybrid(draw)
    if model_type in ENCODERS:
        _of_encoders(draw)
    draw.put("use_bias", True, False, there=0.1 if model_type == "ernie4_5_moe" else 0.5)
    for field, value in STRANGERS.items():
        if draw.often(0.05):
            draw.config.setdefault(field, value)
    return draw.config


def _dimensions(draw):
    config, defaults = draw.config, draw.defaults
    config.update(vocab_size=draw.one_of(60, 96), pad_token_id=0)
    config["num_hidden_layers"] = draw.one_of(1, 2, 3, 4)
    heads = draw.one_of(2, 4, 4, 8, 8, 16, 32)
    if draw.often(0.05):
        heads = defaults.get("num_attention_heads", 12)
    else:
        config["num_attention_heads"] = heads
    width = draw.one_of(4, 6, 8, 12) if heads < 32 else 2
    if draw.often(0.9) and partly_rotary(draw):
        least = round(2 / draw.defaults[rotary_fields(draw.defaults)[1]])
        width = max(least, width // least * least)
    config["hidden_size"] = heads * width
    key_values = defaults.get("num_key_value_heads")
    fits = draw.model_type != "nemotron" and (key_values is None or heads % key_values == 0)
    if draw.often(0.3 if fits else 0.95):
        shared = [n for n in (1, 2, 4, 8, 16, 32) if heads % n == 0]
        draw.put("num_key_value_heads", *shared, there=1)
    draw.put("num_kv_heads", *(n for n in (1, 2, heads) if heads % n == 0))
    without_default = ("ministral", "mixtral", "hunyuan_v1_dense", "hunyuan_v1_moe")
    needs = defaults.get("head_dim") is not None or draw.model_type in without_default
    # OLMoE's and BitNet's norms do not follow it, nor GPT-NeoX's projections.
    seldom = 0.05 if draw.model_type in ("olmoe", "bitnet", "gpt_neox") else 1
    if draw.often((0.8 if needs else 0.4) * seldom):
        draw.put("head_dim", 4, 8, 12, 16, there=1)
    for field in ("intermediate_size", "ffn_dim"):
        draw.put(field, 24, 33, 40, 72, there=1)
    draw.put("ffn_hidden_size", 24, 33, 40, 72)
    draw.put("max_position_embeddings", 24, 32, 48)
    draw.put("word_embed_proj_dim", 16, 24, config["hidden_size"])


def partly_rotary(draw):
    """Whether a part of each head may be rotary."""
    return draw.defaults.get(rotary_fields(draw.defaults)[1]) is not None


def _options(draw):
    flags = (
        "tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "bias", "enable_bias",
        "qk_layernorm", "do_layer_norm_before", "_remove_final_layer_norm", "alibi",
        "layer_norm_elementwise_affine", "new_decoder_architecture", "multi_query",
        "parallel_attn",
    )  # fmt: skip
    for field in flags:
        draw.put(field, True, False, there=0.5)
    for field in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"):
        draw.put(field, 0.0, 1e-6, 1e-5, 1e-3, 0.1)
    names = UNKNOWN_ACTIVATIONS if draw.often(0.03) else ACTIVATIONS
    for field in ("hidden_act", "hidden_activation", "activation", "activation_function"):
        if field in draw.defaults or draw.often(0.2):
            draw.config[field] = draw.one_of(*names)
            if draw.often(0.4):
                del draw.config[field]
    draw.put("num_ln_in_parallel_attn", 1, 2, None, there=0.3)
    draw.put("query_pre_attn_scalar", 8, 24, 100, 256)
    draw.put("attn_logit_softcapping", None, 1.0, 5.0, 30.0, 1000.0)
    draw.put("final_logit_softcapping", None, 1.0, 5.0, 50.0, 1000.0)
    for field in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        draw.put(field, 0.3, 0.5, 2, 3.0)
    draw.put("attention_multiplier", 0.1, 0.25, 1)
    draw.put("use_bidirectional_attention", False, None, *([True] if draw.often(0.1) else []))
    draw.put("swiglu_limit", 0.5, 2.0, 7.0)
    draw.put("swiglu_alpha", 1.702, *([1.0] if draw.often(0.1) else []))
    draw.put("clip_qkv", None, *([0.5] if draw.often(0.1) else []))
    if draw.model_type == "gpt_neox":
        draw.put("use_parallel_residual", True, False)


def _of_encoders(draw):
    """Fields of their own."""
    draw.put("pad_token_id", 0, 1, 1, 7, there=0.7)
    draw.put("type_vocab_size", 1, 2, 3)
    draw.put("position_embedding_type", "absolute", there=0.3)
    for field in ("is_decoder", "add_cross_attention"):
        draw.put(field, False, *([True] if draw.often(0.05) else []), there=0.2)


def _of_gpt2(draw):
    """Fields of its own, and its names of those that others have, too."""
    draw.put("n_inner", None, 24, 33, 72)
    for field in (
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
    ):
        draw.put(field, True, False, there=0.4)
    draw.put("add_cross_attention", False, *([True] if draw.often(0.1) else []), there=0.2)
    draw.config.setdefault("max_position_embeddings", 48)
    for name, own in ARCHITECTURES["gpt2"].ALIASES.items():
        if name in draw.config and draw.often(0.8):
            draw.config[own] = draw.config.pop(name)


def _of_gemma3n(draw):
    """Several hidden states, keys that layers share, and gates of which the largest count."""
    config, random = draw.config, draw.random
    layers = config["num_hidden_layers"]
    heads = config["num_attention_heads"] = draw.one_of(2, 4, 8)
    config["hidden_size"] = heads * draw.one_of(4, 6, 8, 12)
    config["num_key_value_heads"] = draw.one_of(*(n for n in (1, 2, 4) if heads % n == 0))
    config["vocab_size_per_layer_input"] = config["vocab_size"] + draw.one_of(0, 0, 3, -5)
    config["hidden_size_per_layer_input"] = draw.one_of(6, 8, 12)
    if config.get("rms_norm_eps") == 0:
        config["rms_norm_eps"] = 1e-5
    if config.get("final_logit_softcapping", 1) is None:
        del config["final_logit_softcapping"]
    if draw.often(0.95):
        config["sliding_window"] = draw.one_of(3, 5, 8, 11, 40)
    usual = ["full_attention" if (n + 1) % 5 == 0 else "sliding_attention" for n in range(layers)]
    kinds = config.get("layer_types", usual)
    most = layers - max(kinds.index(kind) for kind in set(kinds))
    most = most if draw.often(0.95) else layers + 1
    config["num_kv_shared_layers"] = int(random.integers(0, most))
    draw.put("laurel_rank", 1, 3, 8)
    states = draw.one_of(2, 3, 4) if draw.often(0.5) else 4
    draw.put("altup_num_inputs", states, there=1 if states != 4 else 0.3)
    draw.put("altup_active_idx", *range(states), there=0.5)
    draw.put("altup_correct_scale", True, False)
    draw.put("altup_coef_clip", 0.1, 120.0)
    if draw.often(0.6):
        shares = [draw.one_of(0.0, 0.0, 0.5, 0.95, 0.2) for _ in range(layers)]
        config["activation_sparsity_pattern"] = draw.one_of(shares, shares, None)
    if "intermediate_size" in config and draw.often(0.3):
        config["intermediate_size"] = [draw.one_of(24, 33, 40) for _ in range(layers)]


def _of_gemma4(draw):
    """Heads of two sizes, keys that layers share, experts beside a dense FFN, and a row of each
    token for each layer."""
    config, random = draw.config, draw.random
    layers = config["num_hidden_layers"] = int(random.integers(1, 7))
    heads = config["num_attention_heads"] = draw.one_of(2, 4, 8)
    config.pop("use_bidirectional_attention", None)
    draw.put("use_bidirectional_attention", None, "vision", *(["all"] if draw.often(0.1) else []))
    config["num_key_value_heads"] = draw.one_of(*(n for n in (1, 2, 4) if heads % n == 0))
    config["vocab_size_per_layer_input"] = config["vocab_size"] + draw.one_of(0, 0, 3)
    if draw.often(0.03):
        config["vocab_size_per_layer_input"] -= 5
    config["hidden_size_per_layer_input"] = draw.one_of(0, 6, 8, 12)
    if config.get("rms_norm_eps") == 0:  # norms of what a GELU shuts would be those of its rounding
        config["rms_norm_eps"] = 1e-5
    config["global_head_dim"] = draw.one_of(4, 8, 12, 16, 24)
    fitting = (n for n in (1, 2, 4) if heads % n == 0)
    draw.put("num_global_key_value_heads", None, *fitting)
    draw.put("attention_k_eq_v", True, False)
    draw.put("use_double_wide_mlp", True, False)
    if "layer_types" in config or draw.often(0.7):
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [draw.one_of(*kinds) for _ in range(layers)]
    if draw.often(0.95):
        config["sliding_window"] = draw.one_of(3, 5, 8, 11, 40)
    if draw.often(0.6):  # seldom more layers than leave one of each kind with keys of its own
        kinds = [*config.get("layer_types", ["sliding_attention"] * layers)[:-1], "full_attention"]
        most = layers - max(kinds.index(kind) for kind in set(kinds))
        most = most if draw.often(0.9) else layers + 1
        config["num_kv_shared_layers"] = int(random.integers(0, most))
        if config["num_kv_shared_layers"] and draw.often(0.9):  # transformers needs a row for each
            config["hidden_size_per_layer_input"] = draw.one_of(8, 12)
    if draw.often(0.4):
        config.update(enable_moe_block=True, num_experts=draw.one_of(4, 8, 9))
        config.update(top_k_experts=draw.one_of(1, 2, 3), moe_intermediate_size=draw.one_of(24, 33))
    if draw.often(0.2) and "layer_types" in config:
        _per_layer_config(draw)
    if draw.often(0.6):
        head_dims = (config.get("head_dim", 256), config["global_head_dim"])
        found = config["rope_parameters"] = {}
        for kind, head_dim in zip(("sliding_attention", "full_attention"), head_dims, strict=True):
            kinds = KINDS if draw.often(0.2) else ("default", "linear", "proportional")
            found[kind] = _kind(draw, draw.one_of(*kinds), head_dim, False)
            if "proportional" in found[kind].values() and draw.often(0.8):
                found[kind]["partial_rotary_factor"] = draw.one_of(0.25, 0.5, 0.3, 1, 1.0, 0)
            if draw.often(0.98):
                found[kind]["rope_theta"] = draw.number(10, 1e6)


def _per_layer_config(draw):
    """The sizes of heads layer by layer, as newer configs have them."""
    config = draw.config
    kinds = [*config["layer_types"][:-1], "full_attention"]
    heads = [n for n in (1, 2, 4) if config["num_attention_heads"] % n == 0]
    of_kinds = {kind: {} for kind in kinds}
    for own in of_kinds.values():
        if draw.often(0.7):
            own["head_dim"] = draw.one_of(4, 8, 12, 16)
        if draw.often(0.5):
            own["num_key_value_heads"] = draw.one_of(*heads)
    found = {str(layer): of_kinds[kind] for layer, kind in enumerate(kinds) if of_kinds[kind]}
    config["per_layer_config"] = draw.one_of(found, found, found, {}, None)
    if draw.often(0.1) and found:
        found.popitem()


def _of_granite_hybrid(draw):
    """Experts or none, positions or none, and Mamba-2 in most layers."""
    config = draw.config
    draw.put("num_local_experts", 0, 8, 9, there=0.6)
    draw.put("shared_intermediate_size", 24, 33, 40, there=1)
    draw.put("position_embedding_type", "rope", "rope", None, "nope")
    width = config["hidden_size"] * draw.one_of(1, 2, 3)
    heads = draw.one_of(*(n for n in (1, 2, 4, 6, 8) if width % n == 0))
    config.update(mamba_expand=width // config["hidden_size"], mamba_n_heads=heads)
    draw.put("mamba_d_head", width // heads, "auto", there=0.9 if draw.often(0.95) else 0)
    if draw.often(0.05):
        draw.put("mamba_d_head", 5, there=1)
    draw.put("mamba_n_groups", *(n for n in (1, 1, 2, 4, 3) if heads % n == 0))
    draw.put("mamba_d_state", 3, 8, 16, there=1)
    draw.put("mamba_d_conv", 2, 3, 4)
    draw.put("mamba_chunk_size", 4, 16, 256)
    for field in ("mamba_conv_bias", "mamba_proj_bias"):
        draw.put(field, True, False)
    limits = (
        [0.0, float("inf")],
        [0.2, 0.9],
        [0.5, float("inf")],
        [0.0, {"__float__": "Infinity"}],
    )
    draw.put("time_step_limit", *limits)
    names = ("mamba", "attention", "linear_attention", "full_attention")
    kinds = [draw.one_of(*names) for _ in range(config["num_hidden_layers"])]
    draw.put(draw.one_of("layer_types", "layers_block_type"), kinds, there=0.8)


def _of_nemotron_h(draw):
    """Blocks of four kinds, named or by their letters."""
    config, random = draw.config, draw.random
    config.pop("num_hidden_layers", None)
    letters = ["M", "*"]
    pattern = "".join(
        draw.one_of(*letters) + draw.one_of("", "-", "-", "E") for _ in range(random.integers(1, 5))
    )
    if draw.often(0.1):
        pattern = draw.one_of("-M-", "M--", "ME-", "M", "")
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    older = {"linear_attention": "mamba", "full_attention": "attention"}
    if draw.often(0.5):
        config["hybrid_override_pattern"] = pattern
    elif draw.often(0.9):
        named = [kinds[letter] for letter in pattern]
        named = [older.get(kind, kind) for kind in named] if draw.often(0.5) else named
        draw.put(draw.one_of("layers_block_type", "layer_types"), named, there=1)
        config.pop("layer_types" if "layers_block_type" in config else "layers_block_type", None)
    if draw.often(0.9):
        config["num_key_value_heads"] = draw.one_of(*(
            n for n in (1, 2, 4) if config.get("num_attention_heads", 32) % n == 0
        ))  # fmt: skip
    heads = draw.one_of(2, 4, 6)
    config.update(mamba_num_heads=heads, mamba_head_dim=draw.one_of(4, 8, 10))
    config[draw.one_of("n_groups", "mamba_n_groups")] = draw.one_of(1, 2)
    draw.put("ssm_state_size", 3, 8, 16, there=1)
    draw.put(draw.one_of("conv_kernel", "mamba_d_conv"), 2, 3, 4)
    draw.put(draw.one_of("time_step_min", "mamba_dt_min"), 0.0, 0.001, 0.5)
    draw.put("mamba_hidden_act", "silu", "gelu", "relu")
    draw.put("mlp_hidden_act", "relu2", "relu", "silu", "gelu")
    for field in ("use_bias", "use_conv_bias"):
        draw.put(field, True, False, there=0.3)
    if "E" in pattern and draw.often(0.9):
        config.pop("mlp_bias", None)
    draw.put("moe_shared_expert_intermediate_size", 20, 56, there=1)
    draw.put("moe_latent_size", None, *([16] if draw.often(0.1) else []))
    for field in ("chunk_size", "mamba_chunk_size"):
        if draw.often(0.3):
            config[field] = draw.one_of(4, 16, 128)


def _mixture(draw):
    config, layers = draw.config, draw.config["num_hidden_layers"]
    aliases = ("num_experts", "num_local_experts", "n_routed_experts")
    draw.put("moe_intermediate_size", 24, 33, there=1)
    draw.put("shared_expert_intermediate_size", 20, 56, there=1)
    own = next(field for field in aliases if field in draw.defaults)
    needed = draw.defaults[own] in (None, 1)
    known = getattr(ARCHITECTURES[draw.model_type], "ALIASES", {}).keys() - NO_EXPERTS
    known = sorted(known)
    if needed or draw.often(0.8):
        config[draw.one_of(own, *known)] = draw.one_of(8, 8, 12, 12, 9)
    draw.put("num_experts_per_tok", 1, 2, 3, there=1 if needed else 0.6)
    of_layers = [draw.one_of(1, 2, 3) for _ in range(layers)]
    draw.put(draw.one_of("moe_topk", *known), 1, 2, 3, of_layers)
    draw.put("norm_topk_prob", True, False)
    draw.put("decoder_sparse_step", 1, 2, 3, there=0.3)
    draw.put("mlp_only_layers", [], None, [0], [layers - 1, 0], there=0.4)
    draw.put("n_shared_experts", 1, 2, there=1 if needed else 0.6)
    draw.put("first_k_dense_replace", 0, 1, 2, layers, there=0.6)
    if draw.often(0.5):
        groups = draw.one_of(2, 4) if draw.often(0.9) else draw.one_of(1, 3)
        draw.put("n_group", groups, there=1)
        draw.put("topk_group", groups, max(1, groups // 2), 1, there=0.9)
    draw.put("routed_scaling_factor", 0.5, 2.5)
    draw.put("use_qk_norm", True, False)
    if draw.model_type == "phimoe":
        config["num_experts_per_tok"] = draw.one_of(*[2] * 9, 1)
        draw.put("router_jitter_noise", 0.01, 0.1, 0.3, 1.0, 0.0)
        draw.put("lm_head_bias", True, False)


def _latent(draw):
    """Latent attention, and what DeepSeek's configs say of experts beside."""
    config, layers = draw.config, draw.config["num_hidden_layers"]
    heads = config.setdefault("num_attention_heads", draw.defaults["num_attention_heads"])
    if draw.often(0.95):
        config["num_key_value_heads"] = heads
    for field in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
        draw.put(field, 2, 8, 12, 24, *([5, 33] if draw.often(0.2) else []), there=0.97)
    draw.put("q_lora_rank", None, 7, 16, 28, there=0.9)
    draw.put("qk_rope_head_dim", 2, 4, 8, 8, *([5] if draw.often(0.05) else []), there=0.9)
    if draw.model_type == "deepseek_v2" and draw.often(0.97):
        config["num_experts_per_tok"] = draw.one_of(1, 2, 3)
    draw.put("rope_interleave", True, False, there=0.4)
    if draw.model_type == "deepseek_v2":
        groups = "n_group" in config
        draw.put("topk_method", "group_limited_greedy" if groups else "greedy", there=0.7)
        for field in ("norm_topk_prob", "mlp_bias"):
            if draw.often(0.9):
                config.pop(field, None)
    else:
        draw.put("topk_method", "noaux_tc", there=0.3)
    if draw.model_type == "deepseek_v3" and draw.often(0.9):  # which has many groups, and experts
        config.setdefault("n_group", 1)
        config["topk_group"] = min(config.get("topk_group", 1), config["n_group"])
        config.setdefault("n_routed_experts", 12)
        config.setdefault("num_experts_per_tok", 2)
    draw.put("scoring_func", draw.defaults["scoring_func"], there=0.3)
    draw.put("moe_layer_freq", 1, there=0.3)
    draw.put("head_dim", 24, there=0.03)
    config.pop("first_k_dense_replace" if draw.model_type == "glm4_moe_lite" else "", None)
    kinds = [draw.one_of("dense", "sparse") for _ in range(layers)]
    draw.put("mlp_layer_types", kinds, ["dense"] + ["sparse"] * (layers - 1))


def _mixture_of_ernie(draw):
    config, layers = draw.config, draw.config["num_hidden_layers"]
    draw.put("moe_intermediate_size", 24, 33, there=1)
    draw.put("moe_num_experts", 8, 12, 9, there=0.9)
    draw.put("moe_k", 1, 2, 3, there=0.7)
    draw.put("moe_num_shared_experts", 0, 1, 2)
    draw.put("moe_layer_start_index", 0, 1, 2, layers, -1)
    draw.put("moe_layer_end_index", -1, 1, layers - 1, layers, -2)
    draw.put("moe_layer_interval", 1, 2, 3)
    draw.put("moe_norm_min", 1e-12, *([0.5] if draw.often(0.1) else []))
    for name, own in ARCHITECTURES["ernie4_5_moe"].ALIASES.items():
        if own in config and draw.often(0.3):
            config[name] = config.pop(own)


def _windows(draw):
    layers, config = draw.config["num_hidden_layers"], draw.config
    draw.put("sliding_window", 3, 5, 8, 11, 40, there=0.7)
    if draw.often(0.1):
        draw.put("sliding_window", None, there=1)
    draw.put("use_sliding_window", True, True, False, there=0.8)
    draw.put("max_window_layers", 0, 1, 2, 3, there=0.7)
    draw.put("sliding_window_pattern", 1, 2, 3, 6)
    draw.put("no_rope_layer_interval", 1, 2, 3, there=0.5)
    if draw.often(0.4):
        turned = [draw.one_of(0, 1) for _ in range(layers + draw.one_of(0, 0, 0, 1, -1))]
        draw.put("no_rope_layers", turned, there=1)
    if "sliding_window" in draw.defaults and draw.often(0.4):
        kinds = ("sliding_attention", "full_attention")
        slides = config.get("use_sliding_window", "use_sliding_window" not in draw.defaults)
        kinds = kinds if slides or draw.often(0.1) else kinds[1:]
        config["layer_types"] = [draw.one_of(*kinds) for _ in range(layers)]


def _mixers(draw):
    """Of models whose layers need not have attention."""
    config, layers = draw.config, draw.config["num_hidden_layers"]
    other = {"lfm2": "conv", "lfm2_moe": "conv"}.get(draw.model_type)
    draw.put("conv_bias", True, False)
    draw.put("conv_L_cache", 2, 3, 5)
    draw.put("block_auto_adjust_ff_dim", True, False)
    draw.put("block_ffn_dim_multiplier", 1.0, 0.7, 1, None)
    draw.put("block_multiple_of", 8, 24, there=0.8)
    draw.put("full_attn_idxs", [0], [layers - 1], [], None)
    draw.put("num_dense_layers", 0, 1, 2, layers, there=0.8)
    draw.put("use_expert_bias", True, False)
    if "linear_num_key_heads" in draw.defaults:
        other = "linear_attention"
        keys = draw.one_of(1, 2, 4)
        draw.put("linear_num_key_heads", keys, there=1)
        draw.put("linear_num_value_heads", keys, 2 * keys, 3 * keys, 3 if draw.often(0.1) else keys,
                 there=1)  # fmt: skip
        draw.put("linear_key_head_dim", 24, 32, there=1)
        draw.put("linear_value_head_dim", 8, 12, 40, there=1)
        draw.put("linear_conv_kernel_dim", 2, 3, 4)
        draw.put("full_attention_interval", 1, 2, 3, 4)
    if other and (draw.model_type == "lfm2_moe" or draw.often(0.6)):
        kinds = ("full_attention", other)
        if draw.often(0.05):
            kinds = (*kinds, "sliding_attention")
        config["layer_types"] = [draw.one_of(*kinds) for _ in range(layers)]


def rotary_fields(defaults):
    """What an architecture calls the base of its rotary positions, and the share of each head."""
    if "rotary_pct" in defaults:
        return "rotary_emb_base", "rotary_pct"
    return "rope_theta", "partial_rotary_factor"


def _rotary(draw):
    base, part = rotary_fields(draw.defaults)
    config, usual = draw.config, draw.defaults[part]
    heads = config.get("num_attention_heads", draw.defaults["num_attention_heads"])
    head_dim = config.get("head_dim", draw.defaults.get("head_dim"))
    head_dim = head_dim or config["hidden_size"] // heads
    if "qk_rope_head_dim" in draw.defaults:
        head_dim = config.get("qk_rope_head_dim", draw.defaults["qk_rope_head_dim"])
    share, partly = usual or 1.0, draw.often(0.5 if usual else 0.15)
    if partly:
        share = draw.one_of(*(s for s in (0.5, 0.5, 1.0, 0.25) if head_dim * s % 2 == 0))
        if draw.often(0.7):
            config[part] = share
    if draw.often(0.5):
        config[base] = draw.number(10, 1e6)
    draw.put("original_max_position_embeddings", 10, 16, 20, 40, there=0.15)
    kinds = KINDS
    if draw.model_type == "phi3" and draw.often(0.9):
        kinds = ("default", "su", "yarn", "longrope")
        draw.put("original_max_position_embeddings", 10, 16, 20, 40, there=0.6)
    elif draw.model_type == "phimoe" and draw.often(0.9):
        kinds = ("default", "longrope")
    elif partly and not usual and draw.often(0.9):
        kinds = ("default",)
    if draw.often(0.02):
        kinds = ("proportional", "none", 7)
    grows = draw.model_type == "ministral3"  # where it says nothing of it, it has its own
    for form, share_of_configs in (("rope_scaling", 0.35), ("rope_parameters", 0.5)):
        if draw.often(share_of_configs):
            older = form == "rope_scaling"
            config[form] = _kind(draw, draw.one_of(*kinds), int(head_dim * share), older)
            if draw.often(0.2 if older else 0.7):
                config[form]["rope_theta"] = draw.number(10, 1e6)
            if partly and draw.often(0.7):
                config[form]["partial_rotary_factor"] = share
            if draw.often(0.9 if grows else 0.05):
                config[form]["llama_4_scaling_beta"] = draw.one_of(0.1, 0.3, 1, 0)
                if draw.often(0.7):
                    config[form]["original_max_position_embeddings"] = draw.one_of(5, 8, 16)
        elif draw.often(0.2):
            config[form] = None


def _rotary_of_two_kinds(draw):
    config = draw.config
    heads = config.get("num_attention_heads", draw.defaults["num_attention_heads"])
    head_dim = config.get("head_dim", draw.defaults["head_dim"]) or config["hidden_size"] // heads
    for field in ("rope_theta", "rope_local_base_freq"):
        if draw.often(0.4):
            config[field] = draw.number(10, 1e6)
    if draw.often(0.6):
        found = config["rope_parameters"] = {}
        for kind in ("full_attention", "sliding_attention"):
            if draw.often(0.7):
                found[kind] = _kind(draw, draw.one_of(*KINDS), head_dim, draw.often(0.3))
                if draw.often(0.6):
                    found[kind]["rope_theta"] = draw.number(10, 1e6)
        if draw.often(0.1):  # one for all, which this architecture has no use for
            found.update(_kind(draw, draw.one_of(*KINDS), head_dim, False))
        if not found and draw.often(0.5):
            config["rope_parameters"] = None
    if draw.often(0.3):
        config["rope_scaling"] = _kind(draw, draw.one_of(*KINDS), head_dim, True)


def _kind(draw, kind, dim, older):
    """The parameters of one kind of rotary positions, without its base."""
    found = {"type" if older and draw.often(0.5) else "rope_type": kind}
    if kind == "default" and draw.often(0.5):
        found = {}
    if draw.model_type == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    if draw.often(0.5 if "hunyuan" in draw.model_type else 0.05):
        found["alpha"] = draw.one_of(2.0, 50, 1000.0, 0)
    if kind in ("linear", "dynamic", "yarn", "llama3") or draw.often(0.3):
        found["factor"] = draw.one_of(2.0, 4, 8.0)
    if kind in ("llama3", "yarn", "longrope") and draw.often(0.7):
        found["original_max_position_embeddings"] = draw.one_of(8, 16, 20)
    if kind == "llama3":
        found.update(low_freq_factor=draw.one_of(1, 1.0, 2.0), high_freq_factor=4.0)
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            found[key] = [draw.number(1, 8) for _ in range(dim // 2)]
    if draw.often(0.9 if draw.model_type == "phimoe" else 0.05):
        found.update(short_mscale=draw.number(0.5, 2), long_mscale=draw.number(0.5, 2))
    if kind in ("yarn", "longrope") and draw.often(0.2):
        found["attention_factor"] = draw.number(0.5, 2)
    if kind == "yarn":
        for key, value in {
            "beta_fast": draw.one_of(4.0, 16, 0),
            "beta_slow": draw.one_of(0.5, 2),
            "mscale": draw.one_of(0.7, 1.0, 0),
            "mscale_all_dim": draw.one_of(0, 0.4, 1.0),
            "truncate": draw.one_of(True, False),
        }.items():
            if draw.often(0.4):
                found[key] = value
    return found
