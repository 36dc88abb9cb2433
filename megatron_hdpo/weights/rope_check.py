"""Comparison of rotary position tables with those of `transformers`, at every position of the model's context.

Log-probs of short texts do not show a wrong table: the slow frequencies, which are what scaling changes, have hardly
turned there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import chunks_of, unwrap
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.weights.checks import Check
from megatron_hdpo.weights.errors import WeightsError

_POSITIONS = 4096
"""Positions whose tables are in memory at once."""
_ABSOLUTE, _RELATIVE = 1e-6, 5e-7
"""Allowed difference of a cosine or sine: a constant, and a share of its angle in radians, which fp32 rounds twice."""


def check_rope(
    model: nn.Module, architecture: Architecture, context: ParallelContext, reference: Path, name: str
) -> Check:
    """Compare the tables of all ranks with those that transformers makes for the folder `reference`. Collective."""
    problem: str | None = None
    found: tuple[float, str | None] = (0.0, None)
    try:
        theirs = _rotary_of_transformers(reference)
        tables = [chunk.rotary_pos_emb for chunk in chunks_of(unwrap(model))]
        found = max((table_difference(table, theirs, architecture.max_positions) for table in tables), key=_severity)
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"transformers has no table like this model's for {reference}: {error}"
    results = context.gather_objects((problem, found))
    title = f"{name}: rotary positions against transformers"
    if problems := tuple(dict.fromkeys(text for text, _ in results if text is not None)):
        return Check(title, False, "no reference", problems)
    largest, first = max((each for _, each in results), key=_severity)
    size = f"{architecture.max_positions:,} positions x {architecture.head_dim} channels"
    summary = f"{size}: cosines and sines differ by at most {largest:.1e}"
    if first is None:
        return Check(title, True, summary)
    return Check(title, False, summary, (f"  the first difference beyond rounding is at {first}",))


def table_difference(ours: Any, theirs: Any, positions: int) -> tuple[float, str | None]:
    """Return the largest difference of two tables, and the first entry beyond rounding as text, None without one.

    ours: Megatron's RotaryEmbedding. theirs: a rotary embedding of transformers; what it multiplies cosines and sines
    with (the attention scaling of YaRN) is part of the comparison. positions: 0 to positions - 1 are compared.
    """
    largest, first = 0.0, None
    frequencies_D = theirs.inv_freq.detach().float().cpu().repeat(2)
    for start, angles_PD in _angles(ours, positions):
        their_tables = _tables_of(theirs, start, len(angles_PD))
        if their_tables[0].shape != angles_PD.shape:
            raise WeightsError(
                f"transformers turns {their_tables[0].shape[1]} channels of a head, this model {angles_PD.shape[1]}"
            )
        turned_PD = torch.arange(start, start + len(angles_PD), dtype=torch.float32)[:, None] * frequencies_D
        for kind, our, their in zip(("cosine", "sine"), (angles_PD.cos(), angles_PD.sin()), their_tables, strict=True):
            difference_PD = (our - their).abs()
            largest = max(largest, float(difference_PD.nan_to_num(torch.inf).max()))
            wrong = (~(difference_PD <= _ABSOLUTE + _RELATIVE * turned_PD)).nonzero()
            if first is None and len(wrong):
                row, channel = (int(index) for index in wrong[0])
                values = f"{float(our[row, channel]):.6f}, of transformers {float(their[row, channel]):.6f}"
                first = f"position {start + row}, channel {channel}: {kind} {values}"
    return largest, first


def _severity(found: tuple[float, str | None]) -> tuple[bool, float]:
    return found[1] is not None, found[0]


def _angles(ours: Any, positions: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, angles [P, channels]) of a block of positions, fp32 on the CPU."""
    for start in range(0, positions, _POSITIONS):
        half = ours.get_freqs_non_repeated(min(_POSITIONS, positions - start), start).float().cpu()
        yield start, torch.cat((half, half), dim=-1)


def _tables_of(theirs: Any, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [P, channels] as the attention of transformers gets them."""
    cos, sin = theirs(torch.empty(0), torch.arange(start, start + count)[None])
    return cos[0].float(), sin[0].float()


def _rotary_of_transformers(folder: Path) -> Any:
    """Return the rotary embedding that transformers makes from a folder's config.json; no weights are read or made."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return type(model.model.rotary_emb)(config=model.config)
