"""Execution of micro-batches by Megatron's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from torch import Tensor, nn

from megatron_hdpo.model.chunks import chunks_of, unwrap
from megatron_hdpo.model.micro_batch import MicroBatch
from megatron_hdpo.model.routing_replay import with_routing
from megatron_hdpo.parallel.context import ParallelContext

OnProgress = Callable[[int], None]


class HasBatch(Protocol):
    """A piece of work that has a micro-batch."""

    @property
    def batch(self) -> MicroBatch:
        """The tokens of the micro-batch."""


WorkT = TypeVar("WorkT", bound=HasBatch)


def run_micro_batches(
    ddp: nn.Module,
    context: ParallelContext,
    work: Sequence[WorkT],
    last_stage: Callable[[WorkT, Tensor], Tensor],
    *,
    forward_only: bool,
    on_progress: OnProgress | None = None,
) -> None:
    """Run every micro-batch forward and, unless `forward_only`, backward, and reduce the gradients at the end.

    The schedule is 1F1B, interleaved if a rank has several chunks of layers. A bare model can only run forward.
    last_stage: computes a scalar loss from a piece of work and the model's output on the last stage. The loss must be
    normalised already: gradients of micro-batches and replicas are summed. on_progress: called with the rows of each
    micro-batch. Every rank must bring the same number of micro-batches. Collective over all ranks.
    """

    def forward_step(iterator: Iterator[WorkT], model: Any) -> tuple[Tensor, Any]:
        item = next(iterator)
        packed = item.batch.packed
        output = model(
            input_ids=packed.tokens_M[None],
            position_ids=packed.positions_M[None],
            attention_mask=None,
            packed_seq_params=with_routing(packed.packed_seq_params(), item.batch.routed_experts_MLK),
        )
        if on_progress is not None and model is chunks[-1]:
            on_progress(packed.num_tokens)
        # Megatron wants (loss, number of tokens to divide by, values to collect).
        return output, lambda output: (last_stage(item, output), 0, {})

    stages, chunks = context.groups.pp.size(), chunks_of(ddp)
    communicator = {}
    if stages > 1:
        communicator["p2p_communicator"] = StageCommunicator(pp_group=context.groups.pp, config=unwrap(ddp).config)
    interleaved = len(chunks) > 1
    get_forward_backward_func(pp_size=stages, vp_size=len(chunks) if interleaved else None)(
        forward_step_func=forward_step,
        data_iterator=[iter(work) for _ in chunks] if interleaved else iter(work),
        model=chunks,
        num_microbatches=len(work),
        seq_length=max(item.batch.packed.num_tokens for item in work),  # not used: lengths vary and are communicated
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=context.groups,
        **communicator,
    )


class StageCommunicator(P2PCommunicator):
    """Megatron's exchange between pipeline stages, made safe in two places.

    The interleaved schedule frees the storage of an output (`deallocate_pipeline_outputs`) while the output is still
    being sent, and what is allocated next would be sent in its place. Aliases are sent instead: a send holds on to its
    tensor until it is over, and so to the storage.

    With two ranks under the interleaved schedule, each rank is both the next and the previous one of the other.
    Megatron's exchange of shapes would then deliver the shape of a gradient to a receive that waits for an activation.
    Its exchange of tensors (`overlap_p2p_comm`) keeps them apart, and is used here for the shapes too.
    """

    def _communicate(
        self, *, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, **options: Any
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        return super()._communicate(
            tensor_send_next=None if tensor_send_next is None else tensor_send_next.detach(),
            tensor_send_prev=None if tensor_send_prev is None else tensor_send_prev.detach(),
            **options,
        )

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        if self.pp_group.size() > 2 or self.virtual_pipeline_model_parallel_size is None:
            return super()._communicate_shapes(tensor_send_next, tensor_send_prev, recv_prev, recv_next)
        device = torch.cuda.current_device()
        sent = [
            None if t is None else torch.tensor(t.shape, device=device) for t in (tensor_send_prev, tensor_send_next)
        ]
        received = [torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2)]
        requests = _p2p_ops(
            tensor_send_prev=sent[0],
            tensor_recv_prev=received[0] if recv_prev else None,
            tensor_send_next=sent[1],
            tensor_recv_next=received[1] if recv_next else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        return received[0].tolist(), received[1].tolist()


def finalize_without_division(model: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients as Megatron does, without dividing by the number of tokens: losses are normalised already."""
    finalize_model_grads(model, None, **kwargs)


def same_number_everywhere(bins: list[list[int]], context: ParallelContext) -> list[list[int]]:
    """Pad bins with empty ones to the largest number of any replica, at least one.

    Replicas that share experts would deadlock with different numbers of micro-batches. The interleaved schedule needs
    a multiple of the number of pipeline stages. Collective over all ranks.
    """
    most = max(1, *context.gather_objects(len(bins)))
    if context.layout.virtual_stages > 1:
        most += -most % context.layout.pipeline
    return bins + [[] for _ in range(most - len(bins))]
