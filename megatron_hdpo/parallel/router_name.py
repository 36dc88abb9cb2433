"""A name that Megatron-Core's router reads and, without Transformer Engine, does not define."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.transformer.moe import moe_utils


@contextmanager
def router_name_defined() -> Iterator[None]:
    """Define the name while the context is entered: without it the first forward pass of an expert layer fails.

    None makes the router use torch's matrix product. Does nothing where the name is defined: with Transformer Engine,
    and in Megatron-Core 0.19.
    """
    if hasattr(moe_utils, "te_general_gemm"):
        yield
        return
    moe_utils.te_general_gemm = None
    try:
        yield
    finally:
        del moe_utils.te_general_gemm
