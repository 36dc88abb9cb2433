"""What an answer of a reward service means: a value, or why there is none and whether another request may bring one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from megatron_hdpo.rewards.service_messages import Answer, AnswerError, read_answer, shown

_BUSY = 429
_TIMEOUT = 408
_UNAVAILABLE = 503


class NoValue(Exception):
    """A request that brought no value.

    may_pass: whether another one may. is_busy: the service is well, and asks for fewer requests. wait_s: seconds that
    it wants to be left alone.
    """

    def __init__(self, reason: str, may_pass: bool = False, is_busy: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.may_pass, self.is_busy, self.wait_s = may_pass, is_busy, wait_s

    @property
    def is_outage(self) -> bool:
        """Return whether the service is out of order: a failure that may pass, and no answer of a busy one."""
        return self.may_pass and not self.is_busy


def value_of(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """Return the value in an answer. Raises NoValue.

    Another request may help after status 408, 429 and 5xx. It does not after a refusal (another 4xx), a redirection,
    or an answer that cannot be read.
    """
    if status == 200:
        try:
            return read_answer(body)
        except AnswerError as error:
            raise NoValue(str(error)) from error
    wait_s = seconds_to_wait(headers.get("Retry-After", ""), time.time())
    is_busy = status == _BUSY or (status == _UNAVAILABLE and wait_s is not None)
    asked = f", asks to wait for {wait_s:.0f} s" if wait_s else ""
    reason = f"status {status}{asked}" + (f": {shown(body)}" if body else "")
    raise NoValue(reason, is_busy or status == _TIMEOUT or status >= 500, is_busy, wait_s or 0.0)


def no_answer(error: Exception, limit_s: float) -> NoValue:
    """Return the error of a request without a whole answer: no connection, a closed one, or none in time."""
    if isinstance(error, TimeoutError):
        return NoValue(f"no answer within {limit_s:g} s", may_pass=True)
    return NoValue(f"no answer: {error or type(error).__name__}", may_pass=True)


def seconds_to_wait(text: str, now: float) -> float | None:
    """Return the seconds that a `Retry-After` header asks for, as a number or as a date; None for anything else.

    now: Unix time.
    """
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
