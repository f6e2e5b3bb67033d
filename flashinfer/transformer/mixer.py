"""What mixes the tokens of a text in a layer: what its kinds have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from flashinfer.formats.arrays import Float32Array, UInt8Array
from flashinfer.formats.layers.mixer import MixerConfig
from flashinfer.formats.layers.norm import NormConfig
from flashinfer.paper.interfaces import Stream, Tap
from flashinfer.transformer.kv_cache import KVDtype
from flashinfer.transformer.norm import Norm
from flashinfer.transformer.positions import Positions
from flashinfer.transformer.state import RecurrentState, StateSizes
from flashinfer.transformer.text import Rows
from flashinfer.transformer.text_memory import TextMemory
from flashinfer.transformer.weights import Linear, LinearOfHeads

Config = TypeVar("Config", bound=MixerConfig)
RecurrentConfig = TypeVar("RecurrentConfig", bound=MixerConfig)


@dataclass(frozen=True)
class MemoryWanted:
    """What a layer's memory of a text has room for.

    context  tokens of the text; dtype: of keys and values
    drafts   tokens that may be drafted behind the text
    """

    context: int
    dtype: KVDtype
    drafts: int = 0


@dataclass(frozen=True)
class Parts:
    """What a layer's mixer is made of.

    weights    {name: what loading.load_weights gives}; layer: how the layer's names begin
    positions  tables that all layers share
    """

    weights: Mapping[str, Any]
    layer: str
    positions: Positions

    def linear(self, name: str, rounded: bool = False) -> Linear:
        """A product with weights, and biases where there are any; rounded: see
        ``kernels.linear``."""
        weights, bias = self.weights[f"{self.layer}.{name}.weight"], self.vector(f"{name}.bias")
        return Linear(weights, bias, rounded)

    def linear_of_heads(self, name: str, rows: int) -> LinearOfHeads:
        """A product of each head with its own ``rows`` rows of weights."""
        return LinearOfHeads(self.weights[f"{self.layer}.{name}.weight"], rows=rows)

    def vector(self, name: str) -> Any:
        """A float32 array, or None where there is none."""
        return self.weights.get(f"{self.layer}.{name}")

    def table(self, name: str) -> Float32Array:
        """A small matrix of float32, which always is in DRAM: (rows, columns)."""
        matrix = self.weights[f"{self.layer}.{name}"].matrix
        return matrix.data.view(np.float32)

    def norm(self, config: NormConfig, name: str) -> Norm:
        """A norm."""
        return Norm(config, self.vector(f"{name}.weight"), self.vector(f"{name}.bias"))


class Mixer(ABC, Generic[Config]):
    """A layer's mixer of tokens, of one kind.

    What a budget or a plan needs to know of it, its class tells of its config alone.

    config  of the layer
    tap     is told intermediate values, see transformer/values.py; None: nobody
    """

    config: Config
    tap: Tap | None

    @classmethod
    @abstractmethod
    def made(cls, config: Config, parts: Parts) -> "Mixer[Config]":
        """The mixer of a layer."""

    @classmethod
    @abstractmethod
    def working_bytes(cls, config: Config) -> int:
        """Bytes that a token takes on its way through the mixer, beside its memory."""

    @classmethod
    @abstractmethod
    def memory_bytes(cls, config: Config, wanted: MemoryWanted) -> int:
        """Bytes in DRAM of a text's memory."""

    @classmethod
    @abstractmethod
    def seen_bytes(cls, config: Config, wanted: MemoryWanted) -> int:
        """Bytes of its text's memory that pass through the CPU for a token, in the middle of the
        context."""

    @classmethod
    @abstractmethod
    def new_memory(
        cls, config: Config, wanted: MemoryWanted, memory: UInt8Array, scratch: Float32Array
    ) -> TextMemory:
        """A text's memory in ``memory``, which has as many bytes as ``memory_bytes`` says.

        scratch  float32 for a state of any layer, which all share
        """

    @classmethod
    def state_numbers(cls, config: Config) -> int:
        """Numbers of its state, for which ``scratch`` has room; 0: it has none."""
        return 0

    @property
    @abstractmethod
    def linears(self) -> Sequence[Linear]:
        """Its products with weights, in the order in which they are made."""

    @abstractmethod
    def __call__(self, x: Float32Array, texts: Sequence[Rows]) -> Float32Array:
        """x (T, d_model), the next tokens of some texts, each of which sees its own ->
        (T, d_model)."""

    def streams(self) -> tuple[Stream, ...]:
        """Which of its matrices are streamed at every token, in this order."""
        return tuple(s for part in self.linears for s in part.streams())


class RecurrentMixer(Mixer[RecurrentConfig]):
    """A mixer whose memory of a text is a state."""

    @classmethod
    @abstractmethod
    def sizes(cls, config: RecurrentConfig) -> StateSizes:
        """The sizes of its state."""

    @classmethod
    def memory_bytes(cls, config: RecurrentConfig, wanted: MemoryWanted) -> int:
        """Bytes of a text's state."""
        return cls.sizes(config).nbytes(wanted.drafts)

    @classmethod
    def seen_bytes(cls, config: RecurrentConfig, wanted: MemoryWanted) -> int:
        """Bytes of the state, which is read and written for each token."""
        return 2 * cls.sizes(config).nbytes(0)

    @classmethod
    def new_memory(
        cls,
        config: RecurrentConfig,
        wanted: MemoryWanted,
        memory: UInt8Array,
        scratch: Float32Array,
    ) -> TextMemory:
        """A text's state."""
        return RecurrentState(cls.sizes(config), memory, scratch)

    @classmethod
    def state_numbers(cls, config: RecurrentConfig) -> int:
        """Numbers of its state, for which ``scratch`` has room."""
        return cls.sizes(config).numbers
