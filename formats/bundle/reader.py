"""The flat bundle (``.flash``): one model in one file that is also a valid safetensors file.

Beyond safetensors it promises: data and every tensor begin on a 4096-byte boundary (``_pad.N``
tensors of zeros fill the gaps); a layer's FFN is one tensor, a row a neuron; ``__metadata__``
holds the version, the model's config, a CRC-32 of every tensor and of the header, where the
model came from, and what calibration found. See ``layout.py`` for the tensors, ``writing.py`` for
how such a file is made.
"""

import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

from .. import bounded_json
from ..architectures import model_config
from ..config import ModelConfig
from ..errors import FormatError, shown
from ..files import MOST_TEXT
from ..number_formats import BY_SAFETENSORS, FORMATS, NumberFormat
from ..numbers import LARGEST_FLOAT32, is_number
from ..safetensors import SafetensorsFile
from .layout import TEMPLATE, TOKENIZER, layout, predictor_layout

VERSION = "1"
PAGE = 4096
CHUNK_BYTES = 8 << 20
WINDOWS = 8  # calibration measures windows of 1 to 8 tokens
CAPACITIES = tuple(k / 16 for k in range(17))  # and caches of these shares of a layer's rows
CALIBRATED = ("active", "predicted", "missed", "rank")  # of each layer: shares, and a rank
CALIBRATED_LISTS = {
    "window_rows": WINDOWS,  # neurons that windows of 1, 2, ... tokens need, on average
    "window_rows_most": WINDOWS,  # and at most
    "misses": len(CAPACITIES),  # neurons to read per token with caches of these sizes
}
# Of a mixture's layers, too: "uses", the share of the tokens that used each expert.
# Where known: shares of the units used that the predictor or router named when it was asked one
# layer early, and of the surest half of an early router's choice that were used.
CALIBRATED_MAYBE = ("guessed", "surest")
METHODS = ("threshold", "cats", "teal")  # see calibrate
PREDICTOR_FORMS = (  # ours, PowerInfer's
    {"between": "", "reads": "normed"},
    {"between": "relu", "reads": "residual"},
)
NO_CRC = "0" * 8  # stands for the header's own CRC while that is taken
HEADER_CRC = '"flashinfer.header_crc32":"%s"'


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of weights in a bundle: rows of ``row_bytes`` bytes from ``offset`` on."""

    name: str
    offset: int
    rows: int
    columns: int
    format: NumberFormat

    @property
    def row_bytes(self):
        return self.format.row_bytes(self.columns)

    @property
    def nbytes(self):
        return self.rows * self.row_bytes


class Bundle:
    """An open bundle: ``config`` (ModelConfig), ``specs``, ``tensors`` {name: StoredTensor}.

    hf_config    the model's config as Hugging Face wrote it
    calibration  what ``calibrate`` found (a dict), or None
    source       where the model came from (a dict)
    With ``calibrated=False`` it is opened as it was before it was calibrated.
    memory       bytes that parsing its header may take; None: bounded_json.MOST
    Raises FormatError where the file is not a bundle or lacks a tensor.
    """

    config: ModelConfig

    def __init__(self, path, calibrated=True, memory=None):
        self.path, self.calibrated = Path(path), calibrated
        if self.path.is_dir():
            raise FormatError(
                f"{path}: is a directory; make a bundle of it: flashinfer convert {path} DST.flash"
            )
        self.memory = bounded_json.MOST if memory is None else min(memory, bounded_json.MOST)
        self.file = SafetensorsFile(self.path, self.memory)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self):
        version = self.file.metadata.get("flashinfer.version")
        if version is None:
            raise FormatError(
                f"{self.path}: a safetensors file, but no flashinfer bundle; flashinfer convert "
                "makes one from a checkpoint's directory"
            )
        if version != VERSION:
            raise FormatError(f"{self.path}: bundle version {shown(version)}, known is {VERSION}")
        self.hf_config = self._json("flashinfer.config", finite=False)
        self.source = self._json("flashinfer.source")
        self.formats = self._json("flashinfer.formats")
        try:
            self.config = model_config(self.hf_config)
            ranks = self._ranks() if self.calibrated else []
            if self.config.experts and ranks:
                self.config = replace(self.config, neurons_apart=True)
            self.calibration = self._calibration() if self.calibrated else None
            self.specs = layout(self.config) + predictor_layout(self.config, ranks)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None
        self.tensors = {spec.name: self._tensor(spec) for spec in self.specs}

    def _json(self, key, finite=True):
        """An object that the metadata holds as text; all of them together take ``memory``."""
        text, what = self.file.metadata.get(key) or "null", f"{self.path}: metadata {key}"
        value = bounded_json.parse(text, what, self.memory, finite=finite)
        self.memory -= bounded_json.parsed_bytes(text.encode("utf-8", "surrogatepass"))
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise FormatError(f"{what} is not a JSON object")
        return value

    def _calibration(self):
        found = self._json("flashinfer.calibration")
        experts = self.config.experts if self.config.reads_experts else 0
        return checked_calibration(found, self.config.num_hidden_layers, experts)

    def _ranks(self):
        """The rank of each layer's predictor, from the tensors; none where there are none."""
        ranks = []
        for layer in range(self.config.num_hidden_layers):
            info = self.file.tensors.get(f"layers.{layer}.predictor.a")
            if info is not None and len(info.shape) == 2:
                ranks.append(info.shape[0])
        if 0 in ranks:
            raise FormatError(f"{self.path}: a predictor of rank 0; calibrate it again")
        if len(ranks) not in (0, self.config.num_hidden_layers):
            raise FormatError(f"{self.path}: predictors for some layers only; calibrate it again")
        return ranks

    def _tensor(self, spec):
        info = self.file.tensors.get(spec.name)
        if info is None:
            raise FormatError(f"{self.path}: tensor {spec.name} is missing")
        format = self._format(spec, info)
        expected = spec.shape
        if format.block > 1:
            expected = (*spec.shape[:-1], format.row_bytes(spec.shape[-1]))
        if info.shape != expected:
            raise FormatError(
                f"{self.path}: tensor {spec.name} is {info.shape}, the config says {expected}"
            )
        if info.offset % PAGE:
            raise FormatError(f"{self.path}: tensor {spec.name} is not on a {PAGE}-byte boundary")
        rows = spec.shape[0] if len(spec.shape) == 2 else 1
        return StoredTensor(spec.name, info.offset, rows, spec.shape[-1], format)

    def _format(self, spec, info):
        """The NumberFormat of a tensor: by its dtype, or by name where safetensors has none."""
        name = self.formats.get(spec.name)
        named = FORMATS.get(name) if isinstance(name, str) else None
        format = named or BY_SAFETENSORS.get(info.dtype)
        if (
            format is None
            or format.safetensors != info.dtype
            or (spec.exact and info.dtype != "F32")
        ):
            raise FormatError(f"{self.path}: tensor {spec.name} cannot be {info.dtype}")
        return format

    @property
    def predictor_form(self):
        """What stands between a predictor's two maps, and what it reads."""
        return (self.calibration or {}).get("predictor", PREDICTOR_FORMS[0])

    def cut(self, layer):
        """(method, threshold) below which a layer's neurons count as silent, or None: see
        ``calibrate``'s ``target_sparsity``."""
        sparsity = self.calibration and self.calibration.get("sparsity")
        return sparsity and (sparsity["method"], self.calibration["layers"][layer]["threshold"])

    def uses(self, layer):
        """The share of the text's tokens that used each expert of a layer when calibrated, or
        None."""
        return self.calibration and self.calibration["layers"][layer].get("uses")

    @property
    def has_predictors(self):
        return "layers.0.predictor.a" in self.tensors

    @property
    def unit_bytes(self):
        """Bytes of what is read and kept as one: a neuron's bundle, or an expert's."""
        return self.tensors["layers.0.ffn.bundles"].row_bytes * self.config.unit_neurons

    @property
    def ffn_format(self):
        return self.tensors["layers.0.ffn.bundles"].format

    def tokenizer_json(self):
        """The tokenizer's own file as text, or None where the bundle has none."""
        return self._text(TOKENIZER)

    def chat_template(self):
        """The jinja template of a conversation, or None where the bundle has none."""
        return self._text(TEMPLATE)

    @property
    def special_tokens(self):
        """{role: token} of the special tokens that the tokenizer names, as templates want them."""
        named = self.hf_config.get("special_tokens_map")
        named = named if isinstance(named, dict) else {}
        return {role: token for role, token in named.items() if isinstance(token, str)}

    def where(self, name):
        """(offset, bytes) in the file of its tokenizer.json or chat template, or None."""
        info = self.file.tensors.get(name)
        return info and (info.offset, info.nbytes)

    def _text(self, name):
        info = self.file.tensors.get(name)
        if info is None:
            return None
        if info.nbytes > MOST_TEXT:
            raise FormatError(
                f"{self.path}: its {name} has {info.nbytes:,} bytes, more than the {MOST_TEXT:,} "
                "it may have"
            )
        try:
            return bytes(self.file.read_bytes(info.offset, info.nbytes)).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.path}: its {name} is damaged") from None

    def read(self, name):
        """A whole tensor as float32, in its own shape. For small ones."""
        tensor = self.tensors[name]
        raw = self.file.read_bytes(tensor.offset, tensor.nbytes)
        values = tensor.format.decode(raw.reshape(tensor.rows, -1))
        return values if tensor.rows > 1 else values.reshape(-1)

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def checked_calibration(calibration, n_layers, n_experts=0):
    """What calibration wrote into a bundle, or None where it is empty. Raises FormatError."""
    if not calibration:
        return None
    layers = calibration.get("layers")
    if not isinstance(layers, list) or len(layers) != n_layers:
        raise FormatError("its calibration is not that of this model; calibrate it again")
    sound = all(isinstance(layer, dict) and _sound_layer(layer, n_experts) for layer in layers)
    form = calibration.get("predictor", PREDICTOR_FORMS[0])
    if form not in PREDICTOR_FORMS:
        raise FormatError("its predictors are of a form that is not known; calibrate it again")
    sparsity = calibration.get("sparsity")
    if sparsity is not None:
        sound = sound and isinstance(sparsity, dict) and sparsity.get("method") in METHODS
        sound = sound and is_number(sparsity.get("target"), 0, 1)
        limits = -LARGEST_FLOAT32, LARGEST_FLOAT32
        sound = sound and all(is_number(layer.get("threshold"), *limits) for layer in layers)
    if not sound:
        raise FormatError("its calibration is damaged; calibrate it again")
    return calibration


def _sound_layer(layer, n_experts):
    """Whether a layer's record holds the numbers that it should."""
    numbers = [layer.get(key) for key in CALIBRATED]
    numbers += [layer[key] for key in CALIBRATED_MAYBE if key in layer]
    for key, length in CALIBRATED_LISTS.items():
        values = layer.get(key)
        numbers += values if isinstance(values, list) and len(values) == length else [None]
    uses = layer.get("uses", [])
    sound = isinstance(uses, list) and len(uses) == n_experts
    sound = sound and all(is_number(share, 0, 1) for share in uses)
    return sound and all(is_number(n, 0, (1 << 31) - 1) for n in numbers)


def verify(path, progress=lambda nbytes: None):
    """Check every byte of a bundle against its checksums; return the bytes checked.

    Raises FormatError naming the first tensor that differs. Memory: one chunk.
    """
    with Bundle(path) as bundle:
        file = bundle.file
        header = bytes(file.read_bytes(8, file.header_bytes))
        stored = file.metadata.get("flashinfer.header_crc32", "")
        if not re.fullmatch("[0-9a-f]{8}", stored):
            raise FormatError(f"{path}: the header has no checksum")
        blank = header.replace((HEADER_CRC % stored).encode(), (HEADER_CRC % NO_CRC).encode(), 1)
        if f"{zlib.crc32(blank):08x}" != stored:
            raise FormatError(f"{path}: the header does not match its checksum")
        checksums = bundle._json("flashinfer.checksums")
        for info in sorted(file.tensors.values(), key=lambda info: info.offset):
            crc = 0
            for start in range(0, info.nbytes, CHUNK_BYTES):
                chunk = file.read_bytes(info.offset + start, min(CHUNK_BYTES, info.nbytes - start))
                crc = zlib.crc32(chunk, crc)
                progress(len(chunk))
            if checksums.get(info.name) != f"{crc:08x}":
                raise FormatError(f"{path}: tensor {info.name} does not match its checksum")
        return file.size
