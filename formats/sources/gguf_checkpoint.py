"""A GGUF file seen as a Hugging Face checkpoint, so that ``convert`` takes either."""

import json
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..architectures import phi3
from ..architectures.hugging_face import behind
from ..arrays import AnyArray, Float32Array, UInt8Array
from ..bounded_json import JsonObject
from ..errors import FormatError, shown
from ..layers.layer import LayerConfig
from ..number_formats import FORMATS, NumberFormat
from ..numbers import is_number, is_whole
from .checkpoint import COLUMN_CHUNK
from .gguf_metadata import refuse_strangers
from .split_gguf import open_gguf
from .tokenizers.gguf_vocabulary import gguf_tokenizer

RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
# GGUF's architecture -> model_type, the activation that llama.cpp uses for it, the config's name of
# the norms' epsilon, GGUF's name of it
ARCHITECTURES = {
    "llama": ("llama", "silu", "rms_norm_eps", RMS),
    "bamboo": ("bamboo", "relu", "rms_norm_eps", RMS),
    "qwen2": ("qwen2", "silu", "rms_norm_eps", RMS),
    "qwen3": ("qwen3", "silu", "rms_norm_eps", RMS),
    "gemma": ("gemma", "gelu_pytorch_tanh", "rms_norm_eps", RMS),
    "falcon": ("falcon", "gelu", "layer_norm_epsilon", LAYER),
    "phi2": ("phi", "gelu_new", "layer_norm_eps", LAYER),
    "phi3": ("phi3", "silu", "rms_norm_eps", RMS),
    "nemotron": ("nemotron", "relu2", "norm_eps", LAYER),
    "olmoe": ("olmoe", "silu", "rms_norm_eps", RMS),
    "qwen2moe": ("qwen2_moe", "silu", "rms_norm_eps", RMS),
    "qwen3moe": ("qwen3_moe", "silu", "rms_norm_eps", RMS),
    "granitemoe": ("granitemoe", "silu", "rms_norm_eps", RMS),
    "gpt-oss": ("gpt_oss", "silu", "rms_norm_eps", RMS),
    "gptneox": ("gpt_neox", "gelu", "layer_norm_eps", LAYER),
    "gpt2": ("gpt2", "gelu_new", "layer_norm_epsilon", LAYER),
}
BLOCK, KINDS = "blk.{}", ("weight", "bias")
NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_positions.weight": "position_embd.weight",
    **{f"lm_head.{k}": f"output.{k}" for k in KINDS},
    **{f"final_norm.{k}": f"output_norm.{k}" for k in KINDS},
    **{f"layers.{{}}.attention_norm.{k}": f"{BLOCK}.attn_norm.{k}" for k in KINDS},
    **{f"layers.{{}}.ffn_norm.{k}": f"{BLOCK}.ffn_norm.{k}" for k in KINDS},
    **{f"layers.{{}}.{p}_proj.{k}": f"{BLOCK}.attn_{p}.{k}" for p in "qkv" for k in KINDS},
    **{f"layers.{{}}.o_proj.{k}": f"{BLOCK}.attn_output.{k}" for k in KINDS},
    **{f"layers.{{}}.{p}_norm.{k}": f"{BLOCK}.attn_{p}_norm.{k}" for p in "qk" for k in KINDS},
    **{f"layers.{{}}.ffn.{p}_bias": f"{BLOCK}.ffn_{p}.bias" for p in ("gate", "up", "down")},
    **{f"layers.{{}}.router.{k}": f"{BLOCK}.ffn_gate_inp.{k}" for k in KINDS},
    "layers.{}.sinks": f"{BLOCK}.attn_sinks.weight",
    "layers.{}.shared.weigh.weight": f"{BLOCK}.ffn_gate_inp_shexp.weight",
    **{
        f"layers.{{}}.shared.{p}.weight": f"{BLOCK}.ffn_{p}_shexp.weight"
        for p in ("gate", "up", "down")
    },
}
# Architectures whose attention may have a window. A window of another has to be without effect.
WINDOWED = ("llama", "phi3", "gpt-oss")
LOCAL_EXPERTS = ("mixtral", "granitemoe", "gpt_oss")  # their configs say num_local_experts
PARTLY = ("phi", "phi3", "nemotron", "gpt_neox")  # only a part of each head may be rotary
TURNED = ("llama", "bamboo", "granitemoe")  # GGUF puts the two values of a rotary pair together
# {the type that a metadata key should have: (whether a value has it, its name for people)}
KINDS_OF_VALUES: dict[type, tuple[Callable[[Any], bool], str]] = {
    int: (is_whole, "a whole number"),
    float: (is_number, "a number"),
    str: (lambda value: isinstance(value, str), "a text"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
}
# Tensors that are not weights of the model: rotary factors, which become a part of the config, and
# PowerInfer's predictors, which ``calibrate --predictor-from`` takes.
SCALINGS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PREDICTORS = (".fc1.weight", ".fc2.weight")


@dataclass(frozen=True)
class Naming:
    """NAMES, FFN and ROWS as an architecture's module has them, for the tensors of a GGUF file."""

    NAMES: dict[str, str]
    FFN: dict[str, str]
    ROWS: dict[str, Callable[[LayerConfig], AnyArray]]


class GgufCheckpoint:
    """An open GGUF file with the interface of ``Checkpoint``.

    activation  the FFN's, under Hugging Face's name; None: the one that llama.cpp uses, because
                GGUF does not state it (ReLU models look like others of their architecture)
    """

    def __init__(self, path: Path | str, activation: str | None = None) -> None:
        self.directory = self.config_path = Path(path)
        self.file = open_gguf(path)
        try:
            tensors = self.file.tensors
            self.shapes = {
                name: tensor.shape
                for name, tensor in tensors.items()
                if name not in SCALINGS and not name.endswith(PREDICTORS)
            }
            for name, shape in self.shapes.items():
                if name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 1:
                    self.shapes[name] = (1, *shape)  # Hugging Face's is a matrix of one row
            self.architecture: str = self._get("general.architecture", str)
            if self.architecture not in ARCHITECTURES:
                raise FormatError(
                    f"{path}: architecture {shown(self.architecture)} is not supported; "
                    f"supported: {', '.join(ARCHITECTURES)}"
                )
            self.known: set[str] = set()  # the architecture's keys that were read
            self.config = self._config(activation)
            self._refuse_strangers()
            self.naming = naming_of(self.architecture, tensors)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ metadata

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        """metadata[key], or None where it is missing.

        Raises FormatError where it is not of this ``kind``, or is a missing text or flag.
        """
        value = self.file.metadata.get(key, default)
        is_sound, what = KINDS_OF_VALUES[kind]
        if value is not None and not is_sound(value):
            raise FormatError(f"{self.directory}: metadata {key} is {shown(value)}, not {what}")
        if value is None and kind in (str, bool):
            raise FormatError(f"{self.directory}: metadata {key} is missing")
        return value

    def _of(self, key: str, kind: type = int, default: Any = None) -> Any:
        """The same of a key of the architecture."""
        self.known.add(key)
        return self._get(f"{self.architecture}.{key}", kind, default)

    def _refuse_strangers(self) -> None:
        try:
            refuse_strangers(self.file.metadata, self.architecture, self.known, self.config)
        except FormatError as error:
            raise FormatError(f"{self.directory}: {error}") from None

    def _config(self, activation: str | None) -> JsonObject:
        """A Hugging Face config that leaves no field out, because GGUF has defaults of its own.

        A field that the file does not state is None, which ``model_config`` refuses where it needs
        the field.
        """
        model_type, usual, epsilon, epsilon_key = ARCHITECTURES[self.architecture]
        tensors = self.file.tensors
        if "blk.0.fc1.weight" in tensors:  # a model of PowerInfer, which have a ReLU
            usual = "relu"
        heads, hidden_size = self._of("attention.head_count"), self._of("embedding_length")
        embeddings = tensors.get("token_embd.weight")
        head_dim = self._of("attention.key_length")
        if head_dim is None and heads and hidden_size:
            head_dim = hidden_size // heads
        window = None
        if self.architecture in WINDOWED:
            window = self._of("attention.sliding_window") or None
        if model_type == "llama" and self._of("expert_count"):
            model_type = "mixtral"
        elif model_type == "llama" and window:
            model_type = "mistral"
        neurons = self._of("feed_forward_length")
        config = {
            "model_type": model_type,
            "vocab_size": embeddings.shape[0] if embeddings else None,
            "hidden_size": hidden_size,
            "intermediate_size": neurons,
            "ffn_hidden_size": neurons,
            "num_hidden_layers": self._of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._of("attention.head_count_kv"),
            "head_dim": head_dim,
            "max_position_embeddings": self._of("context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "hidden_act": activation or usual,
            "activation": activation or usual,
            epsilon: self._of(epsilon_key, float),
            "attention_bias": "blk.0.attn_output.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            "qk_layernorm": "blk.0.attn_q_norm.weight" in tensors,
            "rope_parameters": self._rope_parameters(),
            "original_max_position_embeddings": self._of("rope.scaling.original_context_length"),
            "partial_rotary_factor": self._partial_rotary_factor(model_type, head_dim),
            "sliding_window": window,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id", int),
            "eos_token_id": self._ends_of_text(),
        }
        config.update(self._of_its_own(config))
        return config

    def _of_its_own(self, config: JsonObject) -> JsonObject:
        """The fields that only some architectures have, or that they have otherwise."""
        model_type: str = config["model_type"]
        found: JsonObject = {}
        if model_type == "phi3" and config["original_max_position_embeddings"] is None:
            found["original_max_position_embeddings"] = config["max_position_embeddings"]
        if self._of("expert_count"):
            found.update(self._mixture(model_type, config["intermediate_size"]))
        if model_type == "granitemoe":
            found.update(self._scales())
        if model_type == "falcon":
            two = "blk.0.attn_norm_2.weight" in self.file.tensors
            found["new_decoder_architecture"] = True  # GGUF's packed heads are in that order
            found["num_kv_heads"] = config["num_key_value_heads"] or 1
            found["num_ln_in_parallel_attn"] = 2 if two else 1
        if model_type in ("gpt_neox", "gpt2"):
            self._refuse_other_heads(config)
        if model_type == "gpt2":
            found["n_inner"] = config["intermediate_size"]
            found["activation_function"] = config["hidden_act"]
        if model_type == "gpt_neox":
            found["use_parallel_residual"] = self._of("use_parallel_residual", bool)
            found["rotary_pct"] = config["partial_rotary_factor"]
        return found

    def _refuse_other_heads(self, config: JsonObject) -> None:
        """Raise FormatError where heads share keys, or are not hidden_size all together."""
        heads, width = config["num_attention_heads"], config["head_dim"]
        if config["num_key_value_heads"] not in (None, heads) or (
            heads and width and heads * width != config["hidden_size"]
        ):
            raise FormatError(
                f"{self.directory}: {shown(heads)} heads of {shown(width)} with "
                f"attention.head_count_kv {shown(config['num_key_value_heads'])} are not supported "
                f"for {self.architecture}"
            )

    def _mixture(self, model_type: str, neurons: int | None) -> JsonObject:
        """The fields of a mixture of experts."""
        neurons = self._of("expert_feed_forward_length") or neurons
        experts = self._of("expert_count")
        return {
            "num_local_experts" if model_type in LOCAL_EXPERTS else "num_experts": experts,
            "num_experts_per_tok": self._of("expert_used_count"),
            "moe_intermediate_size": neurons,
            "intermediate_size": neurons,
            # As llama.cpp's code has it; a file that states otherwise is refused.
            "norm_topk_prob": model_type not in ("olmoe", "qwen2_moe"),
            "shared_expert_intermediate_size": self._of("expert_shared_feed_forward_length"),
        }

    def _scales(self) -> JsonObject:
        """Granite's factors of embeddings, attention, blocks and logits."""
        return {
            "embedding_multiplier": self._of("embedding_scale", float),
            "attention_multiplier": self._of("attention.scale", float),
            "residual_multiplier": self._of("residual_scale", float),
            "logits_scaling": self._of("logit_scale", float),
        }

    def _partial_rotary_factor(self, model_type: str, head_dim: int | None) -> float:
        """The share of each head that is rotary. Raises FormatError where it has to be 1."""
        turned = self._of("rope.dimension_count")
        if not turned or not head_dim or turned == head_dim:
            return 1.0
        if model_type not in PARTLY or not 0 < turned < head_dim:
            raise FormatError(
                f"{self.directory}: rope.dimension_count {shown(turned)} of heads of "
                f"{shown(head_dim)} is not supported for {self.architecture}"
            )
        # The next larger number, so that its product with head_dim is not rounded below ``turned``.
        return math.nextafter(turned / head_dim, math.inf)

    def _rope_parameters(self) -> JsonObject:
        """The kind of rotary positions, and its parameters."""
        base = self._of("rope.freq_base", float)
        return {"rope_theta": 10000.0 if base is None else base, **self._rope_scaling()}

    def _rope_scaling(self) -> JsonObject:
        tensors = self.file.tensors
        kind = self._of("rope.scaling.type", str, "linear")  # llama.cpp's default
        factor = self._of("rope.scaling.factor", float)
        if kind == "linear" and not factor:
            kind = "none"
        if "rope_freqs.weight" in tensors:  # Llama 3's scaling, as a factor of each dimension
            self._refuse_two_scalings(kind)
            factors = self._vector("rope_freqs.weight")
            return {
                "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
                "attention_factor": 1.0,
            }  # fmt: skip
        if "rope_factors_short.weight" in tensors and "rope_factors_long.weight" in tensors:
            self._refuse_two_scalings(kind)
            return {
                "rope_type": "longrope",
                "short_factor": self._vector("rope_factors_short.weight"),
                "long_factor": self._vector("rope_factors_long.weight"),
                "attention_factor": self._of("rope.scaling.attn_factor", float),
            }
        if kind == "none":
            return {"rope_type": "default"}
        scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling["beta_fast"] = self._of("rope.scaling.yarn_beta_fast", float, 32.0)
            scaling["beta_slow"] = self._of("rope.scaling.yarn_beta_slow", float, 1.0)
        if self.architecture == "gpt-oss":
            scaling["truncate"] = False
        return scaling

    def _refuse_two_scalings(self, kind: str) -> None:
        """Raise FormatError where factors of each dimension come beside another scaling."""
        if kind not in ("none", "longrope"):
            raise FormatError(
                f"{self.directory}: rope.scaling.type {shown(kind)} beside factors of each "
                "dimension is not supported"
            )

    def _vector(self, name: str) -> list[float]:
        tensor = self.file.tensors[name]
        if len(tensor.shape) != 1 or tensor.type.name != "F32":
            raise FormatError(f"{self.directory}: tensor {name} is not a row of F32")
        return [float(value) for value in self.read_rows(name)]

    def _ends_of_text(self) -> list[int]:
        """The ids of the tokens that end a text, a turn or a message."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = [self._get(f"tokenizer.ggml.{key}", int) for key in keys]
        return sorted({token for token in found if token is not None})

    # ------------------------------------------------------------------ tensors and texts

    def format_of(self, name: str) -> NumberFormat:
        """The NumberFormat that a tensor is converted to where the user names none.

        It is the one that keeps the tensor bit for bit; where there is none, the nearest.
        """
        kind = self.file.tensors[name].type
        if kind.format is not None:
            return kind.format
        bits = next(int(character) for character in kind.name if character.isdigit())
        return FORMATS["q4_0" if bits <= 4 else "q8_0"]

    def requantised(self) -> list[str]:
        """Names of the types in this file that no number format of a bundle keeps bit for bit."""
        types = (t.type for n, t in self.file.tensors.items() if n in self.shapes)
        return sorted({kind.name for kind in types if kind.format is None})

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        """Rows ``start:stop`` of a tensor as float32."""
        tensor = self.file.tensors[name]
        if len(tensor.shape) > 1:
            return self.file.decode(tensor.type, self.file.raw_rows(name, start, stop))
        values = self.file.decode(tensor.type, self.file.raw_rows(name))
        return (values if len(self.shapes.get(name, ())) == 2 else values.reshape(-1))[start:stop]

    def raw_rows(self, name: str, format: NumberFormat, start: int, stop: int) -> UInt8Array | None:
        """The same rows as bytes, where the file holds them in this NumberFormat; else None."""
        tensor = self.file.tensors[name]
        if tensor.type.format is not format or len(tensor.shape) < 2:
            return None
        return self.file.raw_rows(name, start, stop)

    def read_columns(self, name: str) -> Iterator[Float32Array]:
        """Yield a matrix (n, m) transposed, in pieces (<= COLUMN_CHUNK, n) float32."""
        tensor = self.file.tensors[name]
        raw, kind = self.file.raw_rows(name), tensor.type
        for start in range(0, tensor.shape[1], COLUMN_CHUNK):
            stop = min(start + COLUMN_CHUNK, tensor.shape[1])
            piece = raw[:, start // kind.block * kind.block_bytes :]
            piece = piece[:, : (stop - start) // kind.block * kind.block_bytes]
            yield self.file.decode(kind, piece).T

    def generation_config(self) -> JsonObject:
        return {}

    def tokenizer_json(self) -> str | None:
        """The text of a ``tokenizer.json`` made of the vocabulary in the file, or None.

        Raises FormatError where the vocabulary is damaged, or of an unknown kind.
        """
        try:
            made = gguf_tokenizer(self.file.metadata)
        except FormatError as error:
            raise FormatError(f"{self.directory}: {error}") from None
        return None if made is None else json.dumps(made)

    def chat_template(self) -> str | None:
        """The jinja template of a conversation, or None."""
        return self._get("tokenizer.chat_template", str, "") or None

    def special_tokens(self) -> dict[str, str]:
        """{role: token} of the special tokens that the tokenizer names."""
        tokens, found = self.file.metadata.get("tokenizer.ggml.tokens"), {}
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            number = self._get(f"tokenizer.ggml.{name}_token_id", int)
            if isinstance(tokens, list) and number is not None and 0 <= number < len(tokens):
                found[f"{role}_token"] = tokens[number]
        return found

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "GgufCheckpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def naming_of(architecture: str, tensors: Container[str]) -> Naming:
    """The Naming of a GGUF file.

    tensors  the names of its tensors, which tell the forms of an architecture apart
    """
    names = dict(NAMES)
    rows: dict[str, Callable[[LayerConfig], AnyArray]] = {}
    parts = ("gate", "up", "down") if "blk.0.ffn_gate.weight" in tensors else ("up", "down")
    ffn = {part: f"{BLOCK}.ffn_{part}.weight" for part in parts}
    if "blk.0.ffn_gate_exps.weight" in tensors:
        for part in ("gate", "up", "down"):
            ffn[part] = f"{BLOCK}.ffn_{part}_exps.weight"
            names[f"layers.{{}}.ffn.{part}_bias"] = f"{BLOCK}.ffn_{part}_exps.bias"
    if "blk.0.post_attention_norm.weight" in tensors and "blk.0.ffn_norm.weight" not in tensors:
        names["layers.{}.ffn_norm.weight"] = f"{BLOCK}.post_attention_norm.weight"
    if "blk.0.attn_qkv.weight" in tensors:
        for p in "qkv":
            names.update({f"layers.{{}}.{p}_proj.{k}": f"{BLOCK}.attn_qkv.{k}" for k in KINDS})
            rows[f"{p}_proj"] = behind(p)
    if f"{BLOCK}.ffn_down_t.weight".format(0) in tensors:  # PowerInfer's: one row per neuron
        ffn["down_t"] = f"{BLOCK}.ffn_down_t.weight"
        del ffn["down"]
    if architecture in TURNED:
        rows["q_proj"] = lambda layer: _unpermuted(layer, layer.attention.num_attention_heads)
        rows["k_proj"] = lambda layer: _unpermuted(layer, layer.attention.num_key_value_heads)
    if architecture == "phi3":
        ffn = {"gate": ffn["up"], "up": ffn["up"], "down": ffn["down"]}
        rows.update({part: phi3.ROWS[part] for part in ("gate", "up")})
    if "blk.0.attn_norm_2.weight" in tensors:  # attention's norm; attn_norm is the FFN's
        for k in KINDS:
            names[f"layers.{{}}.attention_norm.{k}"] = f"{BLOCK}.attn_norm_2.{k}"
            names[f"layers.{{}}.ffn_norm.{k}"] = f"{BLOCK}.attn_norm.{k}"
    return Naming(names, ffn, rows)


def _unpermuted(layer: LayerConfig, heads: int) -> AnyArray:
    """For each row of Hugging Face's q or k projection, the row of a llama GGUF that holds it."""
    head_dim = layer.attention.head_dim
    ids = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return ids.swapaxes(1, 2).reshape(-1)
