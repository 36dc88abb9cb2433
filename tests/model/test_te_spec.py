"""Transformer Engine's layers, built from its own Python modules, hold what the plain torch layers hold.

Same parameters, cut, marked, loaded and stored alike, for every architecture and kind of layout; checkpoints of one are
read by the other, or refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from layer_specs import LAYOUTS, RANKS
from te_checkpoints import CASES as READ_BY_THE_OTHER
from te_python import FOLDER
from tiny_checkpoints import CASES, MOE_CASES, make_checkpoint

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"there is no {FOLDER.relative_to(ROOT)}: make te-python"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("specs")
    for case in CASES | MOE_CASES:
        make_checkpoint(case, folder / case)
    # A process of its own: Megatron-Core looks for Transformer Engine once, when it is imported.
    command = [sys.executable, HELPERS / "te_python.py", "layer_specs", folder]
    path = os.pathsep.join(filter(None, [str(HELPERS), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads((folder / "answer.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_specs_hold_the_same(layout: str, ranks: list[dict[str, Any]]) -> None:
    cases, _ = LAYOUTS[layout]
    assert len(ranks) == RANKS
    for rank in ranks:
        found = rank[layout]
        assert {case: found[case]["differences"] for case in cases} == {case: [] for case in cases}
        assert all(found[case]["compared"] >= 20 for case in cases)


@pytest.mark.parametrize("case", CASES | MOE_CASES)
def test_the_layers_compared_are_transformer_engines(case: str, ranks: list[dict[str, Any]]) -> None:
    expected = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    if case in MOE_CASES:
        expected |= {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
    for rank in ranks:
        assert expected <= set(rank["tp2_sp_pp2"][case]["layers"])


@pytest.mark.parametrize("case", READ_BY_THE_OTHER)
@pytest.mark.parametrize(("writer", "reader"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
def test_a_checkpoint_is_read_by_the_other_spec_or_refused(
    writer: str, reader: str, case: str, ranks: list[dict[str, Any]]
) -> None:
    """Tied to the layout, the optimizer's state is stored in the order of the parameters, which the specs do not
    share."""
    for rank in ranks:
        seen = rank["read"][f"{writer} {case}"]
        assert f"was written with model.spec={writer}, this run has {reader}: the optimizer's state" in seen["refused"]
        assert (seen["weights"], seen["wrong moments"], seen["teacher"]) == ([], 0, [])
