"""How much is fuzzed: 100 cases per target in the suite, the same ones each time; 100,000 new ones in `make fuzz`.

A target is a test in tests/fuzz that is decorated by `fuzzed` and by hypothesis' `given`. Whatever input it gets, the
code under test returns or raises a UserError; any other exception fails the test, and hypothesis shows the smallest
input that makes it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

CASES = "MEGATRON_HDPO_FUZZ_CASES"

_asked = os.environ.get(CASES)
# No database: a run on one machine does not depend on what was run there before.
fuzzed = settings(
    max_examples=int(_asked or 100),
    derandomize=_asked is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
