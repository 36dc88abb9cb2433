"""Text of amounts, speeds and durations for people."""

from __future__ import annotations


def number(value: float) -> str:
    """Return 12345.0 as "12,345", 0.5 as "0.5"."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def speed(rate: float, unit: str) -> str:
    """Return units per second, or seconds per unit where that is easier to read."""
    if rate < 1:
        return f"{1 / rate:,.1f} s/{unit}"
    return f"{rate:,.1f} {unit}/s" if rate < 100 else f"{rate:,.0f} {unit}/s"


def duration(seconds: float) -> str:
    """Return 8.21 as "8.2 s", 75 as "1 min 15 s", 7300 as "2 h 01 min"."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
