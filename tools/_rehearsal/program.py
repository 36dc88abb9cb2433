"""The program of a run on one rank of the null GPU: build, load, teachers, two steps, a checkpoint.

All of it is the run's own, with these exceptions: rollouts are made up, servers and weight files are stand-ins, and a
checkpoint's bytes are counted instead of written.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from _rehearsal.folder import write_folder
from _rehearsal.meter import MeasuringConsole, Meter
from _rehearsal.replaced import Rehearsed, note_shapes, replaced
from _rehearsal.servers import ServerMemory, StandInFleet, stand_ins
from _rehearsal.synthetic import groups_of
from megatron_hdpo.checkpoint import store
from megatron_hdpo.config import Recipe
from megatron_hdpo.config.precision import resolve
from megatron_hdpo.costs.workload import Workload
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.parallel.context import ParallelContext, start
from megatron_hdpo.parallel.stop_request import StopRequest
from megatron_hdpo.planner.made_up import PromptsOfLength
from megatron_hdpo.sampling.step_rollouts import on_every_rank
from megatron_hdpo.teachers.config import ExternalTeacherConfig
from megatron_hdpo.teachers.teacher import PolicyTeacher
from megatron_hdpo.training import loop
from megatron_hdpo.training import run as run_module
from megatron_hdpo.training import start as start_module
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.training.policy_sync import PolicySync
from megatron_hdpo.training.run import Run


def rehearse(
    recipe: Recipe, architecture: Architecture, teacher: Architecture | None, workload: Workload, meter: Meter,
    memory: ServerMemory | None, steps: int = 2,
) -> Rehearsed:  # fmt: skip
    """Run the recipe's program on this rank, measured by `meter`.

    teacher: architecture of an external teacher. memory: of a server on this GPU. Raises what the program raises;
    `meter.now` then names the phase.
    """
    with tempfile.TemporaryDirectory() as folder, stand_ins(memory) as fleets, meter.watching():
        recipe = _on_given_servers(_settled(recipe, architecture, teacher, Path(folder)), fleets)
        context = start(recipe.parallel, "cuda", recipe.seed)
        meter.context = context
        done = Rehearsed(context, workload, 0, fleets=fleets)
        with replaced(done):
            run = _build(recipe, architecture, context, workload, MeasuringConsole(meter))
            done.head_chunk = run.policy.head_chunk
            with run.console.phase("prepare"):
                start_module._begin(run)
            with run.console.phase("sync"):
                run.sync(run.step)
            groups = groups_of(workload, run.objective, architecture.vocab_size)
            run.policy.on_training = partial(note_shapes, done)
            with patch.object(loop, "collect_step_rollouts", lambda run: (on_every_rank(groups), {})):
                for _ in range(steps):
                    done.shapes.clear()
                    loop._step(run)
            with run.console.phase("save"):
                run.checkpoints.save(run.step, run.policy, run.learner.state_dict())
            run.sync.close()
            run.engine.close()
        return done


def _settled(recipe: Recipe, architecture: Architecture, teacher: Architecture | None, folder: Path) -> Recipe:
    """Return the recipe with folders that exist, in the precision of a GPU, and without what a rehearsal leaves out."""
    path = write_folder(architecture, folder / "model")
    recipe = resolve(recipe, "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype)
    changes: dict[str, Any] = {
        "output": folder / "run",
        "model": recipe.model.model_copy(update={"path": str(path)}),
        "warmup": recipe.warmup.model_copy(update={"kind": "none"}),
    }
    if isinstance(recipe.teacher, ExternalTeacherConfig) and teacher is not None:
        other = write_folder(teacher, folder / "teacher")
        changes["teacher"] = recipe.teacher.model_copy(update={"path": str(other)})
    return recipe.model_copy(update=changes)


def _on_given_servers(recipe: Recipe, fleets: list[StandInFleet]) -> Recipe:
    """Return the recipe with stand-ins in place of servers that somebody else starts."""
    config = recipe.rollout.sglang
    if recipe.rollout.engine != "sglang" or config.placement != "given":
        return recipe
    fleets.append(StandInFleet(config.servers, len(config.urls), None))
    fleets[-1].start()
    sglang = config.model_copy(update={"urls": fleets[-1].urls, "router": None})
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"sglang": sglang})})


def _build(
    recipe: Recipe, architecture: Architecture, context: ParallelContext, workload: Workload, console: MeasuringConsole
) -> Run:
    """Build a run as `training.run.build_run` does, without data, tokenizer, rewards and record."""
    policy = run_module._build_policy(recipe, context, console, architecture)
    with console.phase("start engine"):
        built = run_module.start_engine(recipe, policy)
    data = SimpleNamespace(
        prompts=PromptsOfLength(workload.privileged_prompt_tokens), train=[], evaluation=[], order=_Order()
    )
    learner = Learner(
        policy=policy,
        objective=run_module._build_objective(recipe, data),  # type: ignore[arg-type]
        teacher=PolicyTeacher(policy),
        console=console,
        updates_per_step=recipe.train.updates_per_step,
        max_skipped_updates=recipe.train.max_skipped_updates,
    )
    absent: Any = SimpleNamespace(
        coordinator=SimpleNamespace(sampler=SimpleNamespace(stop=StopRequest())),
        open=lambda step: None,
        begin=lambda *_: None,
        begun=0,
        paused=nullcontext,
        stragglers=SimpleNamespace(metrics=lambda step: {}),
    )
    return Run(
        recipe=recipe,
        context=context,
        console=console,
        data=data,  # type: ignore[arg-type]
        policy=policy,
        learner=learner,
        engine=built.engine,
        sync=PolicySync(policy, built.sync),
        rewards=absent,
        prefetched=absent,
        saver=None,
        failed_rollouts=absent,
        checkpoints=store.CheckpointStore(
            recipe.output, context, recipe.checkpoint.keep, recipe.checkpoint.reshardable
        ),
        record=absent,
        measurements=absent,
    )


class _Order:
    """Order of problems of a run that samples none."""

    def batch(self, step: int, size: int) -> list[Any]:
        """Return no problem."""
        return []
