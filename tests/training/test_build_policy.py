"""The policy of a run has the sizes of the recipe's train section."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest

from megatron_hdpo.training import run


def test_sizes_of_micro_batch_and_head_chunk_reach_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("build_model", "load_hf", "wrap_data_parallel"):
        monkeypatch.setattr(run, name, MagicMock())
    made: dict[str, Any] = {}
    monkeypatch.setattr(run, "Policy", lambda *sizes, **more: made.update(more, micro_batch_tokens=sizes[3]))
    recipe = MagicMock()
    recipe.train.micro_batch_tokens, recipe.train.head_chunk = 300, 70
    run._build_policy(recipe, MagicMock(), MagicMock(), MagicMock())
    assert made == {"micro_batch_tokens": 300, "head_chunk": 70}
