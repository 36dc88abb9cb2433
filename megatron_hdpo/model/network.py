"""A GPTModel that stops before its head.

Head, log-probs and divergence are computed together, over the response rows only (see model/loss.py): logits of prompts
are never made, and the shards of the vocabulary are never gathered.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_hdpo.model.chunks import ModelChunks

HAS_OUTPUT_PROCESSOR = "output_processor" in signature(GPTModel.forward).parameters
"""Whether GPTModel takes a function in place of its head: Megatron-Core 0.18 and later."""


class HeadlessGPTModel(GPTModel):
    """Megatron's GPTModel; the last stage returns hidden states after the final norm, [rows / SP, 1, hidden]."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layers of this stage; arguments as in GPTModel."""
        if HAS_OUTPUT_PROCESSOR:
            kwargs["output_processor"] = _hidden_states
        return super().forward(*args, **kwargs)

    if not HAS_OUTPUT_PROCESSOR:

        def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states

    def head_weight(self) -> Tensor:
        """Return this rank's shard of the head, [V / tp, H]; last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def _hidden_states(hidden_states: Tensor, **_: Any) -> Tensor:
    """Return the input of the head as the output of the model (an `output_processor` of GPTModel)."""
    return hidden_states


def hidden_rows(
    model: HeadlessGPTModel | ModelChunks, output: Tensor, rows_N: Tensor, groups: ProcessGroupCollection
) -> Tensor:
    """Select the hidden states [N, H] at the rows `rows_N` of a micro-batch from the last stage's output.

    They are whole on every tensor-parallel rank. Their gradient must come back complete and equal on every rank, as
    that of `head_loss` is.
    """
    if model.config.sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False, group=groups.tp)
    return output[:, 0].index_select(0, rows_N)


def recut_head(head_weight_VH: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """Copy a head cut into shards of another size: this rank's shard [rows, H], which begins at token rank * rows.

    head_weight_VH: this rank's shard as it is now. Rows beyond the end of the head are zero. Collective over the group
    unless both shards have the same number of rows.
    """
    if rows == len(head_weight_VH):
        return head_weight_VH.clone()
    shards = [torch.empty_like(head_weight_VH) for _ in range(group.size())]
    dist.all_gather(shards, head_weight_VH.contiguous(), group=group)
    own = torch.cat(shards)[group.rank() * rows : (group.rank() + 1) * rows]
    return torch.cat([own, own.new_zeros(rows - len(own), own.shape[1])])
