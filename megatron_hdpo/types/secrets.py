"""Secrets in texts that are written or shown: passwords of addresses, and the mark that stands in their place."""

from __future__ import annotations

import re

MARK = "***"
"""Text in place of a secret, in every file that a run writes."""

_PASSWORD = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:)[^/\s]+(?=@)")
_PARAMETER = re.compile(r"(?i)(?P<before>[?&][\w.-]*(?:token|key|secret|password|signature|credential)=)[^&#\s'\"]+")


def without_passwords(text: str) -> str:
    """Return a text with `***` for the password of every address in it, and for keys and tokens in its parameters."""
    return _PARAMETER.sub(rf"\g<before>{MARK}", _PASSWORD.sub(rf"\g<before>{MARK}", text))
