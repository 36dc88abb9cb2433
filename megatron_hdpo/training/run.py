"""Run: everything that a run holds, built from its recipe.

Steps that fail cheaply come first: recipe and layout, then data, then model, engine and optimizer. An error in a recipe
is reported before any weight is read.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.config import Recipe, RecipeError, check_recipe
from megatron_hdpo.config.check import DEFAULT_IMPORTANCE_CAP, requested_lengths
from megatron_hdpo.config.precision import begun_in, choose_precision, resolve
from megatron_hdpo.data.load import LoadedData
from megatron_hdpo.health.check import check_health
from megatron_hdpo.model.architecture import Architecture, read_architecture
from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.config import OptimizerConfig, choose_spec
from megatron_hdpo.model.dtype_speed import Measure, measure_bfloat16
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.model.trainer_memory import TrainerMemory
from megatron_hdpo.objectives.base import ObjectiveDeps
from megatron_hdpo.objectives.registry import build_objective
from megatron_hdpo.objectives.settings import surrogate_of
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.cores import usable_cores
from megatron_hdpo.parallel.stop_request import StopRequest
from megatron_hdpo.rewards.pool import RewardPool
from megatron_hdpo.rollout.build import BuiltEngine, build_engine
from megatron_hdpo.rollout.engine import Engine
from megatron_hdpo.rollout.sglang.servers.fleet import Report, no_report
from megatron_hdpo.sampling.coordinator import RolloutCoordinator
from megatron_hdpo.sampling.prefetch import PrefetchedRollouts
from megatron_hdpo.sampling.response_text import ResponseText
from megatron_hdpo.sampling.sampler import RolloutSampler
from megatron_hdpo.sampling.saved import Decode
from megatron_hdpo.sampling.saver import RolloutSaver
from megatron_hdpo.teachers.teacher import PolicyTeacher
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.logging import configure_logging
from megatron_hdpo.training.failed_rollouts import FailedRollouts
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.training.load_data import check_enough, check_same, fingerprint, load_data
from megatron_hdpo.training.measurements import Measurements, build_measurements
from megatron_hdpo.training.own_code import check_same_code
from megatron_hdpo.training.policy_sync import PolicySync
from megatron_hdpo.training.record import RunRecord
from megatron_hdpo.training.tokenizer import Tokenizer, check_tokens, load_tokenizer, stop_token_ids
from megatron_hdpo.types.learning import Objective
from megatron_hdpo.weights.load import load_hf


@dataclass
class Run:
    """State of a run between its steps.

    engine: samples the rollouts; `sync` sends weights to it. prefetched: rollouts of this step and the next ones.
    saver: writes them; None where the recipe does not ask for it. failed_rollouts: watches those that fail.
    checkpoints, record: what the run leaves in its folder. step: number of steps that have been taken. saved_step: the
    last one with a checkpoint. accept_changes: whether a resumed run may train on other problems, or by other code of
    the user's own, than before.
    """

    recipe: Recipe
    context: ParallelContext
    console: Console
    data: LoadedData
    policy: Policy
    learner: Learner
    engine: Engine
    sync: PolicySync
    rewards: RewardPool
    prefetched: PrefetchedRollouts
    saver: RolloutSaver | None
    failed_rollouts: FailedRollouts
    checkpoints: CheckpointStore
    record: RunRecord
    measurements: Measurements
    step: int = 0
    saved_step: int = 0
    accept_changes: bool = False

    @property
    def stop_request(self) -> StopRequest:
        """Request that the run ends early."""
        return self.coordinator.sampler.stop

    @property
    def architecture(self) -> Architecture:
        """Sizes of the policy."""
        return self.policy.architecture

    @property
    def objective(self) -> Objective:
        """Objective that the learner trains for."""
        return self.learner.objective

    @property
    def coordinator(self) -> RolloutCoordinator:
        """Sampling of groups on all ranks."""
        return self.prefetched.coordinator

    @property
    def whose_samples(self) -> str:
        """Text that marks a number of samples as those of the console's rank alone; "" if there is no other rank."""
        return "on rank 0" if len(self.coordinator.sampling_ranks) > 1 else ""

    def rebuild_optimizer(self, config: OptimizerConfig, total_steps: int) -> None:
        """Build a new optimizer and schedule for the model's current weights."""
        self.policy.optimizer, self.policy.schedule = build_optimizer(
            config, self.policy.ddp, self.context, total_steps
        )

    def close(self, failed: bool) -> None:
        """Stop workers and engine, and close the record."""
        self.prefetched.close()
        if self.saver is not None:
            self.saver.close()
        self.rewards.close()
        self.sync.close()
        self.engine.close()
        self.record.close(failed)


def build_run(
    recipe: Recipe,
    context: ParallelContext,
    resumes: bool = False,
    measure: Measure = measure_bfloat16,
    console: Console | None = None,
    stop_request: StopRequest | None = None,
) -> Run:
    """Build a run from its recipe; the model holds the recipe's checkpoint, nothing is resumed yet. Collective.

    resumes: a checkpoint in the output folder will be loaded, and must fit. measure: compares bfloat16 with float32 on
    this CPU. console: of this rank; default: one on standard output. stop_request: ends the run early when it is made.
    Raises RecipeError, DataError, LayoutError, ... with what is wrong and where.
    """
    console = console or Console(enabled=context.is_leader, progress_s=recipe.tracking.progress_seconds)
    with console.phase("build"):
        stop_request = StopRequest() if stop_request is None else stop_request
        return _build_run(recipe, context, resumes, measure, console, stop_request)


def _build_run(
    recipe: Recipe,
    context: ParallelContext,
    resumes: bool,
    measure: Measure,
    console: Console,
    stop_request: StopRequest,
) -> Run:
    _open_logs(recipe, context, console)
    heartbeat = context.heartbeat
    heartbeat.progress, heartbeat.phase, heartbeat.stop = console.doing, console.innermost, stop_request
    if context.is_leader:
        heartbeat.report = console.print
    checkpoint = recipe.checkpoint
    checkpoints = CheckpointStore(
        recipe.output,
        context,
        checkpoint.keep,
        checkpoint.reshardable,
        checkpoint.verify == "full",
        checkpoint.keep_every,
    )
    if resumes:
        with console.phase("verify checkpoint"):
            checkpoints.set_damaged_aside(console.warn)
    checkpoints.code = check_same_code(recipe, context)
    architecture = read_architecture(recipe.model.path)
    recipe = settle_precision(recipe, architecture, context, console, measure)
    for warning in check_recipe(recipe, architecture, context.world_size):
        console.warn(warning)
    health = check_health(recipe.health, context, console, recipe.output, recipe.model_dump_json())
    if resumes and (latest := checkpoints.latest()) is not None:
        checkpoints.check(latest, architecture, recipe.model.dtype, choose_spec(recipe.model, context.device))
    tokenizer = load_tokenizer(recipe.model.path)
    stop_ids = stop_token_ids(tokenizer, recipe.model.path)
    for warning in check_tokens(tokenizer, stop_ids, architecture.vocab_size, recipe.model.path):
        console.warn(warning)
    rewards = RewardPool(recipe.data.tasks, recipe.reward)
    if recipe.rollout.replay is None:
        rewards.check()
    data = _load_data(recipe, context, console, tokenizer, rewards, architecture.vocab_size)
    if resumes:
        check_enough(recipe, data)
    checkpoints.data = fingerprint(data.train)
    policy = _build_policy(recipe, context, console, architecture)
    with console.phase("start engine") as phase:
        built = start_engine(recipe, policy, phase.note)
    sync = PolicySync(policy, built.sync)
    text = ResponseText(tokenizer)
    sampler = RolloutSampler(built.engine, rewards, text, recipe.rollout.max_retries, stop_request, text.opened_by)
    heartbeat.progress = partial(_progress, console, sampler)
    learner = Learner(
        policy=policy,
        objective=_build_objective(recipe, data),
        # The recipe's teacher may be the model after the warm-up: `start.prepare` sets it.
        teacher=PolicyTeacher(policy),
        console=console,
        updates_per_step=recipe.train.updates_per_step,
        max_skipped_updates=recipe.train.max_skipped_updates,
    )
    rollouts = RolloutCoordinator(
        config=recipe.rollout,
        context=context,
        sampler=sampler,
        prompts=data.prompts,
        stop_token_ids=stop_ids,
        seed=recipe.seed,
        sampling_ranks=built.sampling_ranks,
        restore_weights=sync.restore,
    )
    return Run(
        recipe=recipe,
        context=context,
        console=console,
        data=data,
        policy=policy,
        learner=learner,
        engine=built.engine,
        sync=sync,
        rewards=rewards,
        prefetched=PrefetchedRollouts(
            rollouts,
            partial(data.order.batch, size=recipe.rollout.prompts_per_step),
            joins=recipe.rollout.swap == "mid_generation",
        ),
        saver=_saver(recipe, context, rollouts.sampler.decode),
        failed_rollouts=FailedRollouts(recipe.rollout.max_failed_share, recipe.rollout.max_empty_steps, console.warn),
        checkpoints=checkpoints,
        record=RunRecord(recipe, context, console),
        measurements=build_measurements(recipe, policy, learner.work, console, health),
    )


def settle_precision(
    recipe: Recipe,
    architecture: Architecture,
    context: ParallelContext,
    console: Console,
    measure: Measure = measure_bfloat16,
) -> Recipe:
    """Return the recipe with `dtype: auto` resolved, and print which precision was chosen and why.

    Rank 0 decides for all ranks, as machines may differ. Collective. Raises CheckpointError when a checkpoint in the
    output folder cannot be read.
    """
    begun = begun_in(recipe.output)
    choice = choose_precision(recipe, architecture, context.device.type, begun, measure) if context.is_leader else None
    choice = context.broadcast_object(choice)
    assert choice is not None
    console.print(choice.line)
    if choice.warning is not None:
        console.warn(choice.warning)
    return resolve(recipe, choice.dtype)


def set_threads(recipe: Recipe, local_world_size: int) -> None:
    """Set the CPU threads of this rank: the recipe's number, else an equal share of the cores."""
    cores = len(usable_cores())
    torch.set_num_threads(recipe.threads_per_rank or max(1, cores // local_world_size))


def _open_logs(recipe: Recipe, context: ParallelContext, console: Console) -> None:
    try:
        configure_logging(recipe.output, context.rank, console)
    except OSError as error:
        raise RecipeError(f"output: the folder {recipe.output} cannot be written: {error.strerror}") from error
    # Warnings caused by Megatron but attributed to us by the CPU shim; users need not see them.
    for message in ("The .grad attribute of a Tensor that is not a leaf", "Please use DTensor instead"):
        warnings.filterwarnings("ignore", message=message)


def _progress(console: Console, sampler: RolloutSampler) -> str:
    """Return what this rank does; its answers count apart from the phase, as they also come while it trains."""
    return f"{console.doing() or 'between phases'}, {sampler.answers:,} answers of engine and judges since the start"


def _saver(recipe: Recipe, context: ParallelContext, decode: Decode) -> RolloutSaver | None:
    rollout = recipe.rollout
    if not rollout.save or rollout.replay is not None:
        return None
    return RolloutSaver(recipe.output / "rollouts", context.rank, decode, rollout.save_keep)


def _load_data(
    recipe: Recipe,
    context: ParallelContext,
    console: Console,
    tokenizer: Tokenizer,
    rewards: RewardPool,
    vocab_size: int,
) -> LoadedData:
    """Load the data on every rank: one rank checks it, the others wait for its cache, in no collective's time limit."""
    with console.phase("load data"):
        data = load_data(recipe, tokenizer, rewards, vocab_size)
        check_same(data, context)
    for line in data.report.lines():
        console.print(line)
    return data


def _build_policy(recipe: Recipe, context: ParallelContext, console: Console, architecture: Architecture) -> Policy:
    with console.phase("load model"):
        model = build_model(architecture, context, recipe.model)
        load_hf(model, architecture, context, recipe.model.path)
        context.barrier("weights read")
        ddp = wrap_data_parallel(model, context)
    return Policy(architecture, context, ddp, recipe.train.micro_batch_tokens, head_chunk=recipe.train.head_chunk)


def start_engine(recipe: Recipe, policy: Policy, report: Report = no_report) -> BuiltEngine:
    """Build the recipe's engine; servers that share the policy's GPUs sleep until they get its weights. Collective.

    report: gets the state of this rank's servers while they start.
    """
    rollout = recipe.rollout
    trainer = None
    leaving = rollout.sglang.trainer_memory
    if rollout.engine == "sglang" and rollout.replay is None and leaving != "keep":
        trainer = TrainerMemory(policy, leaving)
    built = build_engine(
        rollout,
        Path(recipe.model.path),
        policy.architecture,
        policy.context,
        recipe.output,
        report=report,
        trainer=trainer,
        lengths=requested_lengths(recipe),
    )
    built.engine.make_room()
    return built


def _build_objective(recipe: Recipe, data: LoadedData) -> Objective:
    config = recipe.objective
    surrogate = surrogate_of(config)
    biased = recipe.rollout.filtered or recipe.rollout.ahead
    if biased and surrogate is not None and surrogate.importance_cap is None:
        surrogate = surrogate.model_copy(update={"importance_cap": DEFAULT_IMPORTANCE_CAP})
        config = config.model_copy(update={"surrogate": surrogate})
    deps = ObjectiveDeps(
        temperature=recipe.rollout.temperature,
        updates_per_step=recipe.train.updates_per_step,
        prompts=data.prompts,
        leakage=recipe.data.leakage,
    )
    return build_objective(config, deps)
