"""What is read of a unit: its bytes side by side, or each of its matrices from where it lies."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from flashinfer.formats.arrays import Int64Array
from flashinfer.formats.bundle.in_place import FILE_BYTES
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.bundle.stored import StoredTensor
from flashinfer.formats.number_formats import Matrices
from flashinfer.paper.flash import row_spans, slot_bytes


@dataclass(frozen=True)
class Piece:
    """``nbytes`` of each unit: of the first at ``offset``, of each other a ``stride`` later. Their
    read goes to ``room`` bytes behind the beginning of the unit's slot."""

    offset: int
    stride: int
    nbytes: int
    room: int


@dataclass(frozen=True)
class Pieces:
    """What is read of each unit of a layer, in reads of this alignment.

    slot_bytes  of the slot that holds a unit
    """

    pieces: tuple[Piece, ...]
    alignment: int
    slot_bytes: int

    @property
    def rooms(self) -> Int64Array:
        """Where in a slot each piece's read goes, (pieces,)."""
        return np.array([piece.room for piece in self.pieces])

    def spans(self, units: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(offsets, lengths, skips) of the aligned reads that cover these units (n,) int64: each
        (n, pieces). A piece begins ``skips`` bytes into its read."""
        found = [
            row_spans(piece.offset, piece.nbytes, units, self.alignment, piece.stride)
            for piece in self.pieces
        ]
        offsets, lengths, skips = (np.stack(column, axis=1) for column in zip(*found, strict=True))
        return offsets, lengths, skips

    def anywhere(self) -> "Pieces":
        """Pieces that take the same reads, with nothing that tells where in a file the layer is."""
        return replace(
            self,
            pieces=tuple(
                replace(piece, offset=number * FILE_BYTES + piece.offset % self.alignment)
                for number, piece in enumerate(self.pieces)
            ),
        )


@lru_cache(maxsize=1024)  # the plan asks for each layer's again and again
def pieces_of(tensor: StoredTensor, unit_neurons: int, alignment: int) -> Pieces:
    """The Pieces of a layer's units, of which each has so many rows of the tensor."""
    nbytes = tensor.row_bytes * unit_neurons
    runs = [(tensor.offset, nbytes, nbytes)]
    if tensor.runs is not None:
        assert isinstance(tensor.format, Matrices)
        parts = tensor.format.parts.values()
        runs = [(*run, part.nbytes) for run, part in zip(tensor.runs, parts, strict=True)]
    pieces, room = [], 0
    for offset, stride, size in runs:
        pieces.append(Piece(offset, stride, size, room))
        room += slot_bytes(size, stride, offset, alignment)
    return Pieces(tuple(pieces), alignment, room)


def one_piece(nbytes: int, alignment: int) -> Pieces:
    """The Pieces of units of so many bytes that lie side by side, the first one on a page."""
    piece = Piece(0, nbytes, nbytes, 0)
    return Pieces((piece,), alignment, slot_bytes(nbytes, nbytes, 0, alignment))


def pieces_of_layer(bundle: Bundle, layer: int, alignment: int) -> Pieces:
    """The Pieces of a bundle's layer."""
    ffn = bundle.config.layers[layer].ffn
    return pieces_of(bundle.bundles(layer), 1 if ffn.matrices else ffn.unit_neurons, alignment)
