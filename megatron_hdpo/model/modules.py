"""Small torch modules for Megatron's extension points, used where the stock modules lack a feature.

The stock norm refuses sequence parallelism; the stock attention refuses packed sequences and context parallelism.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_hdpo.model.packing import own_rows


class RMSNorm(torch.nn.Module):
    """RMS normalisation over the last dimension, in fp32, with a learned scale.

    The scale carries Megatron's `sequence_parallel` mark: with sequence parallelism each rank sees only its part of the
    sequence, and `finalize_model_grads` must sum the ranks' parts of the gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden] to the same shape and dtype."""
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class PackedAttention(MegatronModule):
    """Causal attention on torch's fused SDPA, over packed or plain sequences.

    Packed (thd): query [M, heads, d], key and value [M, kv heads, d]; sequence i is rows cu_seqlens[i]:cu_seqlens[i+1]
    and no token attends outside its own sequence. Plain: [s, b, heads, d].
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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute attention: [M, heads * d] for packed sequences, [s, b, heads * d] otherwise.

        Raises NotImplementedError on an attention bias, and on plain sequences under context parallelism.
        """
        if attention_bias is not None:
            raise NotImplementedError("PackedAttention has no attention bias")
        if packed_seq_params is None:
            if self.cp_group is not None:
                raise NotImplementedError("context parallelism is for packed sequences")
            out_bhsd = self._causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out_bhsd.permute(2, 0, 1, 3).flatten(2)
        boundaries = packed_seq_params.cu_seqlens_q.cpu().numpy()
        if self.cp_group is not None:
            return self._over_context_ranks(query, key, value, boundaries).flatten(1)
        parts = zip(*(x.split(np.diff(boundaries).tolist()) for x in (query, key, value)), strict=True)
        return torch.cat([self._of_sequence(*part) for part in parts]).flatten(1)

    def _over_context_ranks(self, query: Tensor, key: Tensor, value: Tensor, boundaries: np.ndarray) -> Tensor:
        """Attend from each of this rank's chunks of queries to all keys of its sequence up to the chunk's end."""
        assert self.cp_group is not None
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = self._all_rows(torch.cat([key, value], dim=-1), boundaries).chunk(2, dim=-1)
        outputs, done = [], 0
        for start, stop in pairwise(boundaries.tolist()):
            chunk = (stop - start) // (2 * ranks)
            for index in (rank, 2 * ranks - 1 - rank):
                seen = slice(start, start + (index + 1) * chunk)
                outputs.append(self._of_sequence(query[done : done + chunk], key[seen], value[seen]))
                done += chunk
        return torch.cat(outputs)

    def _all_rows(self, own: Tensor, boundaries: np.ndarray) -> Tensor:
        """Gather the rows of all context-parallel ranks in the order of the sequences.

        In the backward pass each rank gets the sum over ranks of the gradients of its own rows.
        """
        assert self.cp_group is not None
        gathered = gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=self.cp_group)
        ranks = self.cp_group.size()
        order = np.argsort(np.concatenate([own_rows(boundaries, ranks, rank) for rank in range(ranks)]))
        return gathered.index_select(0, torch.from_numpy(order).to(own.device))

    def _of_sequence(self, query_thd: Tensor, key_thd: Tensor, value_thd: Tensor) -> Tensor:
        """Attend within one sequence; the queries are its last rows, and the last query sees every key."""
        return self._causal(*(x.transpose(0, 1)[None] for x in (query_thd, key_thd, value_thd)))[0].transpose(0, 1)

    def _causal(self, query_bhsd: Tensor, key_bhsd: Tensor, value_bhsd: Tensor) -> Tensor:
        queries, keys = query_bhsd.shape[2], key_bhsd.shape[2]
        mask = None
        if queries < keys:  # torch's is_causal assumes that the queries are the first rows of the sequence
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query_bhsd.device).tril(keys - queries)
        return F.scaled_dot_product_attention(
            query_bhsd,
            key_bhsd,
            value_bhsd,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
            scale=self.softmax_scale,
        )
