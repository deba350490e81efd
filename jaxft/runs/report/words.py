"""Numbers and texts as the page shows them."""

from __future__ import annotations

import math
import re
from typing import Any

from markupsafe import Markup

UNPRINTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
NONE = "–"  # noqa: RUF001  (a dash for what is not known)


def plain(value: Any) -> Any:
    r"""A text without what HTML or UTF-8 cannot hold; other values, and markup, as they are.

    >>> plain("a\x00b\ud800\tc")
    'a\ufffdb\ufffd\tc'
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return UNPRINTED.sub("\ufffd", value.replace("\r\n", "\n").replace("\r", "\n"))
    return value


def cut(text: str, most: int) -> str:
    """The text, of a long one the beginning and how much is left out.

    >>> cut("abc", 3), cut("abcdef", 3)
    ('abc', 'abc … (3 more characters)')
    """
    if len(text) <= most:
        return text
    return f"{text[:most]} … ({len(text) - most:,} more characters)"


def figure(value: float | None) -> str:
    """A number with four digits that count, or four places behind the point where it is above a hundredth.

    >>> figure(0.0), figure(3.37354), figure(1234.5), figure(0.09), figure(0.00012345), figure(2e-12), figure(None)
    ('0', '3.374', '1,234', '0.0900', '0.0001234', '2.000e-12', '–')
    """
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e12:
        return f"{value:.3e}"
    places = max(0, 3 - math.floor(math.log10(abs(value))))
    places = min(places, 4) if abs(value) >= 0.01 else places
    return f"{value:,.{places}f}"


def signed(value: float | None) -> str:
    """A change, with its sign.

    >>> signed(0.5), signed(-0.25), signed(None)
    ('+0.5000', '-0.2500', '–')
    """
    return f"+{figure(value)}" if value is not None and value >= 0 else figure(value)


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A figure with its interval, where there is one.

    >>> interval(0.5, 0.25, 0.75), interval(0.5, None, None)
    ('0.5000 (0.2500 to 0.7500)', '0.5000')
    """
    if low is None or high is None:
        return figure(value)
    return f"{figure(value)} ({figure(low)} to {figure(high)})"


def tick(value: float) -> str:
    """A number on an axis, as short as it goes.

    >>> tick(0.25), tick(1500000.0), tick(2000.0), tick(0.0), tick(3e-5), tick(0.00095)
    ('0.25', '1.5M', '2k', '0', '3e-5', '9.5e-4')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    if 0 < abs(value) < 0.01:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.3g}"


def many(number: float | None) -> str:
    """A count in short.

    >>> many(245760), many(3475712), many(7), many(8.03e9), many(None)
    ('245,760', '3.48 million', '7', '8.03 billion', '–')
    """
    if number is None:
        return NONE
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def size(number: float | None) -> str:
    """Bytes.

    >>> size(512), size(2**20), size(1.5 * 2**30), size(None)
    ('512 B', '1.00 MiB', '1.50 GiB', '–')
    """
    if number is None:
        return NONE
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{_three(number / 1024**power)} {name}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """A span of time.

    >>> duration(0.25), duration(42.4), duration(90), duration(7322), duration(None)
    ('0.25 s', '42 s', '1 min 30 s', '2 h 2 min', '–')
    """
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def _three(value: float) -> str:
    """A number from 1 to 1024 with three digits that count."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
