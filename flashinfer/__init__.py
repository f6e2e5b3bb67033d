"""Language models larger than memory, run from flash storage (after arXiv 2312.11514)."""

from importlib import import_module

__all__ = ["BudgetError", "FormatError", "Model", "UserError"]
__version__ = "0.1.0"
HOMES = {"Model": "flashinfer.model"}


def __getattr__(name):
    """Imports a name of ``__all__`` when it is first used: the command says that it was interrupted
    before NumPy is there."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES.get(name, "flashinfer.formats.errors")), name)
