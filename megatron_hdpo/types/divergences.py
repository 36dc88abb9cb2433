"""Names of the divergences and of the top-k conventions, in the one list that recipes and formulas share.

`megatron_hdpo.divergence.DivergenceSpec` says what each name computes. No torch is imported here, so that a recipe can
be checked without it.
"""

from __future__ import annotations

from typing import Literal

DivergenceKind = Literal["jsd", "forward_kl", "reverse_kl", "skew_forward", "skew_reverse", "akl"]
DivergenceTail = Literal["outside", "literal", "bucket", "renormalise"]
