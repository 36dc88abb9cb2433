"""HDPO and its family of on-policy self-distillation methods on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core says at import, once per rank and module, that optional packages are missing; `doctor` tells whether
# that matters. This stands here because it must come before the first import of Megatron.
for _message in (".*Apex (is|are) not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)
