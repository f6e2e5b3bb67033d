"""Which tensors a bundle holds, in which order, and what each is for.

The order is the order on flash: what must stay in DRAM first, so that opening a model is one
sequential read; then what is read row by row; then the FFN, one tensor of bundles a layer.
"""

from dataclasses import dataclass

from ..number_formats import FORMATS

# What each role means to the memory plan, in the order on flash.
SMALL = "small"  # norms, biases, projections: always in DRAM
PREDICTOR = "predictor"  # always in DRAM
ATTENTION = "attention"  # and shared experts: in DRAM where it fits, else streamed by layers
HEAD = "head"  # in DRAM where it fits, else streamed
EMBEDDING = "embedding"  # read row by row, where the output head does not hold it already
FFN = "ffn"  # read bundle by bundle

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name in the bundle, shape, role; ``exact`` ones are always f32."""

    name: str
    shape: tuple[int, ...]
    role: str
    exact: bool = False


def layout(config):
    """The TensorSpecs of a model with this ModelConfig, without predictors, in file order."""
    d, layers = config.hidden_size, range(config.num_hidden_layers)
    specs = []
    if config.embedding_size != d:
        specs.append(TensorSpec("project_in.weight", (d, config.embedding_size), SMALL))
        specs.append(TensorSpec("project_out.weight", (config.embedding_size, d), SMALL))
    if config.final_norm:
        specs += _norm("final_norm", d, config)
    if config.head_bias:
        specs.append(_vector("lm_head.bias", config.vocab_size))
    projections = projection_shapes(config)
    for layer in layers:
        specs += _small(f"layers.{layer}", config, projections)
    for layer in layers:
        specs += [
            TensorSpec(f"layers.{layer}.{p}_proj.weight", shape, ATTENTION)
            for p, shape in projections.items()
        ]
        specs += [
            TensorSpec(f"layers.{layer}.shared.{p}.weight", shape, ATTENTION)
            for p, shape in shared_shapes(config).items()
        ]
    vocabulary = (config.vocab_size, config.embedding_size)
    if config.tied:
        specs.append(TensorSpec("embed_tokens.weight", vocabulary, HEAD))
    else:
        specs.append(TensorSpec("lm_head.weight", vocabulary, HEAD))
        specs.append(TensorSpec("embed_tokens.weight", vocabulary, EMBEDDING))
    if config.positions == "learned":
        positions = (config.max_position_embeddings + config.position_offset, d)
        specs.append(TensorSpec("embed_positions.weight", positions, EMBEDDING))
    # One row a neuron: [up_i | down_i] or [gate_i | up_i | down_i] (paper section 3.2,
    # row-column bundling).
    bundles = (config.d_ffn, config.parts * d)
    specs += [TensorSpec(f"layers.{layer}.ffn.bundles", bundles, FFN) for layer in layers]
    return specs


def projection_shapes(config):
    """{"q", "k", "v", "o": (rows, columns)} of attention's projections."""
    d, width = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return {"q": (width, d), "k": (keys, d), "v": (keys, d), "o": (d, width)}


def shared_shapes(config):
    """{"gate", "up", "down": (rows, columns)} of the expert that every token uses."""
    d, neurons = config.hidden_size, config.shared_d_ffn
    return {"gate": (neurons, d), "up": (neurons, d), "down": (d, neurons)} if neurons else {}


def _small(layer, config, projections):
    """A layer's norms, biases and router."""
    d = config.hidden_size
    specs = _norm(f"{layer}.attention_norm", d, config)
    if not config.shared_norm:
        specs += _norm(f"{layer}.ffn_norm", d, config)
    if config.norm_after:
        specs += _norm(f"{layer}.attention_after_norm", d, config)
        specs += _norm(f"{layer}.ffn_after_norm", d, config)
    if config.qk_norm:
        for p in "qk":
            size = projections[p][0] if config.qk_norm_whole else config.head_dim
            specs += _norm(f"{layer}.{p}_norm", size, config)
    if config.experts:
        specs.append(TensorSpec(f"{layer}.router.weight", (config.experts, d), SMALL, exact=True))
    if config.router_bias:
        specs.append(_vector(f"{layer}.router.bias", config.experts))
    if config.shared_gated:
        specs.append(TensorSpec(f"{layer}.shared.weigh.weight", (1, d), SMALL, exact=True))
    biased = ("qkv" if config.qkv_bias else "") + ("o" if config.o_bias else "")
    specs += [_vector(f"{layer}.{p}_proj.bias", projections[p][0]) for p in biased]
    if config.attention_sinks:
        specs.append(_vector(f"{layer}.sinks", config.num_attention_heads))
    if config.ffn_bias:
        if config.gated:
            specs.append(_vector(f"{layer}.ffn.gate_bias", config.d_ffn))
        specs.append(_vector(f"{layer}.ffn.up_bias", config.d_ffn))
        specs.append(_vector(f"{layer}.ffn.down_bias", d * max(1, config.experts)))
    return specs


def predictor_layout(config, ranks):
    """The TensorSpecs of one low-rank predictor a layer (paper section 3.1): B (A x) + bias."""
    d, specs = config.hidden_size, []
    for layer, rank in enumerate(ranks):
        specs.append(TensorSpec(f"layers.{layer}.predictor.a", (rank, d), PREDICTOR))
        specs.append(TensorSpec(f"layers.{layer}.predictor.b", (config.d_ffn, rank), PREDICTOR))
        specs.append(
            TensorSpec(f"layers.{layer}.predictor.bias", (config.d_ffn,), PREDICTOR, exact=True)
        )
    return specs


def format_of(spec, ffn, dense):
    """The NumberFormat of a tensor: norms f32, predictors f16, FFN and the others as asked for.

    Positions, one small row a token, keep 16 bits where the others have fewer.
    """
    if spec.exact:
        return FORMATS["f32"]
    if spec.role == PREDICTOR:
        return FORMATS["f16"]
    if spec.name == "embed_positions.weight" and dense.block > 1:
        return FORMATS["f16"]
    return ffn if spec.role == FFN else dense


def head_name(config):
    return "embed_tokens.weight" if config.tied else "lm_head.weight"


def _norm(name, size, config):
    if not config.norm_affine:
        return []
    bias = [_vector(f"{name}.bias", size)] if config.norm == "layer" else []
    return [_vector(f"{name}.weight", size), *bias]


def _vector(name, size):
    return TensorSpec(name, (size,), SMALL, exact=True)
