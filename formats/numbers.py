"""Whether a value of JSON or of a file's metadata is a number. Booleans are not numbers here."""

import math
from typing import Any, TypeGuard

LARGEST_FLOAT32 = 3e38


def is_whole(value: Any, least: float = -math.inf, most: float = math.inf) -> TypeGuard[int]:
    """Whether ``value`` is a whole number within these limits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> TypeGuard[float]:
    """Whether ``value`` is a number within these limits. NaN never is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and least <= value <= most
