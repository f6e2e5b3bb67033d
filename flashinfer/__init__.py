"""Language models larger than memory, run from flash storage (after arXiv 2312.11514)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # of what ``__getattr__`` imports
    from flashinfer.formats.errors import BudgetError, FormatError, UserError
    from flashinfer.model import Model

__all__ = ["BudgetError", "FormatError", "Model", "UserError"]
__version__ = "0.1.0"
HOMES = {"Model": "flashinfer.model"}


def __getattr__(name: str) -> Any:
    """Import a name of ``__all__`` when it is first used.

    ``flashinfer.__main__`` handles Ctrl-C before NumPy is imported, so importing the package must
    not import NumPy.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES.get(name, "flashinfer.formats.errors")), name)
