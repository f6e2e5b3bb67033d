"""Every hot path in plain NumPy, which explains and checks, and the choice of its compiled twin.

A compiled twin has the same name, arguments, meaning and errors (doors.py). Callers write
``kernels.linear(...)`` and get the compiled one where there is one. ``FLASHINFER_KERNELS=numpy`` in
the environment, or ``use("numpy")``, picks NumPy's instead. The last bits of the two may differ;
within one of them they never do, however rows, tokens and threads are split: see the comment at
each sum.
"""

import os

from flashinfer.formats.number_formats import FORMATS
from flashinfer.kernels import attention, direct_io, doors, neuron_cache, sparse_matmul
from flashinfer.kernels.activations import ACTIVATIONS
from flashinfer.kernels.sparse_matmul import Matrix, quantise

__all__ = ["NAMES", "TWINS", "Matrix", "describe", "in_use", "quantise", "set_threads", "use"]

NAMES = (
    "linear", "sparse_up", "sparse_down", "attention", "remember", "rotate", "activate",
    "layer_norm", "rms_norm", "positive", "route", "place", "merge_reads", "copy_rows", "Reader",
)  # fmt: skip


def _twins(*modules):
    """{name: the kernel}, each from the one of these modules that has it."""
    return {name: getattr(m, name) for name in NAMES for m in modules if hasattr(m, name)}


TWINS = {"numpy": _twins(sparse_matmul, attention, neuron_cache, direct_io)}
# A thread that has nothing to do spins this often before it sleeps: long enough to be there
# between two products, and no core is burnt while the other waits for reads. GNU's own default
# is 30 times as long. It is read when the library is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
try:
    from flashinfer._native import kernels as _native
except ImportError:
    pass
else:
    formats = {name: (f.block, f.block_bytes) for name, f in FORMATS.items()}
    if _native.tables() != (formats, tuple(ACTIVATIONS)):
        raise ImportError(
            f"{_native.__file__}: was built from another version of flashinfer; install it again"
        )
    TWINS["native"] = _twins(_native)


def use(kind):
    """Use the "numpy" or the "native" kernels from now on. Raises ValueError for others."""
    if kind not in TWINS:
        raise ValueError(f"no {kind!r} kernels here; there are {', '.join(TWINS)}")
    globals().update(TWINS[kind])
    globals()["in_use"] = kind


def set_threads(threads):
    """Compute with this many threads from now on (the NumPy kernels always with one)."""
    doors.set_threads(threads)
    if "native" in TWINS:
        _native.set_threads(threads)


def describe():
    """What computes, for people: "native (avx512)" or "numpy"."""
    return f"native ({_native.vector_unit()})" if in_use == "native" else "numpy"


in_use = "numpy"
use(os.environ.get("FLASHINFER_KERNELS") or ("native" if "native" in TWINS else "numpy"))
