"""Whole runs with SGLang in place of the embedded engine: what they leave behind, resumed, ahead, and interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from commands import Ended, run_command, run_world
from fault_proxy import changed, cut_off, fault_proxy
from one_engine import Weights
from recipes import Tree, small_recipe
from safetensors.torch import load_file
from server_tools import LiveServer, servers_under, wait_until

from megatron_hdpo.rollout.sglang.servers.config import ServerConfig
from megatron_hdpo.sampling.saved import read_step, step_file, write_groups
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.types.rollouts import Group
from megatron_hdpo.weights.save import save_hf

STEPS = 3


WARMUP = {
    "kind": "sft",
    "steps": 40,
    "examples_per_step": 32,
    "optimizer": {"lr": 1e-2},
    "plain": [{"kind": "digit_sums", "name": "short", "lengths": [2], "size": 40, "seed": 3}],
    "privileged": [{"kind": "digit_sums", "name": "shown", "lengths": [2, 3, 4], "size": 200, "seed": 4}],
}
"""Lets some rollouts be right, and more of those that see the solution."""


@pytest.fixture(scope="module")
def warm_model(sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The servers' model after WARMUP."""
    folder = tmp_path_factory.mktemp("warm")
    tree = small_recipe(sglang_model, folder / "run") | {"warmup": WARMUP, "self_test": {"enabled": False}}
    del tree["data"]["evaluation"]
    train(tree, "train.steps=0")
    return folder / "run" / "hf"


def recipe_on(urls: list[str], model: Path, output: Path) -> Tree:
    """HDPO on servers that are there."""
    tree = small_recipe(model, output)
    tree["data"]["train"][0]["lengths"] = [2, 2, 4]
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


def run(tree: Tree, *overrides: str, ranks: int = 1, timeout: float = 300, **kw: Any) -> Ended:
    """The command, however it ends."""
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return run_command("train", file, *overrides, ranks=ranks, timeout=timeout, **kw)


def groups_of(folder: Path, step: int) -> list[Group]:
    return read_step(folder / "rollouts", step)


def versions_of(groups: list[Group]) -> set[int]:
    return {
        int(version)
        for group in groups
        for sample in (*group.samples, *group.privileged_samples)
        for version in sample.completion.weight_versions
    }


def rows_of(folder: Path) -> list[dict[str, float]]:
    """Metrics of steps 1, 2, ..."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] > 0]


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}], ids=["alone", "TP2xPP2"])
def test_a_run_on_servers_trains_and_goes_on_where_it_stopped(
    sglang_server: LiveServer, warm_model: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    tree = recipe_on([sglang_server.url], warm_model, tmp_path / "run")
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


@pytest.mark.parametrize(
    ("ahead", "swap", "ranks"),
    [(1, "after_batch", 1), (1, "mid_generation", 1), (3, "after_batch", 1), (3, "mid_generation", 2)],
)
def test_rollouts_ahead_are_no_older_than_allowed(
    sglang_server: LiveServer, warm_model: Path, tmp_path: Path, ahead: int, swap: str, ranks: int
) -> None:
    tree = ahead_recipe(sglang_server, warm_model, tmp_path, ahead, swap) | {"parallel": {"tensor": ranks}}
    train_ahead(tree, ranks)
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, ahead + 4))
    for row in rows:
        groups = groups_of(tmp_path / "run", row["step"])
        oldest = max(row["step"] - 1 - ahead, 0)
        newer = 4 if swap == "mid_generation" and row["step"] > ahead else 0
        for group in groups:
            versions = sorted(int(v) for sample in group.samples for v in set(sample.completion.weight_versions))
            assert versions == [oldest] * (8 - newer) + [oldest + 1] * newer, (row["step"], versions)
        assert row["rollout/mixed_versions_rate"] == 0 and row["rollout/staleness_max"] == row["step"] - 1 - oldest
        tokens = np.concatenate([s.completion.weight_versions for group in groups for s in group.samples])
        assert row["rollout/staleness_mean"] == pytest.approx(row["step"] - 1 - tokens.mean())
    moved = {row["step"] for row in rows if row.get("train/grad_norm", 0) > 0}
    seen = {row["step"]: row for row in rows if "train/mismatch_k3" in row}
    differ = {
        step for step in seen if any(past in moved for past in range(oldest_change(tmp_path / "run", step), step))
    }
    assert differ, "the warm-up makes some groups mixed"
    for step, row in seen.items():
        assert (row["train/mismatch_k3"] > 1e-6) == (step in differ), "old rollouts are not the new policy's"
        log_ratios = mismatch_in_float64(tmp_path / "run", step)
        k3 = float((np.exp(log_ratios) - 1 - log_ratios).mean())
        assert row["train/mismatch_k3"] == pytest.approx(k3, rel=1e-3, abs=1e-6)
        assert row["train/mismatch_max"] == pytest.approx(float(np.exp(log_ratios.max())), rel=1e-3)


@pytest.mark.fault(
    "the run is killed with three steps sampled ahead (`rollout.ahead`)",
    phase="learning",
    seen="`resumed from step_...`",
    lost="the rollouts ahead, which are sampled again on the same problems",
)
def test_a_run_with_rollouts_ahead_that_was_killed_goes_on_with_the_same_problems(
    sglang_server: LiveServer, warm_model: Path, tmp_path: Path
) -> None:
    """It is killed while step 3 is being trained, with steps 4 to 6 complete and not trained."""
    tree = ahead_recipe(sglang_server, warm_model, tmp_path, 3, "after_batch")
    train_ahead(tree, 1, dies_in=3, codes=[-9])
    train_ahead(tree, 1)
    problems = yaml.safe_load((tmp_path / "problems.yaml").read_text())
    for step in range(1, 7):
        groups = groups_of(tmp_path / "run", step)
        assert [group.problem.id for group in groups] == problems[step - 1], "as if nothing were sampled ahead"
        resumed = 2 if step > 2 else 0
        assert versions_of(groups) == {max(step - 1 - 3, resumed)}, step
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 7))


def ahead_recipe(server: LiveServer, model: Path, folder: Path, ahead: int, swap: str) -> Tree:
    """Of as many steps as it takes until the weights that sample have changed twice."""
    tree = recipe_on([server.url], model, folder / "run")
    tree["rollout"] |= {"ahead": ahead, "swap": swap, "max_new_tokens": 64}
    tree["train"] |= {"steps": ahead + 3, "max_mismatch_k3": None}  # one rare token of a few may have a ratio of 100
    tree["optimizer"]["lr"] = 3e-3  # enough to see the policy move, too little to unlearn the sums
    tree["evaluation"] = {"every": 2, "samples": 1, "k": [1], "greedy": False, "before": False}
    return tree


def train_ahead(tree: Tree, ranks: int, dies_in: int | None = None, codes: Sequence[int] | None = None) -> None:
    file = Path(tree["output"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(tree))
    ended = run_world(ranks, train_as_far_ahead_as_allowed, str(file), dies_in, timeout=300)
    assert ended.codes == (codes or [0] * ranks), ended.text


def train_as_far_ahead_as_allowed(file: str, dies_in: int | None) -> None:
    """On any machine alike, the steps that may be sampled are complete before the trainer begins its own.

    With swap=mid_generation see `swap_amid_groups`.
    """
    from megatron_hdpo import cli
    from megatron_hdpo.training import loop
    from megatron_hdpo.training.learner import Learner

    tree = yaml.safe_load(Path(file).read_text())
    if tree["rollout"]["swap"] == "mid_generation":
        swap_amid_groups(tree["rollout"], tree["train"]["steps"])
    begin, learn, train = loop.begin_next_rollouts, Learner.learn, loop.train

    def begin_and_wait(run: Any) -> None:
        begin(run)
        if tree["rollout"]["swap"] == "after_batch":
            assert wait_until(lambda: run.prefetched.ready == run.prefetched.begun)

    def learn_and_export(self: Any, rollouts: Any, step: int) -> Any:
        if step + 1 == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        policy = self.policy
        folder = Path(file).parent / f"before_{step + 1}"
        save_hf(policy.model, policy.architecture, policy.context, Path(tree["model"]["path"]), folder)
        return learn(self, rollouts, step)

    def train_and_tell(run: Any) -> None:
        train(run)
        problems = [[p.id for p in run.data.order.batch(step, 4)] for step in range(tree["train"]["steps"])]
        (Path(file).parent / "problems.yaml").write_text(yaml.safe_dump(problems))

    loop.begin_next_rollouts, Learner.learn, loop.train = begin_and_wait, learn_and_export, train_and_tell  # type: ignore
    cli.main(["train", file])


def swap_amid_groups(rollout: Tree, steps: int) -> None:
    """Of each step, half of every group is sampled by the oldest weights that are allowed, and half by the next."""
    from megatron_hdpo.rollout.sglang.asking import Asking
    from megatron_hdpo.rollout.sglang.weights.push import WeightPush
    from megatron_hdpo.sampling.coordinator import RolloutCoordinator

    size, ahead = rollout["prompts_per_step"] * rollout["samples_per_prompt"], rollout["ahead"]
    step_of: dict[int, int] = {}  # by the seed of a request
    over: Counter[int] = Counter()  # samples that have come, by step
    requests, ask, push = RolloutCoordinator._requests, Asking.ask, WeightPush.push

    def requests_of_a_step(self: Any, problems: Any, sampling: Any, purpose: Any) -> Any:
        made = requests(self, problems, sampling, purpose)
        step_of.update({request.seed: purpose[1] for request in made if purpose[0] == "train"})
        return made

    async def ask_half(self: Any, replica: Any, sample: Any) -> Any:
        step = step_of.get(sample.request.seed, -1)
        while sample.index % 2 and self.engine.weight_version <= step - ahead:
            await asyncio.sleep(0.01)
        answer = await ask(self, replica, sample)
        over[step] += 1
        return answer

    def push_after_half(self: Any, stream: Any, version: int) -> Any:
        half = version + ahead - 1  # of this step has come, and all of those before it
        wanted = [size] * min(half, steps) + [size // 2] * (half < steps)
        if self.engine.replicas and version > 0:
            assert wait_until(lambda: all(over[step] >= count for step, count in enumerate(wanted)))
        return push(self, stream, version)

    RolloutCoordinator._requests, Asking.ask, WeightPush.push = requests_of_a_step, ask_half, push_after_half  # type: ignore


def mismatch_in_float64(folder: Path, step: int) -> np.ndarray:
    """ln(trainer / engine) of each token that a step trains on, the trainer's from its weights of before the step."""
    weights = Weights(folder.parent / f"before_{step}")
    return np.concatenate(
        [
            weights.of_sampled(group.prompt_ids, sample.completion, 0) - sample.completion.logprobs
            for group in mixed_groups(folder, step)
            for sample in group.samples
        ]
    )


def mixed_groups(folder: Path, step: int) -> list[Group]:
    """Groups whose samples have an advantage."""
    return [group for group in groups_of(folder, step) if len({sample.reward for sample in group.samples}) > 1]


def oldest_change(folder: Path, step: int) -> int:
    """First step whose update the oldest rollouts with an advantage have not seen."""
    return 1 + min((min(versions_of([group])) for group in mixed_groups(folder, step)), default=step)


def test_the_servers_top_log_probs_teach_as_the_trainers_do(sglang_server: LiveServer, tmp_path: Path) -> None:
    """Cliffs of the same saved rollouts: the teacher's distribution from the server, and from the trainer."""
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "server")
    tree["data"]["train"][0]["lengths"] = [4, 5]
    tree["warmup"] = WARMUP | {"privileged_share": 0.7}
    tree["objective"]["logits_from"] = "rollout"
    tree["rollout"]["max_new_tokens"] = 10
    tree["train"]["steps"] = 1
    train(tree)
    kept = [sample for group in groups_of(tmp_path / "server", 1) for sample in group.privileged_samples]
    assert kept and all(sample.completion.top_logprobs is not None for sample in kept)
    (server,) = rows_of(tmp_path / "server")
    tree["output"], tree["objective"]["logits_from"] = str(tmp_path / "trainer"), "trainer"
    tree["rollout"]["replay"] = str(tmp_path / "server" / "rollouts")
    train(tree)
    (trainer,) = rows_of(tmp_path / "trainer")
    assert server["distill/tokens"] == trainer["distill/tokens"] > 0 and trainer["train/grad_norm"] > 1e-3
    for name in ("distill/divergence", "distill/covered_mass", "train/grad_norm"):
        assert server[name] == pytest.approx(trainer[name], rel=1e-4), name


def test_the_servers_rollouts_teach_what_they_would_from_any_engine(
    sglang_server: LiveServer, warm_model: Path, tmp_path: Path
) -> None:
    """A step on rollouts as the server gave them, and one on the same tokens with the log-probs of `transformers`: the
    weights afterwards are the same."""
    tree = recipe_on([sglang_server.url], warm_model, tmp_path / "server")
    tree["train"]["steps"] = 1
    tree["checkpoint"] = {"every": 1}
    train(tree)
    weights = Weights(warm_model)
    groups, differ = groups_of(tmp_path / "server", 1), False
    for group in groups:
        assert len(group.samples) == 8
        for sample in group.samples:
            own = weights.of_sampled(group.prompt_ids, sample.completion, 0).astype(np.float32)
            differ |= bool((own != sample.completion.logprobs).any())  # those of a short response may be the same bits
            sample.completion = replace(sample.completion, logprobs=own)
    assert differ, "they are of another program"
    write_groups(tmp_path / "scored" / step_file(1, 0), dict(enumerate(groups)), len(groups), str)
    tree["output"] = str(tmp_path / "scored_run")
    tree["rollout"] |= {"engine": "embedded", "replay": str(tmp_path / "scored")}
    train(tree)
    (on_server,), (scored,) = rows_of(tmp_path / "server"), rows_of(tmp_path / "scored_run")
    assert on_server["train/grad_norm"] > 1e-3
    assert on_server["train/grad_norm"] == pytest.approx(scored["train/grad_norm"], rel=1e-4)
    before, after, again = (
        load_file(folder / "model.safetensors")
        for folder in (warm_model, tmp_path / "server" / "hf", tmp_path / "scored_run" / "hf")
    )
    moves = torch.cat([(after[name] - before[name]).flatten() for name in before])
    differences = torch.cat([(after[name] - again[name]).flatten() for name in before])
    assert moves.norm() > 1e-3 and differences.norm() < 1e-2 * moves.norm()


def test_a_server_that_is_away_for_a_moment_costs_no_sample(
    sglang_server: LiveServer, warm_model: Path, tmp_path: Path
) -> None:
    """Amid an evaluation, and amid a step: all its connections break."""
    with fault_proxy(sglang_server.url) as proxy:
        tree = recipe_on([proxy.url], warm_model, tmp_path / "run")
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


def test_log_probs_that_are_not_the_trainers_stop_the_run(
    sglang_server: LiveServer, warm_model: Path, tmp_path: Path
) -> None:
    def lower(answer: dict[str, Any]) -> dict[str, Any]:
        rows = [[value - 1.0, *rest] for value, *rest in answer["meta_info"]["output_token_logprobs"]]
        return answer | {"meta_info": answer["meta_info"] | {"output_token_logprobs": rows}}

    with fault_proxy(sglang_server.url) as proxy:
        tree = recipe_on([proxy.url], warm_model, tmp_path / "run")
        tree["self_test"], tree["evaluation"] = {"enabled": False}, {"before": False}
        proxy.faults["/generate"] = [None] + [changed(lower)] * 1000
        ended = run(tree)
    errors = "".join(ended.stderr)
    assert ended.codes == [2] and "Traceback" not in ended.text, ended.text
    assert "train/mismatch_k3 is 0.718, and train.max_mismatch_k3 is 0.5" in errors, errors
    assert not list((tmp_path / "run").glob("checkpoints/step_*")), "the step is not saved"


def train_and_break(file: str) -> None:
    """An error of the trainer's own, while the next step's rollouts, which never come, are being sampled."""
    from megatron_hdpo import cli
    from megatron_hdpo.rollout.sglang.api import ServerApi
    from megatron_hdpo.sampling.prefetch import PrefetchedRollouts
    from megatron_hdpo.training.learner import Learner

    begin = PrefetchedRollouts.begin

    async def never(*args: Any) -> Any:
        await asyncio.sleep(600)

    def begin_in_vain(self: Any, *args: Any) -> None:
        ServerApi.generate = never  # type: ignore[method-assign]
        begin(self, *args)

    def learn(self: Any, groups: Any, step: int) -> Any:
        time.sleep(0.5)
        raise RuntimeError("the trainer broke")

    PrefetchedRollouts.begin, Learner.learn = begin_in_vain, learn  # type: ignore[method-assign]
    cli.main(["train", file])


@pytest.mark.fault(
    "the trainer fails while rollouts are sampled ahead",
    phase="learning",
    seen="the error; the run ends and waits for no rollout",
    lost="the steps since the last checkpoint",
)
def test_an_error_while_rollouts_are_sampled_ahead_ends_the_run(sglang_server: LiveServer, tmp_path: Path) -> None:
    tree = recipe_on([sglang_server.url], sglang_server.model, tmp_path / "run")
    tree["rollout"]["ahead"] = 1
    tree["self_test"] = {"enabled": False}
    tree["evaluation"] = {"before": False}
    del tree["data"]["evaluation"]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    ended = run_world(1, train_and_break, str(file), timeout=300)
    assert ended.codes == [1] and "RuntimeError: the trainer broke" in ended.text, f"{ended.codes}\n{ended.text}"


def kill_servers_of(folder: Path) -> None:
    for process in servers_under(folder):
        with suppress(psutil.Error):  # gone already, with its parent
            if "supervisor.py" not in " ".join(process.cmdline()):
                process.kill()


def train_and_lose_the_server(file: str) -> None:
    """The only server is killed when the first of step 2's rollouts has come."""
    from megatron_hdpo import cli
    from megatron_hdpo.sampling.sampler import SamplingJob

    take, versions = SamplingJob._take, []

    def take_and_kill(self: Any, result: Any) -> None:
        take(self, result)
        assert self.sampler.engine.shared_gpu.trainer.weights_away, "while servers sample"
        version = self.sampler.engine.weight_version
        if version == 1 and 1 not in versions:
            kill_servers_of(Path(file).parent)
        versions.append(version)

    SamplingJob._take = take_and_kill  # type: ignore[method-assign]
    cli.main(["train", file])


@pytest.mark.slow
@pytest.mark.fault(
    "the only server of a rank is killed",
    phase="sampling",
    seen="a warning; the weights are sent to its successor",
    lost="nothing",
)
def test_a_run_starts_its_servers_and_outlives_their_death(
    sglang_config: ServerConfig, sglang_model: Path, tmp_path: Path
) -> None:
    tree = recipe_on([], sglang_model, tmp_path / "run") | {"warmup": WARMUP}
    servers = yaml.safe_load(sglang_config.model_dump_json(exclude_defaults=True))
    tree["rollout"]["sglang"] = {"servers": servers, "sync": {"min_peak": 0}, "trainer_memory": "all"}
    tree["rollout"]["max_new_tokens"] = 64
    tree["checkpoint"]["export"] = True
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
    exported = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert all(tensor.isfinite().all() and tensor.any() for tensor in exported.values()), "read after they came home"
    assert wait_until(lambda: not servers_under(tmp_path)), servers_under(tmp_path)
