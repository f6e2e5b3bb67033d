"""Faults that are planted in transformers' models, one at a time.

A fault is a function of (model, plant); ``plant(owner, name, value)`` sets an attribute and is
undone after the run.
"""

import sys

import torch
from torch.nn.functional import gelu, silu

LAYER = 1  # the layer that a fault is planted in, where it is one layer's


def code(model):
    """The module of transformers that holds the model's classes."""
    return sys.modules[type(model).__module__]


def layers(model):
    """The model's layers."""
    for path in ("model.layers", "model.decoder.layers", "transformer.h"):
        owner = model
        for part in path.split("."):
            owner = getattr(owner, part, None)
        if owner is not None:
            return owner
    raise ValueError(type(model))


def attention(model):
    layer = layers(model)[LAYER]
    return layer.self_attn if hasattr(layer, "self_attn") else layer.self_attention


def after(module, change, plant):
    """Change what a module gives: change(output, *args)."""
    forward = module.forward

    def changed(*args, **options):
        output = forward(*args, **options)
        if isinstance(output, tuple):
            return (change(output[0], *args), *output[1:])
        return change(output, *args)

    plant(module, "forward", changed)


def before(module, change, plant):
    """Change what a module reads."""
    forward = module.forward
    plant(module, "forward", lambda x, *args, **options: forward(change(x), *args, **options))


def edit(parameter, change):
    """Change a parameter in place."""
    with torch.no_grad():
        change(parameter.data)


def flip(name):
    """One sign of one matrix of a layer."""

    def fault(model, plant):
        weight = layers(model)[LAYER].get_submodule(name).weight
        edit(weight, lambda w: w.view(-1)[w.numel() // 3].mul_(-1))

    return fault


def wrong_block(name, factor=2.0):
    """The scale of one block of 32 of a matrix is decoded wrongly."""

    def fault(model, plant):
        weight = layers(model)[LAYER].get_submodule(name).weight
        edit(weight, lambda w: w.view(-1)[32 * 7 : 32 * 8].mul_(factor))

    return fault


def swapped_blocks(name):
    """Two blocks of 32 of a row change places."""

    def fault(model, plant):
        weight = layers(model)[LAYER].get_submodule(name).weight

        def swap(w):
            row = w[3].clone()
            w[3, :32], w[3, 32:64] = row[32:64], row[:32]

        edit(weight, swap)

    return fault


def epsilon(name, value):
    """A norm of one layer has another epsilon."""

    def fault(model, plant):
        norm = layers(model)[LAYER].get_submodule(name)
        plant(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps", value)

    return fault


def norm_without(what, name="input_layernorm"):
    def fault(model, plant):
        norm = layers(model)[LAYER].get_submodule(name)
        if what == "bias":
            edit(norm.bias, lambda b: b.zero_())
        elif what == "mean":
            w, b, eps = norm.weight, norm.bias, norm.eps
            plant(norm, "forward", lambda x: x * torch.rsqrt((x * x).mean(-1, True) + eps) * w + b)
        elif what == "one":
            after(norm, lambda y, x: y - x * torch.rsqrt((x * x).mean(-1, True) + norm.eps), plant)

    return fault


def bias(name, factor):
    """A bias is left out (0) or added twice (2)."""

    def fault(model, plant):
        edit(layers(model)[LAYER].get_submodule(name).bias, lambda b: b.mul_(factor))

    return fault


def in_bfloat16(name):
    """Sums of one product are kept in bfloat16."""

    def fault(model, plant):
        linear = layers(model)[LAYER].get_submodule(name)

        def forward(x):
            y = x.bfloat16() @ linear.weight.bfloat16().T
            return (y if linear.bias is None else y + linear.bias.bfloat16()).float()

        plant(linear, "forward", forward)

    return fault


def frequencies(change):
    def fault(model, plant):
        owner = next(m for m in model.modules() if hasattr(m, "inv_freq"))
        plant(owner, "inv_freq", change(owner.inv_freq))

    return fault


def plain_frequencies(model, plant):
    """The scaling of rotary positions is left out."""
    owner = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    base, n = model.config.rope_parameters["rope_theta"], len(owner.inv_freq)
    plant(owner, "inv_freq", base ** (-torch.arange(n) / n))


def no_rope_scale(model, plant):
    plant(model.model.rotary_emb, "attention_scaling", 1.0)


def side_by_side(model, plant):
    """Rotary pairs lie side by side, not half a head apart."""

    def rotate(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    def apply(q, k, cos, sin, *args, **options):
        cos, sin = (
            t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1).unsqueeze(1) for t in (cos, sin)
        )
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin

    plant(code(model), "apply_rotary_pos_emb", apply)


def turned_backwards(model, plant):
    before_ = code(model).rotate_half
    plant(code(model), "rotate_half", lambda x: -before_(x))


def positions(change):
    """The model is called with other positions."""

    def fault(model, plant):
        forward = model.forward

        def moved(ids, **options):
            here = change(torch.arange(ids.shape[1]))[None]
            return forward(ids, position_ids=here, **options)

        plant(model, "forward", moved)

    return fault


def another_token(model, plant):
    """The first token, such as one that begins a text, is another one."""
    embed = model.get_input_embeddings()
    before(embed, lambda ids: torch.cat([ids[:, :1] * 0 + 5, ids[:, 1:]], dim=1), plant)


def learned_positions(model, plant):
    embed = model.model.decoder.embed_positions
    plant(embed, "offset", embed.offset - 1)


def attending(change):
    """Attention is called with other arguments: change(arguments) of one layer."""

    def fault(model, plant):
        own, which = code(model).eager_attention_forward, attention(model)

        def changed(module, query, key, value, mask, **options):
            if module is not which:
                return own(module, query, key, value, mask, **options)
            named = {"query": query, "key": key, "value": value, "mask": mask, **options}
            change(named)
            parts = [named.pop(part) for part in ("query", "key", "value", "mask")]
            return own(module, *parts, **named)

        plant(code(model), "eager_attention_forward", changed)

    return fault


def scaled(named):
    named["scaling"] *= 1.01


def not_causal(named):
    named["mask"] = None


def sees_one_less(named):
    """The window is one token shorter."""
    mask = named["mask"].clone()
    n, window = mask.shape[-1], named["sliding_window"]
    rows = torch.arange(window - 1, n)
    mask[..., rows, rows - window + 1] = torch.finfo(mask.dtype).min
    named["mask"] = mask


def sees_all(named):
    mask = named["mask"]
    n = mask.shape[-1]
    least = torch.finfo(mask.dtype).min
    named["mask"] = torch.triu(torch.full((n, n), least), 1)[None, None]


def keys_of_8_bits(named):
    for part in ("key", "value"):
        x = named[part]
        scale = x.abs().amax(-1, keepdim=True) / 127
        named[part] = torch.round(x / scale) * scale


def keys_of_16_bits(named):
    for part in ("key", "value"):
        named[part] = named[part].half().float()


def softmax_of_16_bits(model, plant):
    functional = code(model).nn.functional
    own = functional.softmax
    plant(
        functional,
        "softmax",
        lambda x, dim=-1, dtype=None, **o: own(x.bfloat16(), dim=dim).float(),
    )


def values_as_keys(named):
    named["value"] = named["key"]


def no_cap(named):
    named["softcap"] = None


def no_sinks(model, plant):
    edit(attention(model).sinks, lambda s: s.fill_(-1e9))


def alibi_steeper(model, plant):
    build = code(model).build_alibi_tensor
    plant(
        code(model), "build_alibi_tensor", lambda *args, **options: build(*args, **options) * 1.01
    )


def groups_interleaved(model, plant):
    """Heads are mapped to keys in turn, not in groups."""

    def repeat(x, n):
        return x.repeat(1, n, 1, 1)

    plant(code(model), "repeat_kv", repeat)


def heads_out_of_order(model, plant):
    own, which = code(model).eager_attention_forward, attention(model)

    def changed(module, *args, **options):
        y, weights = own(module, *args, **options)
        return (y.flip(2) if module is which else y), weights

    plant(code(model), "eager_attention_forward", changed)


def ffn(model):
    return layers(model)[LAYER].mlp


def gate_and_up(model, plant):
    mlp = ffn(model)
    gate, up = mlp.gate_proj.weight.data.clone(), mlp.up_proj.weight.data.clone()
    edit(mlp.gate_proj.weight, lambda w: w.copy_(up))
    edit(mlp.up_proj.weight, lambda w: w.copy_(gate))


def act(change):
    def fault(model, plant):
        owner = ffn(model) if hasattr(layers(model)[LAYER], "mlp") else layers(model)[LAYER]
        names = ("act_fn", "activation_fn", "act")
        name = next(n for n in names if hasattr(owner, n))
        module = getattr(owner, name)
        if isinstance(module, torch.nn.Module):
            plant(module, "forward", change)
        else:
            plant(owner, name, change)

    return fault


def output(name, change):
    """What a module of a layer gives is changed."""

    def fault(model, plant):
        after(layers(model)[LAYER].get_submodule(name), lambda y, *args: change(y), plant)

    return fault


def routed(change):
    """What a router gives, (logits, weights, choices), is changed."""

    def fault(model, plant):
        mlp = layers(model)[LAYER]
        mlp = mlp.block_sparse_moe if hasattr(mlp, "block_sparse_moe") else mlp.mlp
        router = mlp.router if hasattr(mlp, "router") else mlp.gate
        forward = router.forward
        plant(router, "forward", lambda *args, **options: change(*forward(*args, **options)))

    return fault


def not_normalised(logits, weights, chosen):
    return logits, logits.softmax(-1).gather(-1, chosen), chosen


def next_best(logits, weights, chosen):
    """The last choice is the expert that comes next."""
    others = logits.scatter(-1, chosen, -torch.inf).argmax(-1)
    return logits, weights, torch.cat([chosen[:, :-1], others[:, None]], dim=1)


def weights_reversed(logits, weights, chosen):
    return logits, weights.flip(-1), chosen


def experts_permuted(model, plant):
    mlp = layers(model)[LAYER].mlp
    for parameter in mlp.experts.parameters():
        edit(parameter, lambda p: p.copy_(p.roll(1, 0).clone()))


def expert_weight(model, plant):
    edit(next(ffn(model).experts.parameters()), lambda p: p[2].view(-1)[77].mul_(-1))


def no_choice_bias(model, plant):
    for name, buffer in layers(model)[LAYER].named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()


def half_scale(model, plant):
    for module in layers(model)[LAYER].modules():
        if hasattr(module, "routed_scaling_factor"):
            plant(module, "routed_scaling_factor", module.routed_scaling_factor / 2)


def shared_not_gated(model, plant):
    after(ffn(model).shared_expert_gate, lambda y, *args: y * 0 + 30, plant)


def config_of(owner_of, name, value):
    def fault(model, plant):
        owner = owner_of(model)
        plant(owner, name, value(getattr(owner, name)))

    return fault


def layers_swapped(model, plant):
    first, second = layers(model)[0], layers(model)[1]
    states = first.state_dict(), second.state_dict()
    copies = [{k: v.clone() for k, v in state.items()} for state in states]
    first.load_state_dict(copies[1])
    second.load_state_dict(copies[0])


def head_moved(model, plant):
    """Rows of the output head are one off."""
    after(model.lm_head, lambda y, *args: y.roll(1, -1), plant)


def head_not_tied(model, plant):
    weight = model.lm_head.weight
    plant(model.lm_head, "weight", torch.nn.Parameter(weight.detach() * 1.001))


def embedding_row(model, plant):
    after(
        model.get_input_embeddings(),
        lambda y, *args: y[:, [0, 1, 2, 4, *range(4, y.shape[1])]],
        plant,
    )


def not_scaled_embedding(model, plant):
    embed = model.get_input_embeddings()
    after(embed, lambda y, *args: y / embed.embed_scale, plant)


def top(name, change):
    """What a module of the model gives is changed."""

    def fault(model, plant):
        after(model.get_submodule(name), lambda y, *args: change(y), plant)

    return fault


def output_of_layer(change):
    def fault(model, plant):
        after(layers(model)[LAYER], lambda y, x, *args: change(y, x), plant)

    return fault


def not_a_number(name):
    def fault(model, plant):
        edit(
            layers(model)[LAYER].get_submodule(name).weight,
            lambda w: w.view(-1)[5].fill_(float("nan")),
        )

    return fault


NORMS, TURNED = {"attention_norm"}, {"q_turned", "k_turned"}
# (what is wrong, the model, the fault, the values at which it is to be found)
FAULTS = [
    (
        "rope base 10000 -> 10500",
        "llama-silu",
        frequencies(lambda f: f * 1.05 ** -torch.linspace(0, 1, len(f))),
        TURNED,
    ),
    ("rope scaling (linear) left out", "llama-linear", plain_frequencies, TURNED),
    ("rope scaling (llama3) left out", "llama-llama3", plain_frequencies, TURNED),
    ("rope scaling (yarn) left out", "llama-yarn", plain_frequencies, TURNED),
    ("yarn's attention factor left out", "llama-yarn", no_rope_scale, TURNED),
    ("rotary pairs side by side", "qwen2", side_by_side, TURNED),
    ("rotated the other way", "mistral", turned_backwards, TURNED),
    (
        "rotary base of the other layers (Gemma 3)",
        "gemma3",
        config_of(lambda m: m.model.rotary_emb, "sliding_attention_inv_freq", lambda f: f * 0.5),
        TURNED,
    ),
    ("position off by one (rotary)", "llama-silu", positions(lambda p: p + 1), TURNED),
    ("position off by one (learned)", "opt-plain", learned_positions, {"embedded"}),
    ("context shift: positions begin anew", "qwen3", positions(lambda p: p % 12), TURNED),
    ("only the first token's position counts", "phi", positions(lambda p: p * 0), TURNED),
    ("another first token (no BOS)", "gemma", another_token, {"embedded"}),
    ("window one token short", "mistral", attending(sees_one_less), {"heads"}),
    ("window ignored", "mistral", attending(sees_all), {"heads"}),
    ("no causal mask", "llama-silu", attending(not_causal), {"heads"}),
    ("softmax scale off by 1 %", "qwen2", attending(scaled), {"heads"}),
    ("keys and values in 8 bits", "llama-silu", attending(keys_of_8_bits), {"heads"}),
    ("keys and values in 16 bits, declared as 32", "qwen3", attending(keys_of_16_bits), {"heads"}),
    ("softmax in bfloat16", "mistral", softmax_of_16_bits, {"heads"}),
    ("keys used as values", "llama-silu", attending(values_as_keys), {"heads"}),
    ("soft cap of the scores left out", "gemma2", attending(no_cap), {"heads"}),
    (
        "soft cap of the logits left out",
        "gemma2",
        config_of(lambda m: m.config, "final_logit_softcapping", lambda c: None),
        {"logits"},
    ),
    ("attention sinks left out", "gpt-oss", no_sinks, {"heads"}),
    ("heads mapped to keys in turn", "qwen2", groups_interleaved, {"heads"}),
    ("heads in the wrong order", "qwen3", heads_out_of_order, {"heads"}),
    ("slopes of alibi 1 % too steep", "falcon-rw-alibi", alibi_steeper, {"heads"}),
    ("norm epsilon 1e-6 -> 1e-5", "llama-silu", epsilon("input_layernorm", 1e-5), NORMS),
    (
        "norm epsilon of the FFN 1e-6 -> 1e-5",
        "qwen2",
        epsilon("post_attention_layernorm", 1e-5),
        {"ffn_norm"},
    ),
    ("norm weights without 1 +", "gemma", norm_without("one"), NORMS),
    ("layer norm without its mean", "phi", norm_without("mean"), NORMS),
    ("layer norm without its bias", "phi", norm_without("bias"), NORMS),
    (
        "norm in bfloat16",
        "llama-silu",
        output("input_layernorm", lambda y: y.bfloat16().float()),
        NORMS,
    ),
    (
        "norm of the queries left out",
        "qwen3",
        config_of(lambda m: attention(m).q_norm, "forward", lambda f: lambda x: x),
        {"q_norm"},
    ),
    (
        "norm after attention left out",
        "gemma2",
        config_of(
            lambda m: layers(m)[LAYER].post_attention_layernorm, "forward", lambda f: lambda x: x
        ),
        {"attention_after_norm"},
    ),
    (
        "last norm left out",
        "llama-silu",
        config_of(lambda m: m.model.norm, "forward", lambda f: lambda x: x),
        {"final_norm"},
    ),
    ("bias of the queries left out", "qwen2", bias("self_attn.q_proj", 0), {"q"}),
    ("bias of the keys added twice", "qwen2", bias("self_attn.k_proj", 2), {"k"}),
    ("bias of the up projection left out", "opt-plain", bias("fc1", 0), {"up"}),
    ("bias of the down projection added twice", "opt-plain", bias("fc2", 2), {"ffn"}),
    *[
        (f"one sign flipped in {name}", model, flip(name), {key})
        for name, model, key in (
            ("self_attn.q_proj", "llama-silu", "q"),
            ("self_attn.k_proj", "mistral", "k"),
            ("self_attn.v_proj", "qwen2", "v"),
            ("self_attn.o_proj", "qwen3", "o"),
            ("mlp.gate_proj", "llama-silu", "gate"),
            ("mlp.up_proj", "mistral", "up"),
            ("mlp.down_proj", "qwen2", "ffn"),
        )
    ],
    (
        "one block's scale decoded as twice as large",
        "llama-silu",
        wrong_block("mlp.down_proj"),
        {"ffn"},
    ),
    (
        "one block's scale off by 1 / 2048",
        "llama-silu",
        wrong_block("self_attn.v_proj", 1 + 2**-11),
        {"v"},
    ),
    ("two blocks of a row change places", "qwen2", swapped_blocks("mlp.down_proj"), {"ffn"}),
    ("sums in bfloat16, gate", "llama-silu", in_bfloat16("mlp.gate_proj"), {"gate"}),
    ("sums in bfloat16, output projection", "qwen3", in_bfloat16("self_attn.o_proj"), {"o"}),
    ("gate and up change places", "llama-silu", gate_and_up, {"gate", "up"}),
    ("GELU exact for its tanh form", "gemma", act(lambda x: gelu(x)), {"activations"}),
    (
        "GELU in its tanh form for the exact one",
        "llama-gelu-tied",
        act(lambda x: gelu(x, approximate="tanh")),
        {"activations"},
    ),
    ("SiLU for GELU", "phi", act(silu), {"activations"}),
    ("ReLU for its square", "nemotron", act(torch.relu), {"activations"}),
    ("ReLU for its square (Arcee)", "arcee", act(torch.relu), {"activations"}),
    (
        "leaky ReLU",
        "opt-plain",
        act(lambda x: torch.nn.functional.leaky_relu(x, 1e-4)),
        {"activations"},
    ),
    ("router weights not normalised", "qwen3-moe", routed(not_normalised), {"choice_weights"}),
    (
        "router weights normalised, which are not",
        "olmoe",
        routed(lambda a, w, c: (a, w / w.sum(-1, True), c)),
        {"choice_weights"},
    ),
    ("the next best expert is chosen", "mixtral", routed(next_best), {"choices"}),
    (
        "experts' weights in the wrong order",
        "mixtral",
        routed(weights_reversed),
        {"choice_weights"},
    ),
    ("expert indices permuted", "mixtral", experts_permuted, {"experts"}),
    ("one sign flipped in one expert", "olmoe", expert_weight, {"experts"}),
    ("bias of the choice ignored", "dots1", no_choice_bias, {"choices"}),
    ("scale of the experts' weights halved", "dots1", half_scale, {"choice_weights"}),
    ("shared expert not gated", "qwen2-moe", shared_not_gated, {"shared_gate"}),
    (
        "limit of the gate 7 -> 1",
        "gpt-oss",
        config_of(lambda m: ffn(m).experts, "limit", lambda v: 1.0),
        {"experts"},
    ),
    (
        "alpha of the gate 1.702 -> 1.7",
        "gpt-oss",
        config_of(lambda m: ffn(m).experts, "alpha", lambda v: 1.7),
        {"experts"},
    ),
    (
        "residual multiplier left out",
        "granitemoe",
        config_of(lambda m: layers(m)[LAYER], "residual_multiplier", lambda v: 1.0),
        {"attended"},
    ),
    (
        "embedding multiplier left out",
        "granitemoe",
        config_of(lambda m: m.model, "embedding_multiplier", lambda v: 1.0),
        {"embedded"},
    ),
    (
        "logits not scaled",
        "granitemoe",
        config_of(lambda m: m.config, "logits_scaling", lambda v: 1.0),
        {"logits"},
    ),
    (
        "attention multiplier 1 / sqrt(d)",
        "granitemoe",
        config_of(attention, "scaling", lambda v: 0.3162),
        {"heads"},
    ),
    (
        "embeddings not scaled",
        "gemma",
        config_of(lambda m: m.get_input_embeddings(), "embed_scale", lambda s: torch.tensor(1.0)),
        {"embedded"},
    ),
    (
        "residual added in bfloat16",
        "llama-silu",
        output_of_layer(lambda y, x: y.bfloat16().float()),
        {"output"},
    ),
    ("residual left out", "mistral", output_of_layer(lambda y, x: y - x), {"output"}),
    (
        "residual before the norm (parallel layers)",
        "phi",
        output_of_layer(lambda y, x: y - x + layer_norm(x)),
        {"output"},
    ),
    ("layers change places", "llama-silu", layers_swapped, NORMS),
    ("rows of the output head one off", "llama-silu", head_moved, {"logits"}),
    ("tied head is another matrix", "llama-gelu-tied", head_not_tied, {"logits"}),
    ("the embedding of another token", "qwen2", embedding_row, {"embedded"}),
    ("a weight is not a number", "qwen2", not_a_number("mlp.down_proj"), {"ffn"}),
    ("logits in float16", "mistral", top("lm_head", lambda y: y.half().float()), {"logits"}),
]


def layer_norm(x):
    return torch.nn.functional.layer_norm(x, x.shape[-1:])
