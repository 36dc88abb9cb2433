"""The policy on its ranks: it scores responses and takes optimizer steps.

The trainer calls `score` (forward only) and `update` (forward, backward, optimizer step). Both take the work of this
rank's data-parallel replica and run it through Megatron's pipeline schedule as packed micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import ModelChunks, chunks_of, unwrap
from megatron_hdpo.model.fp8_rules import alignment
from megatron_hdpo.model.gradient_norm import gradient_norm
from megatron_hdpo.model.loss import TokenCounts, micro_batch_loss
from megatron_hdpo.model.micro_batch import (
    LossInputs,
    MicroBatch,
    MicroBatchShape,
    example_micro_batch,
    loss_inputs,
    scoring_micro_batch,
    shape_of,
)
from megatron_hdpo.model.network import HeadlessGPTModel, hidden_rows, recut_head
from megatron_hdpo.model.overlap import gather_weights
from megatron_hdpo.model.packing import RowLayout, bin_by_tokens
from megatron_hdpo.model.pipeline import (
    OnProgress,
    finalize_without_division,
    run_micro_batches,
    same_number_everywhere,
)
from megatron_hdpo.model.router import RouterStatistics
from megatron_hdpo.model.routing_replay import replay_routing
from megatron_hdpo.model.scoring import ScoringContext, ScoringSettings, score_rows, settings_of
from megatron_hdpo.model.step_metrics import TokenSums, step_metrics, sum_over_ranks
from megatron_hdpo.model.trainer_memory import TrainerMemory
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.errors import UserError
from megatron_hdpo.types.learning import (
    Example,
    HiddenOnHost,
    LossSpec,
    Score,
    Scoring,
    ScoringKey,
)
from megatron_hdpo.types.transfer import wait_for_copies


class TrainingError(UserError, RuntimeError):
    """An error that stops the run; the text says what happened, on which rank, and what to do."""


@dataclass(frozen=True)
class Work:
    """One micro-batch of the schedule; `inputs` on the last stage of an update, `scorings` when scoring."""

    batch: MicroBatch
    inputs: LossInputs | None = None
    scorings: tuple[Scoring, ...] = ()


OnTraining = Callable[[Sequence[MicroBatchShape], LossSpec], None]


class Policy:
    """A model that scores (bare or under Megatron's DDP) and, with optimizer and schedule, trains (under DDP).

    The model may consist of chunks (`ModelChunks`). micro_batch_tokens: largest number of rows of a packed micro-batch,
    over all context-parallel ranks. head_chunk: number of tokens that have logits at a time.
    vocab_size: number of tokens that have probability; default: the architecture's. A teacher whose vocabulary is
    padded further than the student's uses the student's. on_training: called with the shapes of every step's
    micro-batches when they have run. memory: moves the training state off the device while servers use it; None: it
    stays.
    """

    def __init__(
        self,
        architecture: Architecture,
        context: ParallelContext,
        ddp: nn.Module,
        micro_batch_tokens: int,
        optimizer: ChainedOptimizer | None = None,
        schedule: OptimizerParamScheduler | None = None,
        head_chunk: int = 1024,
        vocab_size: int | None = None,
    ) -> None:
        self.architecture = architecture
        self.context = context
        self.ddp = ddp
        self.model: HeadlessGPTModel | ModelChunks = unwrap(ddp)
        self.micro_batch_tokens = micro_batch_tokens
        self.optimizer = optimizer
        self.schedule = schedule
        self.head_chunk = head_chunk
        self.vocab_size = vocab_size or architecture.vocab_size
        self.on_training: OnTraining | None = None
        self.memory: TrainerMemory | None = None
        self.model.config.finalize_model_grads_func = finalize_without_division
        self._rows = row_layout(context, alignment(self.model.config))
        self._routers = RouterStatistics(self.model)
        replay_routing(self.model)

    def score(
        self,
        scorings: Sequence[Scoring],
        on_progress: OnProgress | None = None,
        answered: ScoringContext | None = None,
    ) -> dict[ScoringKey, Score]:
        """Score this replica's `scorings` with the current weights; the last pipeline stage gets the scores, others {}.

        answered: the scorings and scores that `scorings` refer to; not needed if none refers to another.
        Collective over all ranks: replicas without work must call it too.
        """
        self._check_at_home()
        answered = answered or ScoringContext({}, {}, {})
        bins = same_number_everywhere(self._scoring_bins(scorings, answered), self.context)
        work = [partial(self._scoring_work, [scorings[i] for i in indices]) for indices in bins]
        scores: dict[ScoringKey, Score] = {}
        with self.context.megatron_calls(), torch.no_grad():
            step = partial(self._score_step, scores, answered)
            rows = [self._rows.rows([scorings[i].num_tokens for i in indices]) for indices in bins]
            run_micro_batches(self.ddp, self.context, work, step, rows=rows, forward_only=True, on_progress=on_progress)
        wait_for_copies(self.context.device)
        return scores

    def head_copy(self, rows: int) -> Tensor:
        """Copy the current head, cut into shards of `rows` rows: this rank's shard [rows, H].

        The vocabulary of a teacher may be padded further than the student's, so its shards may have another size. Last
        pipeline stage only; collective over the tensor-parallel group.
        """
        return recut_head(self.model.head_weight().detach(), rows, self.context.groups.tp)

    @property
    def head_rows(self) -> int:
        """Number of rows of this rank's shard of the head."""
        tensor = self.context.layout.tensor
        return self.architecture.padded_vocab_size(tensor) // tensor

    def _scoring_bins(self, scorings: Sequence[Scoring], answered: ScoringContext) -> list[list[int]]:
        """Bin the indices of scorings into micro-batches; scorings of one micro-batch have the same settings."""
        by_settings: dict[ScoringSettings, list[int]] = {}
        for i, scoring in enumerate(scorings):
            by_settings.setdefault(settings_of(scoring, answered.asked), []).append(i)
        bins = []
        for members in by_settings.values():
            lengths = [self._rows.padded(scorings[i].num_tokens) for i in members]
            bins += [[members[j] for j in indices] for indices in bin_by_tokens(lengths, self.micro_batch_tokens)]
        return bins

    def _scoring_work(self, scorings: Sequence[Scoring]) -> Work:
        batch = scoring_micro_batch(scorings, self.context.device, self._rows)
        return Work(batch, scorings=tuple(scorings))

    def _score_step(
        self, scores: dict[ScoringKey, Score], answered: ScoringContext, work: Work, output: Tensor
    ) -> Tensor:
        hidden_NH = hidden_rows(self.model, output, work.batch.rows_N, self.context.groups)
        scores |= score_rows(
            hidden_NH,
            self.model.head_weight(),
            batch=work.batch,
            scorings=work.scorings,
            answered=answered,
            groups=self.context.groups,
            vocab_size=self.vocab_size,
            head_chunk=self.head_chunk,
        )
        return output.sum() * 0.0

    def update(
        self,
        examples: Sequence[Example],
        spec: LossSpec,
        on_progress: OnProgress | None = None,
        teacher_head: Tensor | None = None,
        another_follows: bool = False,
    ) -> dict[str, float]:
        """Take one optimizer step on this replica's examples; return metrics of the step, the same on every rank.

        teacher_head: [V / tp, H], the head of the teacher whose hidden states are targets; last stage only.
        another_follows: the next use of the weights is another update, whose forward pass may gather them (see
        model/overlap.py); without it they are complete on every rank when this method returns.
        Collective over all ranks. The loss is normalised over the examples of all replicas. If the gradient is not
        finite, the step is skipped and counted in `train/skipped`. Raises ValueError on targets of two types, or
        hidden states without a teacher_head.
        """
        metrics = self.accumulate_gradients(examples, spec, on_progress, teacher_head)
        metrics |= self._optimizer_step()
        if not another_follows:
            with self.context.megatron_calls():
                gather_weights(self.ddp)
        return metrics

    def accumulate_gradients(
        self,
        examples: Sequence[Example],
        spec: LossSpec,
        on_progress: OnProgress | None = None,
        teacher_head: Tensor | None = None,
    ) -> dict[str, float]:
        """Run forward and backward of one step; the reduced gradients are left in the parameters' `main_grad`.

        Returns the metrics of the step. Arguments and errors as in `update`. Collective over all ranks.
        """
        self._check_at_home()
        _check_targets(examples, teacher_head)
        normalisers = self._normalisers(examples)
        live = [example for example in examples if not example.inert]
        shapes: list[MicroBatchShape] = []

        def made(indices: Sequence[int]) -> Work:
            work = self._training_work([live[i] for i in indices], teacher_head)
            shapes.append(shape_of(work.batch, work.inputs))
            return work

        bins = self._training_bins(live)
        work = [partial(made, indices) for indices in bins]
        sums = TokenSums()
        with self.context.megatron_calls():
            for chunk in chunks_of(self.ddp):
                chunk.zero_grad_buffer()
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            step = partial(self._loss_step, sums, spec, normalisers)
            rows = [self._rows.rows([live[i].num_tokens for i in indices]) for indices in bins]
            run_micro_batches(
                self.ddp, self.context, work, step, rows=rows, forward_only=False, on_progress=on_progress
            )
        if self.on_training is not None:
            self.on_training(shapes, spec)
        metrics = step_metrics(sums, sum(example.num_tokens for example in live), normalisers, spec, self.context)
        return metrics | self._routers.metrics(self.context)

    def _training_bins(self, examples: Sequence[Example]) -> list[list[int]]:
        """Bin the indices of examples into micro-batches, as many as on every other replica. Collective."""
        lengths = [self._rows.padded(example.num_tokens) for example in examples]
        return same_number_everywhere(bin_by_tokens(lengths, self.micro_batch_tokens), self.context)

    def _training_work(self, examples: Sequence[Example], teacher_head: Tensor | None) -> Work:
        batch = example_micro_batch(examples, self.context.device, self._rows)
        last = self.context.is_last_stage
        inputs = loss_inputs(examples, self.context.device, teacher_head, batch.host_places_N) if last else None
        return Work(batch, inputs)

    def _loss_step(
        self, sums: TokenSums, spec: LossSpec, normalisers: TokenCounts, work: Work, output: Tensor
    ) -> Tensor:
        assert work.inputs is not None
        groups = self.context.groups
        loss, batch_sums = micro_batch_loss(
            hidden_rows(self.model, output, work.batch.rows_N, groups),
            self.model.head_weight(),
            batch=work.batch,
            inputs=work.inputs,
            spec=spec,
            normalisers=normalisers,
            groups=groups,
            vocab_size=self.vocab_size,
            head_chunk=self.head_chunk,
        )
        sums.add(batch_sums)
        return loss

    def _check_at_home(self) -> None:
        if self.memory is not None:
            self.memory.check_at_home()

    def _normalisers(self, examples: Sequence[Example]) -> TokenCounts:
        own = [sum(e.surrogate_count for e in examples), sum(e.distill_count for e in examples)]
        return TokenCounts(*sum_over_ranks(own if self.context.is_replica_leader else [0.0, 0.0], self.context))

    def _optimizer_step(self) -> dict[str, float]:
        assert self.optimizer is not None and self.schedule is not None
        if self.memory is not None:
            self.memory.wait()
        lr = self.optimizer.param_groups[0]["lr"]
        with self.context.megatron_calls(), torch.no_grad():
            self.optimizer.prepare_grads()
            norm = gradient_norm(self.optimizer, self.context.device)
            finite = math.isfinite(norm)
            if finite:
                self._clip(norm)
                self.optimizer.step_with_ready_grads()
                self.schedule.step(increment=1)
        return {"train/grad_norm": norm, "train/lr": lr, "train/skipped": 0.0 if finite else 1.0}

    def _clip(self, norm: float) -> None:
        assert self.optimizer is not None
        for optimizer in self.optimizer.chained_optimizers:
            parameters = optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0:
                # The gradients of an offloaded optimizer are in `decoupled_grad`, not in `grad`.
                decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, optimizer.config.clip_grad, norm, decoupled)


def _check_targets(examples: Sequence[Example], teacher_head: Tensor | None) -> None:
    kinds = {type(example.target) for example in examples if example.target is not None}
    if len(kinds) > 1:
        raise ValueError(
            "the targets of a step are of two types, top log-probs and hidden states: an objective must use only one"
        )
    if HiddenOnHost in kinds and teacher_head is None:
        raise ValueError(
            "targets are hidden states, but no scoring by the teacher's weights kept them: there is no teacher head"
        )


def row_layout(context: ParallelContext, alignment: int = 1) -> RowLayout:
    """Return the distribution of a micro-batch's rows over the ranks of this run.

    alignment: the number of rows of each rank is a multiple of this.
    """
    layout = context.layout
    sequence = layout.tensor if layout.sequence else 1
    return RowLayout(alignment * sequence, layout.context, context.groups.cp.rank())


def strip(example: Example) -> Example:
    """Copy an example without the fields that only the loss reads, for pipeline stages before the last.

    Reference log-probs are kept: they decide whether the example is inert.
    """
    return replace(example, target=None, old_logprobs_T=None, rollout_logprobs_T=None)


def share_examples(examples: Sequence[Example] | None, context: ParallelContext) -> list[Example]:
    """Broadcast the examples of the replica's last pipeline stage, stripped, to its other stages.

    Only the last stage has the scores that examples are made from. Its ranks pass their examples and get them back
    whole; the other ranks pass None. Collective over the replica.
    """
    if context.groups.pp.size() == 1:
        assert examples is not None
        return list(examples)
    first_of_last_stage = context.layout.model_ranks - context.layout.tensor * context.layout.context
    stripped = None if examples is None else [strip(example) for example in examples]
    shared = context.broadcast_object(stripped, context.replica_host, source=first_of_last_stage)
    if examples is not None:
        return list(examples)
    assert shared is not None
    return shared
