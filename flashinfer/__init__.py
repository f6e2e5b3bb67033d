"""Language models larger than memory, run from flash storage (after arXiv 2312.11514)."""

from flashinfer.formats.errors import BudgetError, FormatError, UserError
from flashinfer.model import Model

__all__ = ["BudgetError", "FormatError", "Model", "UserError"]
__version__ = "0.1.0"
