# SPDX-License-Identifier: Apache-2.0
"""Numbers as a reader meets them: written once, the same in the terminal, in Markdown, HTML and LaTeX."""

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


def fixed(value: float | None, deviation: float | None = None, *, digits: int = 3) -> str:
    """Return a number with so many decimals, and its spread after ±.

    Example:
        >>> fixed(0.41249, 0.02)
        '0.412 ± 0.020'
        >>> fixed(None)
        '–'
    """
    if value is None:
        return MISSING
    spread = "" if deviation is None else f" ± {deviation:.{digits}f}"
    return _minus(f"{value:.{digits}f}") + spread


def percent(value: float | None, deviation: float | None = None, *, digits: int = 1) -> str:
    """Return a fraction in percent, and its spread after ±; the unit stands in the head of the column.

    Example:
        >>> percent(0.93412, 0.0031)
        '93.4 ± 0.3'
    """
    spread = None if deviation is None else 100 * deviation
    return fixed(None if value is None else 100 * value, spread, digits=digits)


def signed(value: float | None, *, digits: int = 1) -> str:
    """Return a difference with its sign; what rounds to zero has none.

    Example:
        >>> signed(1.25, digits=2), signed(-0.31), signed(-0.01)
        ('+1.25', '−0.3', '0.0')
    """
    if value is None:
        return MISSING
    text = _minus(f"{value:+.{digits}f}")
    return text if text.strip(f"+0.{MINUS}") else text[1:]


def interval(low: float, high: float, *, digits: int = 1) -> str:
    """Return both ends with their signs, with more decimals where an end other than zero would read as zero.

    Example:
        >>> interval(-0.52, 1.14), interval(0.004, 1.14)
        ('−0.5 to +1.1', '+0.004 to +1.140')
    """
    while digits < 4 and any(end and not float(f"{end:.{digits}f}") for end in (low, high)):
        digits += 1
    return f"{signed(low, digits=digits)} to {signed(high, digits=digits)}"


def count(value: float | None) -> str:
    """Return a number of things with three significant digits and a decimal prefix.

    Example:
        >>> count(11689512), count(1814073344), count(999_999), count(42)
        ('11.7 M', '1.81 G', '1.00 M', '42')
    """
    return _scaled(value, ("", "k", "M", "G", "T"))


def size(value: float | None) -> str:
    """Return bytes with three significant digits; 1 kB is 1000 bytes.

    Example:
        >>> size(46_827_520)
        '46.8 MB'
    """
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def milliseconds(value: float | None, width: float | None = None) -> str:
    """Return a time in milliseconds with three significant digits, and the interquartile range in brackets.

    Example:
        >>> milliseconds(12.341, 0.52), milliseconds(0.0812), milliseconds(1234.5)
        ('12.3 (0.5)', '0.0812', '1234')
    """
    if value is None:
        return MISSING
    digits = 0
    while digits < 4 and 0 < value < 10 ** (2 - digits):
        digits += 1
    return f"{value:.{digits}f}" + ("" if width is None else f" ({width:.{digits}f})")


def _minus(text: str) -> str:
    return text.replace("-", MINUS)


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return MISSING
    if value < 1000:
        return f"{value:g} {units[0]}".strip()
    for unit in units[1:]:
        value /= 1000
        if value < 999.5 or unit == units[-1]:
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"
