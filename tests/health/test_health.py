"""Each check of ranks, nodes and links on 2 and 4 gloo ranks: silent when all is well, and clear about a fault."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run_command, run_world
from distributed_helper import run_ranks
from health_ranks import train_with_own_seed, visit, watch
from recipes import Tree
from tiny_policy import make_checkpoint

from megatron_hdpo.health.findings import named
from megatron_hdpo.health.links import ranks_of_nodes
from megatron_hdpo.health.stragglers import compare
from megatron_hdpo.health.versions import differences, source_digest, versions_here
from megatron_hdpo.parallel.location import RankLocation, locate_rank

Seen = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each rank saw; the fault was on the last one."""
    return run_ranks(request.param, visit, str(tmp_path_factory.mktemp("run")))


@pytest.fixture
def last(seen: Seen) -> str:
    """The faulty rank, as the messages name it."""
    return {2: "host0:1", 4: "host1:3"}[len(seen)]


CHECKS = ["versions", "clocks", "folder", "disk", "memory", "devices", "links"]


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_said_of_ranks_that_are_well(seen: Seen, check: str) -> None:
    assert [rank[check].problems for rank in seen] == [[]] * len(seen)
    # What is measured on a busy machine may well be uneven.
    assert check == "links" or [rank[check].warnings for rank in seen] == [[]] * len(seen)


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("odd versions", ["torch differs: ", "but 0.0.1 on {last}: make them equal", "NCCL differs: absent on"]),
        (
            "fast clock",
            ["the clock of {last} is 60.0 s ahead of that of host0:0", "clocks to correct: {last}: synchronise them"],
        ),
        ("slow clock", ["the clock of {last} is 60.0 s behind that of host0:0"]),
        ("own folder", ["is not shared by all ranks: {last} did not see a file of host0:0 within 0.5 s"]),
        ("full disk", ["GB of free space on host0:0, health.min_free_disk_gb is 1e+09"]),
        ("used memory", ["the GPUs of {last} are not free: the worst has 25% of its memory left"]),
        ("slow links", ["ranks runs at ", "health.min_allreduce_gb_per_s is 1e+06"]),
    ],
)
@pytest.mark.fault(
    "a device, a collective, a clock or a disk that is not well",
    phase="health checks",
    seen="one line per problem, with host and rank; exit code 2",
    lost="nothing",
)
def test_a_fault_is_a_problem_on_every_rank(seen: Seen, last: str, check: str, says: list[str]) -> None:
    for rank in seen:
        text = "\n".join(rank[check].problems)
        assert [part for part in says if part.format(last=last) not in text] == [], text
        assert rank[check].warnings == [] or check == "slow links"


def test_a_slow_device_is_warned_of(seen: Seen, last: str) -> None:
    for rank in seen:
        found = rank["slow device"]
        assert found.problems == [] and len(found.warnings) == 1
        assert f"x the median of all ranks on {last};" in found.warnings[0]
        assert found.metrics["health/matmul_slowest_ratio"] == pytest.approx({2: 1.5, 4: 3.0}[len(seen)])


def test_links_are_measured_over_all_ranks_and_inside_nodes(seen: Seen) -> None:
    for rank in seen:
        metrics = rank["links"].metrics
        assert metrics == seen[0]["links"].metrics
        assert metrics["health/allreduce_gb_per_s"] > 0 and rank["matmul"] > 0
        assert ("health/allreduce_node_gb_per_s_min" in metrics) == (len(seen) == 4)


def test_the_folder_is_left_as_it_was(seen: Seen) -> None:
    assert seen[0]["left in the folder"] == []


def test_the_whole_check_has_metrics_and_one_line(seen: Seen) -> None:
    assert all(rank["metrics"].keys() == seen[0]["metrics"].keys() and rank["off"] == {} for rank in seen)
    expected = {"clock_offset_s", "free_disk_gb", "matmul_ms_median", "matmul_slowest_ratio", "allreduce_gb_per_s"}
    assert {f"health/{name}" for name in expected} == seen[0]["metrics"].keys()
    (line,) = [line for line in seen[0]["console"].splitlines() if line.startswith("health: ")]
    assert line.startswith(f"health: {len(seen)} ranks on 1 node agree, clocks within 0.")
    assert all(rank["console"] == "" for rank in seen[1:])


def test_all_reasons_are_one_error_on_every_rank(seen: Seen) -> None:
    """The recipe differed on rank 1, and the disk was too full for all."""
    for rank in seen:
        recipe, disk = rank["error"].splitlines()
        assert recipe.startswith("the recipe differs: ") and ":1: make them equal" in recipe
        assert "health.min_free_disk_gb" in disk


def test_the_minority_is_named() -> None:
    locations = [RankLocation(rank, rank % 8, f"n{rank // 8}") for rank in range(24)]
    versions = [{"torch": "2" if rank < 14 else "1", "Python": "3.11"} for rank in range(24)]
    assert differences(locations, versions) == [
        "torch differs: 2 on 14 of 24 ranks, but 1 on n1:14, n1:15, n2:16, n2:17, n2:18, n2:19, n2:20, n2:21 and 2 "
        "more: make them equal"
    ]
    del versions[3]["Python"]
    assert "Python differs: 3.11 on 23 of 24 ranks, but absent on n0:3" in differences(locations, versions)[1]
    assert named(locations[:2]) == "n0:0, n0:1"


def test_an_edited_source_file_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert source_digest(tmp_path) != before
    assert versions_here("d")["the recipe"] == "d" and versions_here("d")["transformer-engine"]


def test_nodes_are_told_by_their_first_rank() -> None:
    locations = [locate_rank(rank, True, {"LOCAL_RANK": str(rank % 2)}) for rank in range(4)]
    assert ranks_of_nodes(locations) == [[0, 1], [2, 3]]


def test_a_straggler_is_found_among_the_ranks_of_its_stage() -> None:
    # Stage 1 begins later and ends earlier than stage 0: its ranks are compared with each other alone.
    metrics = compare([4.0, 4.0, 4.0, 1.0, 2.0, 1.0], [0, 0, 0, 1, 1, 1])
    assert (metrics["ranks/slowest"], metrics["ranks/slowest_ratio"]) == (4.0, 2.0)
    assert metrics["ranks/wait_share"] == pytest.approx(1 - 16 / 18)
    assert compare([0.0, 0.0], [0, 0]) == {"ranks/slowest": 0.0, "ranks/slowest_ratio": 0.0, "ranks/wait_share": 0.0}


def test_a_rank_that_dawdles_is_found_in_real_updates(tmp_path: Path) -> None:
    """Of two replicas the second takes half as long again from step 2 on, in each of its four micro-batches."""
    ranks = run_ranks(2, watch, str(make_checkpoint("llama", tmp_path)), 3, 1e9)
    for rank in ranks:
        assert rank["metrics"] == ranks[0]["metrics"]
        assert rank["scoring"] == 0.0, "scoring is without gradients, and every replica has its own share of it"
        for metrics in rank["metrics"][1:]:
            assert metrics["ranks/slowest"] == 1
            assert metrics["ranks/slowest_ratio"] == pytest.approx(6 / 5)
            assert metrics["ranks/wait_share"] == pytest.approx(1 - 10 / 12)
    assert [rank["seconds"] for rank in ranks] == [[4.0, 4.0, 4.0], [4.0, 6.0, 6.0]]
    assert ["ranks/allreduce_gb_per_s" in metrics for metrics in ranks[0]["metrics"]] == [False, False, True]
    said = ranks[0]["console"]
    assert said.count("warning: rank 1 on ") == 1 and "has been the slowest of 2 for 2 steps" in said
    assert said.count("warning: links have become slow: ") == 1 and ranks[1]["console"] == ""


def test_a_run_of_two_recipes_is_refused_before_anything_is_read(
    tree: Tree, write_recipe: Callable[[Tree], Path]
) -> None:
    ended = run_world(2, train_with_own_seed, str(write_recipe(tree)))
    assert ended.codes == [2, 2], ended.text
    said = "".join(ended.stderr)
    assert said.count("HealthError: the recipe differs: ") == 1 and "on 1 of 2 ranks, but " in said
    assert "health checks: stopped after " in ended.text and "Traceback" not in ended.text
    assert [path.name for path in Path(tree["output"]).iterdir()] == ["logs"]


def test_an_error_is_said_once_where_rank_0_keeps_the_store(tree: Tree, write_recipe: Callable[[Tree], Path]) -> None:
    """As the script for several nodes wants it: agents then do not share a store of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    ended = run_command("train", write_recipe(tree), "rollout.max_new_tokens=4000", ranks=2, environment=environment)
    assert ended.codes == [2, 2], ended.text
    assert "".join(ended.stderr).count("RecipeError: ") == 1 and "Traceback" not in ended.text, ended.text
