"""The number formats that there are.

f32, f16 and bf16 have a value in each block; the others are GGML's: blocks of whole numbers that
share scales. A new format is one subclass in a file of this folder, listed in FORMATS, and what
``_native/formats.h`` says, where the compiled kernels have their table.
"""

from ..errors import UserError
from .base import BlockFormat, Groups, NumberFormat
from .blocks import IQ4_NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from .floats import BF16, F8E4M3, F16, F32, F64
from .k_quants import IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from .matrices import Matrices, Part
from .ternary import TQ1_0, TQ2_0

__all__ = [
    "BY_SAFETENSORS", "FORMATS", "SOURCES", "BlockFormat", "Groups", "Matrices", "NumberFormat",
    "Part", "number_format",
]  # fmt: skip

FORMATS: dict[str, NumberFormat] = {
    format.name: format
    for format in (
        F32(), F16(), BF16(), Q8_0(), Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q2_K(), Q3_K(), Q4_K(),
        Q5_K(), Q6_K(), IQ4_NL(), IQ4_XS(), MXFP4(), TQ1_0(), TQ2_0(),
    )
}  # fmt: skip
BY_SAFETENSORS = {f.safetensors: f for f in FORMATS.values() if f.block == 1}
# What a checkpoint's tensors are decoded from.
SOURCES: dict[str, NumberFormat] = {
    **BY_SAFETENSORS, **{format.safetensors: format for format in (F64(), F8E4M3())}
}  # fmt: skip


def number_format(name: str) -> NumberFormat:
    """The NumberFormat called ``name``. Raises UserError naming those there are."""
    if name not in FORMATS:
        raise UserError(f"unknown number format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]
