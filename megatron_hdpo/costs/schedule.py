"""Pipeline schedule: 1F1B, interleaved if a rank has several chunks of layers.

megatron.core.pipeline_parallel.schedules, 0.16.1: some forward passes as warm-up, then one forward and one backward
pass in turn, then the remaining backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hdpo.costs.layout import Layout


def warm_up(layout: Layout, stage: int, micro_batches: int) -> int:
    """Return the number of forward passes of chunks before the first backward pass."""
    ahead = layout.pipeline - stage - 1
    if layout.virtual_stages > 1:
        ahead = 2 * ahead + (layout.virtual_stages - 1) * layout.pipeline
    return min(ahead, micro_batches * layout.virtual_stages)


def held_at_most(layout: Layout, stage: int, micro_batches: int, chunk_bytes: Sequence[float]) -> float:
    """Return the peak of the bytes that a rank holds.

    chunk_bytes: what each chunk keeps of a micro-batch until its backward pass.
    """
    if layout.virtual_stages == 1:
        return min(micro_batches, layout.pipeline - stage) * chunk_bytes[0]
    # The schedule is periodic in rounds of the pipeline, so a few rounds have the peak.
    micro_batches = min(micro_batches, 4 * layout.pipeline)
    passes = micro_batches * layout.virtual_stages
    round_passes = layout.pipeline * layout.virtual_stages
    chunks = [k % round_passes // layout.pipeline for k in range(passes)]
    warm = warm_up(layout, stage, micro_batches)
    held = peak = 0.0
    for k in range(passes + warm):
        if k < passes:
            held += chunk_bytes[chunks[k]]
            peak = max(peak, held)
        if warm <= k:
            held -= chunk_bytes[layout.virtual_stages - 1 - chunks[k - warm]]
    return peak


def rounded(layout: Layout, micro_batches: int) -> int:
    """Return the number of micro-batches with the empty ones that fill the last round of an interleaved schedule."""
    return micro_batches + (-micro_batches % layout.pipeline if layout.virtual_stages > 1 else 0)


def bubble(layout: Layout) -> float:
    """Return the time that a rank waits in a step, in micro-batches."""
    return (layout.pipeline - 1) / layout.virtual_stages


def messages(layout: Layout, stage: int) -> tuple[int, int]:
    """Return how many activations a rank sends and receives per micro-batch in the forward pass."""
    chunks = layout.virtual_stages
    return chunks - int(stage == layout.pipeline - 1), chunks - int(stage == 0)
