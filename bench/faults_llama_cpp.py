"""Faults that are planted in GGUF files, so that llama.cpp itself computes something else."""

import tempfile
from pathlib import Path

import gguf
import numpy as np

from tests.make_checkpoints import VARIANTS, make, save
from tests.make_gguf import write_gguf

LAYER = 1
FORMATS = {
    "f32": None, "f16": gguf.GGMLQuantizationType.F16, "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}  # fmt: skip
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}
# Sizes that are whole blocks, which those of the committed checkpoints are not.
WIDE = {
    "hidden_size": 64, "intermediate_size": 96, "ffn_hidden_size": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64, "head_dim": 16,
}  # fmt: skip


class Gguf:
    """A GGUF file in memory: ``metadata`` {key: (type, value)}, ``tensors`` {name: bytes (rows,
    row_bytes) uint8}."""

    @classmethod
    def of(cls, checkpoint, format, seed=0):
        """A random model of the options of one of tests/make_checkpoints.py's."""
        options = {**VARIANTS[Path(checkpoint).name]}
        if options["model_type"] != "gpt_oss":  # whose sizes are whole blocks
            options.update({key: value for key, value in WIDE.items() if key in options})
        with tempfile.TemporaryDirectory() as folder:
            save(make(options, seed), folder, options)
            kind = FORMATS[format]

            def quantise(name, values):
                return None if kind is None or "bias" in name or "gate_inp" in name else kind

            def metadata(writer):
                writer.add_tokenizer_model("no_vocab")
                writer.add_vocab_size(options["vocab_size"])

            path = Path(folder) / "x.gguf"
            write_gguf(folder, path, quantise, metadata)
            return cls(path, format)

    def __init__(self, path, format):
        reader = gguf.GGUFReader(path)
        self.format = format
        self.metadata = {
            name: (field.types[0], field.contents())
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        self.tensors = {t.name: np.array(t.data) for t in reader.tensors}
        self.types = {t.name: t.tensor_type for t in reader.tensors}
        self.architecture = self.metadata["general.architecture"][1]

    def write(self, path):
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, (kind, value) in self.metadata.items():
            if key != "general.architecture":
                writer.add_key_value(key, value, kind)
        for name, data in self.tensors.items():
            block = self.types[name] not in (0, 1)
            writer.add_tensor(name, data, raw_dtype=self.types[name] if block else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def set(self, key, value, kind=None):
        name = f"{self.architecture}.{key}"
        kind = kind or self.metadata[name][0]
        self.metadata[name] = kind, value

    def bytes(self, name):
        """A tensor's bytes in place, flat."""
        return self.tensors[name].view(np.uint8).reshape(-1)


def number(key, value, kind=gguf.GGUFValueType.FLOAT32):
    return lambda file: file.set(key, value, kind)


def whole(key, value):
    return number(key, value, gguf.GGUFValueType.UINT32)


def name_of(part, layer=LAYER):
    return part if "." in part else f"blk.{layer}.{part}.weight"


def flip(part):
    """The sign of one weight, or of a block's scale where weights lie in blocks."""

    def change(file):
        raw = file.bytes(name_of(part))
        size = {"f32": 4, "f16": 2}.get(file.format, BLOCK_BYTES.get(file.format))
        if file.types[name_of(part)] == 0:
            size = 4
        at = (len(raw) // size // 3) * size + {4: 3}.get(size, 1)
        raw[at] ^= 0x80

    return change


def one_step(part):
    """One weight of a block is one step too large."""

    def change(file):
        raw = file.bytes(name_of(part))
        raw[BLOCK_BYTES[file.format] * 5 + 2 + 7] ^= 1

    return change


def twice(part):
    """One block's scale is twice as large."""

    def change(file):
        raw = file.bytes(name_of(part))
        size = BLOCK_BYTES[file.format]
        scale = raw[size * 5 : size * 5 + 2].view(np.float16)
        scale *= np.float16(2)

    return change


def blocks_swapped(part):
    def change(file):
        raw, size = file.bytes(name_of(part)), BLOCK_BYTES[file.format]
        first = raw[:size].copy()
        raw[:size], raw[size : 2 * size] = raw[size : 2 * size], first

    return change


def nibbles_swapped(part):
    """The two halves of one block of 4 bits change places."""

    def change(file):
        raw, size = file.bytes(name_of(part)), BLOCK_BYTES[file.format]
        weights = raw[size * 5 + 2 : size * 6]
        weights[:] = weights >> 4 | weights << 4

    return change


def times(part, factor):
    def change(file):
        file.tensors[name_of(part)] *= factor

    return change


def one_element(part, factor=1.01):
    def change(file):
        file.tensors[name_of(part)].reshape(-1)[3] *= factor

    return change


def plus_one(part):
    def change(file):
        file.tensors[name_of(part)] += 1

    return change


def exchanged(a, b):
    def change(file):
        a_, b_ = name_of(a), name_of(b)
        file.tensors[a_], file.tensors[b_] = file.tensors[b_], file.tensors[a_]

    return change


def rolled(part):
    """Experts, or a router's rows, are one off."""

    def change(file):
        file.tensors[name_of(part)] = np.roll(file.tensors[name_of(part)], 1, axis=0)

    return change


def pairs(part):
    """Rotary pairs lie half a head apart, where llama.cpp wants them side by side."""

    def change(file):
        w = file.tensors[name_of(part)]
        head_dim = file.metadata[f"{file.architecture}.attention.key_length"][1]
        heads = w.reshape(-1, head_dim // 2, 2, w.shape[-1]).swapaxes(1, 2)
        file.tensors[name_of(part)] = np.ascontiguousarray(heads).reshape(w.shape)

    return change


def layers_exchanged(file):
    for name in [n for n in file.tensors if n.startswith("blk.0.")]:
        other = name.replace("blk.0.", "blk.1.")
        file.tensors[name], file.tensors[other] = file.tensors[other], file.tensors[name]


def own_head(file):
    file.tensors["output.weight"] = np.roll(file.tensors["token_embd.weight"], 1, axis=0)
    file.types["output.weight"] = file.types["token_embd.weight"]


def frequency_factors(file):
    half = file.metadata[f"{file.architecture}.rope.dimension_count"][1] // 2
    file.tensors["rope_freqs.weight"] = np.full(half, 1.05, dtype=np.float32)
    file.types["rope_freqs.weight"] = gguf.GGMLQuantizationType.F32


def linear_scaling(file):
    file.set("rope.scaling.type", "linear", gguf.GGUFValueType.STRING)
    file.set("rope.scaling.factor", 2.0, gguf.GGUFValueType.FLOAT32)


def not_a_number(part):
    def change(file):
        file.tensors[name_of(part)].reshape(-1)[5] = np.nan

    return change


def keys_of_8_bits(file):
    return {"keys": "q8_0"}


NORMS, TURNED = {"attention_norm"}, {"q_turned", "k_turned"}
MATRICES = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_gate": "gate",
    "ffn_up": "up", "ffn_down": "ffn",
}  # fmt: skip
# (what is wrong, the model, its number format, the change, the values at which it is to be found)
FAULTS = [
    ("rope base 10000 -> 10500", "llama-silu", "f16", number("rope.freq_base", 10500.0), TURNED),
    ("rope base 10000 -> 10500", "qwen2", "q8_0", number("rope.freq_base", 10500.0), TURNED),
    ("positions squeezed by 2", "llama-silu", "q8_0", linear_scaling, TURNED),
    ("frequency factors of 1.05", "llama-silu", "q4_0", frequency_factors, TURNED),
    ("rotary part of each head", "phi", "f16", whole("rope.dimension_count", 6), TURNED),
    (
        "norm epsilon 1e-6 -> 1e-5",
        "qwen3",
        "f16",
        number("attention.layer_norm_rms_epsilon", 1e-5),
        NORMS,
    ),
    (
        "norm epsilon 1e-5 -> 1e-4",
        "falcon-new",
        "f16",
        number("attention.layer_norm_epsilon", 1e-4),
        NORMS,
    ),
    (
        "embedding scale 3 -> 3.01",
        "granitemoe",
        "f16",
        number("embedding_scale", 3.01),
        {"embedded"},
    ),
    (
        "attention scale 0.2 -> 0.21",
        "granitemoe",
        "f16",
        number("attention.scale", 0.21),
        {"heads"},
    ),
    (
        "residual scale 0.5 -> 0.51",
        "granitemoe",
        "q8_0",
        number("residual_scale", 0.51),
        {"attended"},
    ),
    ("logit scale 2 -> 2.01", "granitemoe", "f16", number("logit_scale", 2.01), {"logits"}),
    ("keys in 8 bits, declared as 16", "llama-silu", "f16", keys_of_8_bits, {"heads"}),
    ("keys in 8 bits, declared as 16", "qwen3", "q4_0", keys_of_8_bits, {"heads"}),
    *[
        (f"one sign flipped in {part}", model, format, flip(part), {key})
        for (part, key), model, format in zip(
            MATRICES.items(),
            ("llama-silu", "qwen2", "qwen3", "llama-silu", "qwen2", "gemma", "phi"),
            ("f16", "f16", "f16", "q8_0", "q8_0", "q4_0", "q4_0"),
            strict=True,
        )
    ],
    *[
        (f"one block's scale doubled in {part}", model, format, twice(part), {key})
        for (part, key), model, format in zip(
            MATRICES.items(),
            ("qwen2", "qwen3", "gemma", "llama-silu", "qwen3", "llama-silu", "qwen2"),
            ("q8_0", "q4_0", "q8_0", "q4_0", "q8_0", "q4_0", "q8_0"),
            strict=True,
        )
    ],
    ("two blocks of a row change places", "llama-silu", "q8_0", blocks_swapped("attn_v"), {"v"}),
    ("two blocks of a row change places", "qwen2", "q4_0", blocks_swapped("ffn_down"), {"ffn"}),
    (
        "the halves of one block of 4 bits change places",
        "llama-silu",
        "q4_0",
        nibbles_swapped("ffn_up"),
        {"up"},
    ),
    (
        "the halves of one block of 4 bits change places",
        "qwen3",
        "q4_0",
        nibbles_swapped("attn_output"),
        {"o"},
    ),
    ("one weight one step off", "llama-silu", "q8_0", one_step("ffn_gate"), {"gate"}),
    ("one weight one step off", "qwen2", "q4_0", one_step("attn_k"), {"k"}),
    ("one norm weight off by 1 %", "llama-silu", "q4_0", one_element("attn_norm"), NORMS),
    ("one norm weight off by 1 %", "qwen2", "f16", one_element("ffn_norm"), {"ffn_norm"}),
    (
        "one weight of the last norm off by 1 %",
        "qwen3",
        "q8_0",
        one_element("output_norm.weight"),
        {"final_norm"},
    ),
    ("norm weights 1 + twice", "gemma", "q8_0", plus_one("attn_norm"), NORMS),
    ("norm of the keys off by 1 %", "qwen3", "q8_0", one_element("attn_k_norm"), {"k_norm"}),
    ("bias of the queries left out", "qwen2", "f16", times("blk.1.attn_q.bias", 0), {"q"}),
    ("bias of the values added twice", "qwen2", "q4_0", times("blk.1.attn_v.bias", 2), {"v"}),
    (
        "bias of the down projection left out",
        "phi",
        "f16",
        times("blk.1.ffn_down.bias", 0),
        {"ffn"},
    ),
    ("bias of the head left out", "phi", "q8_0", times("output.bias", 0), {"logits"}),
    (
        "gate and up change places",
        "llama-silu",
        "q8_0",
        exchanged("ffn_gate", "ffn_up"),
        {"gate", "up"},
    ),
    ("rotary pairs of the queries half a head apart", "llama-silu", "f16", pairs("attn_q"), {"q"}),
    ("rotary pairs of the keys half a head apart", "llama-silu", "f32", pairs("attn_k"), {"k"}),
    ("expert indices permuted, gate", "mixtral", "f16", rolled("ffn_gate_exps"), {"experts"}),
    ("expert indices permuted, down", "qwen3-moe", "q8_0", rolled("ffn_down_exps"), {"experts"}),
    ("rows of the router one off", "olmoe", "f16", rolled("ffn_gate_inp"), {"router"}),
    ("one sign flipped in an expert", "qwen2-moe", "q4_0", flip("ffn_up_exps"), {"experts"}),
    (
        "shared expert's gate negated",
        "qwen2-moe",
        "f16",
        times("ffn_gate_inp_shexp", -1),
        {"shared_gate"},
    ),
    (
        "one block's scale doubled in the shared expert",
        "qwen2-moe",
        "q8_0",
        twice("ffn_down_shexp"),
        {"shared"},
    ),
    ("tied head is another matrix", "llama-gelu-tied", "f16", own_head, {"logits"}),
    ("rows of the head one off", "llama-silu", "f16", rolled("output.weight"), {"logits"}),
    ("rows of the embeddings one off", "qwen3", "q8_0", rolled("token_embd.weight"), {"embedded"}),
    ("layers change places", "llama-silu", "q8_0", layers_exchanged, NORMS),
    ("a weight is not a number", "llama-silu", "f16", not_a_number("attn_v"), {"v"}),
]
# What llama.cpp computes as the models' authors do: see docs/results.md for what it does not.
CLEAN = [
    (model, format)
    for model in (
        "llama-silu",
        "llama-gelu-tied",
        "qwen2",
        "qwen3",
        "gemma",
        "phi",
        "olmoe",
        "qwen2-moe",
        "qwen3-moe",
        "mixtral",
        "granitemoe",
    )
    for format in ("f32", "f16", "bf16", "q8_0", "q4_0")
]
# Sound files whose models llama.cpp computes otherwise than their authors do.
DIFFERENT = [("falcon-new", "f16"), ("phi3", "f16"), ("mistral", "f16"), ("gpt-oss", "f16")]
