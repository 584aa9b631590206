"""What counts as a number in a config or in JSON, where `true` is an int of Python's and a whole number may be too long for a float."""

import sys
from typing import TypeGuard


class NoNumbersError(ValueError):
    """Something came out that is no number."""


def is_whole(value: object, least: int, most: int | None = None) -> TypeGuard[int]:
    """Whether a value is a whole number of at least `least`, and at most `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
