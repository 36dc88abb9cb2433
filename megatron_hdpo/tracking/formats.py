"""Text of amounts and durations for people."""

from __future__ import annotations


def number(value: float) -> str:
    """Return 12345.0 as "12,345", 0.5 as "0.5"."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def amount(value: float, unit: str) -> str:
    """Return "1 step", "2,048 samples"; `unit` is the singular."""
    return f"{number(value)} {plural(value, unit)}"


def plural(value: float, unit: str) -> str:
    """Return the unit as it stands after the number: "step" after 1, else "steps"."""
    return unit if value == 1 else f"{unit}s"


def pace(per_second: float) -> str:
    """Return units per second, "170/s", or seconds per unit where that is easier to read, "4.0 s each"."""
    if per_second < 1:
        return f"{duration(1 / per_second)} each"
    return f"{per_second:,.1f}/s" if per_second < 100 else f"{per_second:,.0f}/s"


def duration(seconds: float) -> str:
    """Return 8.21 as "8.2 s", 75 as "1 min 15 s", 7300 as "2 h 01 min", 200000 as "2 d 07 h"."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24:02d} h"


def clock(seconds: float) -> str:
    """Return a duration in 6 characters at most (7 from 100 days on): "45s", "1m15s", "2h01m", "2d07h"."""
    return duration(round(seconds)).replace(".0", "").replace("min", "m").replace(" ", "")


def fitted(value: float | None, spec: str, width: int) -> str:
    """Return the value in the format `spec`, or with fewer digits where that is wider than `width` (7 at least).

    Large numbers get a suffix: "12.3k", "4.5M". A missing value is "-".
    """
    if value is None:
        return "-"
    forms = (lambda: format(value, spec), lambda: _with_suffix(value), lambda: f"{value:.2g}", lambda: f"{value:.0e}")
    return next((text for form in forms if len(text := form()) <= width), "#" * width)


def _with_suffix(value: float) -> str:
    scaled = value
    for suffix in ("", "k", "M", "G", "T"):
        if abs(scaled) < 999.5:
            return f"{scaled:.3g}{suffix}"
        scaled /= 1000
    return f"{value:.2g}"
