"""Every hot path in plain NumPy, which explains and checks, and the choice of its compiled twin.

A compiled twin has the same name, arguments, meaning and errors (doors.py). Callers write
``kernels.linear(...)`` and get the compiled twin where it is installed.
``FLASHINFER_KERNELS=numpy`` in the environment, or ``use("numpy")``, picks NumPy's instead. The
last bits of the two may differ. Within one of them they never do, however rows, tokens and threads
are split; a comment at each sum says why.
"""

import os
from types import ModuleType
from typing import Any

from flashinfer.formats.number_formats import FORMATS
from flashinfer.kernels import doors
from flashinfer.kernels.activations import ACTIVATIONS
from flashinfer.kernels.attention import attention, remember, rotate
from flashinfer.kernels.direct_io import Reader, copy_rows, merge_reads
from flashinfer.kernels.linear_attention import linear_attention
from flashinfer.kernels.neuron_cache import place, positive, route
from flashinfer.kernels.sparse_matmul import (
    Matrix,
    activate,
    layer_norm,
    linear,
    quantise,
    rms_norm,
    sparse_down,
    sparse_up,
    whole_numbers,
)

__all__ = [
    "NAMES", "TWINS", "Matrix", "Reader", "activate", "attention", "copy_rows", "describe",
    "in_use", "layer_norm", "linear", "linear_attention", "merge_reads", "place", "positive",
    "quantise", "remember", "rms_norm", "rotate", "route", "set_threads", "sparse_down",
    "sparse_up", "use", "whole_numbers",
]  # fmt: skip

NAMES = (
    "linear", "sparse_up", "sparse_down", "attention", "linear_attention", "remember", "rotate",
    "activate", "layer_norm", "rms_norm", "positive", "route", "place", "merge_reads", "copy_rows",
    "Reader",
)  # fmt: skip


def _twins(*modules: ModuleType) -> dict[str, Any]:
    """{name: the kernel}, each from the one of these modules that has it."""
    return {name: getattr(m, name) for name in NAMES for m in modules if hasattr(m, name)}


# {"numpy", "native": {name: the kernel}}; "native" is missing where it is not installed.
TWINS: dict[str, dict[str, Any]] = {"numpy": {name: globals()[name] for name in NAMES}}
# How often an idle thread of OpenMP spins before it sleeps. This is long enough to bridge the time
# between two products, and short enough not to burn a core while another waits for reads; GNU's
# default is 30 times as long. The library reads it when it is loaded, which is below.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
try:
    import flashinfer._native.kernels as _native
except ImportError:
    pass
else:
    formats = {name: (f.block, f.block_bytes) for name, f in FORMATS.items()}
    if _native.tables() != (formats, tuple(ACTIVATIONS)):
        raise ImportError(
            f"{_native.__file__}: was built from another version of flashinfer; install it again"
        )
    TWINS["native"] = _twins(_native)


def use(kind: str) -> None:
    """Use the "numpy" or the "native" kernels from now on. Raises ValueError for any other."""
    if kind not in TWINS:
        raise ValueError(f"no {kind!r} kernels here; there are {', '.join(TWINS)}")
    globals().update(TWINS[kind])
    globals()["in_use"] = kind


def set_threads(threads: int) -> None:
    """Compute with this many threads from now on. The NumPy kernels always use one."""
    doors.set_threads(threads)
    if "native" in TWINS:
        _native.set_threads(threads)


def describe() -> str:
    """The kernels in use, for people: "native (avx512)" or "numpy"."""
    return f"native ({_native.vector_unit()})" if in_use == "native" else "numpy"


in_use = "numpy"
use(os.environ.get("FLASHINFER_KERNELS") or ("native" if "native" in TWINS else "numpy"))
