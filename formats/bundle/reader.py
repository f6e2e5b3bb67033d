"""The flat bundle (``.flash``): one model in one file that is also a valid safetensors file.

Beyond what safetensors requires, the data and every tensor begin on a 4096-byte boundary
(``_pad.N`` tensors of zeros fill the gaps); a layer's FFN is one tensor with one row per neuron;
``__metadata__`` holds the version, the model's config, a CRC-32 of every tensor and of the header,
where the model came from, and what calibration found. ``layout.py`` lists the tensors,
``writer.py`` makes such a file.
"""

import hashlib
import io
import zlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import bounded_json
from ..architectures import model_config
from ..arrays import Float32Array, Int32Array, UInt8Array
from ..bounded_json import JsonObject
from ..config import ModelConfig
from ..errors import FormatError, UserError, shown
from ..files import MOST_TEXT, read_at
from ..number_formats import BY_SAFETENSORS, FORMATS, Matrices, NumberFormat, number_format
from ..progress import Progress, no_progress
from ..safetensors import CHECKSUMS, SafetensorsFile, TensorInfo
from ..tensors import TensorSpec
from .calibration import (
    TRAINED,
    Calibration,
    Cut,
    LayerCalibration,
    PredictorForm,
    calibration_from_json,
)
from .in_place import FILE_BYTES, InPlace, Run, in_place_from_json, opened_sources
from .in_place import KEY as IN_PLACE
from .layout import TEMPLATE, TOKENIZER, bundles_name, layout, places_name, predictor_layout
from .stored import PAGE, Span, StoredTensor

VERSION = "1"


class Bundle:
    """An open bundle.

    calibrated  False: opened as if it had never been calibrated
    memory      bytes that parsing its header may take; None: bounded_json.MOST
    Raises FormatError where the file is not a bundle or lacks a tensor.
    """

    config: ModelConfig
    hf_config: JsonObject  # the model's config as Hugging Face wrote it
    source: JsonObject  # where the model came from
    formats: JsonObject  # {tensor: the name of its number format where safetensors has none}
    in_place: InPlace  # what lies in other files, of a companion
    sources: list[io.FileIO]  # these files
    calibration: Calibration | None  # what ``calibrate`` found
    specs: list[TensorSpec]  # in the order of ``layout``; where they lie is found by their names
    tensors: dict[str, StoredTensor]

    def __init__(
        self, path: Path | str, calibrated: bool = True, memory: int | None = None
    ) -> None:
        self.path, self.calibrated = Path(path), calibrated
        if self.path.is_dir():
            raise FormatError(
                f"{path}: is a directory; make a bundle of it: flashinfer convert {path} DST.flash"
            )
        self.memory = bounded_json.MOST if memory is None else min(memory, bounded_json.MOST)
        self.file, self.sources = SafetensorsFile(self.path, self.memory), []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        version = self.file.metadata.get("flashinfer.version")
        if version is None:
            raise FormatError(
                f"{self.path}: a safetensors file, but no flashinfer bundle; flashinfer convert "
                "makes one from a checkpoint's directory"
            )
        if version != VERSION:
            raise FormatError(
                f"{self.path}: has bundle version {shown(version)}; this program reads {VERSION}"
            )
        self.hf_config = self._json("flashinfer.config", finite=False)
        self.source = self._json("flashinfer.source")
        self.formats = self._json("flashinfer.formats")
        try:
            self.in_place = in_place_from_json(self._json(IN_PLACE))
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None
        self.formats |= {name: placed.format for name, placed in self.in_place.tensors.items()}
        self.sources = opened_sources(self.path, self.in_place)
        try:
            self.config = self._with_matrices(model_config(self.hf_config))
            ranks = self._ranks() if self.calibrated else []
            if ranks and self.config.mixture:
                self.config = self.config.with_neurons_apart()
            self.calibration = self._calibration() if self.calibrated else None
            self.specs = layout(self.config) + predictor_layout(self.config, ranks)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from None
        self.tensors = {spec.name: self._tensor(spec) for spec in self.specs}
        if any(
            places_name(number) in self.file.tensors for number in range(len(self.config.layers))
        ):
            for number in self.config.with_neurons:
                bundles = self.bundles(number)
                self.tensors[bundles.name] = replace(bundles, places=self._places(number))

    def _with_matrices(self, config: ModelConfig) -> ModelConfig:
        """The config, of which some layers' units may be matrices: those with several formats."""
        formats = [self.formats.get(bundles_name(i)) for i in range(len(config.layers))]
        return config.with_matrices(
            [i for i, name in enumerate(formats) if isinstance(name, str) and "," in name]
        )

    def _places(self, number: int) -> Int32Array:
        """Where each neuron of a layer lies, of a bundle with a layout of its own."""
        ffn, name = self.config.layers[number].ffn, places_name(number)
        info, where = self.file.tensors.get(name), f"{self.path}: tensor {name}"
        if info is None:
            raise FormatError(f"{where} is missing, and other layers have one")
        if ffn.router:
            raise FormatError(f"{where} cannot be: the experts of a mixture lie in their order")
        if info.dtype != "I32" or info.shape != (ffn.neurons,):
            raise FormatError(
                f"{where} is {info.dtype} {info.shape}, the config says I32 {(ffn.neurons,)}"
            )
        if 2 * info.nbytes > self.memory:
            raise FormatError(f"{where} has {info.nbytes:,} bytes, too much for the memory")
        self.memory -= info.nbytes
        places: Int32Array = self.file.read_bytes(info.offset, info.nbytes).view("<i4")
        there = np.zeros(ffn.neurons, dtype=bool)
        there[places[(places >= 0) & (places < ffn.neurons)]] = True
        if not there.all():
            raise FormatError(f"{where} is not a permutation: no neuron lies at {there.argmin()}")
        return places

    def _json(self, key: str, finite: bool = True) -> JsonObject:
        """A JSON object from the metadata; all of them together may take ``memory`` bytes."""
        text, what = self.file.metadata.get(key) or "null", f"{self.path}: metadata {key}"
        value = bounded_json.parse(text, what, self.memory, finite=finite)
        self.memory -= bounded_json.parsed_bytes(text.encode("utf-8", "surrogatepass"))
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise FormatError(f"{what} is not a JSON object")
        return value

    def _calibration(self) -> Calibration | None:
        found = self._json("flashinfer.calibration")
        ffns = [layer.ffn for layer in self.config.layers]
        experts: list[int | None] = [0 if ffn.neurons else None for ffn in ffns]
        if self.config.reads_experts:  # of layers without experts nothing is recorded
            experts = [ffn.experts if ffn.reads_experts else None for ffn in ffns]
        return calibration_from_json(found, experts)

    def _ranks(self) -> list[int]:
        """The rank of each layer's predictor, 0 of a layer without neurons; empty where the bundle
        has no predictors."""
        ranks: dict[int, int] = {}
        for layer in self.config.with_neurons:
            info = self.file.tensors.get(f"layers.{layer}.predictor.a")
            if info is not None and len(info.shape) == 2:
                ranks[layer] = info.shape[0]
        if 0 in ranks.values():
            raise FormatError(f"{self.path}: a predictor of rank 0; calibrate it again")
        if len(ranks) not in (0, len(self.config.with_neurons)):
            raise FormatError(f"{self.path}: predictors for some layers only; calibrate it again")
        return [ranks.get(layer, 0) for layer in range(len(self.config.layers))] if ranks else []

    def _tensor(self, spec: TensorSpec) -> StoredTensor:
        info = self.file.tensors.get(spec.name)
        if info is None and spec.name in self.in_place.tensors:
            return self._placed(spec, self.in_place.tensors[spec.name].runs)
        if info is None:
            raise FormatError(f"{self.path}: tensor {spec.name} is missing")
        format = self._format(spec, info)
        expected = spec.shape
        if format.safetensors == "U8":
            expected = (*spec.shape[:-1], format.row_bytes(spec.shape[-1]))
        if info.shape != expected:
            raise FormatError(
                f"{self.path}: tensor {spec.name} is {info.shape}, the config says {expected}"
            )
        if info.offset % PAGE:
            raise FormatError(f"{self.path}: tensor {spec.name} is not on a {PAGE}-byte boundary")
        rows = spec.shape[0] if len(spec.shape) == 2 else 1
        return StoredTensor(spec.name, info.offset, rows, spec.shape[-1], format)

    def _placed(self, spec: TensorSpec, runs: tuple[Run, ...]) -> StoredTensor:
        """A tensor that lies in another file."""
        format, where = self._named_format(spec, apart=True), f"{self.path}: tensor {spec.name}"
        exact = spec.exact and format is not FORMATS["f32"]
        if format is None or exact or len(spec.shape) != 2:
            raise FormatError(f"{where} cannot lie in another file")
        rows, columns = spec.shape
        if columns % format.block:
            raise FormatError(f"{where}: {columns} values are no whole blocks of {format.name}")
        parts: list[tuple[int, int]] = [(1, rows * format.row_bytes(columns))]
        if isinstance(format, Matrices):
            parts = [(rows, part.nbytes) for part in format.parts.values()]
        if len(parts) != len(runs):
            raise FormatError(f"{where} has {len(parts)} matrices, and lies in {len(runs)} places")
        try:
            for run, part in zip(runs, parts, strict=True):
                self.in_place.refuse_beyond(run, *part)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from None
        apart = runs if isinstance(format, Matrices) else None
        return StoredTensor(spec.name, runs[0].address, rows, columns, format, runs=apart)

    def _named_format(self, spec: TensorSpec, apart: bool = False) -> NumberFormat | None:
        """A tensor's NumberFormat, where it is there by name; apart: its matrices do not lie side
        by side."""
        name = self.formats.get(spec.name)
        if isinstance(name, str) and spec.layer is not None and "," in name:
            return self._matrices(spec.layer, name, apart)
        return FORMATS.get(name) if isinstance(name, str) else None

    def _format(self, spec: TensorSpec, info: TensorInfo) -> NumberFormat:
        """A tensor's NumberFormat: by its dtype, or by name where safetensors has none."""
        format = self._named_format(spec) or BY_SAFETENSORS.get(info.dtype)
        if (
            format is None
            or format.safetensors != info.dtype
            or (spec.exact and info.dtype != "F32")
        ):
            raise FormatError(f"{self.path}: tensor {spec.name} cannot be {info.dtype}")
        return format

    def _matrices(self, layer: int, names: str, apart: bool) -> Matrices:
        """The Matrices of a layer's units, of number formats of these names."""
        shapes, found = self.config.layers[layer].ffn.matrix_shapes(), names.split(",")
        if len(found) != len(shapes):
            raise FormatError(
                f"{self.path}: layer {layer} has the number formats {shown(names)}, and "
                f"{len(shapes)} matrices"
            )
        try:
            return Matrices(shapes, [number_format(name) for name in found], apart)
        except UserError as error:
            raise FormatError(f"{self.path}: layer {layer}: {error}") from None

    @cached_property
    def digest(self) -> str:
        """What tells this model from every other: the SHA-256 of the header, which has a checksum
        of each tensor, the config, and what calibration found."""
        return self._sha256(8, self.file.header_bytes)

    @property
    def predictor_form(self) -> PredictorForm:
        """The form of this bundle's predictors."""
        return TRAINED if self.calibration is None else self.calibration.predictor

    def record(self, layer: int) -> LayerCalibration | None:
        """What calibration found of a layer, or None."""
        return None if self.calibration is None else self.calibration.layers[layer]

    def cut(self, layer: int) -> Cut | None:
        """The Cut of a layer; None where calibration was not given a target sparsity."""
        record = self.record(layer)
        return None if record is None else record.cut

    def uses(self, layer: int) -> tuple[float, ...] | None:
        """The share of the calibration text's tokens that used each expert of a layer, or None."""
        record = self.record(layer)
        return None if record is None else record.uses

    @property
    def has_predictors(self) -> bool:
        return f"layers.{self.config.with_neurons[0]}.predictor.a" in self.tensors

    def bundles(self, layer: int) -> StoredTensor:
        """A layer's FFN: a row is a neuron's bundle, or where they are ``matrices`` a unit's; no
        row where there is no FFN."""
        ffn, name = self.config.layers[layer].ffn, bundles_name(layer)
        if not ffn.neurons:
            return StoredTensor(name, 0, 0, ffn.parts * ffn.hidden_size, FORMATS["f16"])
        return self.tensors[name]

    @property
    def has_layout(self) -> bool:
        """Whether neurons lie in another order than that of their numbers."""
        return self.bundles(self.config.with_neurons[0]).places is not None

    def unit_bytes(self, layer: int) -> int:
        """Bytes of a layer's unit: of a neuron's bundle, or of all that an expert has."""
        ffn, bundles = self.config.layers[layer].ffn, self.bundles(layer)
        return bundles.row_bytes * (1 if ffn.matrices else ffn.unit_neurons)

    @property
    def ffn_formats(self) -> str:
        """The names of the number formats of the layers' FFNs, nearly always one."""
        layers = self.config.with_neurons
        return ", ".join(dict.fromkeys(self.bundles(layer).format.name for layer in layers))

    def tokenizer_json(self) -> str | None:
        """The text of the tokenizer's file, or None where the bundle has no tokenizer."""
        return self._text(TOKENIZER)

    def chat_template(self) -> str | None:
        """The jinja template of a conversation, or None where the bundle has none."""
        return self._text(TEMPLATE)

    @property
    def special_tokens(self) -> dict[str, str]:
        """{role: token} of the special tokens that the tokenizer names, as templates want them."""
        named = self.hf_config.get("special_tokens_map")
        named = named if isinstance(named, dict) else {}
        return {role: token for role, token in named.items() if isinstance(token, str)}

    @cached_property
    def vocabulary(self) -> str:
        """What its token ids mean: the SHA-256 of the tokenizer's file or, where it has none, how
        many ids there are."""
        place = self.where(TOKENIZER)
        if place is None:
            return f"{self.config.vocab_size} ids"
        return self._sha256(place.offset, place.nbytes)

    def _sha256(self, offset: int, nbytes: int) -> str:
        """The SHA-256 of these bytes of the file."""
        found = hashlib.sha256()
        for chunk in self.file.chunks(offset, nbytes):
            found.update(chunk.data)
        return found.hexdigest()

    def where(self, name: str) -> Span | None:
        """The Span of the tokenizer's file or of the chat template, or None where it is missing."""
        info = self.file.tensors.get(name)
        return Span(info.offset, info.nbytes) if info else None

    def _text(self, name: str) -> str | None:
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

    def read(self, name: str) -> Float32Array:
        """A whole tensor, (rows, columns) or (columns,) float32. Meant for small tensors."""
        tensor = self.tensors[name]
        raw = self.raw(tensor)
        values = tensor.format.decode(raw if tensor.places is None else raw[tensor.places])
        return values if tensor.rows > 1 else values.reshape(-1)

    def raw(self, tensor: StoredTensor) -> UInt8Array:
        """The bytes of a tensor, (rows, row_bytes), by their places in the file."""
        if tensor.runs is None:
            return self._bytes_at(tensor.offset, tensor.nbytes).reshape(tensor.rows, -1)
        assert isinstance(tensor.format, Matrices)
        raw = np.empty((tensor.rows, tensor.row_bytes), dtype=np.uint8)
        for part, run in zip(tensor.format.parts.values(), tensor.runs, strict=True):
            for unit in range(tensor.rows):
                at = run.address + unit * run.stride
                raw[unit, part.at : part.at + part.nbytes] = self._bytes_at(at, part.nbytes)
        return raw

    def _bytes_at(self, address: int, nbytes: int) -> UInt8Array:
        """Bytes of this file, or of one that it has weights in."""
        number, offset = divmod(address, FILE_BYTES)
        if number == 0:
            return self.file.read_bytes(offset, nbytes)
        source = self.in_place.files[number - 1]
        return read_at(self.sources[number - 1], offset, nbytes, self.path.with_name(source.name))

    @property
    def source_files(self) -> dict[Path, int]:
        """{path: bytes} of the files that a companion has weights in; {} of another bundle."""
        return {self.path.with_name(file.name): file.size for file in self.in_place.files}

    @property
    def nbytes(self) -> int:
        """Bytes of the file, and of what it has in others."""
        held = self.tensors.values()
        return self.file.size + sum(t.nbytes for t in held if t.offset >= FILE_BYTES)

    def close(self) -> None:
        self.file.close()
        for file in self.sources:
            file.close()

    def __enter__(self) -> "Bundle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def verify(path: Path | str, progress: Progress = no_progress) -> int:
    """Check every byte of a bundle against its checksums; return the file's size in bytes.

    progress  is told the bytes checked, as "verify"
    Raises FormatError naming the first tensor that differs. Memory: one chunk.
    """
    with Bundle(path) as bundle:
        file = bundle.file
        file.check_header()
        checksums = bundle._json(CHECKSUMS)
        for info in sorted(file.tensors.values(), key=lambda info: info.offset):
            crc, end = 0, info.offset
            for chunk in file.chunks(info.offset, info.nbytes):
                crc, end = zlib.crc32(chunk.data, crc), end + len(chunk)
                progress("verify", end, file.size)
            if checksums.get(info.name) != f"{crc:08x}":
                raise FormatError(f"{path}: tensor {info.name} does not match its checksum")
        return file.size
