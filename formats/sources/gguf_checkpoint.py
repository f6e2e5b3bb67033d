"""A GGUF file seen as a Hugging Face checkpoint, so that ``convert`` takes either."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

from ..arrays import Float32Array, UInt8Array
from ..bounded_json import JsonObject
from ..bundle.in_place import Run
from ..errors import FormatError, shown
from ..number_formats import FORMATS, NumberFormat
from .gguf_forms import FORMS as GGUF_FORMS
from .gguf_forms import TEXTS
from .gguf_forms.fields import config_of
from .gguf_forms.header import Header
from .gguf_forms.rope import SCALINGS
from .gguf_metadata import refuse_strangers
from .shards import COLUMN_CHUNK
from .split_gguf import open_gguf
from .tokenizers.gguf_vocabulary import gguf_tokenizer

PREDICTORS = (".fc1.weight", ".fc2.weight")  # PowerInfer's, for ``calibrate --predictor-from``
# Several matrices, of heads or of hidden states: (n, rows, columns), which here are one.
SEVERAL = (".attn_k_b.weight", ".attn_v_b.weight", "altup_proj.weight", "altup_unembd_proj.weight")
ROW_VECTORS = (".ffn_gate_inp_shexp.weight",)  # vectors here, Hugging Face's matrices of one row
FLOATS_ALIGNMENT = 4  # bytes; without it the kernels' loads of floats are not defined
VECTORS = (".ssm_a", ".ssm_d", ".ssm_norm.weight")  # matrices here, Hugging Face's vectors


class GgufCheckpoint:
    """An open GGUF file with the interface of ``Checkpoint``.

    activation  the FFN's, under Hugging Face's name; None: the one that llama.cpp uses, because
                GGUF does not state it (ReLU models look like others of their architecture)
    """

    def __init__(self, path: Path | str, activation: str | None = None) -> None:
        self.directory = self.config_path = Path(path)
        self.file = open_gguf(path)
        try:
            self.header = Header(self.file, self.directory)
            self.architecture = self.header.architecture
            known = GGUF_FORMS | TEXTS
            if self.architecture not in known:
                raise FormatError(
                    f"{path}: architecture {shown(self.architecture)} is not supported; "
                    f"supported: {', '.join(known)}"
                )
            self.form = known[self.architecture]
            self.config = config_of(self.form, self.header, activation)
            self._refuse_strangers()
            self.naming = self.form.naming(self.header.kinds)
            self.shapes = self._shapes()
        except BaseException:
            self.close()
            raise

    def _refuse_strangers(self) -> None:
        """Raise FormatError where metadata that is not read could change the result."""
        try:
            refuse_strangers(
                self.file.metadata, self.architecture, self.header.known, self.config,
                self.form.harmless,
            )  # fmt: skip
        except FormatError as error:
            raise FormatError(f"{self.directory}: {error}") from None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """{tensor: its shape in a Hugging Face checkpoint} of the model's weights."""
        further = self.config.get("num_nextn_predict_layers", 0)
        last = self.config["num_hidden_layers"]
        left_out = tuple(f"blk.{last + layer}." for layer in range(further))
        shapes = {
            name: tensor.shape
            for name, tensor in self.file.tensors.items()
            if name not in SCALINGS
            and not name.endswith(PREDICTORS)
            and not name.startswith(left_out)
        }
        for name, shape in shapes.items():
            if name.endswith(ROW_VECTORS) and len(shape) == 1:
                shapes[name] = (1, *shape)
            elif name.endswith(VECTORS):
                shapes[name] = (prod(shape),)
            elif name.endswith(SEVERAL) and len(shape) == 3:
                shapes[name] = (shape[0] * shape[1], shape[2])
        return shapes

    def format_of(self, name: str) -> NumberFormat:
        """The NumberFormat that a tensor is converted to where the user names none.

        It is the one that keeps the tensor bit for bit. Those that are kept by none have blocks of
        256 values, and less than 4 bits each; of such values q4_K loses half of what q4_0 does.
        """
        kind = self.file.tensors[name].type
        if kind.format is not None:
            return kind.format
        return FORMATS["q4_K"]

    def requantised(self) -> list[str]:
        """Names of the types in this file that no number format of a bundle keeps bit for bit."""
        types = (t.type for n, t in self.file.tensors.items() if n in self.shapes)
        return sorted({kind.name for kind in types if kind.format is None})

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Float32Array:
        """Rows ``start:stop`` of a tensor as float32."""
        tensor = self.file.tensors[name]
        if len(tensor.shape) > 1 and not name.endswith(VECTORS):
            return self.file.decode(tensor.type, self.file.raw_rows(name, start, stop))
        values = self.file.decode(tensor.type, self.file.raw_rows(name))
        return (values if len(self.shapes.get(name, ())) == 2 else values.reshape(-1))[start:stop]

    def raw_rows(self, name: str, format: NumberFormat, start: int, stop: int) -> UInt8Array | None:
        """The same rows as bytes, where the file holds them in this NumberFormat; else None."""
        return self.file.raw_rows(name, start, stop) if self._holds(name, format) else None

    def run_of(self, name: str, format: NumberFormat, first: int, rows: int) -> Run | None:
        """Where the file has rows from ``first`` on, and behind them in each further matrix of the
        tensor, if it has them in this NumberFormat and they can be read there; else None."""
        tensor = self.file.tensors[name]
        address = self.file.address(name) + first * tensor.row_bytes
        aligned = format.block > 1 or address % FLOATS_ALIGNMENT == 0
        if not self._holds(name, format) or not aligned:
            return None
        return Run(
            address, (tensor.shape[-2] if len(tensor.shape) > 2 else rows) * tensor.row_bytes
        )

    def _holds(self, name: str, format: NumberFormat) -> bool:
        """Whether the file has a tensor's rows in this NumberFormat."""
        tensor = self.file.tensors[name]
        return tensor.type.format is format and len(tensor.shape) > 1 and not name.endswith(VECTORS)

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
        return self.header.get("tokenizer.chat_template", str, "") or None

    def special_tokens(self) -> dict[str, str]:
        """{role: token} of the special tokens that the tokenizer names."""
        tokens, found = self.file.metadata.get("tokenizer.ggml.tokens"), {}
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            number = self.header.get(f"tokenizer.ggml.{name}_token_id", int)
            if isinstance(tokens, list) and number is not None and 0 <= number < len(tokens):
                found[f"{role}_token"] = tokens[number]
        return found

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "GgufCheckpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
