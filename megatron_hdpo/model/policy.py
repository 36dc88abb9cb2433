"""The policy on its ranks: scores responses, takes optimizer steps, and hands out its weights.

The trainer's two verbs are `score` (forward only) and `update` (forward, backward, optimizer step). Both take the work
of this rank's data-parallel replica and run it through Megatron's pipeline schedule as packed micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_hdpo.divergence import logit_losses, vocab_parallel_topk
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.loss import Normalisers, micro_batch_loss
from megatron_hdpo.model.micro_batch import (
    LossInputs,
    MicroBatch,
    example_micro_batch,
    loss_inputs,
    scoring_micro_batch,
)
from megatron_hdpo.model.network import HeadlessGPTModel, hidden_rows
from megatron_hdpo.model.packing import bin_by_tokens
from megatron_hdpo.objectives.interface import Example, LossSpec, Score, Scoring, ScoringKey
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.rollout.types import TopLogprobs

OnProgress = Callable[[int], None]


class TrainingError(RuntimeError):
    """The run cannot go on; the text says what, at which rank, and what to do."""


@dataclass(frozen=True)
class Work:
    """One micro-batch through the schedule; `inputs` on the last stage of an update, `scorings` when scoring."""

    batch: MicroBatch
    inputs: LossInputs | None = None
    scorings: tuple[Scoring, ...] = ()


class Policy:
    """A model under Megatron's DDP with, for training, its optimizer and schedule.

    micro_batch_tokens: rows of a packed micro-batch, at most. head_chunk: tokens that have logits at a time.
    """

    def __init__(
        self,
        architecture: Architecture,
        context: ParallelContext,
        ddp: DistributedDataParallel,
        micro_batch_tokens: int,
        optimizer: ChainedOptimizer | None = None,
        schedule: OptimizerParamScheduler | None = None,
        head_chunk: int = 1024,
    ) -> None:
        self.architecture = architecture
        self.context = context
        self.ddp = ddp
        self.model: HeadlessGPTModel = ddp.module
        self.micro_batch_tokens = micro_batch_tokens
        self.optimizer = optimizer
        self.schedule = schedule
        self.head_chunk = head_chunk
        self.model.config.finalize_model_grads_func = self._finalize
        self._rows_multiple = context.layout.tensor if context.layout.sequence else 1

    # ------------------------------------------------------------------ scoring

    def score(self, scorings: Sequence[Scoring], on_progress: OnProgress | None = None) -> dict[ScoringKey, Score]:
        """Scores of this replica's `scorings` under the weights that the model holds now, on the last pipeline stage;
        other stages get {}. Collective over all ranks: also replicas without work must call it."""
        binned = bin_by_tokens([len(s.context_ids) + len(s.response_ids) for s in scorings], self.micro_batch_tokens)
        work = [
            Work(
                scoring_micro_batch([scorings[i] for i in indices], self.context.device, self._rows_multiple),
                scorings=tuple(scorings[i] for i in indices),
            )
            for indices in self._same_number_everywhere(binned)
        ]
        scores: dict[ScoringKey, Score] = {}
        with self.context.megatron_calls(), torch.no_grad():
            self._run(work, partial(self._score_step, scores), forward_only=True, on_progress=on_progress)
        return scores

    def _score_step(self, scores: dict[ScoringKey, Score], work: Work, output: Tensor) -> tuple[Tensor, int, dict]:
        hidden_NH = hidden_rows(self.model, output, work.batch.rows_N, self.context.groups)
        row = 0
        for scoring, length in zip(work.scorings, work.batch.responses, strict=True):
            rows = slice(row, row + length)
            scores[scoring.key] = self._score_one(scoring, hidden_NH[rows], work.batch.sampled_ids_N[rows])
            row += length
        return output.sum() * 0.0, 0, {}

    def _score_one(self, scoring: Scoring, hidden_TH: Tensor, ids_T: Tensor) -> Score:
        """Chunk by chunk, so that no more than `head_chunk` tokens have logits at a time."""
        shard = {"group": self.context.groups.tp, "vocab_size": self.architecture.vocab_size}
        logprobs, entropies, ids, tops = [], [], [], []
        for hidden, sampled in zip(hidden_TH.split(self.head_chunk), ids_T.split(self.head_chunk), strict=True):
            logits = F.linear(hidden, self.model.head_weight())
            losses = logit_losses(logits, sampled, None, temperature=scoring.temperature, **shard)
            logprobs.append(as_float(losses.logprobs_T))
            entropies.append(as_float(losses.entropy_T))
            if scoring.top_k:
                found = vocab_parallel_topk(logits / scoring.temperature, scoring.top_k, **shard)
                ids.append(found.ids_TK.to(torch.int32).cpu().numpy())
                tops.append(as_float(found.logprobs_TK))
        top = TopLogprobs(np.concatenate(ids), np.concatenate(tops)) if scoring.top_k else None
        return Score(np.concatenate(logprobs), np.concatenate(entropies), top)

    # ------------------------------------------------------------------ training

    def update(
        self, examples: Sequence[Example], spec: LossSpec, on_progress: OnProgress | None = None
    ) -> dict[str, float]:
        """One optimizer step on this replica's examples; returns metrics of the whole step, the same on every rank.

        Collective over all ranks. Gradients are those of the loss normalised over every replica's examples. A
        gradient that is not finite changes nothing and is counted in `train/skipped`.
        """
        gradients = self.accumulate_gradients(examples, spec, on_progress)
        return gradients | self._optimizer_step()

    def accumulate_gradients(
        self, examples: Sequence[Example], spec: LossSpec, on_progress: OnProgress | None = None
    ) -> dict[str, float]:
        """Forward and backward of one step, gradients reduced and left in the parameters' `main_grad`."""
        normalisers = self._normalisers(examples)
        live = [example for example in examples if not example.inert]
        binned = bin_by_tokens([example.num_tokens for example in live], self.micro_batch_tokens)
        sums: dict[str, float] = {}
        work = [self._training_work([live[i] for i in indices]) for indices in self._same_number_everywhere(binned)]
        with self.context.megatron_calls():
            self.ddp.zero_grad_buffer()
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            step = partial(self._loss_step, sums, spec, normalisers)
            self._run(work, step, forward_only=False, on_progress=on_progress)
        return self._step_metrics(sums, normalisers, spec, sum(example.num_tokens for example in live))

    def _training_work(self, examples: Sequence[Example]) -> Work:
        batch = example_micro_batch(examples, self.context.device, self._rows_multiple)
        return Work(batch, loss_inputs(examples, self.context.device) if self.context.is_last_stage else None)

    def _loss_step(
        self, sums: dict[str, float], spec: LossSpec, normalisers: Normalisers, work: Work, output: Tensor
    ) -> tuple[Tensor, int, dict]:
        assert work.inputs is not None
        groups = self.context.groups
        loss, batch_sums = micro_batch_loss(
            hidden_rows(self.model, output, work.batch.rows_N, groups),
            self.model.head_weight(),
            work.batch,
            work.inputs,
            spec,
            normalisers,
            groups,
            self.architecture.vocab_size,
            self.head_chunk,
        )
        for name, value in batch_sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        return loss, 0, {}

    def _optimizer_step(self) -> dict[str, float]:
        assert self.optimizer is not None and self.schedule is not None
        lr = self.optimizer.param_groups[0]["lr"]
        with self.context.megatron_calls(), torch.no_grad():
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
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
                clip_grad_by_total_norm_fp32(parameters, max_norm=optimizer.config.clip_grad, total_norm=norm)

    # ------------------------------------------------------------------ schedule

    def _run(
        self,
        work: Sequence[Work],
        last_stage: Callable[[Work, Tensor], tuple[Tensor, int, dict]],
        *,
        forward_only: bool,
        on_progress: OnProgress | None,
    ) -> None:
        """Megatron's schedule over the micro-batches; `last_stage` turns hidden states into (loss, 0, {})."""

        def forward_step(iterator: Iterator[Work], model: Any) -> tuple[Tensor, Any]:
            item = next(iterator)
            packed = item.batch.packed
            output = model(
                input_ids=packed.tokens_T[None],
                position_ids=packed.positions_T[None],
                attention_mask=None,
                packed_seq_params=packed.packed_seq_params(),
            )
            if on_progress is not None:
                on_progress(packed.num_tokens)
            return output, partial(last_stage, item)

        groups = self.context.groups
        pipelined = groups.pp.size() > 1
        get_forward_backward_func(pp_size=groups.pp.size(), vp_size=None)(
            forward_step_func=forward_step,
            data_iterator=iter(work),
            model=[self.ddp],
            num_microbatches=len(work),
            seq_length=self.micro_batch_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=groups,
            **(
                {"p2p_communicator": P2PCommunicator(pp_group=groups.pp, config=self.model.config)} if pipelined else {}
            ),
        )

    def _finalize(self, model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        """Reduce gradients without Megatron's division by tokens: losses are normalised already."""
        finalize_model_grads(model, None, **kwargs)

    def _same_number_everywhere(self, binned: list[list[int]]) -> list[list[int]]:
        """Bins, padded with empty ones to the largest number of any replica (at least one): replicas whose pipelines
        ran a different number of micro-batches would wait for each other forever where experts are shared."""
        most = max(1, *self.context.gather_objects(len(binned)))
        return binned + [[] for _ in range(most - len(binned))]

    # ------------------------------------------------------------------ numbers of the whole step

    def _one_per_replica(self) -> bool:
        return self.context.rank == self.context.replica_ranks[0]

    def _normalisers(self, examples: Sequence[Example]) -> Normalisers:
        own = [sum(e.surrogate_count for e in examples), sum(e.distill_count for e in examples)]
        total = self._sum_over_ranks(own if self._one_per_replica() else [0.0, 0.0])
        return Normalisers(surrogate=total[0], distill=total[1])

    def _step_metrics(
        self, sums: Mapping[str, float], normalisers: Normalisers, spec: LossSpec, tokens: int
    ) -> dict[str, float]:
        """Metrics from the sums of the last stages, added up over replicas; sums hold no rank's share twice."""
        names = (
            "surrogate", "surrogate_tokens", "nll", "clipped", "entropy", "mismatch_k3", "mismatch_abs",
            "divergence", "distill_tokens", "covered_mass", "student_mass_at_top1",
        )  # fmt: skip
        mine = self.context.is_last_stage and self.context.groups.tp.rank() == 0
        values = [sums.get(name, 0.0) if mine else 0.0 for name in names]
        total = dict(
            zip((*names, "tokens"), self._sum_over_ranks([*values, tokens * self._one_per_replica()]), strict=True)
        )
        metrics = {"train/tokens": total["tokens"]}
        if normalisers.surrogate:
            metrics["train/surrogate_loss"] = total["surrogate"] / normalisers.surrogate
        if total["surrogate_tokens"]:
            metrics["train/nll"] = total["nll"] / total["surrogate_tokens"]
            metrics["train/entropy"] = total["entropy"] / total["surrogate_tokens"]
            metrics["train/clip_fraction"] = total["clipped"] / total["surrogate_tokens"]
            metrics["train/mismatch_k3"] = total["mismatch_k3"] / total["surrogate_tokens"]
            metrics["train/mismatch_abs"] = total["mismatch_abs"] / total["surrogate_tokens"]
        metrics["distill/tokens"] = total["distill_tokens"]
        if total["distill_tokens"] and spec.distill is not None:
            metrics[f"distill/{spec.distill.kind}"] = total["divergence"] / normalisers.distill
            metrics["distill/covered_mass"] = total["covered_mass"] / total["distill_tokens"]
            metrics["distill/student_mass_at_top1"] = total["student_mass_at_top1"] / total["distill_tokens"]
        return metrics

    def _sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.context.host)
        return tensor.tolist()


def strip(example: Example) -> Example:
    """The example without its per-token targets: what stages before the last need to know."""
    return replace(example, target=None, old_logprobs_T=None, rollout_logprobs_T=None)


def share_examples(examples: Sequence[Example] | None, context: ParallelContext) -> list[Example]:
    """Examples of the replica's last stage, stripped, on the stages that have no scores to make them from.

    The last stage's ranks pass their examples and keep them whole; the others pass None.
    """
    if context.groups.pp.size() == 1:
        assert examples is not None
        return list(examples)
    first_of_last_stage = context.layout.model_ranks - context.layout.tensor
    stripped = None if examples is None else [strip(example) for example in examples]
    shared = context.broadcast_object(stripped, context.replica_host, source=first_of_last_stage)
    if examples is not None:
        return list(examples)
    assert shared is not None
    return shared


def as_float(tensor: Tensor | None) -> np.ndarray:
    """A tensor as a float32 array on the host."""
    assert tensor is not None
    return tensor.detach().float().cpu().numpy()
