"""In which order a pipeline rank runs its micro-batches: 1F1B, interleaved where it has several chunks of layers.

megatron.core.pipeline_parallel.schedules, 0.16.1: some forward passes to warm up, then one forward and one backward in
turns, then the backward passes that are left.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_hdpo.costs.layout import Layout


def warm_up(layout: Layout, stage: int, micro_batches: int) -> int:
    """Forward passes of chunks before the first backward pass."""
    ahead = layout.pipeline - stage - 1
    if layout.virtual_stages > 1:
        ahead = 2 * ahead + (layout.virtual_stages - 1) * layout.pipeline
    return min(ahead, micro_batches * layout.virtual_stages)


def held_at_most(layout: Layout, stage: int, micro_batches: int, chunk_bytes: Sequence[float]) -> float:
    """Bytes that a rank holds at its worst, when each chunk of it keeps `chunk_bytes` of a micro-batch until that has
    gone backward."""
    if layout.virtual_stages == 1:
        return min(micro_batches, layout.pipeline - stage) * chunk_bytes[0]
    # Everything is periodic in rounds of the pipeline; a few show the worst.
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
    """The interleaved schedule takes whole rounds of the pipeline: empty micro-batches fill the last one."""
    return micro_batches + (-micro_batches % layout.pipeline if layout.virtual_stages > 1 else 0)


def bubble(layout: Layout) -> float:
    """Micro-batches' worth of time that a rank waits in a step."""
    return (layout.pipeline - 1) / layout.virtual_stages


def messages(layout: Layout, stage: int) -> tuple[int, int]:
    """Activations that a rank sends and receives per micro-batch in the forward pass."""
    chunks = layout.virtual_stages
    return chunks - int(stage == layout.pipeline - 1), chunks - int(stage == 0)
