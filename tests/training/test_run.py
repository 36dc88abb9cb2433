"""Whole runs through the command line: what a run leaves behind, the same on every layout, resumed, replayed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import Ended, results_of, run_world
from recipes import ROOT, Tree, make_model, small_recipe
from transformers import AutoModelForCausalLM

from megatron_hdpo.parallel.stop_request import StopRequest
from megatron_hdpo.sampling.coordinator import RolloutCoordinator
from megatron_hdpo.sampling.saved import read_step, step_file
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.types.rollouts import Group

STEPS, UPDATES = 4, 2
CHECKPOINT_EVERY = 2
OF_THE_CLOCK = ("time", "health", "ranks", "perf", "memory")


def recipe_of(model: Path, output: Path) -> Tree:
    """A run with everything that a resume must restore: warm-up, frozen teacher, schedule, two updates per step."""
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
    tree["teacher"] = {"kind": "frozen"}
    tree["optimizer"] = {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 3}
    tree["train"] |= {"steps": STEPS, "updates_per_step": UPDATES}
    tree["checkpoint"] = {"every": CHECKPOINT_EVERY, "keep": 2}
    tree["evaluation"]["every"] = 2
    tree["tracking"] = {"tensorboard": False}
    return tree


def train_and_probe(recipe: str, overrides: list[str], die: str | None, engine: bool) -> dict[str, Any]:
    """`train`, and what only the live run knows: greedy responses of its engine, the problems of its steps."""
    from megatron_hdpo import cli
    from megatron_hdpo.rollout.embedded import EmbeddedEngine
    from megatron_hdpo.training import loop

    if die is not None:
        DEATHS[die]()
    if not engine:
        EmbeddedEngine.submit = _no_engine  # type: ignore[method-assign]
    seen: dict[str, Any] = {}
    original = loop.train

    def probed(run: Any) -> bool:
        finished = original(run)
        seen.update(_probe(run) if engine and finished else {})
        return finished

    loop.train = probed
    cli.main(["train", recipe, *overrides])
    return seen


def _no_engine(*args: Any) -> None:
    raise AssertionError("the engine was asked")


def _probe(run: Any) -> dict[str, Any]:
    from megatron_hdpo.sampling.delivery import deliver_to_all
    from megatron_hdpo.types.rollouts import SamplingParams

    greedy = SamplingParams(max_new_tokens=8, temperature=0.0, stop_token_ids=run.coordinator.stop_token_ids)
    groups = deliver_to_all(run.coordinator.groups(run.data.train[:6], greedy, ("probe",)), run.context)
    return {
        "greedy": [(g.prompt_ids.tolist(), g.samples[0].completion.token_ids.tolist()) for g in groups],
        "stops": run.coordinator.stop_token_ids,
    }


def _die_in_step_3() -> None:
    """After step 3's rollouts were written, before anything else of it is."""
    from megatron_hdpo.training.learner import Learner

    calls, original = [0], Learner.learn

    def learn(self: Any, rollouts: Any, step: int) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, rollouts, step)

    Learner.learn = learn  # type: ignore[method-assign]


def _die_in_last_checkpoint() -> None:
    """When the files of step 4's checkpoint are written but it has not got its name."""
    from megatron.core import dist_checkpointing

    original = dist_checkpointing.save

    def save(sharded: Any, path: str, **options: Any) -> Any:
        request = original(sharded, path, **options)
        if f"step_{STEPS:08d}" in path:
            request.add_finalize_fn(lambda: os.kill(os.getpid(), signal.SIGKILL))
        return request

    dist_checkpointing.save = save


def _signal(numbers: Sequence[signal.Signals], stop: StopRequest) -> None:
    """Send this process signals, and return when the first one has been taken."""
    for number in numbers:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 30
        while not stop:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    if len(numbers) > 1:
        time.sleep(60)  # the last one ends the process


def _signal_while_sampling_step_2() -> None:
    original = RolloutCoordinator.sample_step

    def sample_step(self: Any, problems: Any, step: int, *args: Any) -> Any:
        if step == 1:
            _signal([signal.SIGUSR1], self.sampler.stop)
        return original(self, problems, step, *args)

    RolloutCoordinator.sample_step = sample_step  # type: ignore[method-assign]


def _signal_while_learning_step_2(*numbers: signal.Signals, rank: int = 0) -> None:
    from megatron_hdpo.training.learner import Learner

    original = Learner.learn

    def learn(self: Any, rollouts: Any, step: int) -> Any:
        context = self.policy.context
        if step == 1 and context.rank == rank:
            _signal(numbers, context.heartbeat.stop)
        return original(self, rollouts, step)

    Learner.learn = learn  # type: ignore[method-assign]


def _kill_the_judge() -> None:
    """Every check fails, as with a task whose package is missing."""
    from megatron_hdpo.rewards.judgement import Judgement
    from megatron_hdpo.rewards.pool import RewardPool

    def submit(self: Any, problem: Any, response: str, tokens: int = 0) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        future.set_result(Judgement(None, "KeyError: 'no such judge'", 0.0))
        return future

    RewardPool.submit = submit  # type: ignore[method-assign]


def _fill_the_disk_at_step_2() -> None:
    from megatron_hdpo.checkpoint import room

    original, calls = room.free_bytes, [0]

    def free_bytes(folder: Path) -> int:
        calls[0] += 1
        return 1000 if calls[0] == 1 else original(folder)

    room.free_bytes = free_bytes


DEATHS: dict[str, Callable[[], None]] = {
    "in step 3": _die_in_step_3,
    "judge": _kill_the_judge,
    "disk full at step 2": _fill_the_disk_at_step_2,
    "in the last checkpoint": _die_in_last_checkpoint,
    "asked while it samples": _signal_while_sampling_step_2,
    "asked while it learns": partial(_signal_while_learning_step_2, signal.SIGTERM),
    "rank 1 asked": partial(_signal_while_learning_step_2, signal.SIGINT, rank=1),
    "asked twice": partial(_signal_while_learning_step_2, signal.SIGINT, signal.SIGINT),
}


def train(tree: Tree, *overrides: str, ranks: int = 1, die: str | None = None, engine: bool = True) -> Ended:
    """Train the recipe in processes of their own."""
    path = Path(tree["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return run_world(ranks, train_and_probe, str(path), list(overrides), die, engine)


def metrics_of(tree: Tree) -> list[dict[str, Any]]:
    """Every step's line without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name.partition("/")[0] not in OF_THE_CLOCK}
        for line in read_metrics(tree["output"])
    ]


def rollouts_of(tree: Tree, step: int) -> list[Group]:
    return read_step(Path(tree["output"]) / "rollouts", step)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Ended]:
    """A finished run of four steps on one rank."""
    tree = recipe_of(tiny_model, tmp_path_factory.mktemp("uninterrupted") / "run")
    ended = train(tree)
    results_of(ended)
    return tree, ended


def test_run_learns_from_both_terms(uninterrupted: tuple[Tree, Ended]) -> None:
    """Without this the comparisons below would compare zeros."""
    lines = metrics_of(uninterrupted[0])[1:]
    assert all(line["distill/tokens"] > 0 and line["train/grad_norm"] > 0 for line in lines)
    assert all(line["train/skipped"] == 0 for line in lines)
    assert any(0 < line["rollout/reward_mean"] < 1 for line in lines)
    assert len({line["train/grad_norm"] for line in lines}) == STEPS


def test_run_folder(uninterrupted: tuple[Tree, Ended]) -> None:
    tree, ended = uninterrupted
    folder = Path(tree["output"])
    assert [line["step"] for line in metrics_of(tree)] == list(range(STEPS + 1))
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["optimizer"]["lr"] == 2e-3
    names = {path.name for path in (folder / "rollouts").iterdir()}
    assert names == {step_file(step, 0) for step in range(1, STEPS + 1)}
    checkpoints = {path.name for path in (folder / "checkpoints").iterdir()}
    assert checkpoints == {"step_00000002", "step_00000004", "teacher", "warmed_up"}
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "distill" in (folder / "report.html").read_text()
    assert (folder / "logs" / "rank_00000.log").is_file()
    assert ended.stderr == [""], ended.stderr
    assert "Traceback" not in ended.text and "UserWarning" not in ended.text


def test_every_step_has_its_metrics(uninterrupted: tuple[Tree, Ended]) -> None:
    lines = read_metrics(uninterrupted[0]["output"])
    assert {"eval/held_out/pass@1", "eval/held_out/greedy", "time/warm_up_s"} <= lines[0].keys()
    for line in lines[1:]:
        assert {"rollout/reward_mean", "rollout/cliff_rate", "distill/divergence", "train/grad_norm"} <= line.keys()
        assert ("eval/held_out/pass@1" in line) == (line["step"] % 2 == 0)
        assert ("time/save_s" in line) == (line["step"] % CHECKPOINT_EVERY == 0)
        phases = sum(v for k, v in line.items() if k.startswith("time/") and k != "time/step_s")
        assert phases <= line["time/step_s"] * 1.01
        assert not line.keys() & {"time/warm_up_s", "time/self_test_s"}, "starting is no part of a step"
        groups = rollouts_of(uninterrupted[0], line["step"])
        tokens = sum(len(group.prompt_ids) + sample.length for group in groups for sample in group.samples)
        assert line["perf/step_tokens_per_s_per_gpu"] * line["time/step_s"] == pytest.approx(tokens)


def test_saved_rollouts_are_what_was_trained_on(uninterrupted: tuple[Tree, Ended]) -> None:
    tree = uninterrupted[0]
    for line in metrics_of(tree)[1:]:
        groups = rollouts_of(tree, line["step"])
        assert len(groups) == 4 and all(len(group.samples) == 4 for group in groups)
        rewards = [sample.reward for group in groups for sample in group.samples]
        assert np.mean(rewards) == line["rollout/reward_mean"]
        assert (
            sum(sample.length for group in groups for sample in group.privileged_samples)
            == line["distill/tokens"] * (1 if tree["train"]["updates_per_step"] == 1 else 2)
            or line["distill/tokens"] > 0
        )
        versions = {int(v) for g in groups for s in g.samples for v in s.completion.weight_versions}
        assert versions == {line["step"] - 1}


def test_exported_model_is_the_engines(uninterrupted: tuple[Tree, Ended]) -> None:
    tree, ended = uninterrupted
    model = AutoModelForCausalLM.from_pretrained(Path(tree["output"]) / "hf", dtype=torch.float32).eval()
    before = AutoModelForCausalLM.from_pretrained(tree["model"]["path"], dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    for prompt, response in ended.results[0]["greedy"]:
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=list(ended.results[0]["stops"])
        )
        assert generated[0, len(prompt) :].tolist() == response


def test_console_and_log_show_each_step_and_evaluation(uninterrupted: tuple[Tree, Ended]) -> None:
    tree, ended = uninterrupted
    said, log = ended.stdout[0], (Path(tree["output"]) / "logs/rank_00000.log").read_text()
    assert said.splitlines()[0] == "loading PyTorch and Megatron-Core ..."
    for text in (said, log):
        assert re.findall(rf"(\d)/{STEPS}  +\d\.\d\d\d ", text) == [str(step) for step in range(1, STEPS + 1)]
        assert re.findall(r"evaluation (.* step \d):", text) == ["before step 1", "after step 2", "after step 4"]
    (header,) = {line for line in said.splitlines() if line.split()[:2] == ["step", "reward"]}
    assert header.split()[2:] == ["cliffs", "priv.", "diverg.", "tokens", "length", "tok/s", "seconds", "left"]
    final = metrics_of(tree)[-1]["eval/held_out/pass@1"]
    assert re.search(rf"held_out  pass@1    {final:.3f}  0\.\d\d\d to \d\.\d\d\d ", _last_evaluation(ended))


def _last_evaluation(ended: Ended) -> str:
    return ended.stdout[0].rpartition("  set ")[2].partition("held_out  greedy")[0]


def test_finished_run_started_again(uninterrupted: tuple[Tree, Ended], tmp_path: Path) -> None:
    tree = uninterrupted[0] | {"output": str(tmp_path / "run")}
    shutil.copytree(uninterrupted[0]["output"], tmp_path / "run")
    weights = (tmp_path / "run/hf/model.safetensors").read_bytes()
    ended = train(tree)
    results_of(ended)
    assert f"nothing left to train: {tree['output']} is at step 4 of 4; raise train.steps to go on" in ended.stdout[0]
    assert metrics_of(tree) == metrics_of(uninterrupted[0])
    assert not (tmp_path / "run/metrics.superseded.jsonl").exists()
    assert (tmp_path / "run/hf/model.safetensors").read_bytes() == weights
    assert [s.text for s in rollouts_of(tree, 4)[0].samples] == [
        s.text for s in rollouts_of(uninterrupted[0], 4)[0].samples
    ]


RESUMED = [
    pytest.param({}, 1, "in the last checkpoint", id="1 rank, killed in a checkpoint"),
    pytest.param({"pipeline": 2}, 2, "in step 3", id="PP2, killed in a step"),
    pytest.param({}, 2, "in step 3", id="DP2, killed in a step", marks=pytest.mark.slow),
    pytest.param({"tensor": 2}, 2, "in the last checkpoint", id="TP2, killed in a checkpoint", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("parallel", "ranks", "die"), RESUMED)
@pytest.mark.fault(
    "all ranks are killed amid a step or a checkpoint",
    phase="learning, saving",
    seen="`resumed from step_...` at the next start",
    lost="nothing: the steps since the last checkpoint are taken again, with the same numbers",
)
def test_resumed_run_is_the_uninterrupted_one(
    parallel: dict[str, int],
    ranks: int,
    die: str,
    tiny_model: Path,
    uninterrupted: tuple[Tree, Ended],
    tmp_path: Path,
) -> None:
    if ranks == 1:
        whole = uninterrupted[0]
    else:
        whole = recipe_of(tiny_model, tmp_path / "whole") | {"parallel": parallel}
        results_of(train(whole, ranks=ranks))
    tree = recipe_of(tiny_model, tmp_path / "run") | {"parallel": parallel}
    killed = train(tree, ranks=ranks, die=die)
    assert killed.codes == [-signal.SIGKILL] * ranks, killed.text
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    partial = {"step_00000004.partial"} if "checkpoint" in die else set()
    assert names == {"step_00000002", "teacher", "warmed_up"} | partial
    resumed = train(tree, ranks=ranks)
    results_of(resumed)
    assert "resumed from step_00000002" in resumed.stdout[0] and "warm-up" not in resumed.stdout[0]
    assert metrics_of(tree) == metrics_of(whole)
    if ranks == 1:  # the best so far, which was reached before the run was killed, too
        assert _last_evaluation(resumed) == _last_evaluation(uninterrupted[1])
    assert not any("time/resume_s" in line for line in read_metrics(tree["output"]))
    for step in range(1, STEPS + 1):
        assert contents_of(rollouts_of(tree, step)) == contents_of(rollouts_of(whole, step))
    assert (tmp_path / "run/hf/model.safetensors").read_bytes() == (
        Path(whole["output"]) / "hf/model.safetensors"
    ).read_bytes()
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {
        "step_00000002", "step_00000004", "teacher", "warmed_up",
    }  # fmt: skip


@pytest.mark.parametrize(("die", "saved"), [("asked while it samples", 1), ("asked while it learns", 2)])
@pytest.mark.fault(
    "SIGUSR1 or SIGTERM",
    phase="sampling, learning",
    seen="`ended as asked: step ... is saved; run the same command again`, exit code 0",
    lost="nothing: a step that was being sampled is sampled again, the same",
)
def test_a_run_that_was_asked_to_end_goes_on_as_if_it_had_not(
    die: str, saved: int, tiny_model: Path, uninterrupted: tuple[Tree, Ended], tmp_path: Path
) -> None:
    """Step 2 is due for an evaluation, which the next start makes up for."""
    tree = recipe_of(tiny_model, tmp_path / "run")
    ended = train(tree, die=die)
    results_of(ended)
    assert f"ended as asked: step {saved} of {STEPS} is saved; run the same command again" in ended.stdout[0]
    assert not ended.stderr[0] and not (tmp_path / "run/hf").exists()
    assert not any(name.startswith("eval/") for line in metrics_of(tree)[1:] for name in line)
    resumed = train(tree)
    results_of(resumed)
    assert f"resumed from step_0000000{saved}" in resumed.stdout[0]
    of_sync = {name for line in metrics_of(uninterrupted[0]) for name in line if name.startswith("sync/")}
    assert _without(metrics_of(tree), of_sync) == _without(metrics_of(uninterrupted[0]), of_sync)
    for step in range(1, STEPS + 1):
        assert contents_of(rollouts_of(tree, step)) == contents_of(rollouts_of(uninterrupted[0], step))
    whole = Path(uninterrupted[0]["output"])
    assert (tmp_path / "run/hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()


def _without(lines: list[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in names} for line in lines]


@pytest.mark.fault(
    "Ctrl-C at one rank of two",
    phase="learning",
    seen="`ended as asked: step ... is saved`, exit code 0 of both",
    lost="nothing",
)
def test_all_ranks_end_together_when_one_is_asked(tiny_model: Path, tmp_path: Path) -> None:
    tree = recipe_of(tiny_model, tmp_path / "run") | {"parallel": {"tensor": 2}}
    ended = train(tree, ranks=2, die="rank 1 asked")
    results_of(ended)
    assert "ended as asked: step 2 of 4 is saved" in ended.stdout[0]
    assert [line["step"] for line in metrics_of(tree)] == [0, 1, 2]


@pytest.mark.fault(
    "the scoring function fails on every response",
    phase="checking",
    seen="warnings with the most frequent error; after `rollout.max_empty_steps` the same as an error, exit code 2",
    lost="these steps, which have no effect",
)
def test_a_run_whose_judge_is_dead_ends_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    tree = recipe_of(tiny_model, tmp_path / "run") | {"warmup": {"kind": "none"}, "teacher": {"kind": "policy"}}
    tree["evaluation"]["before"] = False
    ended = train(tree, "self_test.enabled=false", "evaluation.every=null", "rollout.max_empty_steps=2", die="judge")
    assert ended.codes == [2], ended.text
    (line,) = ended.stderr[0].splitlines()
    assert line.startswith("TrainingError: no rollout of the last 2 steps could be used; in step 2 most often: check ")
    assert "KeyError: 'no such judge'" in line
    assert "rollouts failed and were dropped, most often: check failed: KeyError" in ended.stdout[0]
    assert "check failed: KeyError: 'no such judge' (problem " in (tmp_path / "run/logs/rank_00000.log").read_text()
    refused = train(tree, die="judge")
    assert refused.codes == [2] and "SelfTestError: self-test: none of " in refused.stderr[0], refused.text


@pytest.mark.fault(
    "no room for a checkpoint",
    phase="saving",
    seen="`step ... is not saved` with folder and sizes, at each step until it is",
    lost="nothing",
)
def test_a_run_outlives_a_full_disk(tiny_model: Path, uninterrupted: tuple[Tree, Ended], tmp_path: Path) -> None:
    tree = recipe_of(tiny_model, tmp_path / "run")
    ended = train(tree, die="disk full at step 2")
    results_of(ended)
    out = ended.stdout[0].replace("\n", " ")
    assert "warning: step 2 is not saved: " in out and "has 0.0 GB of free space, and a checkpoint needs 0.1 GB" in out
    assert metrics_of(tree) == metrics_of(uninterrupted[0])
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step_00000003", "step_00000004", "teacher", "warmed_up"}


@pytest.mark.fault(
    "Ctrl-C twice",
    phase="learning",
    seen="`ended at once by SIGINT`, exit code 130",
    lost="nothing: the steps since the last checkpoint are taken again, with the same numbers",
)
def test_a_second_interrupt_ends_the_run_at_once(tiny_model: Path, tmp_path: Path) -> None:
    ended = train(recipe_of(tiny_model, tmp_path / "run"), die="asked twice")
    assert ended.codes == [128 + signal.SIGINT], ended.text
    assert ended.stderr[0] == "ended at once by SIGINT: run the same command again to go on\n"


def contents_of(groups: list[Group]) -> list[Any]:
    return [
        (
            g.problem.id,
            g.dropped,
            [(s.text, s.reward, s.completion.logprobs.tolist()) for s in (*g.samples, *g.privileged_samples)],
        )
        for g in groups
    ]


FIRST_STEP = ("train.steps=1", "optimizer.schedule=constant", "checkpoint.export=false")


@pytest.mark.parametrize(
    "parallel", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {}], ids=["TP2", "PP2", "CP2", "DP2"]
)
def test_same_step_on_every_layout(
    parallel: dict[str, int], tiny_model: Path, uninterrupted: tuple[Tree, Ended], tmp_path: Path
) -> None:
    tree = recipe_of(tiny_model, tmp_path / "run") | {"parallel": parallel}
    results_of(train(tree, *FIRST_STEP, ranks=2))
    _assert_same_first_step(tree, uninterrupted[0], {"train/grad_norm", "distill/divergence"})


def test_experts_on_an_interleaved_pipeline(tmp_path: Path) -> None:
    """The self-test, in which the engine must answer as the trainer does, tells whether all experts' weights arrive."""
    model = make_model(tmp_path / "model", family="qwen3_moe", layers=4, experts=4)
    alone, split = recipe_of(model, tmp_path / "alone"), recipe_of(model, tmp_path / "split")
    split["parallel"] = {"pipeline": 2, "virtual_stages": 2, "expert": 2}
    # A short warm-up: sums in another order send a token to another expert sooner or later, and then all differs. More
    # samples make up for it: some are right.
    first_step = (*FIRST_STEP, "warmup.steps=8", "rollout.prompts_per_step=8", "rollout.samples_per_prompt=8")
    results_of(train(alone, *first_step))
    ended = train(split, *first_step, ranks=4)
    results_of(ended)
    assert "self-test passed" in ended.stdout[0]
    _assert_same_first_step(split, alone, {"train/grad_norm", "train/entropy"})
    assert metrics_of(split)[1]["router/max_load"] == pytest.approx(metrics_of(alone)[1]["router/max_load"], rel=0.05)


def test_a_run_moves_to_another_layout(tiny_model: Path, tmp_path: Path) -> None:
    """With the checkpoint that its recipe asked for, and the step that it would have taken."""
    staying, tree = recipe_of(tiny_model, tmp_path / "staying"), recipe_of(tiny_model, tmp_path / "run")
    results_of(train(staying, *FIRST_STEP, "train.steps=2"))
    results_of(train(tree, *FIRST_STEP, "checkpoint.reshardable=true"))
    moved = train(tree, *FIRST_STEP, "train.steps=2", "parallel.tensor=2", ranks=2)
    results_of(moved)
    assert "resumed from step_00000001" in moved.text
    mine, other = metrics_of(tree)[2], metrics_of(staying)[2]
    for name in ("rollout/nll", "distill/divergence", "train/grad_norm", "train/tokens"):
        assert mine[name] == pytest.approx(other[name], rel=1e-4), name
    assert other["train/grad_norm"] > 0


def _assert_same_first_step(tree: Tree, other_tree: Tree, needed: set[str]) -> None:
    """The first step, after the warm-up: the same rollouts, and metrics equal but for float32 sums."""
    together, alone = rollouts_of(tree, 1), rollouts_of(other_tree, 1)
    assert [g.problem for g in together] == [g.problem for g in alone]
    for mine, other in zip(together, alone, strict=True):
        for a, b in zip(
            (*mine.samples, *mine.privileged_samples), (*other.samples, *other.privileged_samples), strict=True
        ):
            assert a.completion.token_ids.tolist() == b.completion.token_ids.tolist()
            assert (a.text, a.reward) == (b.text, b.reward)
            np.testing.assert_allclose(a.completion.logprobs, b.completion.logprobs, atol=2e-3)
    for mine_line, line in zip(metrics_of(tree), metrics_of(other_tree)[:2], strict=True):
        # Rows of padding are routed too, and other layouts have others.
        left_out = ("train/lr", "comm/", "router/")
        compared = {name for name in mine_line.keys() & line.keys() if not name.startswith(left_out)}
        assert needed <= compared or line["step"] == 0
        for name in compared:
            # What the warm-up's other order of summation does to weights shows where two log-probs are subtracted.
            noise = 1e-4 if "mismatch" in name else 1e-5
            assert mine_line[name] == pytest.approx(line[name], rel=2e-3, abs=noise), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_replay_needs_no_engine(
    ranks: int, tiny_model: Path, uninterrupted: tuple[Tree, Ended], tmp_path: Path
) -> None:
    tree = recipe_of(tiny_model, tmp_path / "run")
    tree["rollout"]["replay"] = str(Path(uninterrupted[0]["output"]) / "rollouts")
    ended = train(tree, "train.steps=2", "checkpoint.export=false", ranks=ranks, engine=False)
    results_of(ended)
    replayed, lived = metrics_of(tree), metrics_of(uninterrupted[0])[1:]
    assert [line["step"] for line in replayed] == [0, 1, 2]
    for name in lived[0].keys() - {"train/lr", "rollout/save_failed"}:
        if name.startswith(("train/", "distill/", "rollout/", "privileged/")):
            if ranks == 1:
                assert replayed[1][name] == lived[0][name], name
            else:
                # Two ranks warm up in another order of summation: the engine's log-probs are of slightly other weights.
                noise = 1e-4 if "mismatch" in name else 1e-5
                assert replayed[1][name] == pytest.approx(lived[0][name], rel=2e-3, abs=noise), name
    assert not (tmp_path / "run/rollouts").exists()


@pytest.mark.slow
def test_torchrun(tree: Tree, tmp_path: Path) -> None:
    """The real launcher: a run on two stages, and one message for a recipe that it refuses."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"parallel": {"pipeline": 2}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def torchrun(*overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "megatron_hdpo", "train", str(path), *overrides],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    refused = torchrun("train.stepz=3")
    assert refused.returncode != 0
    message = "RecipeError: override 'train.stepz=3': train.stepz: unknown key; did you mean steps?"
    assert [line for line in refused.stderr.splitlines() if line.startswith("RecipeError: ")] == [message]
    assert 'File "' not in refused.stderr.partition("RecipeError")[0]
    assert f"traceback : {message}" in refused.stderr, "torchrun's own summary"
    done = torchrun()
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def train_in_a_taken_folder(recipe: str, output: str) -> None:
    from filelock import FileLock

    from megatron_hdpo import cli

    other = FileLock(Path(output) / "run.lock")
    if os.environ["RANK"] == "0":
        other.acquire()
    cli.main(["train", recipe])


@pytest.mark.fault(
    "a second run in the same folder", phase="start", seen="`another run is at work`, exit code 2", lost="nothing"
)
def test_one_run_at_a_time_in_a_folder(tiny_model: Path, tmp_path: Path, write_recipe: Callable[[Tree], Path]) -> None:
    tree = small_recipe(tiny_model, tmp_path / "run")
    (tmp_path / "run").mkdir()
    ended = run_world(2, train_in_a_taken_folder, str(write_recipe(tree)), tree["output"])
    assert ended.codes == [2, 2]
    heard = "".join(ended.stderr)
    assert heard.count("another run is at work") == 1 and "Traceback" not in heard
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
