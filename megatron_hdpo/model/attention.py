"""Attention of the plain-torch spec, over the sequences of a packed micro-batch.

The stock core attention refuses packed sequences and context parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_hdpo.model.attention_kernels import attend, attend_causally
from megatron_hdpo.model.packing import PackedRowParams


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention, with each row rotated by its own position.

    Megatron rotates packed sequences by their boundaries, for which it waits for the GPU four times per layer. Here the
    rows go through it as one sequence (format sbhd), with a rotation that is looked up by position.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedRowParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [M / SP, 1, hidden] and its bias (none here); arguments as in SelfAttention.

        rotary_pos_emb: angles by position, [longest sequence, 1, 1, head dim].
        """
        if packed_seq_params is not None:
            assert rotary_pos_emb is not None and packed_seq_params.positions_M is not None
            rotary_pos_emb = rotary_pos_emb.index_select(0, packed_seq_params.positions_M)
            packed_seq_params = packed_seq_params.as_one_sequence()
        return super().forward(
            hidden_states,
            attention_mask,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )


class PackedAttention(MegatronModule):
    """Causal attention over packed or plain sequences, for `PackedSelfAttention`.

    Packed: query [M, 1, heads, d], key and value [M, 1, kv heads, d], and no row attends outside its own sequence.
    Plain: [s, b, heads, d].
    Under context parallelism (packed only) M counts this rank's rows, two chunks of every sequence; keys and values of
    all rows are gathered.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group = None if pg_collection is None or config.context_parallel_size == 1 else pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRowParams | None = None,
    ) -> Tensor:
        """Compute attention: [M, 1, heads * d] for packed sequences, [s, b, heads * d] otherwise.

        Raises NotImplementedError on an attention bias, and on plain sequences under context parallelism.
        """
        if attention_bias is not None:
            raise NotImplementedError("PackedAttention has no attention bias")
        if packed_seq_params is None:
            if self.cp_group is not None:
                raise NotImplementedError("context parallelism is for packed sequences")
            out_bhsd = attend_causally(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), scale=self.softmax_scale)
            return out_bhsd.permute(2, 0, 1, 3).flatten(2)
        segments = packed_seq_params.segments
        assert segments is not None
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if segments.key_rows is not None:
            key, value = self._of_segments(torch.cat([key, value], dim=-1), segments.key_rows).chunk(2, dim=-1)
        return attend(query, key, value, segments, self.softmax_scale).flatten(1)[:, None]

    def _of_segments(self, own: Tensor, key_rows: Tensor) -> Tensor:
        """Gather the rows of all context-parallel ranks, and return those of each segment's keys.

        In the backward pass each rank gets the sum over ranks of the gradients of its own rows.
        """
        assert self.cp_group is not None
        gathered = gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=self.cp_group)
        return gathered.index_select(0, key_rows)
