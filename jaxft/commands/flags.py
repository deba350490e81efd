"""What the verbs' flags take: readers of their values, and flags that several verbs have."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            value = float(text)  # 1e3 is a whole number
        except ValueError:
            value = float("nan")
        if not low <= value < 2**31 or not value.is_integer():
            raise argparse.ArgumentTypeError(f"takes a whole number from {low}, not {text!r}")
        return int(value)

    return read


def number(low: float, high: float = float("inf")) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high) or value == float("inf"):
            upper = "" if high == float("inf") else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"takes a number from {low:g}{upper}, not {text!r}")
        return value

    return read
