"""A session: a text with its keys and values in a file, so that it goes on without computing them.

One safetensors file. ``token_ids`` (n,) I32 is the text, and ``messages`` U8 a conversation as
JSON. Of the first ``kept`` tokens each layer has its ``layers.N.keys`` and ``layers.N.values``
(key/value heads, tokens, row), in the number format of the key/value cache, from the first token
that the layer still holds. ``__metadata__`` says what they depend on (``Setting``), and has a
CRC-32 of every tensor and of the header.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats import bounded_json
from flashinfer.formats.arrays import UInt8Array
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.writer import NewTensor, byte_tensor, write_tensors
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import FormatError, UserError, shown
from flashinfer.formats.files import read_into
from flashinfer.formats.numbers import is_whole
from flashinfer.formats.safetensors import CHECKSUMS, ITEM_BYTES, SafetensorsFile, TensorInfo
from flashinfer.transformer.positions import same_turns
from flashinfer.transformer.text_memory import TextMemory

MARK, STATE = KEYS = "flashinfer.session", "flashinfer.state"  # of the metadata
VERSION = "1"  # another one, too, once the keys and values of a text have other bits
MOST_HEADER = 8 << 20  # bytes that parsing the header may take; 100 layers take some 200 KB
MOST_MESSAGES = 16 << 20  # bytes that parsing the messages may take
Message = dict[str, str]  # "role" and "content"


@dataclass(frozen=True)
class Setting:
    """What keys and values depend on besides the tokens.

    model     ``Bundle.digest``, which covers what calibration found; name: the file's
    mode      "predicted", "dense" or "routed"
    kv_dtype  the number format of keys and values
    kernels   "native" or "numpy": the last bits of the two differ
    context   of the key/value cache, on which some rotary positions depend
    """

    model: str
    name: str
    mode: str
    kv_dtype: str
    kernels: str
    context: int


@dataclass(frozen=True)
class Session:
    """What a session's file holds beside keys and values.

    token_ids  of the text; kept: how many of them, the first ones, have keys and values there
    messages   of a conversation, each with a "role" and its "content"; or none
    """

    token_ids: list[int]
    kept: int
    messages: list[Message]


def peek(path: Path | str, bundle: Bundle) -> Session:
    """What a session of this model holds beside keys and values. Raises FormatError."""
    with SessionFile(path) as file:
        file.check_model(bundle)
        return file.session(bundle.config)


def save(
    path: Path | str, setting: Setting, caches: Sequence[TextMemory], session: Session
) -> None:
    """Write a session to ``path``, which is replaced when all of it is on the disk.

    caches  of each layer, which hold the first ``session.kept`` tokens
    Memory: that of the header. Raises UserError where the file cannot be written; what stood there
    before stays.
    """
    messages = json.dumps(session.messages).encode()
    if bounded_json.parsed_bytes(messages) > MOST_MESSAGES:
        raise UserError(f"{path}: messages of {len(messages):,} bytes could not be read again")
    ids = np.array(session.token_ids, dtype="<i4")
    tensors = [
        NewTensor("token_ids", "I32", ids.shape, ids.nbytes, lambda: [ids.tobytes()]),
        byte_tensor("messages", messages),
    ]
    firsts = [cache.first if session.kept else 0 for cache in caches]
    for number, (cache, first) in enumerate(zip(caches, firsts, strict=True)):
        for name in cache.names:
            full = f"layers.{number}.{name}"
            tensors.append(_tensor(full, cache, name, session.kept - first, session.kept))
    state = {"setting": asdict(setting), "kept": session.kept, "first": firsts}
    metadata = {"format": "flashinfer", MARK: VERSION, STATE: json.dumps(state)}
    write_tensors(path, tensors, metadata)


def _tensor(full: str, memory: TextMemory, name: str, tokens: int, end: int) -> NewTensor:
    """An array of the first ``tokens`` tokens that a layer's memory holds, which are those before
    ``end`` of the text."""

    def chunks() -> Iterator[UInt8Array]:
        memory.bring(end)
        return (part for part in memory.rows(name, tokens) if part.size)

    shape = memory.shape(name, tokens)
    nbytes = math.prod(shape) * ITEM_BYTES[memory.format]
    return NewTensor(full, memory.format, shape, nbytes, chunks)


class SessionFile:
    """An open session's file, of which nothing is trusted.

    setting  what its keys and values depend on
    Raises FormatError, naming the file, where it is no session, cut or changed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.file = SafetensorsFile(self.path, MOST_HEADER)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        version = self.file.metadata.get(MARK)
        if version is None:
            raise FormatError(f"{self.path}: a safetensors file, but no session; name another file")
        self.file.check_header()
        if version != VERSION:
            raise FormatError(
                f"{self.path}: has session version {shown(version)}; this program reads {VERSION}"
            )
        self.checksums = self._json(CHECKSUMS)
        state = self._json(STATE)
        kept, firsts = state.get("kept"), state.get("first")
        if not is_whole(kept, 0) or not isinstance(firsts, list):
            raise self._unsound()
        if not all(is_whole(first, 0, kept) for first in firsts):
            raise self._unsound()
        self.kept: int = kept
        self.firsts: list[int] = firsts  # of each layer the first token that it holds
        self.setting = self._setting(state.get("setting"))

    def _json(self, key: str) -> dict[str, Any]:
        text, what = self.file.metadata.get(key) or "null", f"{self.path}: metadata {key}"
        value = bounded_json.parse(text, what, MOST_HEADER, finite=True)
        if not isinstance(value, dict):
            raise FormatError(f"{what} is not a JSON object")
        return value

    def _setting(self, value: Any) -> Setting:
        names = {field.name for field in fields(Setting)}
        if not isinstance(value, dict) or value.keys() != names:
            raise self._unsound()
        words = [value[name] for name in names - {"context"}]
        if not all(isinstance(word, str) for word in words) or not is_whole(value["context"], 1):
            raise self._unsound()
        return Setting(**value)

    def _unsound(self) -> FormatError:
        return FormatError(f"{self.path}: does not say soundly what it holds")

    def check_model(self, bundle: Bundle) -> None:
        """Raise FormatError where this is a session of another model."""
        if self.setting.model != bundle.digest:
            raise FormatError(
                f"{self.path}: a session of another model, {self.setting.name} "
                f"({self.setting.model[:12]}), not of {bundle.path} ({bundle.digest[:12]})"
            )

    def check(self, own: Setting, config: ModelConfig) -> None:
        """Raise UserError where keys and values computed in the setting ``own`` would have other
        bits, or do not fit its context, saying what would be right."""
        there, path = self.setting, self.path
        if there.mode != own.mode:
            # A mixture that has predictors is run by whole experts where "dense" is asked for.
            flag = "dense" if there.mode == "routed" else there.mode
            raise UserError(
                f"{path}: a session of the mode {there.mode}, which is {own.mode} here; "
                f"--neurons {flag} goes on with it"
            )
        if there.kv_dtype != own.kv_dtype:
            raise UserError(
                f"{path}: its keys and values are {there.kv_dtype}, which are {own.kv_dtype} here; "
                f"--kv-dtype {there.kv_dtype} goes on with it"
            )
        if there.kernels != own.kernels:
            raise UserError(
                f"{path}: computed by {there.kernels} kernels, which are {own.kernels} here; "
                f"FLASHINFER_KERNELS={there.kernels} in the environment goes on with it"
            )
        most = config.max_position_embeddings
        rotaries = (layer.mixer.rotary for layer in config.layers)
        if there.context > most or self.kept > there.context:
            raise self._unsound()
        if not all(same_turns(r, there.context, own.context) for r in rotaries if r is not None):
            raise UserError(
                f"{path}: a session of a context of {there.context} tokens, on which this model's "
                f"positions depend; -c {there.context} goes on with it"
            )
        if self.kept > own.context:
            raise UserError(
                f"{path}: its {self.kept} tokens do not fit the context of {own.context}; "
                f"-c {min(self.kept + 1, most)} or more goes on with it"
            )

    def session(self, config: ModelConfig) -> Session:
        """The Session, of which no token is beyond the vocabulary."""
        most = config.max_position_embeddings
        info = self._info("token_ids", "I32", 1)
        if not self.kept <= info.shape[0] <= most + 1:  # the last token need not have been used
            raise FormatError(f"{self.path}: {info.shape[0]} tokens are no text of this model")
        ids = self._read(info).view("<i4")
        strange = ids[(ids < 0) | (ids >= config.vocab_size)]
        if strange.size:
            raise FormatError(
                f"{self.path}: token id {strange[0]} is not within 0 to {config.vocab_size - 1}"
            )
        return Session(ids.tolist(), self.kept, self._messages())

    def _messages(self) -> list[Message]:
        info, what = self._info("messages", "U8", 1), f"{self.path}: its messages"
        if info.nbytes > MOST_MESSAGES // 2:
            raise FormatError(f"{what} have {info.nbytes:,} bytes, more than may be read")
        messages = bounded_json.parse(self._read(info).tobytes(), what, MOST_MESSAGES)
        if not isinstance(messages, list) or not all(_is_message(one) for one in messages):
            raise FormatError(f"{what} are no conversation")
        return messages

    def check_layers(self, caches: Sequence[TextMemory]) -> None:
        """Raise FormatError where keys and values do not fit the key/value caches of a model."""
        names = {"token_ids", "messages"}
        if len(self.firsts) != len(caches):
            raise self._unsound()
        for number, (cache, first) in enumerate(zip(caches, self.firsts, strict=True)):
            tokens = self.kept - first
            if not cache.can_hold(first, self.kept):
                raise FormatError(f"{self.path}: layer {number} cannot hold {tokens} tokens")
            for name in cache.names:
                full, shape = f"layers.{number}.{name}", cache.shape(name, tokens)
                info = self._info(full, cache.format, len(shape))
                if info.shape != shape:
                    raise FormatError(f"{self.path}: {full} is {info.shape}, not {shape}")
                names.add(full)
        if unknown := self.file.tensors.keys() - names:
            raise FormatError(f"{self.path}: has an unknown tensor {shown(min(unknown))}")

    def fill(self, caches: Sequence[TextMemory]) -> None:
        """Read keys and values into the key/value caches, which ``check_layers`` has compared with
        the file. Memory: none but theirs. Raises FormatError where a checksum differs: the caches
        hold nothing to be trusted then."""
        for number, (cache, first) in enumerate(zip(caches, self.firsts, strict=True)):
            cache.bring(0)
            for name in cache.names:
                info = self.file.tensors[f"layers.{number}.{name}"]
                self._read_to(info, cache.rows(name, self.kept - first))
            cache.keep(0, self.kept)
            cache.first = first

    def _info(self, name: str, dtype: str, dimensions: int) -> TensorInfo:
        info = self.file.tensors.get(name)
        if info is None or info.dtype != dtype or len(info.shape) != dimensions:
            raise FormatError(f"{self.path}: has no {name}, or of another kind")
        return info

    def _read(self, info: TensorInfo) -> UInt8Array:
        memory = np.empty(info.nbytes, dtype=np.uint8)
        self._read_to(info, [memory])
        return memory

    def _read_to(self, info: TensorInfo, parts: Iterable[UInt8Array]) -> None:
        """Read a tensor into parts of memory, one after the other, and check it."""
        offset, crc = info.offset, 0
        for part in parts:
            read_into(self.file.file, offset, part.data, self.path)
            crc, offset = zlib.crc32(part.data, crc), offset + part.nbytes
        if self.checksums.get(info.name) != f"{crc:08x}":
            raise FormatError(f"{self.path}: {info.name} does not match its checksum")

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "SessionFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        return False
    try:
        return all(isinstance(text, str) and text.encode() is not None for text in value.values())
    except UnicodeEncodeError:  # lone surrogates
        return False
