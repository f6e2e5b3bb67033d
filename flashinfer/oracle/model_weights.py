"""A model's weights for the oracle: from a bundle, a checkpoint or a GGUF file, none rounded."""

from collections import OrderedDict
from pathlib import Path

import numpy as np

from flashinfer.formats.architectures import architecture, model_config
from flashinfer.formats.arrays import Float64Array
from flashinfer.formats.bundle.layout import layout
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import hugging_face_config, open_checkpoint
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.number_formats import FORMATS, Matrices
from flashinfer.formats.sources.gguf import is_gguf
from flashinfer.formats.sources.gguf_checkpoint import GgufCheckpoint
from flashinfer.formats.sources.names import Names
from flashinfer.formats.tensors import FFN

EXACT = FORMATS["f32"]
KEPT_BYTES = 512 << 20  # of weights that are in memory together


class ModelWeights:
    """The weights of a model, each read when it is asked for.

    path  a bundle, the directory of a Hugging Face checkpoint, or a GGUF file
    config     ModelConfig; hf_config: as Hugging Face has it; naming: the architecture's module
    Raises UserError where it is none of these, or not sound.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self.kept = path, OrderedDict[str, Float64Array]()
        self.bundle: Bundle | None = None
        if Path(path).is_dir() or is_gguf(path):
            self.checkpoint = open_checkpoint(path)
            self.close = self.checkpoint.close
            try:
                self.config = model_config(self.checkpoint.config)
            except FormatError as error:
                self.close()
                raise FormatError(f"{self.checkpoint.config_path}: {error}") from None
            self.hf_config = hugging_face_config(self.checkpoint)
            self.names = Names(self.checkpoint, self.config)
        else:
            # Predictors would turn a mixture's experts into neurons, and change nothing else.
            self.bundle = Bundle(path, calibrated=False)
            self.close = self.bundle.close
            self.config, self.hf_config = self.bundle.config, self.bundle.hf_config
        try:
            self.config.refuse_encoder(path)
        except UserError:
            self.close()
            raise
        self.naming = architecture(self.hf_config)
        self.specs = {spec.name: spec for spec in layout(self.config)}

    def __enter__(self) -> "ModelWeights":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def get(self, name: str) -> Float64Array | None:
        """A tensor by its name in bundles, in its shape, or None where the model has none."""
        return self[name] if name in self.specs else None

    def __getitem__(self, name: str) -> Float64Array:
        if name in self.kept:
            self.kept.move_to_end(name)
            return self.kept[name]
        values = self._read(name).astype(np.float64)
        self.kept[name] = values
        while sum(array.nbytes for array in self.kept.values()) > KEPT_BYTES and len(self.kept) > 1:
            self.kept.popitem(last=False)
        return values

    def _read(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        if self.bundle is not None:
            values = self.bundle.read(name)
            if isinstance(format := self.bundle.tensors[name].format, Matrices):
                return _as_bundles(values.reshape(spec.shape), format)
            return values.reshape(spec.shape)
        made = self.names.tensor(spec, EXACT, EXACT)
        raw = np.concatenate([np.frombuffer(chunk, dtype=np.uint8) for chunk in made.chunks()])
        ffn = self.config.layers[spec.layer or 0].ffn
        if spec.role == FFN and ffn.matrices:
            whole = Matrices(ffn.matrix_shapes(), [EXACT] * ffn.parts)
            return _as_bundles(whole.decode(raw.reshape(ffn.units, -1)), whole)
        return raw.view(np.float32).reshape(spec.shape)

    def rows(self, name: str, ids: np.ndarray) -> Float64Array:
        """Rows ``ids`` of a matrix that holds embeddings, of which no others are read."""
        if name in self.kept:
            return self[name][ids]
        distinct, where = np.unique(ids, return_inverse=True)
        found = np.stack([self._row(name, int(row)) for row in distinct])
        return found.astype(np.float64)[where]

    def _row(self, name: str, row: int) -> np.ndarray:
        """One row of embeddings."""
        if self.bundle is None:
            stored = self.names.find(name, None, self.specs[name].shape).name
            return self.checkpoint.read_rows(stored, row, row + 1)[0]
        tensor = self.bundle.tensors[name]
        at = tensor.offset + row * tensor.row_bytes
        raw = self.bundle.file.read_bytes(at, tensor.row_bytes).reshape(1, -1)
        return tensor.format.decode(raw)[0]

    def format(self, name: str, part: str = "up") -> str:
        """The number format that a matrix has in its file.

        part  of a layer's FFN, whose parts are tensors of their own outside of bundles: "gate",
              "up" or "down"
        """
        if self.bundle is not None:
            format = self.bundle.tensors[name].format
            named = format.parts[part].format if isinstance(format, Matrices) else format
            return named.name
        if not isinstance(self.checkpoint, GgufCheckpoint):
            return "f32"
        return self.checkpoint.file.tensors[self._source(name, part)].type.name.lower()

    def _source(self, name: str, part: str) -> str:
        """The tensor of the GGUF file that holds one of ours."""
        spec = self.specs[name]
        assert spec.layer is not None or "layers" not in name
        template = name if spec.layer is None else name.replace(f".{spec.layer}.", ".{}.", 1)
        if not template.endswith(".ffn.bundles"):
            return self.names.find(template, spec.layer, spec.shape).name
        ffn = self.config.layers[spec.layer or 0].ffn
        shape = (ffn.hidden_size, ffn.d_ffn) if part == "down" else (ffn.d_ffn, ffn.hidden_size)
        expert = 0 if ffn.router else None
        return self.names.find(f"layers.{{}}.ffn.{part}", spec.layer, shape, expert).name


def _as_bundles(units: np.ndarray, format: Matrices) -> np.ndarray:
    """The matrices of units (n, values) as neurons' bundles (neurons, parts * d_model)."""
    at, parts = 0, []
    for name, part in format.parts.items():
        size = part.rows * part.columns
        matrices = units[:, at : at + size].reshape(len(units), part.rows, part.columns)
        matrices = matrices.swapaxes(1, 2) if name == "down" else matrices
        parts.append(matrices.reshape(-1, matrices.shape[2]))
        at += size
    return np.concatenate(parts, axis=1)
