"""How an engine rounds: what an honest result may differ by follows from it."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float64Array
from flashinfer.formats.errors import FormatError, UserError, shown
from flashinfer.formats.toml import read_toml

UNIT = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}  # half a unit in the last place of 1
DEVIATION = 3**-0.5  # of what is as likely anywhere between -1 and 1
# GGML's 8-bit activations: elements of a block, and what its scale is stored in.
# q8_1 keeps a block's sum besides, in float16, for weights that are not centred.
BLOCKS = {"q8_0": (32, np.float16), "q8_1": (32, np.float16), "q8_k": (256, np.float32)}
ROUNDINGS = (*UNIT, *BLOCKS)
SMALLEST = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}  # above 0


@dataclass(frozen=True)
class Arithmetic:
    """An engine's rounding points. Each is a number format: one of ROUNDINGS.

    sums           of products, and each step between values
    values         that are stored, which every module gives
    keys, cached_values  in the key/value cache; queries: before they meet the keys
    probabilities  of attention, before they meet the values
    activations    what the FFN's activation function is tabulated in; "f32": it is computed
    scaled_queries  queries are multiplied with the scores' scale before they are rounded
    products       {number format of weights: what they are multiplied with is rounded to}
    """

    name: str = "float32"
    sums: str = "f32"
    values: str = "f32"
    keys: str = "f32"
    cached_values: str = "f32"
    queries: str = "f32"
    probabilities: str = "f32"
    activations: str = "f32"
    scaled_queries: bool = False
    products: dict[str, str] = field(default_factory=dict)

    @property
    def unit(self) -> float:
        """The standard deviation of one rounding of 1: it is off by up to the unit roundoff, either
        way, equally often."""
        return UNIT[self.sums] * DEVIATION

    @property
    def step(self) -> float:
        """The unit roundoff of values within a module, which some engines round once more or less
        often than others; 0 where they are kept in float32."""
        return 0.0 if self.values == "f32" else UNIT[self.values]


def _modules_in(name: str, format: str) -> Arithmetic:
    """Modules whose inputs and outputs have one format, keys and probabilities too."""
    return Arithmetic(
        name, values=format, keys=format, cached_values=format, queries=format,
        probabilities=format,
    )  # fmt: skip


# transformers rounds what each module gives; llama.cpp keeps values in float32, multiplies 16-bit
# weights with 16-bit and smaller weights with 8-bit activations, and keeps keys in float16.
KNOWN = {
    "float32": Arithmetic(),
    "float32-f16-cache": Arithmetic("float32-f16-cache", keys="f16", cached_values="f16"),
    "float32-q8_0-cache": Arithmetic("float32-q8_0-cache", keys="q8_0", cached_values="q8_0"),
    "bfloat16": _modules_in("bfloat16", "bf16"),
    "float16": _modules_in("float16", "f16"),
    "llama.cpp": Arithmetic(
        "llama.cpp", keys="f16", cached_values="f16", queries="f16", probabilities="f16",
        activations="f16",
        products={
            "f16": "f16", "bf16": "bf16",
            **dict.fromkeys(("q8_0", "q4_0", "q5_0", "iq4_nl", "mxfp4"), "q8_0"),
            **dict.fromkeys(("q4_1", "q5_1"), "q8_1"),
            **dict.fromkeys(
                ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "tq1_0", "tq2_0"), "q8_k"
            ),
        },
    ),
}  # fmt: skip
# Some of llama.cpp's graphs scale the queries, others the scores.
KNOWN["llama.cpp-scaled"] = replace(
    KNOWN["llama.cpp"], name="llama.cpp-scaled", scaled_queries=True
)


def arithmetic_named(name: str, where: object = "--arithmetic") -> Arithmetic:
    """One of KNOWN, or what a TOML file says: Arithmetic's fields, and ``base``, one of KNOWN.

    where  the name was given; errors begin with it
    Raises UserError where it is neither, FormatError where the file is not sound.
    """
    if name in KNOWN:
        return KNOWN[name]
    if not name.endswith(".toml"):
        raise UserError(
            f"{where}: {shown(name)} is not one of {', '.join(KNOWN)}, nor a .toml file"
        )
    return arithmetic_of(read_toml(name), name)


def arithmetic_of(given: dict[str, Any], name: str) -> Arithmetic:
    """The Arithmetic that a TOML file describes. Raises FormatError, which names the file."""
    base = given.pop("base", "float32")
    if not isinstance(base, str) or base not in KNOWN:
        raise FormatError(f"{name}: base is not one of {', '.join(KNOWN)}")
    names = {f.name for f in fields(Arithmetic)} - {"name"}
    products = given.get("products", {})
    formats = [value for key, value in given.items() if key not in ("products", "scaled_queries")]
    if unknown := given.keys() - names:
        raise FormatError(f"{name}: {min(unknown)} is not one of {', '.join(sorted(names))}")
    if not isinstance(products, dict) or not all(
        isinstance(f, str) and f in ROUNDINGS for f in (*formats, *products.values())
    ):
        raise FormatError(f"{name}: a rounding is not one of {', '.join(ROUNDINGS)}")
    if not isinstance(given.get("scaled_queries", False), bool):
        raise FormatError(f"{name}: scaled_queries is not true or false")
    if any(given.get(key) in BLOCKS for key in ("sums", "values", "probabilities", "activations")):
        raise FormatError(f"{name}: only keys, queries and products can be {' or '.join(BLOCKS)}")
    return replace(KNOWN[base], name=Path(name).name, **given)


def rounded(x: AnyArray, format: str) -> Float64Array:
    """x (float64) rounded to the nearest number of a format, ties to even; blocks lie in rows."""
    if format == "f32":
        return x.astype(np.float32).astype(np.float64)
    if format == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float64)
    if format == "bf16":
        return _bfloat16(x)
    return _in_blocks(x, format)[0]


def _bfloat16(x: AnyArray) -> Float64Array:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    kept = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    found = np.where(np.isfinite(x), kept, bits).astype(np.uint32)
    return found.view(np.float32).astype(np.float64)


def _in_blocks(x: AnyArray, format: str) -> tuple[Float64Array, Float64Array, Float64Array]:
    """x (..., n) as GGML rounds it to 8 bits; the step between its numbers; and how far off an
    element may be: that step where float32 may round it either way, else next to nothing.

    A block has a scale, its largest magnitude / 127, by which it is divided before the scale is
    rounded to what it is stored in.
    """
    n, (size, stored_in) = x.shape[-1], BLOCKS[format]
    padded = np.zeros((*x.shape[:-1], -(-n // size) * size))
    padded[..., :n] = x
    blocks = padded.reshape(*x.shape[:-1], -1, size)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    steps = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    stored = scale.astype(stored_in).astype(np.float64)
    near = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < 127 * 4 * UNIT["f32"]
    either = near * stored
    if format == "q8_1":
        total = np.abs((np.rint(steps) * stored).sum(axis=-1, keepdims=True))
        # It is multiplied with the weights' minimum, which is about twice as large as they are.
        either = np.hypot(either, 2 * UNIT["f16"] * total / np.sqrt(size))
    parts = np.rint(steps) * stored, np.broadcast_to(stored, blocks.shape), either
    values, step, either = (part.reshape(padded.shape)[..., :n] for part in parts)
    return values, step, either


def after_rounding(x: AnyArray, noise: AnyArray, format: str) -> Float64Array:
    """The noise of rounded elements (float64) whose noise was ``noise``: a step of the format where
    noise may round to the next number, or has rounded over several; 0 where it cannot."""
    if format in BLOCKS:
        _, step, either = _in_blocks(x, format)
    else:
        step, either = 2 * UNIT[format] * np.abs(x) + SMALLEST[format], np.zeros_like(x)
    apart = np.abs(rounded(x + 4 * noise, format) - rounded(x - 4 * noise, format))
    return np.maximum(either, np.where(apart > 0, np.maximum(noise, np.minimum(apart, step)), 0))
