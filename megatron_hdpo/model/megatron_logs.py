"""Warnings of Megatron-Core that are about this package's code: its users can do nothing about them."""

from __future__ import annotations

import logging

_ABOUT_OUR_CODE = {
    # The move to HybridModel: docs/hybrid-model.md.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # DistributedDataParallel then makes the layout itself.
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}
"""Logger: part of a message that it logs at every construction, from Megatron-Core 0.19 on."""


def leave_out_warnings_about_our_code() -> None:
    """Keep these warnings out of the logs; others of the same loggers stay."""
    for name in _ABOUT_OUR_CODE:
        logging.getLogger(name).addFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    return _ABOUT_OUR_CODE[record.name] not in record.getMessage()
