"""Whole runs with SGLang in place of the embedded engine: what they leave behind, resumed, ahead, and interrupted."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from commands import Ended, run_command, run_world
from fault_proxy import cut_off, fault_proxy
from recipes import Tree, small_recipe
from server_tools import LiveServer, servers_under, wait_until

from megatron_hdpo.rollout.sample_log import read_groups
from megatron_hdpo.rollout.sglang.server_config import ServerConfig
from megatron_hdpo.rollout.types import Group
from megatron_hdpo.tracking.metrics import read_metrics

STEPS = 3


def recipe_on(urls: list[str], model: Path, output: Path) -> Tree:
    """HDPO after a warm-up that lets some rollouts be right, on servers that are there."""
    tree = small_recipe(model, output)
    tree["data"]["train"][0]["lengths"] = [2, 2, 4]
    tree["warmup"] = {
        "kind": "sft",
        "steps": 40,
        "examples_per_step": 32,
        "optimizer": {"lr": 1e-2},
        "plain": [{"kind": "digit_sums", "name": "short", "lengths": [2], "size": 40, "seed": 3}],
        "privileged": [{"kind": "digit_sums", "name": "shown", "lengths": [2, 3, 4], "size": 200, "seed": 4}],
    }
    tree["rollout"] |= {
        "engine": "sglang",
        "samples_per_prompt": 8,
        # The self-test's flattened weights look untrained to a model of 17 tokens.
        "sglang": {"placement": "given", "urls": urls, "servers": {"dtype": "float32"}, "sync": {"min_peak": 0}},
    }
    tree["train"]["steps"] = STEPS
    tree["checkpoint"] = {"every": 1, "keep": 2, "export": False}
    tree["tracking"] = {"tensorboard": False}
    return tree


def train(tree: Tree, *overrides: str, ranks: int = 1, **kw: Any) -> Ended:
    """The command on a recipe file beside its output; every rank ends well."""
    ended = run(tree, *overrides, ranks=ranks, **kw)
    assert ended.codes == [0] * ranks, f"exit codes {ended.codes}\n{ended.text}"
    return ended


def run(tree: Tree, *overrides: str, ranks: int = 1, timeout: float = 120, **kw: Any) -> Ended:
    """The command, however it ends."""
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return run_command("train", file, *overrides, ranks=ranks, timeout=timeout, **kw)


def groups_of(folder: Path, step: int) -> list[Group]:
    return read_groups(folder / "rollouts" / f"step_{step:08d}.jsonl")


def versions_of(groups: list[Group]) -> set[int]:
    return {
        int(version)
        for group in groups
        for sample in (*group.samples, *group.privileged)
        for version in sample.completion.weight_versions
    }


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Metrics of steps 1, 2, ..."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] > 0]


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}], ids=["alone", "TP2xPP2"])
def test_a_run_on_servers_trains_and_goes_on_where_it_stopped(
    sglang_server: LiveServer, tmp_path: Path, layout: dict[str, int]
) -> None:
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "run")
    tree["parallel"] = layout
    ranks = int(np.prod([*layout.values(), 1]))
    train(tree, "train.steps=2", ranks=ranks)
    resumed = train(tree, ranks=ranks)
    assert "resumed from step_00000002" in resumed.stdout[0]
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["sync/bytes"] > 50_000 and row["sync/gb_per_s"] > 0 and row["sync/transfer_s"] > 0
        assert row["rollout/mixed_versions_rate"] == 0 and row["rollout/samples"] == 32
        assert row["rollout/generation_failed"] == 0
    trained = [row for row in rows if "train/mismatch_k3" in row]
    assert trained, "the warm-up makes some groups mixed"
    for row in trained:
        assert abs(row["train/mismatch_k3"]) < 1e-6 and row["train/mismatch_max"] < 1.01 and row["train/grad_norm"] > 0
    for step in (1, 2, 3):
        groups = groups_of(tmp_path / "run", step)
        assert versions_of(groups) == {step - 1} and len(groups) == 4
        assert all(len(group.samples) == 8 for group in groups)


@pytest.mark.parametrize("swap", ["after_batch", "mid_generation"])
def test_rollouts_ahead_are_one_step_old_at_most(sglang_server: LiveServer, tmp_path: Path, swap: str) -> None:
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "run")
    tree["rollout"] |= {"ahead": 1, "swap": swap, "max_new_tokens": 64}
    tree["train"]["steps"] = 4
    train(tree, "optimizer.lr=3e-3")  # enough to see the policy move, too little to unlearn the sums
    rows = rows_of(tmp_path / "run")
    assert versions_of(groups_of(tmp_path / "run", 1)) == {0}
    for step in (2, 3, 4):
        versions = versions_of(groups_of(tmp_path / "run", step))
        assert versions <= {step - 2, step - 1} and step - 2 in versions, (step, versions)
        if swap == "after_batch":
            assert versions == {step - 2}
            assert rows[step - 1]["rollout/mixed_versions_rate"] == 0
    old = [row["step"] for row in rows if trained_versions(tmp_path / "run", row["step"]) - {row["step"] - 1}]
    seen = {row["step"]: row["train/mismatch_k3"] for row in rows if "train/mismatch_k3" in row}
    assert old or swap == "mid_generation", "the warm-up makes some groups mixed"
    assert seen, "the warm-up makes some groups mixed"
    for step, mismatch in seen.items():
        assert (mismatch > 1e-6) == (step in old), f"step {step}: old rollouts are not the new policy's, new ones are"


def trained_versions(folder: Path, step: int) -> set[int]:
    """Versions of the weights that sampled the rollouts with an advantage."""
    mixed = [group for group in groups_of(folder, step) if len({sample.reward for sample in group.samples}) > 1]
    return {int(v) for group in mixed for sample in group.samples for v in sample.completion.weight_versions}


def test_the_servers_top_log_probs_teach_as_the_trainers_do(sglang_server: LiveServer, tmp_path: Path) -> None:
    """Cliffs of the same saved rollouts: the teacher's distribution from the server, and from the trainer."""
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "server")
    tree["data"]["train"][0]["lengths"] = [4, 5]
    tree["warmup"]["privileged_share"] = 0.7
    tree["objective"]["logits_from"] = "rollout"
    tree["rollout"]["max_new_tokens"] = 10
    tree["train"]["steps"] = 1
    train(tree)
    kept = [sample for group in groups_of(tmp_path / "server", 1) for sample in group.privileged]
    assert kept and all(sample.completion.top_logprobs is not None for sample in kept)
    (server,) = rows_of(tmp_path / "server")
    tree["output"], tree["objective"]["logits_from"] = str(tmp_path / "trainer"), "trainer"
    tree["rollout"]["replay"] = str(tmp_path / "server" / "rollouts")
    train(tree)
    (trainer,) = rows_of(tmp_path / "trainer")
    assert server["distill/tokens"] == trainer["distill/tokens"] > 0 and trainer["train/grad_norm"] > 1e-3
    for name in ("distill/divergence", "distill/covered_mass", "train/grad_norm"):
        assert server[name] == pytest.approx(trainer[name], rel=1e-4), name


def test_a_server_that_is_away_for_a_moment_costs_no_sample(sglang_server: LiveServer, tmp_path: Path) -> None:
    """Amid an evaluation, and amid a step: all its connections break."""
    with fault_proxy(sglang_server.url) as proxy:
        tree = recipe_on([proxy.url], sglang_server.model, tmp_path / "run")
        tree["rollout"]["sglang"]["health_interval_s"] = 0.5
        tree["self_test"] = {"enabled": False}
        # One sample of the gate; 12 of the evaluation before the first step, of which the third is lost.
        proxy.faults["/generate"] = [None] * 3 + [cut_off()] + [None] * 40 + [cut_off()]
        proxy.faults["/model_info"] = [cut_off()] * 4
        ended = train(tree, "train.steps=2")
    assert not proxy.faults["/generate"] and not proxy.faults["/model_info"], ended.text
    rows = rows_of(tmp_path / "run")
    assert [row["rollout/samples"] for row in rows] == [32, 32]
    for step in (1, 2):
        assert versions_of(groups_of(tmp_path / "run", step)) == {step - 1}


def train_and_break(file: str) -> None:
    """An error of the trainer's own, while the next step's rollouts, which never come, are being sampled."""
    from megatron_hdpo import cli
    from megatron_hdpo.learner import Learner
    from megatron_hdpo.rollout.ahead import StepRollouts
    from megatron_hdpo.rollout.sglang.api import ServerApi

    begin = StepRollouts.begin

    async def never(*args: Any) -> Any:
        await asyncio.sleep(600)

    def begin_in_vain(self: Any, *args: Any) -> None:
        ServerApi.generate = never  # type: ignore[method-assign]
        begin(self, *args)

    def learn(self: Any, groups: Any, step: int) -> Any:
        time.sleep(0.5)
        raise RuntimeError("the trainer broke")

    StepRollouts.begin, Learner.learn = begin_in_vain, learn  # type: ignore[method-assign]
    cli.main(["train", file])


def test_an_error_while_rollouts_are_sampled_ahead_ends_the_run(sglang_server: LiveServer, tmp_path: Path) -> None:
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "run")
    tree["rollout"]["ahead"] = 1
    tree["self_test"] = {"enabled": False}
    tree["evaluation"] = {"before": False}
    del tree["data"]["evaluation"], tree["warmup"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    ended = run_world(1, train_and_break, str(file), timeout=60)
    assert ended.codes == [1] and "RuntimeError: the trainer broke" in ended.text, f"{ended.codes}\n{ended.text}"


def kill_servers_of(folder: Path) -> None:
    for process in servers_under(folder):
        with suppress(psutil.Error):  # gone already, with its parent
            if "supervisor.py" not in " ".join(process.cmdline()):
                process.kill()


def train_and_lose_the_server(file: str) -> None:
    """The only server is killed when the first of step 2's rollouts has come."""
    from megatron_hdpo import cli
    from megatron_hdpo.rollout.sampler import Sampling

    take, versions = Sampling._take, []

    def take_and_kill(self: Any, result: Any) -> None:
        take(self, result)
        version = self.sampler.engine.weight_version
        if version == 1 and 1 not in versions:
            kill_servers_of(Path(file).parent)
        versions.append(version)

    Sampling._take = take_and_kill  # type: ignore[method-assign]
    cli.main(["train", file])


@pytest.mark.slow
def test_a_run_starts_its_servers_and_outlives_their_death(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path: Path
) -> None:
    tree = recipe_on([], sglang_model, tmp_path / "run")
    servers = yaml.safe_load(sglang_config.model_dump_json(exclude_defaults=True))
    tree["rollout"]["sglang"] = {"servers": servers, "sync": {"min_peak": 0}}
    tree["rollout"]["max_new_tokens"] = 64
    tree["data"]["prompts"]["max_privileged_tokens"] = 32
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    ended = run_world(1, train_and_lose_the_server, str(file), timeout=500)
    assert ended.codes == [0], ended.text
    log = (tmp_path / "run" / "logs" / "node0" / "sglang_0.log").read_text()
    assert log.count("=== server 0 started") == 2
    assert [row["rollout/samples"] for row in rows_of(tmp_path / "run")] == [32] * STEPS
    for step in (1, 2, 3):
        assert versions_of(groups_of(tmp_path / "run", step)) == {step - 1}
    assert wait_until(lambda: not servers_under(tmp_path)), servers_under(tmp_path)
