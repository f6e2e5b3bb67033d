"""What a model is, in the engine's terms: a list of layers, whatever the architecture's name."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .errors import FormatError, UserError
from .layers.attention import AttentionConfig, check_cap
from .layers.ffn import FFNConfig
from .layers.layer import LayerConfig
from .layers.norm import NormConfig
from .tensors import EMBEDDING, HEAD, SMALL, TensorSpec, vector

MOST_LAYERS = MOST_EXPERTS = 4096
Options = dict[str, Any]  # of ``model_of``
ByLayer = Sequence[Options]  # for each layer the options that are its own; empty: none has any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model: embeddings, layers, a last norm and an output head.

    embedding_size   width of the token embeddings; project_in/out where it is not hidden_size
    embedding_scale  what token embeddings are multiplied with
    learned_positions  a row of ``embed_positions`` is added to each token's embedding
    position_offset  row of ``embed_positions`` that position 0 uses
    position_padding  the token that has the row of its own number there, and that positions do not
                     count (RoBERTa's padding); None: there is none
    per_layer_rows   rows of ``embed_tokens_per_layer``, one for each token, and the first for those
                     behind them, of which each layer that has a ``per_layer`` block reads a part;
                     0: there are none
    token_types      rows of ``embed_types``, of which the first is added to each token's embedding;
                     0: there are none
    embedding_norm   a norm comes behind the embeddings
    norm             of the last norm
    final_norm       there is a last norm, before the output head
    has_head         there is an output head
    head_activation  a dense layer with this activation and a norm come before it (BERT's head of
                     masked tokens); None: they do not
    head_bias        the output head has biases
    pooler           there is a dense layer that pools a text: tanh of what it makes of the first
                     token
    logit_scale      what logits are multiplied with
    logit_cap        logits become c tanh(logit / c); None: they stay
    tied             the output head is the embedding matrix
    """

    layers: tuple[LayerConfig, ...]
    vocab_size: int
    hidden_size: int
    embedding_size: int
    max_position_embeddings: int
    embedding_scale: float = 1.0
    learned_positions: bool = False
    position_offset: int = 0
    position_padding: int | None = None
    per_layer_rows: int = 0
    token_types: int = 0
    embedding_norm: bool = False
    norm: NormConfig
    final_norm: bool = True
    has_head: bool = True
    head_activation: str | None = None
    pooler: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    tied: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_cap("logit", self.logit_cap)
        if not self.with_neurons:
            raise FormatError("config: no layer has a feed-forward network")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def encoder(self) -> bool:
        """Whether it makes vectors of whole texts (``Model.encode``), and writes none."""
        return any(layer.mixer.both_ways for layer in self.layers)

    def refuse_encoder(self, name: object) -> None:
        """Raise UserError, naming the model's file, where it is an encoder."""
        if self.encoder:
            raise UserError(
                f"{name}: is an encoder, which writes no text; its vectors are what flashinfer "
                "encode and Model.encode give"
            )

    @property
    def mixture(self) -> bool:
        """Whether some layers have experts."""
        return any(layer.ffn.router for layer in self.layers)

    @property
    def reads_experts(self) -> bool:
        """Whether experts, and not their neurons, are read and kept as one."""
        return any(layer.ffn.reads_experts for layer in self.layers)

    @property
    def sparse(self) -> bool:
        """Whether most neurons of every layer may be silent: what predictors need."""
        return all(layer.ffn.sparse for layer in self.layers)

    @property
    def needs_all(self) -> bool:
        """Whether neurons of some layer depend on all of the others: no predictor tells them
        apart."""
        return any(layer.ffn.needs_all for layer in self.layers)

    @property
    def hidden_states(self) -> int:
        """How many a token has."""
        return max(layer.altup.states if layer.altup else 1 for layer in self.layers)

    @property
    def per_layer_width(self) -> int:
        """Numbers of a row of ``embed_tokens_per_layer``; 0: there is none."""
        return sum(layer.per_layer.size for layer in self.layers if layer.per_layer)

    @property
    def with_neurons(self) -> list[int]:
        """The layers that have an FFN."""
        return [number for number, layer in enumerate(self.layers) if layer.ffn.neurons]

    @property
    def activations(self) -> str:
        """The names of its layers' activations, nearly always one."""
        return ", ".join(dict.fromkeys(layer.ffn.activation for layer in self.layers))

    @property
    def head_name(self) -> str:
        """The tensor of the output head."""
        return "embed_tokens.weight" if self.tied else "lm_head.weight"

    def with_neurons_apart(self) -> "ModelConfig":
        """The same mixture, whose experts' neurons are read one by one, as predictors tell them
        apart. Raises FormatError where no neurons are silent, or experts have biases."""
        if not self.sparse or any(layer.ffn.ffn_bias for layer in self.layers):
            raise FormatError("experts of this kind have no predictors; convert the model again")
        apart = (
            replace(layer, ffn=replace(layer.ffn, neurons_apart=layer.ffn.router is not None))
            for layer in self.layers
        )
        return replace(self, layers=tuple(apart))

    def with_matrices(self, layers: Collection[int]) -> "ModelConfig":
        """The same model, of which these layers' FFNs keep their matrices whole, too."""
        whole = (
            replace(layer, ffn=replace(layer.ffn, matrices=layer.ffn.matrices or number in layers))
            for number, layer in enumerate(self.layers)
        )
        return replace(self, layers=tuple(whole))

    def with_rounded_inputs(self) -> "ModelConfig":
        """The same model, whose layers' products are of inputs rounded to 8 bits (BitNet b1.58).
        Raises FormatError where there are others than those of attention and a dense FFN."""
        layers, outside = [], self.encoder or self.embedding_size != self.hidden_size
        for layer in self.layers:
            mixer, ffn = layer.mixer, layer.ffn
            others = (ffn.router, ffn.shared_d_ffn, layer.laurel_rank, layer.altup, layer.per_layer)
            if not isinstance(mixer, AttentionConfig) or any(others) or outside:
                raise FormatError(
                    "config: quantization_config of bitnet is not supported here: it is for models "
                    "that write, whose linear layers are those of attention and a dense FFN"
                )
            ffn = replace(ffn, rounded=True, matrices=not ffn.sparse)
            layers.append(replace(layer, mixer=replace(mixer, rounded=True), ffn=ffn))
        return replace(self, layers=tuple(layers))

    def tensors(self) -> list[TensorSpec]:
        """The TensorSpecs of the model but for those of its layers."""
        d, specs = self.hidden_size, []
        if self.embedding_size != d:
            specs.append(TensorSpec("project_in.weight", (d, self.embedding_size), SMALL))
            specs.append(TensorSpec("project_out.weight", (self.embedding_size, d), SMALL))
        for way in ("in", "out") if self.hidden_states > 1 else ():
            specs += [
                TensorSpec(f"states.{way}.{number}.weight", (d, d), SMALL)
                for number in range(self.hidden_states - 1)
            ]
        if self.final_norm:
            specs += self.norm.tensors("final_norm", d)
        if self.embedding_norm:
            specs += self.norm.tensors("embed_norm", d)
        if self.token_types:
            specs.append(TensorSpec("embed_types.weight", (self.token_types, d), SMALL, True))
        if self.pooler:
            specs += [vector("pooler.bias", d), TensorSpec("pooler.weight", (d, d), SMALL)]
        if self.head_activation is not None:
            specs += [vector("head_dense.bias", d), TensorSpec("head_dense.weight", (d, d), SMALL)]
            specs += self.norm.tensors("head_norm", d)
        if self.head_bias:
            specs.append(vector("lm_head.bias", self.vocab_size))
        vocabulary = (self.vocab_size, self.embedding_size)
        if self.has_head:
            specs.append(TensorSpec(self.head_name, vocabulary, HEAD))
        if not (self.has_head and self.tied):
            specs.append(TensorSpec("embed_tokens.weight", vocabulary, EMBEDDING))
        if self.per_layer_rows:
            shape = (self.per_layer_rows, self.per_layer_width)
            specs.append(TensorSpec("embed_tokens_per_layer.weight", shape, EMBEDDING))
        if self.learned_positions:
            positions = (self.max_position_embeddings + self.position_offset, d)
            specs.append(TensorSpec("embed_positions.weight", positions, EMBEDDING))
        return specs


def model_of(
    *,
    num_hidden_layers: int,
    norm: Literal["layer", "rms"] = "rms",
    norm_epsilon: float = 1e-5,
    norm_affine: bool = True,
    by_layer: ByLayer = (),
    **options: Any,
) -> ModelConfig:
    """The ModelConfig of options that its layers share, and of those in which they differ.

    options   fields of ModelConfig, LayerConfig, AttentionConfig and FFNConfig, all together;
              ``mixer`` where it is not attention
    norm, norm_epsilon, norm_affine  the fields of the NormConfig of all norms
    by_layer  for each layer the options of a layer, attention or FFN that are its own, which go
              before those shared: [{"attention_window": 512}, {}]; empty: all layers are alike
    Raises FormatError where they are not those of a model.
    """
    options["norm"] = NormConfig(norm, norm_epsilon, norm_affine)
    layers = [_layer({**options, **own}) for own in by_layer]
    layers = layers or [_layer(options)] * num_hidden_layers
    return ModelConfig(layers=tuple(layers), **_of(ModelConfig, options))


def _layer(options: dict[str, Any]) -> LayerConfig:
    if strangers := options.keys() - OPTIONS:
        raise TypeError(f"{', '.join(strangers)}: not an option of a model")
    mixer = options.get("mixer") or AttentionConfig(**_of(AttentionConfig, options))
    ffn = FFNConfig(**_of(FFNConfig, options))
    return LayerConfig(**{**_of(LayerConfig, options), "mixer": mixer, "ffn": ffn})


def _of(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of a dataclass."""
    return {f.name: options[f.name] for f in fields(kind) if f.name in options}


OPTIONS = {
    field.name
    for kind in (AttentionConfig, FFNConfig, LayerConfig, ModelConfig)
    for field in fields(kind)
}
