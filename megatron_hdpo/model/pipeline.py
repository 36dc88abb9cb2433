"""Execution of micro-batches by Megatron's pipeline schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_hdpo.model.chunks import chunks_of, unwrap
from megatron_hdpo.model.micro_batch import MicroBatch
from megatron_hdpo.model.routing_replay import with_routing
from megatron_hdpo.parallel.context import ParallelContext

OnProgress = Callable[[int], None]
Shape = list[int]


class HasBatch(Protocol):
    """A piece of work that has a micro-batch."""

    @property
    def batch(self) -> MicroBatch:
        """The tokens of the micro-batch."""


WorkT = TypeVar("WorkT", bound=HasBatch)


def run_micro_batches(
    ddp: nn.Module,
    context: ParallelContext,
    work: Sequence[Callable[[], WorkT]],
    last_stage: Callable[[WorkT, Tensor], Tensor],
    *,
    rows: Sequence[int],
    forward_only: bool,
    on_progress: OnProgress | None = None,
) -> None:
    """Run every micro-batch forward and, unless `forward_only`, backward, and reduce the gradients at the end.

    The schedule is 1F1B, interleaved if a rank has several chunks of layers. A bare model can only run forward.
    work: makes each piece of work; called once, when the first chunk of layers runs it. last_stage: computes a scalar
    loss from a piece of work and the model's output on the last stage. The loss must be normalised already: gradients
    of micro-batches and replicas are summed. rows: of each micro-batch, over all ranks; the stages of a replica must
    bring the same. on_progress: called with the rows of each micro-batch. Every rank must bring the same number of
    micro-batches. Collective over all ranks.
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
        config = unwrap(ddp).config
        shapes = [_activation_shape(count, config) for count in rows]
        communicator["p2p_communicator"] = StageCommunicator(context, config, *arrivals(shapes, len(chunks), context))
    interleaved = len(chunks) > 1
    get_forward_backward_func(pp_size=stages, vp_size=len(chunks) if interleaved else None)(
        forward_step_func=forward_step,
        data_iterator=readers(work, len(chunks)) if interleaved else (make() for make in work),
        model=chunks,
        num_microbatches=len(work),
        seq_length=max(rows),  # not used: lengths vary
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=context.groups,
        **communicator,
    )


def readers(work: Sequence[Callable[[], WorkT]], count: int) -> list[Iterator[WorkT]]:
    """Return iterators over the same pieces of work, which are made for the first reader and dropped by the last one.

    As itertools.tee, which keeps up to 57 items longer than it needs.
    """
    source = (make() for make in work)
    waiting: list[deque[WorkT]] = [deque() for _ in range(count)]

    def read(own: deque[WorkT]) -> Iterator[WorkT]:
        for _ in work:
            if not own:
                item = next(source)
                for queue in waiting:
                    queue.append(item)
                del item
            yield own.popleft()

    return [read(own) for own in waiting]


def _activation_shape(rows: int, config: TransformerConfig) -> Shape:
    """Return the shape of what a stage hands on, from the rows of a micro-batch over all ranks."""
    split = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    return [rows // split, 1, config.hidden_size]


def arrivals(shapes: Sequence[Shape], chunks: int, context: ParallelContext) -> tuple[deque[Shape], deque[Shape]]:
    """Return the shapes of the activations and of the gradients that a stage receives, in the order of their arrival.

    shapes: of each micro-batch. In a backward pass the schedule runs through a rank's chunks from the last to the
    first, so what holds for the first chunk of the first stage holds there for the last chunk of the last stage:
    nothing arrives for it.
    """
    order = get_schedule_table(len(shapes), chunks, context.layout.pipeline)
    forward = deque(shapes[m] for m, chunk in order if chunk > 0 or not context.is_first_stage)
    backward = deque(shapes[m] for m, chunk in order if chunk > 0 or not context.is_last_stage)
    return forward, backward


class StageCommunicator(P2PCommunicator):
    """Megatron's exchange between pipeline stages, without its exchange of shapes, and safe for outputs that are freed.

    Megatron sends the shape of every tensor first, and both sides wait for the GPU to read it. Here every stage knows
    all micro-batches, and so what arrives next.

    The interleaved schedule frees the storage of an output (`deallocate_pipeline_outputs`) while the output is still
    being sent, and what is allocated next would be sent in its place. Aliases are sent instead: a send holds on to its
    tensor until it is over, and so to the storage.
    """

    def __init__(
        self, context: ParallelContext, config: TransformerConfig, forward: deque[Shape], backward: deque[Shape]
    ) -> None:
        """Expect these shapes from the stage before and from the stage after this one (see `arrivals`)."""
        super().__init__(pp_group=context.groups.pp, config=config)
        self._forward, self._backward = forward, backward

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
    ) -> tuple[Shape, Shape]:
        nothing = [0, 0, 0]
        return (
            self._forward.popleft() if recv_prev else nothing,
            self._backward.popleft() if recv_next else nothing,
        )


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
