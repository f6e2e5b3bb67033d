"""The state of a recurrent layer: of one size, however long the text is.

A state cannot be taken back, as keys and values can. So the tokens of a pass that may be drafts
are not put into it: their inputs are kept, and those that belong to the text are put into
it before the next tokens are, which reads nothing from flash.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from flashinfer.formats.arrays import Float32Array, UInt8Array
from flashinfer.kernels import fixed_math
from flashinfer.transformer.text_memory import MOVING, TextMemory

# step(window, state): ``window`` (lead + n, width) float32 are the inputs of n tokens and of those
# before them; changes ``state`` and returns what the layer makes of the n tokens, (n, outputs).
Step = Callable[[Float32Array, Float32Array], Float32Array]


@dataclass(frozen=True)
class StateSizes:
    """Numbers, each a float32, of a layer's state.

    numbers  of the state; width: of a token's input; lead: tokens before the next whose inputs the
             layer needs, too (a convolution's kernel, less one)
    """

    numbers: int
    width: int
    lead: int

    def nbytes(self, drafts: int) -> int:
        """Bytes of a text's state, where so many tokens may be drafted."""
        room = drafts + 1 if drafts else 0
        return 4 * (self.numbers + (self.lead + room) * self.width)


class RecurrentState(TextMemory):
    """One layer's state of one text.

    state    (numbers,) float32, of the tokens before ``first``
    inputs   (lead + room, width) float32: of the last tokens before ``first``, and of ``waiting``
             tokens after it
    scratch  (numbers,) float32, which all layers' states share, for tokens that wait
    """

    names = ("state", "inputs")
    format = "F32"

    def __init__(self, sizes: StateSizes, memory: UInt8Array, scratch: Float32Array) -> None:
        """``memory`` is as large as ``sizes.nbytes`` says."""
        numbers = memory.view(np.float32)
        self.sizes, self.scratch = sizes, scratch
        self.state = numbers[: sizes.numbers]
        self.inputs = numbers[sizes.numbers :].reshape(-1, sizes.width)
        self.room = len(self.inputs) - sizes.lead
        self.first = self.waiting = 0

    def holds(self, position: int) -> bool:
        """Whether a token at ``position`` finds the state that it needs."""
        return position == 0 or self.first <= position <= self.first + self.waiting

    def settled(self, position: int) -> int:
        """The last token, up to ``position``, that is in the state."""
        return min(self.first, position)

    def advance(self, inputs: Float32Array, start: int, step: Step) -> Float32Array:
        """The tokens at ``start``, inputs (n, width) -> (n, outputs) of the layer."""
        lead, n, taken = self.sizes.lead, len(inputs), start - self.first
        self.first = MOVING  # an interrupt leaves the state between two tokens
        if start == 0:
            self.state[:] = self.inputs[:lead] = taken = 0
        if taken:
            step(self.inputs[: lead + taken], self.state)
            self.inputs[:lead] = self.inputs[taken : taken + lead].copy()
        window = np.concatenate([self.inputs[:lead], inputs])
        if 1 < n <= self.room:
            scratch = self.scratch[: len(self.state)]
            scratch[:] = self.state
            out = step(window, scratch)
            self.inputs[lead : lead + n] = inputs
            self.first, self.waiting = start, n
        else:
            out = step(window, self.state)
            self.inputs[:lead] = window[n:]
            self.first, self.waiting = start + n, 0
        return out

    def copy(self, other: TextMemory, position: int) -> None:
        """Become what another text's memory of the same layer is before ``position``."""
        assert isinstance(other, RecurrentState)
        first, self.first = other.first, MOVING  # an interrupt leaves some of it copied
        self.state[:], self.inputs[:] = other.state, other.inputs
        self.first, self.waiting = first, position - first

    def can_hold(self, first: int, end: int) -> bool:
        """Whether it has room for the tokens first..end of a text beside the state."""
        return first == end

    def shape(self, name: str, tokens: int) -> tuple[int, ...]:
        """(numbers,) of the state, or (lead, width) of the inputs before ``first``."""
        return self.state.shape if name == "state" else (self.sizes.lead, self.sizes.width)

    def rows(self, name: str, tokens: int) -> Iterator[UInt8Array]:
        """The bytes of the state, or of the inputs before ``first``, in place."""
        numbers = self.state if name == "state" else self.inputs[: self.sizes.lead].reshape(-1)
        yield numbers.view(np.uint8)

    def keep(self, start: int, end: int) -> None:
        """Keep the memory of the tokens start..end, of which none is drafted."""
        self.waiting = 0


def steps_and_decays(
    dt: Float32Array,
    bias: Float32Array,
    rates: Float32Array,
    limits: tuple[float, float | None] = (0.0, None),
) -> tuple[Float32Array, Float32Array]:
    """Each head's time step, softplus(dt + bias) within its limits, and what a token leaves of the
    state, exp(rates step): (n, heads) each.

    dt           (n, heads), as it is projected
    bias, rates  (heads,); rates are below 0 in all models, but not in all files
    In float64, whose bits are the same on every machine, and without a warning for what is not
    finite.
    """
    with np.errstate(all="ignore"):
        steps = fixed_math.softplus(dt.astype(np.float64) + bias)
        steps = np.clip(steps, *limits)
        exponents = steps * rates
        decays = fixed_math.exp(-np.abs(exponents))
        decays = np.where(exponents > 0, 1 / decays, decays)
        return steps.astype(np.float32), decays.astype(np.float32)
