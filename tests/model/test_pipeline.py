"""Tensors between pipeline stages arrive as they were sent."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from distributed_helper import run_ranks
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import p2p_communication
from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor
from tiny_policy import joined

from megatron_hdpo.model.pipeline import StageCommunicator

SHAPE = (24, 1, 512)


def test_an_output_that_is_freed_while_it_is_sent_arrives_whole() -> None:
    sent, received = run_ranks(2, send_and_free, fresh=True)
    assert torch.equal(torch.tensor(received), torch.tensor(sent))


def send_and_free() -> list[float]:
    """Return what rank 0 sent, and what rank 1 received, which begins to receive after rank 0 has freed the output."""
    with joined(pipeline=2, virtual_stages=2) as context, context.megatron_calls():
        config = ModelParallelConfig(
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=2,
            pipeline_dtype=torch.float32,
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
            variable_seq_lengths=True,
        )
        communicator = StageCommunicator(pp_group=context.groups.pp, config=config)
        store = dist.distributed_c10d._get_default_store()
        if context.rank == 0:
            return _send(communicator, store)
        original = p2p_communication._p2p_ops

        def receive_late(**arguments: object) -> object:
            store.wait(["freed"], timedelta(seconds=60))
            return original(**arguments)

        p2p_communication._p2p_ops = receive_late
        received, handles = communicator.send_forward_recv_forward(
            None, recv_prev=True, tensor_shape=SHAPE, overlap_p2p_comm=True
        )
        for handle in handles.values():
            handle.wait()
        return received.flatten().tolist()


def _send(communicator: StageCommunicator, store: dist.Store) -> list[float]:
    output = torch.arange(float(torch.Size(SHAPE).numel())).view(SHAPE).clone()
    sent = output.flatten().tolist()
    _, handles = communicator.send_forward_recv_forward(
        output, recv_prev=False, tensor_shape=SHAPE, overlap_p2p_comm=True
    )
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    others = [torch.full(SHAPE, -1.0) for _ in range(100)]  # one of them takes the storage that was freed
    store.set("freed", "")
    for handle in handles.values():
        handle.wait()
    assert all(bool((other == -1).all()) for other in others)
    return sent
