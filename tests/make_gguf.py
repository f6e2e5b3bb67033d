"""A GGUF file of a small Hugging Face checkpoint, packed and named as llama.cpp does it."""

import decimal
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy

from flashinfer.formats.architectures import model_config
from flashinfer.formats.architectures.hugging_face import interleaved
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.formats.sources.gguf import BY_TYPE

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "bamboo": "bamboo", "qwen2": "qwen2",
    "qwen3": "qwen3", "falcon": "falcon",
    "phi": "phi2", "phi3": "phi3", "gemma": "gemma", "nemotron": "nemotron", "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "mixtral": "llama",
    "granitemoe": "granitemoe", "gpt_oss": "gpt-oss", "gpt_neox": "gptneox",
    "gpt2": "gpt2", "arcee": "arcee", "gemma2": "gemma2", "gemma3_text": "gemma3",
    "dots1": "dots1", "glm4_moe": "glm4moe", "granite": "granite", "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe", "smollm3": "smollm3", "ministral3": "mistral3",
    "olmo2": "olmo2", "olmo3": "olmo2", "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe", "granitemoehybrid": "granitehybrid",
    "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "nemotron_h": "nemotron_h",
    "gemma4_text": "gemma4",
}  # fmt: skip
NAMES = {
    "embed_tokens": "token_embd", "word_embeddings": "token_embd", "lm_head": "output",
    "embed_in": "token_embd", "embed_out": "output", "final_layer_norm": "output_norm",
    "wte": "token_embd", "wpe": "position_embd", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "c_attn": "attn_qkv", "c_fc": "ffn_up",
    "norm": "output_norm", "ln_f": "output_norm", "final_layernorm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "ln_attn": "attn_norm_2", "ln_mlp": "attn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "query_key_value": "attn_qkv", "qkv_proj": "attn_qkv", "dense": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "q_a_proj": "attn_q_a", "q_a_layernorm": "attn_q_a_norm", "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa", "kv_a_layernorm": "attn_kv_a_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "gate_up_proj": "ffn_up", "fc1": "ffn_up", "fc2": "ffn_down",
    "dense_h_to_4h": "ffn_up", "dense_4h_to_h": "ffn_down",
    "query_layernorm": "attn_q_norm", "key_layernorm": "attn_k_norm", "wg": "ffn_gate_inp",
    "moe_statics": "exp_probs_b",
    "router": "ffn_gate_inp", "gate": "ffn_gate_inp", "layer": "ffn_gate_inp",
    "shared_expert_gate": "ffn_gate_inp_shexp",
    "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
    "input_linear": "ffn_gate_up", "output_linear": "ffn_down_exps",
    "embeddings": "token_embd", "norm_f": "output_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2", "post_per_layer_input_norm": "post_norm",
    "embed_tokens_per_layer": "per_layer_token_embd", "per_layer_input_gate": "inp_gate",
    "per_layer_model_projection": "per_layer_model_proj", "per_layer_projection": "proj",
    "per_layer_projection_norm": "per_layer_proj_norm", "proj": "ffn_gate_inp",
    "in_proj": "ssm_in", "conv1d": "ssm_conv1d", "out_proj": "ssm_out",
}  # fmt: skip
TURNED = ("llama", "mistral", "bamboo", "mixtral", "granitemoe", "granitemoehybrid", "arcee",
          "granite", "smollm3", "ministral3")  # fmt: skip
# What GGUF cannot say of a checkpoint in tests/data, and what is taken in its place.
UNSAID = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "dots1": {"sliding_window": None, "layer_types": None},
    "hunyuan-moe": {"moe_topk": 3},
    "nemotron-h": {"time_step_min": 0.0},
    "nemotron-h-moe": {"time_step_min": 0.0},
    "olmo3": {"rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                           "original_max_position_embeddings": 12},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    }},
}  # fmt: skip
# Gemma 4's tensors that are no weight or bias of a module.
GEMMA4 = {
    "layer_scalar": "layer_output_scale.weight", "per_expert_scale": "ffn_down_exps.scale",
    "scale": "ffn_gate_inp.scale", "gate_up_proj": "ffn_gate_up_exps.weight",
    "down_proj": "ffn_down_exps.weight",
}  # fmt: skip
LESS_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")  # GGUF holds their norms with one added
SHARED = ("shared_expert", "shared_experts", "shared_mlp")
# Those of which GGUF names a norm post_attention_norm.
POST_NORM = ("gpt_oss", "gemma2", "gemma3_text", "gemma4_text", "glm4_moe", "olmo2", "olmo3")


def checkpoint_of(name, folder):
    """The directory of a checkpoint in tests/data, or made of it in ``folder``, as GGUF has it."""
    data = Path(__file__).parent / "data" / name
    if name not in UNSAID:
        return data
    shutil.copytree(data, folder / name, dirs_exist_ok=True)
    path = folder / name / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **UNSAID[name]}))
    return folder / name


def random_qwen2(folder, width=256, ffn=512):
    """A checkpoint whose rows K-quants can hold."""
    random = np.random.default_rng(3)
    layer, tensors = "model.layers.0.", {}
    shapes = {
        "model.embed_tokens.weight": (40, width), "model.norm.weight": (width,),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
        **{f"{layer}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"},
        **{f"{layer}self_attn.{p}_proj.bias": (width,) for p in "qkv"},
        f"{layer}mlp.gate_proj.weight": (ffn, width), f"{layer}mlp.up_proj.weight": (ffn, width),
        f"{layer}mlp.down_proj.weight": (width, ffn),
    }  # fmt: skip
    for name, shape in shapes.items():
        tensors[name] = random.standard_normal(shape, dtype=np.float32) / 8
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": ffn, "vocab_size": 40,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 32, "hidden_act": "silu", "tie_word_embeddings": True,
        "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_olmoe(folder, width=256, ffn=256, experts=6):
    """A mixture whose rows K-quants can hold."""
    random, layer = np.random.default_rng(5), "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (40, width), "model.norm.weight": (width,),
        "lm_head.weight": (40, width), f"{layer}mlp.gate.weight": (experts, width),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
        **{f"{layer}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"},
        **{f"{layer}self_attn.{p}_norm.weight": (width,) for p in "qk"},
    }  # fmt: skip
    for expert in range(experts):
        part = f"{layer}mlp.experts.{expert}."
        shapes |= {f"{part}{p}_proj.weight": (ffn, width) for p in ("gate", "up")}
        shapes[f"{part}down_proj.weight"] = (width, ffn)
    folder.mkdir()
    tensors = {n: random.standard_normal(s, dtype=np.float32) / 8 for n, s in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "olmoe", "hidden_size": width, "intermediate_size": ffn, "vocab_size": 40,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": False,
        "num_experts": experts, "num_experts_per_tok": 2, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(folder, path, quantise=None, metadata=None, predictors=(), older=False):
    """Write the checkpoint in ``folder`` to ``path``.

    older       latent attention has one tensor that makes keys and values of latents
    predictors  (fc1, fc2) a layer: as PowerInfer writes it, its down projections transposed

    quantise  (name, values) -> a gguf.GGMLQuantizationType, or None for f32
    metadata  called with the GGUFWriter, to add to it
    """
    import gguf

    config = json.loads((Path(folder) / "config.json").read_text())
    model, architecture = model_config(config), ARCHITECTURES[config["model_type"]]
    if architecture == "nemotron_h" and model.mixture:
        architecture = "nemotron_h_moe"
    kinds = AttentionConfig | LatentAttentionConfig
    attentions = [k.mixer for k in model.layers if isinstance(k.mixer, kinds)]
    windows = [getattr(a, "attention_window", None) for a in attentions]
    attention = attentions[windows.index(None) if None in windows else 0]
    ffn = next((k.ffn for k in model.layers if k.ffn.router), model.layers[0].ffn)
    dense = [k.ffn.d_ffn for k in model.layers if not k.ffn.router]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(dense[0] if dense else ffn.d_ffn)
    if ffn.router:
        writer.add_expert_count(ffn.experts)
        writer.add_expert_used_count(ffn.router.experts_per_token)
        writer.add_expert_feed_forward_length(ffn.d_ffn)
    if ffn.shared_d_ffn:
        writer.add_expert_shared_feed_forward_length(ffn.shared_d_ffn)
    if config["model_type"] in ("granite", "granitemoe", "granitemoehybrid"):
        writer.add_embedding_scale(model.embedding_scale)
        writer.add_attention_scale(attention.attention_scale)
        writer.add_residual_scale(model.layers[0].residual_scale)
        writer.add_logit_scale(1 / model.logit_scale)
    if config["model_type"] in ("dots1", "glm4_moe", "deepseek_v2", "deepseek_v3"):
        writer.add_leading_dense_block_count(len(dense))
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[ffn.router.scoring.upper()])
        writer.add_expert_shared_count(ffn.shared_d_ffn // ffn.d_ffn)
        writer.add_expert_weights_norm(ffn.router.normalised)
        writer.add_expert_weights_scale(ffn.router.scale)
        writer.add_expert_group_count(ffn.router.groups)
        writer.add_expert_group_used_count(ffn.router.groups_kept)
    if config["model_type"] == "ernie4_5_moe":
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_expert_shared_count(config["moe_num_shared_experts"])
    if config["model_type"] == "ministral3":
        writer.add_attn_temperature_scale(attention.temperature.beta)
        writer.add_rope_scaling_yarn_log_mul(attention.rotary.parameters["mscale_all_dim"])
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(attention.score_cap)
        writer.add_final_logit_softcapping(model.logit_cap)
    if config["model_type"] == "gemma3_text":
        near = model.layers[0].attention.rotary.base
        writer.add_float32(f"{architecture}.rope.freq_base_swa", near)
    writer.add_head_count(attention.num_attention_heads)
    if architecture == "deepseek2":
        _add_latent_attention(writer, attention, older)
    else:
        if len(attentions) < len(model.layers):
            _add_mamba2(writer, model)
        else:
            writer.add_head_count_kv(attention.num_key_value_heads)
        writer.add_key_length(attention.head_dim)
        writer.add_value_length(attention.head_dim)
    if model.norm.kind == "rms":
        writer.add_layer_norm_rms_eps(model.norm.epsilon)
    else:
        writer.add_layer_norm_eps(model.norm.epsilon)
    if attention.rotary:
        _add_rotary(writer, attention.rotary)
    if config["model_type"] == "nemotron_h":
        _add_blocks(writer, model)
    if config["model_type"] == "gemma4_text":
        _add_gemma4(writer, model)
    if any(windows):
        writer.add_sliding_window(max(window or 0 for window in windows))
    if config["model_type"] == "gpt_neox":
        writer.add_parallel_residual(model.layers[0].parallel)
    writer.add_eos_token_id(model.eos_token_ids[0])
    if metadata:
        metadata(writer)
    for layer, maps in enumerate(predictors):
        for number, values in enumerate(maps, 1):
            writer.add_tensor(f"blk.{layer}.fc{number}.weight", values)
    for name, values in _tensors(folder, config, model, older):
        if predictors and "ffn_down" in name:
            name, values = name.replace("ffn_down", "ffn_down_t"), np.ascontiguousarray(values.T)
        kind = quantise(name, values) if quantise and values.ndim > 1 else None
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, _quantised(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if predictors:
        with open(path, "r+b") as file:
            file.write(b"PWRI")
    return path


def _add_latent_attention(writer, sizes, older):
    writer.add_kv_lora_rank(sizes.kv_lora_rank)
    writer.add_q_lora_rank(sizes.q_lora_rank or 0)  # which llama.cpp wants of all but some models
    if older:
        writer.add_head_count_kv(sizes.num_attention_heads)
        writer.add_key_length(sizes.qk_head_dim)
        writer.add_value_length(sizes.v_head_dim)
    else:
        writer.add_head_count_kv(1)
        writer.add_key_length(sizes.cached_dim)
        writer.add_value_length(sizes.kv_lora_rank)
        writer.add_key_length_mla(sizes.qk_head_dim)
        writer.add_value_length_mla(sizes.v_head_dim)
    if sizes.yarn_weight:
        writer.add_rope_scaling_yarn_log_mul(0.1 * sizes.yarn_weight)


def _quantised(values, kind):
    """The bytes of values; the gguf package has no encoder of K-quants."""
    import gguf

    format = BY_TYPE.get(kind.name)
    if format is None or format.block == 1:
        return gguf.quants.quantize(values, kind)
    return format.encode(values)


def _add_mamba2(writer, model):
    """Of layers that are not all attention's."""
    mamba = next(k.mixer for k in model.layers if isinstance(k.mixer, Mamba2Config))
    writer.add_head_count_kv([getattr(k.mixer, "num_key_value_heads", 0) for k in model.layers])
    writer.add_ssm_conv_kernel(mamba.kernel)
    writer.add_ssm_inner_size(mamba.width)
    writer.add_ssm_state_size(mamba.state_size)
    writer.add_ssm_time_step_rank(mamba.heads)
    writer.add_ssm_group_count(mamba.groups)
    writer.add_rope_scaling_finetuned(any(k.mixer.rotary for k in model.layers))


def _add_blocks(writer, model):
    """Of layers that are one block each."""
    heads, neurons = [], []
    for layer in model.layers:
        heads += [getattr(layer.mixer, "num_key_value_heads", 0)] + [0] * bool(layer.ffn.neurons)
        neurons += [0, layer.ffn.d_ffn] if layer.ffn.neurons else [0]
    writer.add_block_count(len(heads))
    writer.add_head_count_kv(heads)
    writer.add_feed_forward_length(neurons)
    writer.add_layer_norm_eps(model.norm.epsilon)
    router = next((layer.ffn.router for layer in model.layers if layer.ffn.router), None)
    if router:
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_norm(router.normalised)
        writer.add_expert_weights_scale(router.scale)
        writer.add_expert_group_count(router.groups)
        writer.add_expert_group_used_count(router.groups_kept)


def _add_gemma4(writer, model):
    """Of layers that differ in their heads, their neurons and whose keys they read."""
    attentions = [layer.attention for layer in model.layers]
    near = next(a for a in attentions if a.attention_window)
    far = next(a.rotary for a in attentions if not a.attention_window)
    writer.add_head_count_kv([a.num_key_value_heads for a in attentions])
    writer.add_feed_forward_length([k.ffn.shared_d_ffn or k.ffn.d_ffn for k in model.layers])
    writer.add_sliding_window_pattern([a.attention_window is not None for a in attentions])
    writer.add_key_length_swa(near.head_dim)
    writer.add_value_length_swa(near.head_dim)
    writer.add_shared_kv_layers(sum(a.memory_of is not None for a in attentions))
    writer.add_rope_dimension_count_swa(near.rotary.dim)
    writer.add_rope_freq_base_swa(near.rotary.base)
    writer.add_embedding_length_per_layer_input(
        model.layers[0].per_layer.size if model.layers[0].per_layer else 0
    )
    writer.add_final_logit_softcapping(model.logit_cap or 0.0)
    turned = np.arange(far.dim // 2) < far.parameters["turned"]
    writer.add_tensor("rope_freqs.weight", np.where(turned, 1, 1e30).astype(np.float32))


def _add_rotary(writer, rotary):
    import gguf

    writer.add_rope_freq_base(rotary.base)
    writer.add_rope_dimension_count(rotary.dim)
    if rotary.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rotary.kind))
        writer.add_rope_scaling_factor(rotary.parameters["factor"])
    if original := rotary.parameters.get("original_max_position_embeddings"):
        writer.add_rope_scaling_orig_ctx_len(original)


def _tensors(folder, config, model, older):
    experts = {}
    for name, values in safetensors.numpy.load_file(Path(folder) / "model.safetensors").items():
        *_, part, kind = name.split(".")
        if config["model_type"] == "gpt_oss" and ("experts" in name or "sinks" in name):
            yield from _of_gpt_oss(name, values)
            continue
        if config["model_type"] == "gemma4_text" and kind in GEMMA4:
            layer = next(piece for piece in name.split(".") if piece.isdecimal())
            yield f"blk.{layer}.{GEMMA4[kind]}", values
            continue
        if ".experts." in name:  # a layer's become one tensor
            layer, expert = (int(piece) for piece in name.split(".") if piece.isdecimal())
            stacked = experts.setdefault(f"blk.{layer}.{NAMES[part]}_exps.weight", {})
            stacked[expert] = values
            continue
        groups = next(
            (k.mixer.groups for k in model.layers if isinstance(k.mixer, Mamba2Config)), 1
        )
        mamba = part in ("in_proj", "conv1d", "out_proj") or kind in ("A_log", "D", "dt_bias")
        if mamba or name.endswith(".mixer.norm.weight") or ".mamba." in name:
            yield from _of_mamba2(name, values, groups)
            continue
        if ".shared_mlp." in name and config["model_type"] == "granitemoehybrid":
            yield from _of_shared_mlp(name, values, model)
            continue
        if part == "input_linear":
            layer = next(piece for piece in name.split(".") if piece.isdecimal())
            for our, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                yield f"blk.{layer}.ffn_{our}_exps.weight", np.ascontiguousarray(half)
            continue
        if config["model_type"] in LESS_ONE and "norm" in part and kind == "weight":
            values = values + np.float32(1)
        if config["model_type"] in TURNED and part in ("q_proj", "k_proj"):
            sizes = next(k.mixer for k in model.layers if isinstance(k.mixer, AttentionConfig))
            heads = sizes.num_attention_heads if part[0] == "q" else sizes.num_key_value_heads
            pairs = values.reshape(heads, 2, sizes.head_dim // 2, -1).swapaxes(1, 2)
            values = np.ascontiguousarray(pairs.reshape(values.shape))
        if part == "query_key_value":  # all queries, then all keys, then all values
            values = np.concatenate([values[interleaved(p)(model.layers[0])] for p in "qkv"])
        if part == "kv_b_proj":
            yield from _keys_and_values(name.split(".")[2], values, model.layers[0].mixer, older)
            continue
        if part == "c_proj":  # GPT-2's of attention and of the FFN
            part = "o_proj" if ".attn." in name else "down_proj"
        if config["model_type"] == "gpt2" and ".h." in name and values.ndim > 1:
            values = np.ascontiguousarray(values.T)
        layer = next((piece for piece in name.split(".") if piece.isdecimal()), None)
        shared = any(f".{part}." in name for part in SHARED)
        ours = NAMES[part] + ("_shexp" if shared else "")
        values = values.reshape(-1) if part == "shared_expert_gate" else values
        if part == "norm" and ".layers." in name:
            ours = "attn_norm"
        if part == "post_attention_layernorm" and config["model_type"] in POST_NORM:
            ours = "post_attention_norm"
        if kind == "e_score_correction_bias":
            ours, kind, values = "exp_probs_b", "bias", values.reshape(-1)
        if part == "post_attention_layernorm" and config["model_type"] == "falcon":
            ours = "ffn_norm"
        if not (model.tied and ours == "output"):
            yield (f"blk.{layer}." if layer else "") + f"{ours}.{kind}", values
    for name, stacked in experts.items():
        yield name, np.stack([stacked[i] for i in range(len(stacked))])


def _of_mamba2(name, values, groups):
    """Vectors as matrices, and exp(A_log) already taken, as the decimal module takes it."""
    *_, part, kind = name.split(".")
    layer = next(piece for piece in name.split(".") if piece.isdecimal())
    if kind == "A_log":
        with decimal.localcontext(prec=40):
            exact = [float(-decimal.Decimal(float(value)).exp()) for value in values]
        yield f"blk.{layer}.ssm_a", np.array(exact, np.float32)[:, None]
    elif kind == "D":
        yield f"blk.{layer}.ssm_d", values[:, None]
    elif kind == "dt_bias":
        yield f"blk.{layer}.ssm_dt.bias", values
    elif part == "norm":
        yield f"blk.{layer}.ssm_norm.weight", values.reshape(groups, -1)
    else:
        values = values.reshape(len(values), -1) if values.ndim == 3 else values
        yield f"blk.{layer}.{NAMES[part]}.{kind}", values


def _of_shared_mlp(name, values, model):
    """Granite 4's shared expert, which is its FFN where there are no others."""
    layer = next(piece for piece in name.split(".") if piece.isdecimal())
    suffix = "_shexp" if model.layers[0].ffn.router else ""
    if "output_linear" in name:
        yield f"blk.{layer}.ffn_down{suffix}.weight", values
        return
    for our, half in zip(("gate", "up"), np.split(values, 2), strict=True):
        yield f"blk.{layer}.ffn_{our}{suffix}.weight", np.ascontiguousarray(half)


def _keys_and_values(layer, values, sizes, older):
    """What makes the keys and values of each head: together, or apart and the keys' transposed."""
    if older:
        yield f"blk.{layer}.attn_kv_b.weight", values
        return
    heads = values.reshape(sizes.num_attention_heads, -1, sizes.kv_lora_rank)
    keys, of_values = np.split(heads, [sizes.qk_nope_head_dim], axis=1)
    yield f"blk.{layer}.attn_k_b.weight", np.ascontiguousarray(keys.swapaxes(1, 2))
    yield f"blk.{layer}.attn_v_b.weight", np.ascontiguousarray(of_values)


def _of_gpt_oss(name, values):
    """Its experts, whose gate and up lie in turn, rows and columns exchanged; its sinks."""
    layer, part = name.split(".")[2], name.split(".")[-1]
    kind = "bias" if part.endswith("_bias") else "weight"
    if part == "sinks":
        yield f"blk.{layer}.attn_sinks.weight", values
        return
    values = values if kind == "bias" else values.swapaxes(1, 2)
    if part.startswith("down"):
        yield f"blk.{layer}.ffn_down_exps.{kind}", np.ascontiguousarray(values)
        return
    for first, our in enumerate(("gate", "up")):
        yield f"blk.{layer}.ffn_{our}_exps.{kind}", np.ascontiguousarray(values[:, first::2])
