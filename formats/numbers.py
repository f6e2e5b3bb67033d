"""Whether a value of JSON or of a file's metadata is a number; true and false are none."""

import math

LARGEST_FLOAT32 = 3e38


def is_whole(value, least=-math.inf, most=math.inf):
    """Whether it is a whole number within these limits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value, least=-math.inf, most=math.inf):
    """Whether it is a number within these limits, which NaN never is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and least <= value <= most
